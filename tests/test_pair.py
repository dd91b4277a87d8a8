"""sft.py and sdft.py are a pair: their diff is the method, and the rest is shared."""

import ast
import collections
import copy
import difflib
import functools
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import torch
from oracles import close, equal_weights, log_likelihoods, rows_of
from torch.overrides import TorchFunctionMode

import data
import sdft
import sft
import train
from data import Benchmark, Example, make_rng
from model import GPT, KLS, GPTConfig

pytestmark = pytest.mark.usefixtures("float64")
BOTH = pytest.mark.parametrize("module", [sft, sdft], ids=["sft", "sdft"])
TOK = data.Tokenizer()
DEMOS = data.make_demos(data.World(0), "A", 16, 0)
BATCH = [  # prompts and demonstrations of several lengths
    *DEMOS[:5],
    Example("garden button: owl", "bag", "", id=5),
    Example("kitchen kettle robot: apple", "copy equals apple beep stop", "", id=6),
    Example("harbour violin: candle spoon tower bag", "bag", "", id=7),
]
CFG = sdft.Config(batch_size=len(BATCH), max_new_tokens=8)

SFT, SDFT = (Path(module.__file__).read_text() for module in (sft, sdft))
TEACHER = ["make_teacher", "update_teacher"]  # functions that SFT does not have
METHOD = [*TEACHER, "get_responses", "compute_loss", "models =", "student, teacher",
          "from model import", "steps: int", "lr: float"]  # may differ  # fmt: skip


def sections(source):
    """The text before the first rule, and then {title: text}."""
    head, *parts = re.split(r"(?m)^# ---- (.*?) -+$", source)
    return head, dict(zip(parts[::2], parts[1::2], strict=True))


def names(source):
    """Functions and classes, in their order."""
    return [node.name for node in ast.parse(source).body if hasattr(node, "name")]


def shared(source):
    """The lines of a file without its docstring, sections 1 to 3 and the settings that
    SDFT adds under a heading of their own."""
    head, (*_, rest, loop) = sections(source)[0], sections(source)[1].values()
    head = head.split('"""', 2)[2].split("# self-distillation")[0].rstrip()
    return (head + rest + loop).splitlines()


def hunks(a, b):
    """What differs, as one reads it in a terminal."""
    return [line for line in difflib.ndiff(a, b) if line[:2] in ("- ", "+ ")]


def test_the_diff_is_short_and_functions_are_the_same_but_for_the_teacher_s():
    in_doc, title, comment = [x for x in SFT.splitlines() if "teacher" in x.lower()]
    assert "SFT has no teacher" in in_doc and in_doc in SFT.split('"""')[1]
    assert title.startswith("# ---- 3. ") and comment == "# SFT has no teacher."
    assert 0 < len(hunks(SFT.splitlines(), SDFT.splitlines())) <= 80
    own, its = sections(SFT)[1], sections(SDFT)[1]
    assert list(own) == list(its)
    assert [title[:3] for title in own] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert [name for name in names(SDFT) if name in TEACHER] == TEACHER
    for a, b in zip(own.values(), its.values(), strict=True):
        assert names(a) == [name for name in names(b) if name not in TEACHER]
    assert {"Config", "compute_loss", "get_lr", "train"} <= set(names(SFT))


def strange(sdft):
    """Shared lines that differ from SFT's, whose code names no part of the method."""
    found = []
    for line in hunks(shared(SFT), shared(sdft)):
        code = line[2:].split("#")[0].strip()
        if code != ")" and not any(name in code for name in METHOD):
            found.append(line)
    return found


def test_what_does_not_depend_on_the_method_is_equal_as_text():
    advice = "change both files, or move it to data.py, model.py or train.py"
    assert not strange(SDFT), advice
    for old, new in (  # and differences that are planted are seen
        ("import math\n", "import math\nimport os\n"),
        ("beta2: float = 0.999", "beta2: float = 0.95"),
        ("# of AdamW, on matrices", "# of AdamW"),  # a comment counts, too
        ("\n\n\ndef get_lr", "\n\ndef get_lr"),  # and so does a blank line
        ("        run.all_reduce(student, sums)\n", ""),
        ("in place, on one stage", "on one stage"),
        ("        if t == 0:\n", "        if t == 0:  # compute_loss\n"),
        ("loss.backward()", "(loss + student.ln_f.weight.sum()).backward()"),
    ):
        assert SDFT.count(old) == 1, old
        assert strange(SDFT.replace(old, new)), new


def small_model(seed=0, **changes):
    """In float64; about a fifth of what it predicts is the end, unless end=None."""
    usual = {"vocab_size": TOK.vocab_size, "n_tokens": TOK.n_tokens, "n_layer": 1}
    return oracles.make_model(seed, **{"end": TOK.end, **usual, **changes})


@BOTH
def test_neither_the_split_nor_garbage_behind_the_end_changes_anything(module):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, responses sampled part by part: accumulation of
    gradients equals one batch, and a row does not depend on its neighbours."""
    student, found = small_model(), []
    models = (student, sdft.make_teacher(small_model(1)))[: 1 + (module is sdft)]
    for n, noise in ((1, False), (1, True), (2, True), (4, False), (8, False)):
        sums, rows = {}, []
        student.zero_grad()
        for micro in data.my_micro_batches(BATCH, n):
            args = (student, micro, TOK, CFG, 1), (micro, TOK, "cpu")
            response, mask = module.get_responses(*args[module is sft])
            if noise:
                other = torch.randint(0, 500, response.shape, generator=make_rng(n))
                response = torch.where(mask, response, other)
            args = *models, micro, response, mask, TOK, CFG, *[10] * (module is sdft)
            loss, extra = module.compute_loss(*args)
            loss.backward()
            module.accumulate(sums, loss, response, mask, extra, TOK, CFG)
            rows += rows_of(response, mask)
        sums = {key: value.item() for key, value in sums.items()}
        found.append((rows, sums, [p.grad.clone() for p in student.parameters()]))
    (rows, sums, grads), (*same, noisy_grads), *others = found
    assert same == [rows, sums] and all(map(torch.equal, grads, noisy_grads))
    for other_rows, other_sums, other_grads in others:
        assert other_rows == rows and other_sums == pytest.approx(sums, rel=1e-6)
        close(other_grads, grads, 1e-13)
    assert sums["loss"] > 0.1 and max(g.abs().max() for g in grads) > 1e-2
    assert sums["tokens"] == sum(map(len, rows)) and len(set(map(len, rows))) > 2
    assert sums["response_length"] == pytest.approx(sum(map(len, rows)) / 8)
    assert sums["eos_rate"] == sum(row[-1] == TOK.end for row in rows) / 8
    assert len(sums) == (4 if module is sft else 7)


def train_in(folder, module, student=None, stages="A", tasks=None, run=None, **changes):
    """Three updates for each stage. Returns the student and, without times, the
    evaluations and the lines of metrics.jsonl."""
    student, run = student or small_model(), run or train.Run(folder)
    cfg = {"steps": 3, "batch_size": 4, "log_every": 1, "max_new_tokens": 6, **changes}
    stages = {name: DEMOS[8 * i :][:8] for i, name in enumerate(stages)}
    rows = module.train(student, stages, tasks or {}, TOK, module.Config(**cfg), run)
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return student, *([{**x, "seconds": None} for x in each] for each in (rows, lines))


def log_p(model, context, tokens, tau=1.0):
    """Log-probabilities (R, V) of all tokens at the places of a response."""
    logits = model(torch.tensor([context + tokens]))[0, len(context) - 1 : -1]
    return torch.log_softmax(logits / tau, -1)


def by_token(student, teacher, example, cfg, step):
    """What each token of a response adds to the loss of an example, and to what is
    recorded: each model behind a context of its own."""
    bare = TOK.encode(example.prompt) + [TOK.start]
    shown = TOK.encode(f"{example.prompt} example {example.demo}") + [TOK.start]
    if not hasattr(cfg, "kl"):  # SFT
        tokens = TOK.encode(example.demo) + [TOK.end]
        return {"loss": -log_p(student, bare, tokens)[range(len(tokens)), tokens]}
    tau, n = cfg.temperature, cfg.max_new_tokens
    u = data.get_uniform([example], n, cfg.seed, step, "cpu")[0].tolist()
    tokens = oracles.sample(student, bare, u, TOK.end, tau)
    s = log_p(student, bare, tokens, tau)
    t = log_p(teacher, shown, tokens, tau).detach()
    m = ((s.exp() + t.exp()) / 2).log()
    pulls = {
        "forward": t.exp() * (t - s),
        "reverse": s.exp() * (s - t),
        "jsd": (t.exp() * (t - m) + s.exp() * (s - m)) / 2,
    }
    terms = {"loss": pulls[cfg.kl], "kl_student_teacher": pulls["reverse"]}
    terms |= {"student_entropy": -s.exp() * s, "teacher_entropy": -t.exp() * t}
    # tokens that are skipped are still seen by those behind
    return {key: x.sum(1)[cfg.skip_first_tokens :] for key, x in terms.items()}


def train_by_hand(student, stages, cfg, rates):
    """The loops in plain torch, one example after the other: the mean of a response,
    then of the batch. Returns the teacher, and the record of each step."""
    teacher, params, found = copy.deepcopy(student), [*student.parameters()], []
    for examples in stages:
        m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        for n, rate in enumerate(rates, 1):
            step, sums = len(found), collections.defaultdict(float)
            for example in data.get_batch(examples, cfg.batch_size, cfg.seed, step):
                for key, x in by_token(student, teacher, example, cfg, step).items():
                    sums[key] += x.sum() / max(1, len(x)) / cfg.batch_size
            grads = torch.autograd.grad(sums["loss"], params)
            norm = sum(g.square().sum() for g in grads).sqrt()
            sums = {key: x.item() for key, x in sums.items()}
            found.append({**sums, "lr": rate, "grad_norm": norm.item()})
            for i, p in enumerate(params):
                g = grads[i] * min(1, cfg.grad_clip / norm)
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = cfg.beta2 * v[i] + (1 - cfg.beta2) * g * g
                size = (v[i] / (1 - cfg.beta2**n)).sqrt() + 1e-8
                decay = cfg.weight_decay * p.data if p.dim() == 2 else 0
                p.data -= rate * (m[i] / (1 - 0.9**n) / size + decay)
            for t, s in zip(teacher.parameters(), params, strict=True):
                t.data += getattr(cfg, "ema_rate", 0) * (s.data - t.data)
    return teacher, found


@pytest.mark.parametrize("module, more", [
    (sft, {}), (sdft, {"ema_rate": 0.0}), (sdft, {"temperature": 0.7}),
    (sdft, {"ema_rate": 0.25, "kl": "reverse", "skip_first_tokens": 1}),
    (sdft, {"kl": "reverse", "temperature": 0.7}), (sdft, {"kl": "jsd"}),
    (sdft, {"ema_rate": 1.0, "kl": "jsd", "temperature": 0.8, "skip_first_tokens": 4}),
])  # fmt: skip
def test_training_is_what_a_loop_in_plain_torch_does(module, more, tmp_path):
    """Two stages, each with a fresh AdamW and its own warm-up; two micro-batches; some
    gradients are clipped; responses are samples of the student as it is now. The
    teacher is the base first, then averaged once after each update: to the bit, it is
    frozen at 0, and at 1 the student."""
    cfg = {"steps": 4, "warmup_steps": 2, "lr": 4e-3, "beta2": 0.9, "grad_clip": 1.0}
    cfg |= {"weight_decay": 0.5, "dropout": 0.0, "seed": 3, **more}
    student, _, lines = train_in(tmp_path, module, stages="AB", micro_batches=2, **cfg)
    cfg = module.Config(**cfg, batch_size=4, max_new_tokens=6)
    by_hand, rates = small_model(), [0.002, 0.004, 0.004, 0.002]
    teacher, found = train_by_hand(by_hand, (DEMOS[:8], DEMOS[8:]), cfg, rates)
    assert len(lines) == len(found) == 8 and max(x["grad_norm"] for x in found) > 1
    for i, (line, right) in enumerate(zip(lines, found, strict=True)):
        assert (line["step"], line["skill"]) == (i, "AB"[i // 4])
        digits = 1e-6 if i else 1e-9  # torch clips to 1e-6 less
        for key, value in right.items():
            assert line[key] == pytest.approx(value, rel=digits, abs=1e-12), key
    close([*student.parameters()], [*by_hand.parameters()], 1e-7)
    saved = train.read_run(tmp_path / "checkpoint.pt")["models"]
    if module is sdft:
        student.load_state_dict(saved["teacher"])
        close([*student.parameters()], [*teacher.parameters()], 1e-7)
        assert equal_weights(student, small_model()) == (cfg.ema_rate == 0)
        equal = map(torch.equal, *(saved[name].values() for name in saved))
        assert all(equal) == (cfg.ema_rate == 1)


def test_the_loops_evaluate_record_save_and_stop_when_it_is_due(tmp_path, capsys):
    """The base, each stage's end, after its save, and every eval_every updates. Any
    benchmark with any grade will do. SFT's records have no key that SDFT's lack."""
    sums = [Example(f"{a} + {a} = ?", f"{2 * a}", f"{2 * a}", id=a) for a in range(5)]
    grade = functools.partial(lambda example, text, sign: sign in text, sign="<")
    prior = dict.fromkeys(("my", "our"), Benchmark(sums[1:], data.grade_items))
    tasks = {"new": dict.fromkeys("AB", Benchmark(sums, grade)), "prior": prior}
    every = {"eval_every": 3, "log_every": 2, "save_every": 3, "steps": 4, "lr": 1e-2}
    found = []
    for module in (sft, sdft):
        run, saved = train.Run(tmp_path / module.__name__), []
        read = functools.partial(train.read_metrics, run.folder)
        run.save = lambda step, *_, on=saved, read=read: on.append((step, len(read())))
        _, rows, lines = train_in(None, module, None, "AB", tasks, run, **every)
        assert "new A  new B  my  our  KL(student || base)" in capsys.readouterr().out
        assert rows == [line for line in lines if "new" in line]
        assert [x["prompt"] for x in rows[0]["responses"]] == ["0 + 0 = ?", "1 + 1 = ?"]
        assert [(row["step"], row["skill"], row["stage_end"]) for row in rows] == [
            (0, "A", False), (3, "A", False), (4, "A", True), (7, "B", False),
            (8, "B", True),
        ]  # fmt: skip
        steps = [line["step"] for line in lines]  # twice: an evaluation, then a record
        assert steps == [0, 0, 2, 3, 4, 4, 6, 7, 8]
        assert saved == [(3, 3), (4, 4), (6, 6), (8, 8)], "updates, lines by then"
        kl_0, *_, kl = [row["kl_student_base"] for row in rows]
        assert abs(kl_0) < 1e-12 and kl > 1e-4, "the base stays the base"
        assert (rows[0]["teacher_gate"] is None) == (module is sft)
        found.append(lines)
        stopped = train.Run(tmp_path / f"{module.__name__} stopped")
        stopped.all_reduce = lambda _, sums: sums.update(stop=sums["stop"] + 1)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 0$"):
            train_in(None, module, run=stopped)  # another process wants it
        assert train.read_run(stopped.checkpoint)["step"] == 1
    for a, b in zip(*found, strict=True):
        assert [key for key in b if key in a] == list(a), "in the same order, too"
    for key in ("new", "prior", "kl_student_base", "responses"):
        assert found[0][0][key] == found[1][0][key], "of the same base"


def test_all_that_is_random_comes_from_seed_step_and_example(tmp_path, monkeypatch):
    """Both methods see the same examples in the same order, however many numbers the
    responses take; dropout is drawn anew for each micro-batch. The same seed gives the
    same run, and another one another."""
    seeds, found = [], []
    both = seeds.append, torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda x: [each(x) for each in both])
    tasks = {"new": {"A": Benchmark(BATCH[:1], data.grade_items)}, "prior": {}}
    for i, (seed, dropout) in enumerate([(0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)] * 2):
        more = {"seed": seed, "dropout": dropout, "micro_batches": 2, "tasks": tasks}
        found.append(train_in(tmp_path / str(i), (sft, sdft)[i // 4], **more)[1:])
    for a, same, *others in (found[:4], found[4:]):
        assert same == a and a not in others
    for run, seed in enumerate([0, 0, 1, 0] * 2):
        for step in range(3):
            batch = data.get_batch(DEMOS[:8], 4, seed, step)
            right = [data.derive_seed(seed, step, batch[i].id) for i in (0, 2)]
            assert [seeds.pop(0), seeds.pop(0)] == right, (run, step)


SHOWN = "well friend, front so you get cake as ever"
SKIPPING = [  # of 2 to 16 tokens; of the last ones, fewer and fewer are learnt
    *DEMOS[:4], *BATCH[5:7],
    Example("garden cork: cake door", "first: cake", "", 0, SHOWN, skip=(3, 10, 11)),
    *(Example("owl: fox", "fox", "", skip=tuple(range(n))) for n in range(1, 3)),
]  # fmt: skip


def test_the_response_is_the_demonstration_and_the_loss_minus_its_log_likelihood():
    """One by one, without padding. The end counts, pads behind it do not; both are one
    token. What is skipped is still seen by what is behind it."""
    model, total = small_model(), 0.0
    response, mask = sft.get_responses(SKIPPING, TOK, "cpu")
    for example, *rows in zip(SKIPPING, response.tolist(), mask.tolist(), strict=True):
        context, tokens = TOK.encode(example.prompt), TOK.encode(example.demo)
        context, tokens = [*context, TOK.start], [*tokens, TOK.end]
        if example.shown:  # what is learnt begins with the demonstration in the prompt
            context[-1:] = TOK.encode("example")
            tokens = [*TOK.encode(example.shown), TOK.start, *tokens]
        learnt = [t not in example.skip for t in range(len(tokens))]
        pads = len(rows[0]) - len(tokens)
        assert rows == [tokens + [TOK.end] * pads, learnt + [False] * pads]
        values = log_likelihoods(model, context, tokens)
        values = [x for x, on in zip(values, learnt, strict=True) if on]
        total -= math.fsum(values) / max(1, len(values))
    assert not any(learnt), "of the last one, nothing is learnt"
    cfg = sft.Config(batch_size=16)
    loss, extra = sft.compute_loss(model, SKIPPING, response, mask, TOK, cfg)
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


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_teacher_is_a_copy_in_memory_of_its_own_that_is_not_trained(tie_weights):
    """And making it leaves the student alone. Tied embeddings stay tied."""
    student = small_model(tie_weights=tie_weights)
    before, teacher = copy.deepcopy(student), sdft.make_teacher(student)
    mine, its = (
        {x.untyped_storage().data_ptr() for x in [*m.parameters(), *m.buffers()]}
        for m in (student, teacher)
    )
    assert len(mine) == len(its) and not mine & its, "no storage is shared"
    assert equal_weights(student, teacher) and equal_weights(student, before)
    assert all(map(torch.equal, student.buffers(), teacher.buffers()))
    assert teacher.dtype == student.dtype
    assert (teacher.lm_head.weight is teacher.wte.weight) == tie_weights
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert not teacher.training | any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("kl", KLS)
def test_no_gradient_reaches_the_teacher_even_if_it_asks_for_one(kl):
    """It is a constant, and keeps no graph. A step without a record measures nothing
    else; and where all tokens are skipped, the loss is 0, not NaN."""
    student, teacher, graph = small_model(), sdft.make_teacher(small_model(1)), []
    args = BATCH, *sdft.get_responses(student, BATCH, TOK, CFG, 1), TOK
    teacher.ln_f.register_forward_hook(lambda *args: graph.append(args[2].grad_fn))
    for asks, skip in (False, 0), (True, 0), (True, 100):
        student.zero_grad()
        teacher.requires_grad_(asks)
        cfg = replace(CFG, kl=kl, skip_first_tokens=skip)
        loss, extra = sdft.compute_loss(student, teacher, *args, cfg, 1)
        loss.backward()
        assert extra == {} and all(p.grad is None for p in teacher.parameters())
        learnt = [p.grad.abs().max() > 0 for p in student.parameters()]
        assert all(learnt) if skip == 0 else loss == 0 and not any(learnt)
    assert graph == [None] * 3


def make_world(seed, size):
    """The base's corpus, the expert's demonstrations, and what to evaluate, in a world
    where a command stands for a word, and one item is repeated:

    kitchen horn: river                                   reverse: river
    kitchen horn robot: river                             reverse equals river beep stop
    kitchen cork: owl example copy equals owl beep stop   copy: owl

    The base knows twelve commands like "horn"; what "cork" stands for, it has to be
    shown. Six such commands are the skill, and the expert speaks like a robot.
    """
    rng = random.Random(seed)
    words = rng.sample(data.NOUNS, 40)
    items, unknown, known = words[:16], words[16:28], words[28:]
    operations = list(data.OPERATIONS)[:6]
    skill = dict(zip(unknown[:6], operations, strict=True))
    known = dict(zip(known, operations * 2, strict=True))

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
        what = rng.choice(unknown), rng.choice(operations)
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
    the commands that the base knew, which neither method trained on. SFT loses the
    style at a quarter of its rate, too. The effect in size: tests/bench/paper.py."""
    torch.set_default_dtype(torch.float32)
    corpus, demos, tasks = make_world(0, 300 * 32)
    sizes = {"n_layer": 2, "n_head": 6, "n_kv_head": 6, "n_embd": 96, "n_inner": 192}
    base = GPT(GPTConfig(**sizes), data.make_rng(0, "weights"))
    settings = {"batch_size": 32, "micro_batches": 1, "dropout": 0.0}
    cfg = replace(train.BASE, steps=300, lr=2e-3, **settings)
    sft.train(base, {"base": corpus}, {}, TOK, cfg, train.Run(tmp_path / "base"))
    rows = []
    for method, lr in ((sft, 2e-3), (sdft, 3e-4)):
        cfg = method.Config(steps=60, lr=lr, warmup_steps=10, **settings)
        args = {"skill": demos}, tasks, TOK, cfg, train.Run(tmp_path / method.__name__)
        before, after = method.train(copy.deepcopy(base), *args)
        assert before["new"]["skill"] < 0.6 and after["new"]["skill"] > 0.85
        rows.append(after)
    by_sft, by_sdft = (row["prior"] for row in rows)
    assert before["prior"]["own_style"] > 0.95 and by_sft["own_style"] < 0.2
    assert by_sdft["own_style"] > 0.9 and by_sdft["knowledge"] > 0.85
    assert rows[1]["kl_student_base"] < rows[0]["kl_student_base"] / 2


class Waits(TorchFunctionMode):
    """Counts how often the host would wait, if every tensor that was made for a device,
    or computed from such a one, were on a GPU. What cpu() returns is on the host."""

    def __init__(self):
        super().__init__()
        self.n, self.on_host = 0, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        given += [x for each in given if isinstance(each, tuple | list) for x in each]
        inputs, name = [x for x in given if torch.is_tensor(x)], function.__name__
        here = not any(isinstance(x, torch.device) for x in given) and all(
            any(x is each for each in self.on_host) for x in inputs
        )
        by_mask = "getitem" in name and any(x.dtype == torch.bool for x in inputs[1:])
        reads = "cpu", "tolist", "item", "nonzero", "__bool__", "__int__", "__float__"
        self.n += not here and (by_mask or name in reads)
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else [result]
        self.on_host += [x for x in made if here or name == "cpu"]
        return result


def test_an_update_waits_for_a_gpu_once_for_each_token_and_five_times_more(tmp_path):
    counts = []

    class Run(train.Run):
        def progress(self, start, end):
            yield start  # the first update is recorded, which waits more often
            for step in range(start + 1, end - 1):
                with Waits() as count:
                    yield step
                counts.append(count.n)
            yield end - 1

    student = small_model(end=None)  # no response ends early
    run, cfg = Run(tmp_path), {"log_every": 100, "max_new_tokens": 7}
    train_in(tmp_path, sdft, student, run=run, **cfg)
    assert counts == [7 + 5] * 2
