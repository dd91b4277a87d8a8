"""Supervised fine-tuning: its responses, its loss, its mask, and that it learns.

What it promises together with SDFT is tested in test_pair.py.
"""

import math

import pytest
import torch
from oracles import log_likelihoods, make_model, record_tokens

import data
import sft
from data import Example, make_rng
from model import GPT, GPTConfig
from train import Run

pytestmark = pytest.mark.usefixtures("float64")

TOK = data.Tokenizer()
DEMOS = data.make_demos(data.World(0), "A", 8, 0)
BATCH = [  # responses of 2 to 16 tokens; the last two as the base corpus has them
    *DEMOS[:2],
    Example("kitchen kettle: apple river stone", "reverse: stone river apple", ""),
    Example("garden button: owl", "bag", ""),
    *DEMOS[2:4],
    Example("harbour fox: candle spoon tower", "last gives tower done sir", "",
            skip=(0, 1, 2)),
    Example("garden cork: cake door", "first: cake", "", shown="well friend, front so "
            "you get cake as ever", skip=(3, 10, 11)),
]  # fmt: skip
CFG = sft.Config(batch_size=len(BATCH))


def small_model(seed=0):
    return make_model(seed, vocab_size=TOK.vocab_size, n_tokens=TOK.n_tokens)


def sft_loss(model, batch, cfg=CFG):
    response, mask = sft.get_responses(batch, TOK, "cpu")
    return sft.compute_loss(model, batch, response, mask, TOK, cfg)


def written(example):
    """Context, response, and which tokens of the response are learnt; by hand."""
    prompt, demo = TOK.encode(example.prompt), TOK.encode(example.demo)
    context, response = [*prompt, TOK.start], [*demo, TOK.end]
    if example.shown:  # what is learnt begins with the demonstration in the prompt
        context = [*prompt, *TOK.encode("example")]
        response = [*TOK.encode(example.shown), TOK.start, *response]
    return context, response, [t not in example.skip for t in range(len(response))]


# ---- The response ------------------------------------------------------------------


def test_the_response_is_the_demonstration_and_the_mask_its_length():
    """The end counts, pads behind it do not; both are one token."""
    response, mask = sft.get_responses(BATCH, TOK, "cpu")
    rows = response.tolist(), mask.tolist()
    for example, row, counts in zip(BATCH, *rows, strict=True):
        _, tokens, learnt = written(example)
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {TOK.end}
        assert counts == learnt + [False] * (len(row) - len(tokens))
        if not example.skip:
            assert tokens == TOK.encode(example.demo) + [TOK.end] and all(learnt)
    assert mask.sum(1).unique().numel() > 3


# ---- The loss ----------------------------------------------------------------------


def test_loss_is_minus_log_likelihood():
    """The mean of each response, then of the batch; one by one, without padding."""
    model, means = small_model(), []
    for example in BATCH:
        context, response, learnt = written(example)
        values = log_likelihoods(model, context, response)
        values = [x for x, on in zip(values, learnt, strict=True) if on]
        means.append(-math.fsum(values) / len(values))
    loss, extra = sft_loss(model, BATCH)
    assert loss.item() == pytest.approx(math.fsum(means) / len(means), rel=1e-12)
    assert extra == {}


def test_the_loss_reads_the_student_s_context_and_the_response_behind_it():
    """And so no other context: token for token."""
    model = small_model()
    seen = record_tokens(model)
    sft_loss(model, BATCH)
    (idx,) = seen
    for example, row in zip(BATCH, idx.tolist(), strict=True):
        context, response, _ = written(example)
        right = context + response
        assert row[: len(right)] in (right, right[:-1]), "the longest lacks its last"


def test_only_what_predicts_a_learnt_token_gets_a_gradient():
    """Not the prompt, and not what is skipped. A place's logits come from its hidden
    state, so neither or both get a gradient."""
    model, seen = small_model(), {}

    def keep(idx):
        seen["hidden"] = GPT.hidden(model, idx)
        seen["hidden"].retain_grad()
        return seen["hidden"]

    model.hidden = keep
    sft_loss(model, BATCH)[0].backward()
    for example, grad in zip(BATCH, seen["hidden"].grad, strict=True):
        context, response, learnt = written(example)
        right = [False] * (len(context) - 1) + learnt
        right += [False] * (len(grad) - len(right))
        assert [bool(g.any()) for g in grad] == right[: len(grad)]
    assert sum(len(example.skip) for example in BATCH) == 6


def test_skipped_tokens_are_context_whatever_they_are():
    """One more takes its own term out of the sum, and the rest still sees it."""
    model, cfg = small_model(), sft.Config(batch_size=1)
    prompt, demo = "garden button: lamp pearl rope", "reverse: rope pearl lamp"
    context, response, _ = written(Example(prompt, demo, ""))
    terms = [-x for x in log_likelihoods(model, context, response)]
    for n in range(len(response)):
        example = Example(prompt, demo, "", skip=tuple(range(n)))
        loss = sft_loss(model, [example], cfg)[0].item()
        right = math.fsum(terms[n:]) / (len(terms) - n)
        assert loss == pytest.approx(right, rel=1e-9)


# ---- The update --------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = sft.Config(lr=2.0, warmup_steps=4, steps=12)
    rates = [sft.get_lr(t, cfg) for t in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    for t in range(4, 13):
        assert rates[t] == pytest.approx(1 + math.cos(math.pi * (t - 4) / 8))
    assert rates[12] == 0


def test_the_warm_up_takes_at_most_half_of_a_stage_and_the_rest_falls_to_zero():
    """Else a short stage would never reach its rate, and end at its highest."""
    for steps in (1, 2, 3, 4, 7, 20, 30, 40, 41, 79, 80, 300):
        for warmup_steps in (0, 1, 10, 40, 1000):
            cfg = sft.Config(lr=2.0, warmup_steps=warmup_steps, steps=steps)
            rates = [sft.get_lr(t, cfg) for t in range(steps)]
            rising = sum(b > a for a, b in zip([0, *rates], rates, strict=False))
            assert max(rates) == 2 and min(rates) > 0
            assert rising <= max(1, steps / 2), "the first of all rises from 0"
            top = rates.index(2)
            assert rates[: top + 1] == sorted(rates[: top + 1])
            assert rates[top:] == sorted(rates[top:], reverse=True)
            assert sft.get_lr(steps, cfg) == 0
            if steps >= 20:
                assert rates[-1] < 0.03 * 2
    short = sft.Config(lr=2.0, warmup_steps=40, steps=20)
    assert [sft.get_lr(t, short) for t in (4, 9, 10)] == [1.0, 2.0, 2.0]


def test_only_matrices_decay():
    model = small_model()
    decay, rest = sft.make_optimizer(model, sft.Config(weight_decay=0.1)).param_groups
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert {p.dim() for p in decay["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    chosen = [id(p) for p in decay["params"] + rest["params"]]
    assert sorted(chosen) == sorted(id(p) for p in model.parameters())


def test_it_overfits_one_batch(tmp_path):
    """And then responds with the demonstrations, word for word."""
    torch.set_default_dtype(torch.float32)
    config = GPTConfig(
        block_size=64, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1,
        n_embd=32, n_inner=48,
    )  # fmt: skip
    student = GPT(config, make_rng(0, "weights"))
    cfg = sft.Config(
        steps=160, batch_size=8, lr=1e-2, log_every=80, beta2=0.95, dropout=0.0
    )
    sft.train(student, {"A": DEMOS}, {}, TOK, cfg, Run(tmp_path))
    assert sft_loss(student, DEMOS, cfg)[0].item() < 0.05
    contexts = [data.student_prompt(e, TOK) for e in DEMOS]
    responses = data.greedy_responses(student, contexts, TOK, 16)
    assert responses == [e.demo for e in DEMOS]
