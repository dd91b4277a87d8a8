"""The direction of the effect, small: a base model of its own, then both methods.

Two operations in each domain, 12 known commands, 24 items, four styles, one skill; a
base half as wide, no dropout, batches of 32, and 120 updates for both methods, each at
a rate at which it learns. About a minute on two free cores. The size of the effect:
tests/bench/paper.py.
"""

import copy
from dataclasses import replace

import pytest

import data
import sdft
import sft
import train
from model import GPT, GPTConfig

WORDS = {
    "OPERATIONS": ("first", "last", "second", "copy", "reverse", "rotate"),
    "STYLES": ("own", "robot", "formal", "expert"),
}
SEED = 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small world, its base model, and what both methods have made of it."""
    with pytest.MonkeyPatch.context() as patch:
        for table, kept in WORDS.items():
            whole = getattr(data, table)
            patch.setattr(data, table, {name: whole[name] for name in kept})
        patch.setattr(data, "NOUNS", data.NOUNS[:24])
        patch.setattr(data, "KNOWN", 12)
        tok, world = data.Tokenizer(), data.World(SEED)
        config = GPTConfig(n_layer=3, n_head=12, n_kv_head=12, n_embd=96, n_inner=256)
        base = GPT(config, data.make_rng(SEED, "weights"))
        cfg = replace(
            train.BASE, seed=SEED, steps=1000, batch_size=32, warmup_steps=50,
            dropout=0.0,
        )  # fmt: skip
        corpus = data.make_base_corpus(world, tok, cfg.steps * cfg.batch_size, SEED)
        folder = tmp_path_factory.mktemp("small")
        sft.train(base, {"base": corpus}, {}, tok, cfg, train.Run(folder / "base"))
        tasks = data.make_tasks(world, size=100, seed=SEED)
        stages = {"A": data.make_demos(world, "A", 128, seed=SEED)}
        rows = {}
        for method, lr in ((sft, 1e-3), (sdft, 3e-4)):  # rates at which they learn
            cfg = method.Config(
                steps=120, batch_size=32, lr=lr, warmup_steps=10, dropout=0.0
            )
            run = train.Run(folder / method.__name__)
            student = copy.deepcopy(base)
            rows[method.__name__] = method.train(student, stages, tasks, tok, cfg, run)
        return rows


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_both_methods_learn_the_skill(method, small):
    before, after = small[method]
    assert before["new"]["A"] < 0.6
    assert after["new"]["A"] > 0.9


def test_sft_loses_the_model_s_own_style_on_prior_prompts(small):
    before, after = small["sft"]
    assert before["prior"]["own_style"] > 0.95
    assert after["prior"]["own_style"] < 0.5


def test_sdft_keeps_the_model_s_own_style_on_prior_prompts(small):
    assert small["sdft"][-1]["prior"]["own_style"] > 0.95


def test_sdft_keeps_more_of_the_prior_skills_than_sft(small):
    kept = {name: sum(rows[-1]["prior"].values()) for name, rows in small.items()}
    assert kept["sdft"] > kept["sft"] + 1  # of 5
