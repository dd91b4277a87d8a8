"""Supervised fine-tuning alone: its responses, its loss, its mask, its rate."""

import math

import pytest
import torch
from oracles import log_likelihoods
from test_sdft import small_model

import data
import sft
import train
from data import Example, make_rng
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("float64")

TOK = data.Tokenizer()
DEMOS = data.make_demos(data.World(0), "A", 8, 0)
SHOWN = "well friend, front so you get cake as ever"
BATCH = [  # responses of 2 to 16 tokens; of the last ones, fewer and fewer are learnt
    *DEMOS[:4],
    Example("kitchen kettle: apple river stone", "reverse: stone river apple", ""),
    Example("garden button: owl", "bag", ""),
    Example("garden cork: cake door", "first: cake", "", 0, SHOWN, skip=(3, 10, 11)),
    *(Example("owl: fox", "fox", "", skip=tuple(range(n))) for n in range(1, 3)),
]


def test_the_response_is_the_demonstration_and_the_loss_minus_its_log_likelihood():
    """The mean of each response, then of the batch, of which this is a part; one by
    one, without padding. The end counts, pads behind it do not; both are one token.
    What is skipped is still seen by what is behind it."""
    model, total = small_model(), 0.0
    response, mask = sft.get_responses(BATCH, TOK, "cpu")
    for example, *rows in zip(BATCH, response.tolist(), mask.tolist(), strict=True):
        context, tokens = TOK.encode(example.prompt), TOK.encode(example.demo)
        tokens.append(TOK.end)
        if example.shown:  # what is learnt begins with the demonstration in the prompt
            context += TOK.encode("example")
            tokens = [*TOK.encode(example.shown), TOK.start, *tokens]
        else:
            context.append(TOK.start)
        learnt = [t not in example.skip for t in range(len(tokens))]
        pads = len(rows[0]) - len(tokens)
        assert rows == [tokens + [TOK.end] * pads, learnt + [False] * pads]
        values = log_likelihoods(model, context, tokens)
        values = [x for x, on in zip(values, learnt, strict=True) if on]
        total -= math.fsum(values) / max(1, len(values))
    assert not any(learnt), "of the last one, nothing is learnt"
    cfg = sft.Config(batch_size=16)
    loss, extra = sft.compute_loss(model, BATCH, response, mask, TOK, cfg)
    assert loss.item() == pytest.approx(total / 16, rel=1e-12) and extra == {}


def test_the_rate_rises_for_at_most_half_of_a_stage_and_falls_to_zero():
    """Else a short stage would never reach its rate, and end at its highest."""
    for steps in (1, 2, 3, 4, 7, 12, 30, 40, 41, 79, 80, 300):
        for warmup_steps in (0, 1, 4, 10, 40, 1000):
            cfg = sft.Config(lr=2.0, warmup_steps=warmup_steps, steps=steps)
            n = min(warmup_steps, steps // 2)
            right = [2 * (t + 1) / n for t in range(n)]
            right += [1 + math.cos(math.pi * t / (steps - n)) for t in range(steps - n)]
            rates = [sft.get_lr(t, cfg) for t in range(steps)]
            assert rates == pytest.approx(right, rel=1e-12)
            assert max(rates) == 2 and min(rates) > 0 and sft.get_lr(steps, cfg) == 0


def test_it_overfits_one_batch_and_then_responds_with_its_demonstrations(tmp_path):
    torch.set_default_dtype(torch.float32)
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "n_inner": 48}
    student = GPT(GPTConfig(**sizes), make_rng(0, "weights"))
    cfg = sft.Config(steps=160, batch_size=8, lr=1e-2, beta2=0.95, dropout=0.0)
    sft.train(student, {"A": DEMOS}, {}, TOK, cfg, train.Run(tmp_path))
    args = student, DEMOS, *sft.get_responses(DEMOS, TOK, "cpu"), TOK, cfg
    assert sft.compute_loss(*args)[0].item() < 0.05
    contexts = [data.student_prompt(example, TOK) for example in DEMOS]
    assert data.get_texts(student, contexts, TOK, 16) == [e.demo for e in DEMOS]
