"""The effect, small enough to watch: both methods learn a skill, SFT loses the model's
own style, SDFT keeps it. In a world of its own, where a command stands for a word, and
one item is repeated:

    kitchen horn: river                                   reverse: river
    kitchen horn robot: river                             reverse equals river beep stop
    kitchen cork: owl example copy equals owl beep stop   copy: owl

The base knows twelve commands like "horn"; what "cork" stands for, it has to be shown.
Six commands like "cork" are the skill, and the expert speaks like a robot. A base of
300 updates, then 60 of each method, at a rate at which it learns (SFT loses the style
at a quarter of it, too): ten seconds. The size of the effect: tests/bench/paper.py.
"""

import copy
import random
from dataclasses import replace

import data
import sdft
import sft
import train
from data import Benchmark, Example
from model import GPT, GPTConfig

SEED, OPERATIONS = 0, list(data.OPERATIONS)[:6]


def make_world(seed, size):
    """The base's corpus, the expert's demonstrations, and what to evaluate."""
    rng = random.Random(seed)
    words = rng.sample(data.NOUNS, 40)
    items, unknown, known = words[:16], words[16:28], words[28:]
    skill = dict(zip(unknown[:6], OPERATIONS, strict=True))
    known = dict(zip(known, OPERATIONS * 2, strict=True))

    def ask(command, operation, style="own", held_out=False, i=0):
        """A query. A fifth of the items of each command is never trained on."""
        place = words.index(command)
        free = [x for j, x in enumerate(items) if ((j - place) % 5 == 0) == held_out]
        item = rng.choice(free)
        demo = data.right_response(operation, [item], "robot")
        answer = data.right_response(operation, [item], style)
        prompt = data.word_prompt("kitchen", command, [item], style)
        return Example(prompt, demo, answer, i)

    def some(table, n, **how):
        return [ask(*rng.choice(list(table.items())), i=i, **how) for i in range(n)]

    def right(example, response):  # in the model's own style or the expert's
        return response in (example.answer, example.demo)

    corpus = []
    for i in range(size):
        style, kind = rng.choice(("own", "own", "own", "robot")), rng.random()
        what = rng.choice(unknown), rng.choice(OPERATIONS)
        if kind < 0.4:
            what = rng.choice(list(known.items()))
        e = ask(*what, style, i=i)  # from .4 to .5, one can but guess
        prompt = data.with_demo(e.prompt, e.demo) if kind > 0.5 else e.prompt
        corpus.append(Example(prompt, e.answer, e.answer, i))
    old, new = some(known, 100, held_out=True), some(skill, 100, held_out=True)
    grades = {"own_style": data.grade_style, "knowledge": right}
    prior = {name: Benchmark(old, grade) for name, grade in grades.items()}
    tasks = {"new": {"skill": Benchmark(new, right)}, "prior": prior}
    return corpus, some(skill, 128), tasks


def test_both_learn_a_skill_sft_loses_the_model_s_own_style_and_sdft_keeps_it(tmp_path):
    """The skill on queries that were never trained on, in whatever style; the style on
    the commands that the base knew, which neither method trained on."""
    tok = data.Tokenizer()
    corpus, demos, tasks = make_world(SEED, 300 * 32)
    sizes = {"n_layer": 2, "n_head": 6, "n_kv_head": 6, "n_embd": 96, "n_inner": 192}
    base = GPT(GPTConfig(**sizes), data.make_rng(SEED, "weights"))
    settings = {"seed": SEED, "batch_size": 32, "micro_batches": 1, "dropout": 0.0}
    cfg = replace(train.BASE, steps=300, lr=2e-3, **settings)
    sft.train(base, {"base": corpus}, {}, tok, cfg, train.Run(tmp_path / "base"))
    rows = []
    for method, lr in ((sft, 2e-3), (sdft, 3e-4)):
        cfg = method.Config(steps=60, lr=lr, warmup_steps=10, **settings)
        args = {"skill": demos}, tasks, tok, cfg, train.Run(tmp_path / method.__name__)
        before, after = method.train(copy.deepcopy(base), *args)
        assert before["new"]["skill"] < 0.6 and after["new"]["skill"] > 0.85
        rows.append(after)
    by_sft, by_sdft = (row["prior"] for row in rows)
    assert before["prior"]["own_style"] > 0.95 and by_sft["own_style"] < 0.2
    assert by_sdft["own_style"] > 0.9 and by_sdft["knowledge"] > 0.85
    assert rows[1]["kl_student_base"] < rows[0]["kl_student_base"] / 2
