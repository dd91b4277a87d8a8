"""sft.py and sdft.py are a pair: their diff is the method, and the rest is shared."""

import ast
import difflib
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from oracles import close, equal_weights, log_likelihoods, rows_of
from test_sdft import BATCH, CFG, DEMOS, TOK, small_model, train_by_hand, train_in

import data
import sdft
import sft
import train
from data import Benchmark, Example, make_rng

pytestmark = pytest.mark.usefixtures("float64")
BOTH = pytest.mark.parametrize("module", [sft, sdft], ids=["sft", "sdft"])

# ---- The text ----------------------------------------------------------------------

SFT, SDFT = (Path(module.__file__).read_text() for module in (sft, sdft))
TEACHER = ["make_teacher", "update_teacher"]  # functions that SFT does not have
METHOD = [*TEACHER, "get_responses", "compute_loss", "models ="]  # section 5 may differ


def sections(source):
    """The text before the first rule, and then {title: text}."""
    head, *parts = re.split(r"(?m)^# ---- (.*?) -+$", source)
    return head, dict(zip(parts[::2], parts[1::2], strict=True))


def names(source):
    """Functions and classes, in their order."""
    return [node.name for node in ast.parse(source).body if hasattr(node, "name")]


def shared(source):
    """What does not depend on the method, as lines: no docstring, loss to import,
    sections 1 to 3, settings that SDFT adds under a heading of their own, the two
    defaults that are each method's own best, and no statement of section 5 that names a
    part of the method, however many lines it is wrapped over."""
    head, parts = sections(source)
    head = head.split('"""', 2)[2].split("# self-distillation")[0].rstrip()
    head = re.sub(r"(?m)^from model import .*", "", head)
    head = re.sub(r"(?m)(?<=^    )(steps: int|lr: float) = \S+", "", head)
    *_, rest, loop = parts.values()
    own = set()
    for node in ast.walk(ast.parse(loop)):
        simple = isinstance(node, ast.Assign | ast.Expr)
        if simple and not isinstance(node.value, ast.Constant):  # a docstring
            if any(name in ast.unparse(node) for name in METHOD):
                own |= set(range(node.lineno - 1, node.end_lineno))
    lines = [line for i, line in enumerate(loop.splitlines()) if i not in own]
    return [*head.splitlines(), *rest.splitlines(), *lines]


def hunks(a, b):
    """What differs, as one reads it in a terminal."""
    return [line for line in difflib.ndiff(a, b) if line[:2] in ("- ", "+ ")]


def test_the_diff_is_short_and_functions_are_the_same_but_for_the_teacher_s():
    assert 0 < len(hunks(SFT.splitlines(), SDFT.splitlines())) <= 80
    own, its = sections(SFT)[1], sections(SDFT)[1]
    assert list(own) == list(its)
    assert [title[:3] for title in own] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert [name for name in names(SDFT) if name in TEACHER] == TEACHER
    for a, b in zip(own.values(), its.values(), strict=True):
        assert names(a) == [name for name in names(b) if name not in TEACHER]
    assert {"Config", "compute_loss", "get_lr", "train"} <= set(names(SFT))


def test_what_does_not_depend_on_the_method_is_equal_as_text():
    advice = "change both files, or move it to data.py, model.py or train.py"
    assert not hunks(shared(SFT), shared(SDFT)), advice
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
        assert hunks(shared(SFT), shared(SDFT.replace(old, new))), new


def test_sft_s_file_says_nothing_about_a_teacher_but_that_it_has_none():
    in_doc, title, comment = [x for x in SFT.splitlines() if "teacher" in x.lower()]
    assert "SFT has no teacher" in in_doc and in_doc in SFT.split('"""')[1]
    assert title.startswith("# ---- 3. ") and comment == "# SFT has no teacher."
    assert comment in sections(SFT)[1]["3. What happens to the teacher"]


FOREIGN = {  # of the tiny world, and of a run on a machine: a trainer knows neither
    *data.make_tasks(data.World(0), 1, 0)["prior"], *data.DOMAINS, "NOUNS", "STYLES",
    "OPERATIONS", "tqdm", "json", "Path", "os", "sys", "print", "open",
}  # fmt: skip


def foreign(source):
    """Words of FOREIGN in code, and names of files, also in comments."""
    words = set(re.findall(r"\w+", re.sub("#.*", "", source)))
    files = re.findall(r"\w\.(?:jsonl?|pt|txt|csv|png)\b", source)
    return [*words & FOREIGN, *files]


def test_no_trainer_names_a_benchmark_a_file_or_a_bar():
    """What it may import: see test_reliability."""
    assert foreign(SFT) == foreign(SDFT) == []
    for line in ('tasks["in_context"]', "bar = tqdm(steps)", "open(path)", "data.NOUNS",
                 "# as in metrics.jsonl"):  # fmt: skip
        assert len(foreign(f"{SDFT}\n{line}\n")) == 1, line


# ---- What both promise -------------------------------------------------------------


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


OF_RESPONSES = "tokens", "response_length", "eos_rate"  # see the test above


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
        for key in line.keys() - {"step", "skill", "seconds", *OF_RESPONSES}:
            digits = 1e-6 if i else 1e-9  # torch clips to 1e-6 less
            assert line[key] == pytest.approx(right[key], rel=digits, abs=1e-12), key
    close([*student.parameters()], [*by_hand.parameters()], 1e-7)
    saved = train.read_run(tmp_path / "checkpoint.pt")["models"]
    if module is sdft:
        student.load_state_dict(saved["teacher"])
        close([*student.parameters()], [*teacher.parameters()], 1e-7)
        assert equal_weights(student, small_model()) == (cfg.ema_rate == 0)
        equal = map(torch.equal, *(saved[name].values() for name in saved))
        assert all(equal) == (cfg.ema_rate == 1)


def test_the_loops_evaluate_record_and_save_when_it_is_due(tmp_path, capsys):
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
    for a, b in zip(*found, strict=True):
        assert [key for key in b if key in a] == list(a), "in the same order, too"
    for key in ("new", "prior", "kl_student_base", "responses"):
        assert found[0][0][key] == found[1][0][key], "of the same base"


# ---- SFT alone ---------------------------------------------------------------------

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
