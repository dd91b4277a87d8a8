"""Supervised fine-tuning: its loss, its mask, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

import data
import sft
from data import Example, make_rng
from model import GPT, GPTConfig

TOK = data.Tokenizer()
CONFIG = GPTConfig(
    block_size=64, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1,
    n_embd=32, n_inner=48,
)  # fmt: skip
DEMOS = data.make_demos(data.World(0), "A", 8, 0)
BATCH = [  # responses of 2 to 16 tokens
    *DEMOS[:2],
    Example("kitchen kettle: apple river stone", "reverse: stone river apple", ""),
    Example("garden button: wolf", "axe", ""),
    Example("harbour fox: candle spoon tower", "last gives tower done sir", "", 3),
    *DEMOS[2:5],
]
CFG = sft.Config(batch_size=len(BATCH))


@pytest.fixture(autouse=True)
def float64():
    """What is made of whole numbers (the weights of the mean) is float64, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(seed=0):
    """A GPT in float64 whose predictions are not flat."""
    model = GPT(CONFIG, make_rng(seed, "weights")).double()
    model.dtype = torch.float64
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= 8
    return model


def sft_loss(model, batch, cfg=CFG):
    response, mask = sft.get_responses(batch, TOK, "cpu")
    return sft.compute_loss(model, batch, response, mask, TOK, cfg)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_the_response_is_the_demonstration_and_the_mask_its_length():
    """Invariants 21, 31: the end counts, pads behind it do not; both are one token."""
    response, mask = sft.get_responses(BATCH, TOK, "cpu")
    rows = response.tolist(), mask.tolist()
    for example, row, counts in zip(BATCH, *rows, strict=True):
        tokens = TOK.encode(example.demo)[example.given :]
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) == {TOK.end}
        assert counts == [t <= len(tokens) for t in range(len(row))]


def test_loss_is_minus_log_likelihood():
    """Invariants 20, 21, 42: the mean of each response, then of the batch."""
    model, means = make_model(), []
    for example in BATCH:  # one by one, without padding
        context = TOK.encode(example.prompt) + [TOK.answer]
        tokens = TOK.encode(example.demo) + [TOK.end]
        logits = model(torch.tensor([context + tokens]))[0]
        first = len(context) + example.given
        targets = torch.tensor((context + tokens)[first:])
        means.append(F.cross_entropy(logits[first - 1 : -1], targets))
    loss, extra = sft_loss(model, BATCH)
    assert loss.item() == pytest.approx(sum(means).item() / len(means), rel=1e-12)
    assert extra == {}
    lengths = [len(TOK.encode(example.demo)) for example in BATCH]
    assert len(set(lengths)) > 2, "with equal lengths every mean is the same"


def test_a_long_and_a_short_response_weigh_the_same():
    """Invariant 42: duplicating a row keeps the mean."""
    model, *both = make_model(), *sorted(BATCH, key=lambda e: len(e.demo))
    short, long = both[0], both[-1]
    a = sft_loss(model, [long], sft.Config(batch_size=1))[0]
    b = sft_loss(model, [short], sft.Config(batch_size=1))[0]
    both = sft_loss(model, [long, short], sft.Config(batch_size=2))[0]
    assert both.item() == pytest.approx((a + b).item() / 2, rel=1e-12)
    twice = sft_loss(model, [long, short] * 2, sft.Config(batch_size=4))[0]
    assert twice.item() == pytest.approx(both.item(), rel=1e-12)
    assert abs(a - b) > 0.01, "else this shows nothing"


def place_gradients(model, batch):
    """All tokens of the batch (B, T), and d loss / d states at each of them (B, T, C):
    a place's logits come from its state, so neither or both get a gradient."""
    seen = {}

    def keep(idx):
        states = GPT.states(model, idx)
        states.retain_grad()
        seen["states"], seen["idx"] = states, idx
        return states

    model.states = keep
    loss, _ = sft_loss(model, batch)
    loss.backward()
    del model.states
    return seen["idx"], seen["states"].grad


def test_prompt_logits_get_no_gradient():
    """Only places that predict a token of the response, its end included, do."""
    idx, grad = place_gradients(make_model(), BATCH)
    for row, example in enumerate(BATCH):
        prompt = len(TOK.encode(example.prompt)) + 1 + example.given
        n = len(TOK.encode(example.demo)) - example.given + 1
        learnt = [bool(g.any()) for g in grad[row]]
        places = range(idx.size(1))
        assert learnt == [prompt - 1 <= t < prompt + n - 1 for t in places]


def test_given_tokens_are_not_learnt():
    """They are context: the loss starts behind them, whatever they are."""
    model = make_model()
    prompt, demo = "garden button: lamp pearl rope", "reverse: rope pearl lamp"
    n = len(TOK.encode(demo))
    cfg, losses = sft.Config(batch_size=1), []
    for given in range(n + 1):
        example = Example(prompt, demo, "", given)
        losses.append(sft_loss(model, [example], cfg)[0].item())
    sums = [loss * (n + 1 - given) for given, loss in enumerate(losses)]
    context = TOK.encode(prompt) + [TOK.answer]
    idx = torch.tensor([context + TOK.encode(demo) + [TOK.end]])
    log_p = torch.log_softmax(model(idx)[0], dim=-1)
    for t in range(n):  # one more given token takes its own term out of the sum
        place = len(context) + t
        term = -log_p[place - 1, idx[0, place]].item()
        assert sums[t] - sums[t + 1] == pytest.approx(term, rel=1e-9)


def test_garbage_behind_the_end_changes_nothing():
    """Invariant 30: not a bit of loss or gradient."""
    model = make_model()
    response, mask = sft.get_responses(BATCH, TOK, "cpu")
    garbage = torch.randint(0, TOK.vocab_size, response.shape, generator=make_rng(1))
    other = torch.where(mask, response, garbage)
    assert not torch.equal(other, response)
    a, _ = sft.compute_loss(model, BATCH, response, mask, TOK, CFG)
    b, _ = sft.compute_loss(model, BATCH, other, mask, TOK, CFG)
    assert torch.equal(a, b)
    for x, y in zip(gradients(model, a), gradients(model, b), strict=True):
        assert torch.equal(x, y)


def test_a_row_s_loss_does_not_depend_on_its_neighbours():
    """Invariant 28."""
    model = make_model()
    alone = sum(sft_loss(model, [example])[0] for example in BATCH)
    together = sft_loss(model, BATCH)[0]
    assert together.item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_the_gradient_does_not_depend_on_the_split(micro_batches):
    """Invariant 39: 1 x 8 = 2 x 4 = 4 x 2 = 8 x 1."""
    model = make_model()
    whole = gradients(model, sft_loss(model, BATCH)[0])
    for part in data.my_parts(BATCH, micro_batches):
        sft_loss(model, part)[0].backward()  # accumulates in p.grad
    for p, g in zip(model.parameters(), whole, strict=True):
        assert (p.grad - g).abs().max() < 1e-13
    assert max(g.abs().max() for g in whole) > 1e-2


def test_records_do_not_depend_on_the_split():
    model, sums = make_model(), {1: {}, 4: {}}
    for n in sums:
        for part in data.my_parts(BATCH, n):
            response, mask = sft.get_responses(part, TOK, "cpu")
            loss, extra = sft.compute_loss(model, part, response, mask, TOK, CFG)
            sft.tally(sums[n], loss, response, mask, extra, TOK, CFG)
    tokens = sum(len(TOK.encode(e.demo)) + 1 - e.given for e in BATCH)
    for got in sums.values():
        assert got["tokens"] == tokens
        assert got["response_length"].item() == pytest.approx(tokens / len(BATCH))
        assert got["eos_rate"] == 1
        assert got["loss"].item() == pytest.approx(sft_loss(model, BATCH)[0].item())


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = sft.Config(lr=2.0, warmup_steps=4, steps=12)
    rates = [sft.get_lr(t, cfg) for t in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    for t in range(4, 13):
        assert rates[t] == pytest.approx(1 + math.cos(math.pi * (t - 4) / 8))
    assert rates[12] == 0


def test_only_matrices_decay():
    model = make_model()
    decay, rest = sft.make_optimizer(model, sft.Config(weight_decay=0.1)).param_groups
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert {p.dim() for p in decay["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    chosen = [id(p) for p in decay["params"] + rest["params"]]
    assert sorted(chosen) == sorted(id(p) for p in model.parameters())


def test_it_overfits_one_batch(tmp_path):
    """And then answers with the demonstrations, word for word."""
    torch.set_default_dtype(torch.float32)
    student = GPT(CONFIG, make_rng(0, "weights"))
    cfg = sft.Config(
        steps=160, batch_size=8, lr=1e-2, log_every=80, beta2=0.95, dropout=0.0
    )
    sft.train(student, {"A": DEMOS}, {}, TOK, cfg, tmp_path)
    loss = sft_loss(student, DEMOS, cfg)[0].item()
    assert loss < 0.05
    contexts = [data.student_prompt(e, TOK) for e in DEMOS]
    assert data.answer(student, contexts, TOK, 16) == [e.demo for e in DEMOS]


def test_a_step_whose_loss_is_not_finite_is_not_made(tmp_path):
    """Weights stay what they were; the error names the step and the examples."""
    student = make_model()
    with torch.no_grad():
        student.ln_f.weight[0] = math.inf
    before = [p.clone() for p in student.parameters()]
    cfg = sft.Config(steps=2, batch_size=8)
    named = r"step 0: .*\[0, 1, 2, 3, 4, 5, 6, 7\]"
    with pytest.raises(FloatingPointError, match=named):
        sft.train(student, {"A": DEMOS}, {}, TOK, cfg, tmp_path)
    for p, old in zip(student.parameters(), before, strict=True):
        assert torch.equal(p, old)
    assert not (tmp_path / "checkpoint.pt").exists()
