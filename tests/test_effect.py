"""The effect, small enough to watch: both methods learn a skill, SFT loses the model's
own style, SDFT keeps it. In a world of its own, where a command stands for an operation
and there is but one item:

    kitchen horn: river                                    reverse: river
    kitchen horn robot: river                              reverse equals river beep
    kitchen cork: owl example copy equals owl beep stop    copy: owl

The base knows twelve commands like "horn"; what "cork" stands for, it has to be shown.
Six commands like "cork" are the skill, and the expert speaks like a robot. A base of
400 updates, then 200 of SFT and 60 of SDFT at one learning rate: about ten seconds.
(Seeds 0 to 7: both learn all of it; the own style is at .00 after SFT and at .80 to
1.00 after SDFT, and KL(student || base) at 2.4 to 3.6 and at .41 to .46.)
The size of the effect in a larger world, with its prior skills: tests/bench/paper.py.
"""

import copy
import random
from dataclasses import replace

import pytest

import data
import sdft
import sft
import train
from data import Benchmark, Example
from model import GPT, GPTConfig

SEED, OPERATIONS = 0, list(data.OPERATIONS)[:6]


def make_world(seed, size):
    """The base's corpus, the demonstrations of the skill, and what to evaluate."""
    rng = random.Random(seed)
    words = rng.sample(data.NOUNS, 40)
    items, unknown = words[:16], words[16:28]
    known = dict(zip(words[28:], OPERATIONS * 2, strict=True))
    skill = dict(zip(unknown[:6], OPERATIONS, strict=True))

    def ask(command, operation, style="own", held_out=False, i=0):
        """A query. A fifth of all pairs of command and item is never trained on."""
        item = rng.choice(items)
        while ((words.index(command) + items.index(item)) % 5 == 0) != held_out:
            item = rng.choice(items)
        demo, answer = (
            data.right_response(operation, [item], each) for each in ("robot", style)
        )
        prompt = data.word_prompt("kitchen", command, [item], style)
        return Example(prompt, demo, answer, i)

    def some(table, n, **how):
        return [ask(*rng.choice(list(table.items())), i=i, **how) for i in range(n)]

    corpus = []
    for i in range(size):
        style, kind = rng.choice(("own", "own", "own", "robot")), rng.random()
        what = rng.choice(unknown), rng.choice(OPERATIONS)
        if kind < 0.4:
            what = rng.choice(list(known.items()))
        query = ask(*what, style, i=i)  # a tenth guesses: nothing is known, nor shown
        shown = data.with_demo(query.prompt, query.demo) if kind > 0.5 else query.prompt
        corpus.append(replace(query, prompt=shown, demo=query.answer))

    def right(example, response):  # in the model's own style or the expert's
        return response in (example.answer, example.demo)

    old = some(known, 100, held_out=True)
    prior = {"own_style": data.grade_style, "knowledge": right}
    return corpus, some(skill, 128), {
        "new": {"skill": Benchmark(some(skill, 100, held_out=True), right)},
        "prior": {name: Benchmark(old, grade) for name, grade in prior.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Of the base and of the end, by method."""
    folder, tok = tmp_path_factory.mktemp("effect"), data.Tokenizer()
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 64, "n_inner": 128}
    base = GPT(GPTConfig(**sizes), data.make_rng(SEED, "weights"))
    few = {"steps": 400, "batch_size": 32, "micro_batches": 1}
    cfg = replace(train.BASE, **few, lr=2e-3, dropout=0.0)
    corpus, demos, tasks = make_world(SEED, cfg.steps * cfg.batch_size)
    sft.train(base, {"base": corpus}, {}, tok, cfg, train.Run(folder / "base"))
    rows = {}
    for method, steps in ((sft, 200), (sdft, 60)):
        cfg = method.Config(
            steps=steps, batch_size=32, lr=5e-4, warmup_steps=10, dropout=0.0
        )
        args = {"skill": demos}, tasks, tok, cfg, train.Run(folder / method.__name__)
        rows[method.__name__] = method.train(copy.deepcopy(base), *args)
    return rows


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_both_methods_learn_the_skill(method, evaluations):
    """On queries that were never trained on, in whatever style."""
    before, after = evaluations[method]
    assert before["new"]["skill"] < 0.7 and after["new"]["skill"] > 0.85


def test_sft_loses_the_model_s_own_style_and_sdft_keeps_it(evaluations):
    """On the commands that the base knew, which neither method trained on."""
    before, by_sft = (row["prior"]["own_style"] for row in evaluations["sft"])
    by_sdft = evaluations["sdft"][-1]["prior"]["own_style"]
    assert before > 0.95 and by_sft < 0.2 and by_sdft > 0.6


def test_sdft_keeps_what_the_model_knew_and_stays_closer_to_it(evaluations):
    rows = {method: both[-1] for method, both in evaluations.items()}
    assert rows["sdft"]["prior"]["knowledge"] > 0.6
    assert rows["sdft"]["kl_student_base"] < rows["sft"]["kl_student_base"] / 2
