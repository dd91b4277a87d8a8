"""Self-distillation: contexts, responses, loss and the teacher's average."""

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import data
import sdft
import sft
from data import Example, make_rng
from model import GPT, KLS, GPTConfig

TOK = data.Tokenizer()
CONFIG = GPTConfig(
    block_size=64, vocab_size=TOK.vocab_size, n_layer=1, n_head=2, n_kv_head=1,
    n_embd=32, n_inner=48,
)  # fmt: skip
WORLD = data.World(0)
DEMOS = data.make_demos(WORLD, "A", 16, 0)
BATCH = [  # prompts and demonstrations of several lengths
    *DEMOS[:5],
    Example("garden button: wolf", "axe", "", id=5),
    Example("kitchen kettle robot: apple", "copy equals apple beep stop", "", id=6),
    Example("harbour violin: candle spoon tower bag", "bag", "", id=7),
]
OTHER_DEMOS = [replace(e, demo="double gives bag bag done sir") for e in BATCH]
CFG = sdft.Config(batch_size=len(BATCH), max_new_tokens=8)
KINDS = pytest.mark.parametrize("kl", KLS)


@pytest.fixture(autouse=True)
def float64():
    """What is made of whole numbers (the weights of the mean) is float64, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(seed=0, tie_weights=True):
    """A GPT in float64: its predictions are not flat, and about a fifth are the end."""
    config = replace(CONFIG, tie_weights=tie_weights)
    model = GPT(config, make_rng(seed, "weights")).double()
    model.dtype = torch.float64
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= 10
        for block in model.h:  # a channel that is always on, and favours the end
            block.attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        model.wte.weight[:, 0] = 1
        model.lm_head.weight[TOK.end, 0] = 7
    return model


def make_pair(seed=0):
    """Student and teacher with different weights."""
    return make_model(seed), sdft.make_teacher(make_model(seed + 1))


def respond(student, teacher, batch=BATCH, cfg=CFG, step=1):
    return sdft.get_responses(student, teacher, batch, TOK, cfg, step)


def sdft_loss(student, teacher, batch, response, mask, cfg=CFG, step=1):
    return sdft.compute_loss(student, teacher, batch, response, mask, TOK, cfg, step)[0]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def equal_weights(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def record_tokens(model):
    """A list that gets the tokens (B, T) of every later forward pass of the model."""
    seen = []
    model.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


def rows_of(response, mask):
    """The responses as lists of tokens, without what stands behind their end."""
    rows = zip(response.tolist(), mask.sum(1).tolist(), strict=True)
    return [row[:n] for row, n in rows]


# ---- The truth, in plain loops -----------------------------------------------------


def log_softmax_on_paper(logits, temperature):
    logits = [x / temperature for x in logits]
    top = max(logits)
    log_total = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - log_total for x in logits]


def kl_on_paper(p, q):
    """KL(p || q) in nats, of two lists of log-probabilities."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def divergence_on_paper(log_s, log_t, kl):
    if kl == "forward":
        return kl_on_paper(log_t, log_s)
    if kl == "reverse":
        return kl_on_paper(log_s, log_t)
    both = zip(log_s, log_t, strict=True)
    log_m = [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in both]
    return (kl_on_paper(log_t, log_m) + kl_on_paper(log_s, log_m)) / 2


@torch.no_grad()
def divergences_on_paper(student, teacher, example, tokens, kl="forward", tau=1):
    """One number for each token of a response: each context alone, no padding."""
    bare = TOK.encode(example.prompt) + [TOK.answer]
    shown = TOK.encode(f"{example.prompt} example {example.demo}") + [TOK.answer]
    values = []
    for t in range(len(tokens)):  # predict tokens[t] from all that stands before it
        s = student(torch.tensor([bare + tokens[:t]]))[0, -1].tolist()
        q = teacher(torch.tensor([shown + tokens[:t]]))[0, -1].tolist()
        log_s = log_softmax_on_paper(s, tau)
        log_t = log_softmax_on_paper(q, tau)
        values.append(divergence_on_paper(log_s, log_t, kl))
    return values


@torch.no_grad()
def sample_on_paper(model, context, uniforms, temperature=1):
    """Token by token, each the first whose cumulative probability exceeds u."""
    tokens = []
    for u in uniforms:
        logits = model(torch.tensor([context + tokens]))[0, -1].tolist()
        p = [math.exp(x) for x in log_softmax_on_paper(logits, temperature)]
        cumulative = itertools.accumulate(p)
        tokens.append(next(i for i, total in enumerate(cumulative) if total > u))
        if tokens[-1] == TOK.end:
            break
    return tokens


# ---- The loss ----------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_the_loss_is_what_two_plain_loops_say(kl, tau):
    """Invariants 20, 21, 33, 42: rows, then tokens, each formula typed out anew."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl, temperature=tau)
    response, mask = respond(student, teacher)
    means = []
    for example, tokens in zip(BATCH, rows_of(response, mask), strict=True):
        values = divergences_on_paper(student, teacher, example, tokens, kl, tau)
        means.append(math.fsum(values) / len(tokens))
    loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    assert loss.item() == pytest.approx(math.fsum(means) / len(BATCH), rel=1e-9)
    assert len({len(row) for row in rows_of(response, mask)}) > 2


@KINDS
def test_same_context_and_weights_give_zero_loss_and_gradient(kl, monkeypatch):
    """Invariant 13: the signal is the demonstration, and nothing else."""
    student = make_model()
    teacher, cfg = sdft.make_teacher(student), replace(CFG, kl=kl)
    response, mask = respond(student, teacher)
    loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    assert loss > 1e-3
    assert max(g.abs().max() for g in gradients(student, loss)) > 1e-4
    monkeypatch.setattr(data, "teacher_prompt", data.student_prompt)
    loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    assert abs(loss) < 1e-12
    assert max(g.abs().max() for g in gradients(student, loss)) < 1e-7


@KINDS
def test_the_gradient_is_that_of_finite_differences(kl):
    """Through contexts, temperature and mean; the response itself stays fixed."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl, temperature=0.8, skip_first_tokens=1)
    response, mask = respond(student, teacher)

    def loss():
        return sdft_loss(student, teacher, BATCH, response, mask, cfg)

    rng, eps = make_rng(0), 1e-5
    for p, g in zip(student.parameters(), gradients(student, loss()), strict=True):
        direction = torch.randn(p.shape, generator=rng)
        with torch.no_grad():
            p += eps * direction
            up = loss().item()
            p -= 2 * eps * direction
            down = loss().item()
            p += eps * direction
        slope = (g * direction).sum().item()
        assert (up - down) / (2 * eps) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_logits_align_across_contexts():
    """Invariant 22: both sequences end in the same ids, right behind own contexts."""
    student, teacher = make_pair()
    response, mask = respond(student, teacher)
    seen_student, seen_teacher = record_tokens(student), record_tokens(teacher)
    sdft_loss(student, teacher, BATCH, response, mask)
    (by_student,), (by_teacher,) = seen_student, seen_teacher
    for i, tokens in enumerate(rows_of(response, mask)):
        prompt, demo = BATCH[i].prompt, BATCH[i].demo
        bare = TOK.encode(prompt) + [TOK.answer]
        shown = TOK.encode(prompt) + TOK.encode(f"example {demo}") + [TOK.answer]
        for rows, right in ((by_student, bare + tokens), (by_teacher, shown + tokens)):
            row = rows[i].tolist()[: len(right)]
            assert row in (right, right[:-1]), "the longest lacks its last token"


def test_another_demonstration_changes_the_teacher_and_not_the_student():
    """Invariant 23: bit for bit, in the loss, in the sampler and in the evaluation."""
    student, teacher = make_pair()
    response, mask = respond(student, teacher)
    seen_student, seen_teacher = record_tokens(student), record_tokens(teacher)
    losses = [
        sdft_loss(student, teacher, batch, response, mask)
        for batch in (BATCH, OTHER_DEMOS)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert torch.equal(*seen_student)
    assert not torch.equal(seen_teacher[0][:, :20], seen_teacher[1][:, :20])
    again, _ = respond(student, teacher, OTHER_DEMOS)
    assert torch.equal(again, response)


def test_no_token_of_a_demonstration_reaches_the_sampler_or_the_evaluator():
    """Invariant 23: what the student is given to read is its prompt."""
    student, teacher = make_pair()
    seen, seen_teacher = record_tokens(student), record_tokens(teacher)
    respond(student, teacher)
    data.accuracy(student, "A", BATCH, TOK, 8)
    whole = [idx for idx in seen if idx.size(1) > 1]  # the others are single new tokens
    assert len(whole) == 2 and not seen_teacher
    for idx in whole:
        for row, example in zip(idx.tolist(), BATCH, strict=True):
            bare = TOK.encode(example.prompt) + [TOK.answer]
            assert row[: len(bare)] == bare
            assert set(row[len(bare) :]) <= {TOK.end}


def test_an_evaluation_does_not_depend_on_the_demonstrations():
    """Invariants 23, 48: but for the teacher, who alone is shown them."""
    student, teacher = make_pair()
    base, records = make_model(7), []
    for batch in (BATCH, OTHER_DEMOS):
        tasks = {"new": {"A": batch}, "prior": {"knowledge": batch}}
        models = {"student": student, "teacher": teacher}
        records.append(sdft.evaluate(models, base, "A", tasks, TOK, CFG))
    a, b = records
    for key in ("kl_teacher_base", "kl_teacher_student_by_position"):
        assert a.pop(key) != b.pop(key)
    assert a == b and a["kl_student_base"] > 0.01


def test_an_evaluation_measures_distances_on_responses_of_one_s_own():
    """KL(student || base) and KL(teacher || base), by plain loops."""
    student, teacher = make_pair()
    base, queries = make_model(7), BATCH[:3]
    tasks = {"new": {"A": queries}, "prior": {"knowledge": queries}}
    models = {"student": student, "teacher": teacher}
    record = sdft.evaluate(models, base, "A", tasks, TOK, CFG)
    for name, model, make in (
        ("kl_student_base", student, data.student_prompt),
        ("kl_teacher_base", teacher, data.teacher_prompt),
    ):
        means = []
        for example in queries:
            u = data.get_uniform([example], 8, CFG.seed, "evaluate", "cpu")[0].tolist()
            context = make(example, TOK)
            tokens = sample_on_paper(model, context, u)
            bare, values = TOK.encode(example.prompt) + [TOK.answer], []
            for t in range(len(tokens)):
                p = model(torch.tensor([context + tokens[:t]]))[0, -1].tolist()
                q = base(torch.tensor([bare + tokens[:t]]))[0, -1].tolist()
                p, q = log_softmax_on_paper(p, 1), log_softmax_on_paper(q, 1)
                values.append(kl_on_paper(p, q))
            means.append(math.fsum(values) / len(values))
        assert record[name] == pytest.approx(math.fsum(means) / len(means), rel=1e-9)


def test_a_row_s_loss_does_not_depend_on_its_neighbours():
    """Invariant 28: neither does its response."""
    student, teacher = make_pair()
    response, mask = respond(student, teacher)
    total = 0
    for i, example in enumerate(BATCH):
        alone, its_mask = respond(student, teacher, [example])
        assert rows_of(alone, its_mask) == [rows_of(response, mask)[i]]
        total += sdft_loss(student, teacher, [example], alone, its_mask).item()
    loss = sdft_loss(student, teacher, BATCH, response, mask)
    assert loss.item() == pytest.approx(total, rel=1e-12)


@KINDS
def test_garbage_behind_the_end_changes_nothing(kl):
    """Invariant 30: not a bit of loss or gradient."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl)
    response, mask = respond(student, teacher)
    garbage = torch.randint(0, TOK.vocab_size, response.shape, generator=make_rng(1))
    other = torch.where(mask, response, garbage)
    assert not torch.equal(other, response)
    a = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    b = sdft_loss(student, teacher, BATCH, other, mask, cfg)
    assert torch.equal(a, b)
    for x, y in zip(gradients(student, a), gradients(student, b), strict=True):
        assert torch.equal(x, y)


@KINDS
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_the_gradient_does_not_depend_on_the_split(kl, micro_batches):
    """Invariant 39: 1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, the responses sampled part by
    part."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl)
    loss = sdft_loss(student, teacher, BATCH, *respond(student, teacher), cfg)
    whole = gradients(student, loss)
    for part in data.my_parts(BATCH, micro_batches):
        sampled = respond(student, teacher, part)
        sdft_loss(student, teacher, part, *sampled, cfg).backward()
    for p, g in zip(student.parameters(), whole, strict=True):
        assert (p.grad - g).abs().max() < 1e-13
    assert max(g.abs().max() for g in whole) > 1e-3


def test_skipped_tokens_are_left_out_of_the_loss_only():
    """Invariants 40, 41: later tokens still see them; a row of fewer tokens adds 0."""
    student, teacher = make_pair()
    response, mask = respond(student, teacher)
    rows = rows_of(response, mask)
    assert min(map(len, rows)) <= 3 < max(map(len, rows))
    for skip in (0, 1, 3, 100):
        means = []
        for example, tokens in zip(BATCH, rows, strict=True):
            values = divergences_on_paper(student, teacher, example, tokens)[skip:]
            means.append(math.fsum(values) / max(1, len(values)))
        cfg = replace(CFG, skip_first_tokens=skip)
        loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
        right = math.fsum(means) / len(BATCH)
        assert loss.item() == pytest.approx(right, rel=1e-9, abs=1e-15)
    assert loss == 0
    assert all(bool((g == 0).all()) for g in gradients(student, loss))


def test_long_and_short_responses_weigh_the_same():
    """Invariant 42: and duplicating a row keeps the mean."""
    student, teacher = make_pair()
    long = torch.tensor([TOK.encode("copy: bag bag bag bag bag") + [TOK.end]])
    short = torch.full_like(long, TOK.end)
    one = torch.arange(long.size(1))[None] < 1
    masks = torch.ones_like(one), one
    losses = [
        sdft_loss(student, teacher, BATCH[:1], row, mask, replace(CFG, batch_size=1))
        for row, mask in zip((long, short), masks, strict=True)
    ]
    both = torch.cat((long, short)), torch.cat(masks)
    pair, cfg = [BATCH[0]] * 2, replace(CFG, batch_size=2)
    mean = sdft_loss(student, teacher, pair, *both, cfg).item()
    assert mean == pytest.approx((losses[0] + losses[1]).item() / 2, rel=1e-12)
    assert abs(losses[0] - losses[1]) > 1e-3, "else this shows nothing"
    twice, cfg = [x.repeat(2, 1) for x in both], replace(CFG, batch_size=4)
    again = sdft_loss(student, teacher, pair * 2, *twice, cfg).item()
    assert again == pytest.approx(mean, rel=1e-12)


@KINDS
def test_a_temperature_divides_the_logits_of_both_models(kl):
    """Invariant 33: the loss at 2 is that at 1 of two models with halved states."""
    student, teacher = make_pair()
    response, mask = respond(student, teacher)
    cool = replace(CFG, kl=kl, temperature=2.0)
    loss = sdft_loss(student, teacher, BATCH, response, mask, cool)
    with torch.no_grad():
        student.ln_f.weight /= 2
        teacher.ln_f.weight /= 2
    same = sdft_loss(student, teacher, BATCH, response, mask, replace(CFG, kl=kl))
    assert loss.item() == pytest.approx(same.item(), rel=1e-12)


def test_a_context_that_does_not_fit_is_refused_and_nothing_is_cut():
    """Invariant 24."""
    student, teacher = make_pair()
    demo = " ".join(["apple"] * 60)
    batch = [Example("garden button: wolf", demo, "")]
    response = torch.full((1, 8), 7)
    mask = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="of up to 70 .* need 78 > block_size 64"):
        sdft_loss(student, teacher, batch, response, mask)


def test_records_are_sums_that_no_split_changes():
    """And what is watched beside the loss is right, by plain loops."""
    student, teacher = make_pair()
    response, mask = respond(student, teacher)
    _, extra = sdft.compute_loss(student, teacher, BATCH, response, mask, TOK, CFG, 10)
    _, none = sdft.compute_loss(student, teacher, BATCH, response, mask, TOK, CFG, 11)
    assert none == {} and len(extra) == 3
    reverse = 0
    for example, tokens in zip(BATCH, rows_of(response, mask), strict=True):
        values = divergences_on_paper(student, teacher, example, tokens, "reverse")
        reverse += math.fsum(values) / len(values) / len(BATCH)
    assert extra["kl_student_teacher"].item() == pytest.approx(reverse, rel=1e-9)
    parts = {}
    for part in data.my_parts(BATCH, 4):
        sampled = respond(student, teacher, part)
        more = sdft.compute_loss(student, teacher, part, *sampled, TOK, CFG, 10)[1]
        for key, value in more.items():
            parts[key] = parts.get(key, 0) + value
    for key, value in extra.items():
        assert parts[key].item() == pytest.approx(value.item(), rel=1e-12)


# ---- The response ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_response_comes_from_the_current_student(temperature):
    """Invariants 33, 35: by a plain loop, before and after the student has changed."""
    student, teacher = make_pair()
    cfg, seen = replace(CFG, temperature=temperature), []
    for change in (0.0, 0.05):
        with torch.no_grad():
            for p in student.parameters():
                p += change * torch.randn(p.shape, generator=make_rng(0))
        got = rows_of(*respond(student, teacher, cfg=cfg))
        u = data.get_uniform(BATCH, CFG.max_new_tokens, CFG.seed, 1, "cpu").tolist()
        for example, row, numbers in zip(BATCH, got, u, strict=True):
            context = TOK.encode(example.prompt) + [TOK.answer]
            assert row == sample_on_paper(student, context, numbers, temperature)
        seen.append(got)
    assert seen[0] != seen[1]


def test_responses_come_from_the_teacher_when_asked():
    """Off-policy, an ablation: the teacher's weights and the teacher's context."""
    student, teacher = make_pair()
    cfg = replace(CFG, generate_from="teacher")
    got = rows_of(*respond(student, teacher, cfg=cfg))
    u = data.get_uniform(BATCH, CFG.max_new_tokens, CFG.seed, 1, "cpu").tolist()
    for example, row, numbers in zip(BATCH, got, u, strict=True):
        shown = f"{example.prompt} example {example.demo}"
        context = TOK.encode(shown) + [TOK.answer]
        assert row == sample_on_paper(teacher, context, numbers)
    assert got != rows_of(*respond(student, teacher))


def test_a_rollout_keeps_no_graph_and_restores_the_mode():
    """Invariant 35."""
    student, teacher = make_pair()
    for training in (True, False):
        student.train(training)
        response, mask = respond(student, teacher)
        assert student.training == training
        assert not response.requires_grad and not response.is_inference()
        assert all(p.grad is None for p in student.parameters())
        loss = sdft_loss(student, teacher, BATCH, response, mask)
        assert loss.requires_grad, "the student still learns from it"


def test_a_rollout_cuts_off_no_unlikely_token(monkeypatch):
    """Invariant 33: neither top-k nor top-p; the last token of all can be drawn."""
    student, teacher = make_pair()
    with torch.no_grad():  # make the last id the least likely of all
        student.lm_head.weight[-1] = -student.lm_head.weight[0]
    context = data.pad_batch(data.student_prompt, BATCH, TOK, "cpu")
    ids, lengths = context
    logits = student(ids)[range(len(BATCH)), lengths - 1]
    p = torch.softmax(logits, dim=-1)[:, -1]
    assert p.max() < 5e-3 and p.min() > 1e-12

    def nearly_one(batch, n, *_):
        return torch.full((len(batch), n), 1 - 1e-13)

    monkeypatch.setattr(data, "get_uniform", nearly_one)
    response, mask = respond(student, teacher)
    assert (response == TOK.vocab_size - 1).all() and len(response) == len(BATCH)


def test_the_mask_ends_with_the_first_end():
    """Invariant 36: included; a response without one keeps all, and is counted."""
    student, teacher = make_pair()
    cfg, ended = replace(CFG, max_new_tokens=4), 0
    response, mask = respond(student, teacher, cfg=cfg)
    for row, seen in zip(response.tolist(), mask.tolist(), strict=True):
        n = row.index(TOK.end) + 1 if TOK.end in row else 4
        assert seen == [t < n for t in range(len(row))]
        ended += TOK.end in row
    assert 0 < ended < len(BATCH), "both kinds must occur"
    assert response.size(1) == 4
    sums, loss = {}, torch.zeros(())
    sdft.tally(sums, loss, response, mask, {}, TOK, cfg)
    assert sums["eos_rate"] == ended / len(BATCH)
    assert sums["response_length"] == mask.sum() / len(BATCH)


def test_each_prompt_of_a_step_is_another_one_and_gets_one_response():
    """Invariant 37."""
    student, teacher = make_pair()
    for step in range(4):
        batch = data.get_batch(DEMOS, 8, 0, step)
        assert len({example.prompt for example in batch}) == 8
        response, mask = respond(student, teacher, batch, step=step)
        assert len(response) == len(mask) == 8


def test_each_step_draws_new_responses():
    student, teacher = make_pair()
    first = respond(student, teacher, step=0)[0]
    assert torch.equal(first, respond(student, teacher, step=0)[0])
    second = respond(student, teacher, step=1)[0]
    assert first.tolist() != second.tolist()


# ---- The teacher -------------------------------------------------------------------


@KINDS
def test_no_gradient_reaches_the_teacher(kl):
    """Invariant 14."""
    student = make_model()
    teacher = sdft.make_teacher(student)
    optimizer = sdft.make_optimizer(student, CFG)
    response, mask = respond(student, teacher)
    cfg = replace(CFG, kl=kl)
    sdft_loss(student, teacher, BATCH, response, mask, cfg).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not teacher.training and student.training
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}
    assert not trained & {id(p) for p in teacher.parameters()}
    mine, its = (
        {x.untyped_storage().data_ptr() for x in [*m.parameters(), *m.buffers()]}
        for m in (student, teacher)
    )
    assert not mine & its, "no storage is shared"
    teacher.requires_grad_(True)  # even so
    sdft_loss(student, teacher, BATCH, response, mask, cfg).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_making_a_teacher_leaves_the_student_alone():
    student = make_model()
    teacher = sdft.make_teacher(student)
    assert equal_weights(student, teacher)
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert teacher.dtype == student.dtype


@KINDS
def test_a_live_teacher_gives_the_gradient_of_a_copy(kl):
    """Invariant 15: the student itself as teacher is a constant, too."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl, teacher="live")
    sdft.update_teacher(teacher, student, cfg)
    assert equal_weights(teacher, student)
    response, mask = respond(student, teacher)
    by_teacher = []
    for each in (teacher, copy.deepcopy(student), student):
        loss = sdft_loss(student, each, BATCH, response, mask, cfg)
        by_teacher.append(gradients(student, loss))
    for a, b, c in zip(*by_teacher, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert max(g.abs().max() for g in by_teacher[0]) > 1e-4


def test_a_frozen_teacher_stays_bit_identical():
    """Invariant 15."""
    student, teacher = make_pair()
    before = copy.deepcopy(teacher)
    for _ in range(5):
        sdft.update_teacher(teacher, student, replace(CFG, teacher="frozen"))
    assert equal_weights(teacher, before) and not equal_weights(teacher, student)


def test_ema_rate_0_freezes_and_1_copies():
    """Invariant 16."""
    student, teacher = make_pair()
    before = copy.deepcopy(teacher)
    sdft.update_teacher(teacher, student, replace(CFG, ema_rate=0.0))
    assert equal_weights(teacher, before)
    sdft.update_teacher(teacher, student, replace(CFG, ema_rate=1.0))
    assert equal_weights(teacher, student)


@pytest.mark.parametrize("ema_rate", [0.02, 0.3])
def test_the_teacher_approaches_a_constant_student_geometrically(ema_rate):
    """Invariant 16: teacher_n = student + (1 - ema_rate)^n (teacher_0 - student)."""
    student, teacher = make_pair()
    first, student_before = copy.deepcopy(teacher), copy.deepcopy(student)
    cfg = replace(CFG, ema_rate=ema_rate)
    for n in range(1, 8):
        sdft.update_teacher(teacher, student, cfg)
        for t, s, t_0 in zip(
            teacher.parameters(), student.parameters(), first.parameters(), strict=True
        ):
            right = s + (1 - ema_rate) ** n * (t_0 - s)
            assert (t - right).abs().max() < 1e-14
    assert equal_weights(student, student_before)


def share_closed(dtype):
    """How much of a gap of 1 % an ema_rate of 0.01 closes in 250 updates."""
    student = GPT(CONFIG, make_rng(0, "weights"))
    teacher = sdft.make_teacher(student)
    with torch.no_grad():
        for p in student.parameters():
            p *= 1.01
    student, teacher = student.to(dtype), teacher.to(dtype)

    def gap():
        pairs = zip(student.parameters(), teacher.parameters(), strict=True)
        return sum((s.double() - t.double()).abs().sum() for s, t in pairs)

    before, cfg = gap(), replace(CFG, ema_rate=0.01)
    for _ in range(250):
        sdft.update_teacher(teacher, student, cfg)
    return 1 - (gap() / before).item()


def test_the_average_moves_in_float32_and_hardly_in_bfloat16():
    """Invariant 17: 1 - 0.99^250 = 0.919; in bfloat16 most steps round to nothing."""
    assert share_closed(torch.float32) == pytest.approx(1 - 0.99**250, abs=1e-3)
    assert share_closed(torch.bfloat16) < 0.1


def test_tied_embeddings_are_averaged_once_and_stay_tied():
    """Invariant 18: averaged twice, the teacher would run ahead; tables are copied."""
    student, teacher = make_pair()
    first = teacher.wte.weight.clone()
    sdft.update_teacher(teacher, student, replace(CFG, ema_rate=0.25))
    right = 0.25 * student.wte.weight + 0.75 * first
    assert (teacher.wte.weight - right).abs().max() < 1e-15
    assert teacher.lm_head.weight is teacher.wte.weight
    assert len(list(teacher.parameters())) == len(list(student.parameters()))
    assert torch.equal(teacher.cos, student.cos)
    assert torch.equal(teacher.sin, student.sin)
    untied = sdft.make_teacher(make_model(tie_weights=False))
    assert untied.lm_head.weight is not untied.wte.weight


# ---- The loop ----------------------------------------------------------------------


def run(module, folder, seed=0, **settings):
    """Three steps of a method; returns its student and its records, without times."""
    folder.mkdir()
    student = make_model()
    cfg = module.Config(
        steps=3, batch_size=4, warmup_steps=1, lr=1e-3, log_every=1, save_every=1,
        seed=seed, **settings,
    )  # fmt: skip
    module.train(student, {"A": DEMOS}, {}, TOK, cfg, folder)
    records = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in records]
    assert len(records) == 3
    return student, [{**record, "seconds": None} for record in records]


def saved_teacher(folder):
    teacher = make_model()
    saved = data.read_checkpoint(folder / "checkpoint.pt")
    teacher.load_state_dict(saved["models"]["teacher"])
    return teacher


def test_the_same_seed_gives_the_same_losses(tmp_path):
    """Invariant 38: and another seed others."""
    student, first = run(sdft, tmp_path / "a")
    again, second = run(sdft, tmp_path / "b")
    other, third = run(sdft, tmp_path / "c", seed=1)
    assert first == second and equal_weights(student, again)
    assert first != third and not equal_weights(student, other)


def test_both_methods_see_the_same_examples_in_the_same_order(tmp_path, monkeypatch):
    """Invariant 38: however many random numbers the responses take."""
    get_batch, drawn = data.get_batch, []

    def keep(*args):
        batch = get_batch(*args)
        drawn.append([example.id for example in batch])
        return batch

    monkeypatch.setattr(data, "get_batch", keep)
    run(sft, tmp_path / "a")
    run(sdft, tmp_path / "b")
    run(sdft, tmp_path / "c", max_new_tokens=3)
    assert drawn[:3] == drawn[3:6] == drawn[6:]
    assert drawn[0] != drawn[1]


def test_the_teacher_is_averaged_once_after_each_optimizer_step(tmp_path, monkeypatch):
    """Invariant 16: not for each micro-batch, and never before the step."""
    update, students, teachers = sdft.update_teacher, [make_model()], []

    def keep(teacher, student, cfg):
        assert not equal_weights(student, students[-1]), "the step comes first"
        students.append(copy.deepcopy(student))
        update(teacher, student, cfg)
        teachers.append(copy.deepcopy(teacher))

    monkeypatch.setattr(sdft, "update_teacher", keep)
    student, _ = run(sdft, tmp_path / "a", micro_batches=2, ema_rate=0.25)
    assert len(teachers) == 3 and equal_weights(student, students[-1])
    weights = 0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25  # of base and three students
    for t, *ps in zip(
        saved_teacher(tmp_path / "a").parameters(),
        *[each.parameters() for each in students],
        strict=True,
    ):
        right = sum(w * p for w, p in zip(weights, ps, strict=True))
        assert (t - right).abs().max() < 1e-14


def test_training_with_a_frozen_a_live_and_an_averaged_teacher(tmp_path):
    """Invariant 15: frozen it stays the base, live it is the student, ema neither."""
    for kind in ("frozen", "live", "ema"):
        student, _ = run(sdft, tmp_path / kind, teacher=kind)
        teacher = saved_teacher(tmp_path / kind)
        assert equal_weights(teacher, make_model()) == (kind == "frozen")
        assert equal_weights(teacher, student) == (kind == "live")
        assert not equal_weights(student, make_model())


def test_the_teacher_is_the_student_s_weights_before_the_first_step(tmp_path):
    """The first loss of a run is that of the base model, shown the demonstrations."""
    _, records = run(sdft, tmp_path / "a", dropout=0.0)
    base, means = make_model(), []
    for example in data.get_batch(DEMOS, 4, 0, 0):
        u = data.get_uniform([example], 16, 0, 0, "cpu")[0].tolist()
        tokens = sample_on_paper(base, data.student_prompt(example, TOK), u)
        values = divergences_on_paper(base, base, example, tokens)
        means.append(math.fsum(values) / len(values))
    assert records[0]["loss"] == pytest.approx(math.fsum(means) / 4, rel=1e-9)


def test_distillation_closes_the_gap_to_the_teacher(tmp_path):
    """Eighty steps towards a fixed teacher, on the same prompts, lower the loss."""
    student = make_model()
    cfg = sdft.Config(
        steps=80, batch_size=8, warmup_steps=1, lr=3e-3, log_every=79,
        teacher="frozen", max_new_tokens=8, dropout=0.0,
    )  # fmt: skip
    sdft.train(student, {"A": DEMOS[:8]}, {}, TOK, cfg, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["loss"] for line in lines)
    assert last < 0.25 * first
