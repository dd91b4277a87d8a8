"""sft.py and sdft.py are a pair: their diff is the method and nothing else.

The first half compares their texts; the second half tests, for both, what both promise.
"""

import ast
import difflib
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from oracles import equal_weights, gradients, make_model, rows_of

import data
import sdft
import sft
import train
from data import Benchmark, Example, make_rng
from model import GPT, GPTConfig

ROOT = Path(sft.__file__).parent
SFT, SDFT = ((ROOT / f"{name}.py").read_text() for name in ("sft", "sdft"))
ADVICE = "change both files, or move it to data.py, model.py or train.py"
TEACHER = ["make_teacher", "update_teacher"]  # functions that SFT does not have
METHOD = [*TEACHER, "get_responses", "compute_loss", "models ="]  # section 5 may differ
RULE = re.compile(r"^# ---- (.*?) -+$", re.MULTILINE)
MOST_CHANGED, MOST_LINES, MOST_COLUMNS = 80, 300, 88


def rules(source):
    return RULE.findall(source)


def section(source, number):
    """The text of a section, up to the rule of the next one."""
    parts = RULE.split(source)
    (text,) = [
        text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
        if title.startswith(f"{number}. ")
    ]
    return text


def names(source):
    """Functions and classes, in their order."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds)]


def hunks(a, b):
    """What differs, as one reads it in a terminal; empty if nothing does."""
    a, b = a.splitlines(), b.splitlines()
    lines = difflib.unified_diff(a, b, "sft.py", "sdft.py", n=1, lineterm="")
    return "\n".join(lines)


def changed(a, b):
    """Numbers of the lines (from 0) that only a has, and of those that only b has."""
    matcher = difflib.SequenceMatcher(
        None, a.splitlines(), b.splitlines(), autojunk=False
    )
    only_a, only_b = [], []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag != "equal":
            only_a += range(i, j)
            only_b += range(k, m)
    return only_a, only_b


def method_lines(text):
    """Numbers of the lines (from 0) of simple statements that name a part of the
    method, however many lines they are wrapped over. A docstring is none."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        simple = isinstance(node, ast.Assign | ast.Expr)
        if not simple or isinstance(node.value, ast.Constant):
            continue
        if any(name in ast.unparse(node) for name in METHOD):
            found |= set(range(node.lineno - 1, node.end_lineno))
    return found


def check_equal(a, b):
    if a != b:
        raise AssertionError(f"{ADVICE}\n{hunks(a, b)}")


def check_loop(a, b):
    """Each line of section 5 that differs belongs to a statement of the method."""
    for text, lines in zip((a, b), changed(a, b), strict=True):
        allowed = method_lines(text)
        for i in lines:
            if i not in allowed:
                line = text.splitlines()[i].strip()
                raise AssertionError(f"{ADVICE}: {line!r}\n{hunks(a, b)}")


def config(source):
    """The lines of class Config, as text."""
    (node,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "Config"]
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def shared_config(source):
    """The same up to the fields that SDFT adds under a heading of their own, without
    the two defaults that are each method's own best: updates and learning rate."""
    shared = config(source).split("# self-distillation")[0].rstrip()
    return re.sub(r"(?m)^(    (?:steps|lr): \w+ = )\S+", r"\1...", shared)


# ---- The text ----------------------------------------------------------------------


def test_the_section_rules_are_the_same_and_in_the_same_order():
    assert rules(SFT) == rules(SDFT)
    assert [title[:3] for title in rules(SFT)] == ["1. ", "2. ", "3. ", "4. ", "5. "]


def test_the_functions_are_the_same_apart_from_the_teacher_s_two():
    own = names(SDFT)
    assert [name for name in own if name in TEACHER] == TEACHER
    assert names(SFT) == [name for name in own if name not in TEACHER]
    assert "compute_loss" in own and "train" in own
    for number in range(1, 6):
        own = [name for name in names(section(SDFT, number)) if name not in TEACHER]
        assert names(section(SFT, number)) == own


def test_what_does_not_depend_on_the_method_is_equal_as_text():
    assert "def get_lr" in section(SFT, 4)
    check_equal(section(SFT, 4), section(SDFT, 4))


def test_the_loops_differ_only_in_lines_that_name_the_method():
    assert "def train" in section(SFT, 5)
    check_loop(section(SFT, 5), section(SDFT, 5))


def test_shared_settings_are_equal_as_text_and_in_order():
    assert "batch_size" in shared_config(SFT)
    assert len(shared_config(SFT).splitlines()) == len(config(SFT).splitlines())
    check_equal(shared_config(SFT), shared_config(SDFT))


def test_the_diff_is_short():
    lines = sum(map(len, changed(SFT, SDFT)))
    assert 0 < lines <= MOST_CHANGED, f"{lines} lines differ\n{hunks(SFT, SDFT)}"


def test_each_file_is_short_and_narrow():
    for source in (SFT, SDFT):
        lines = source.splitlines()
        assert len(lines) <= MOST_LINES
        assert max(map(len, lines)) <= MOST_COLUMNS


def imported(source):
    """The modules that a file imports, in whatever way."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [n for n in nodes if isinstance(n, ast.Import)]
    found = {alias.name for node in plain for alias in node.names}
    return found | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}


def test_the_pair_import_neither_each_other_nor_what_runs_them():
    for source in (SFT, SDFT):
        assert imported(source) == {
            "copy", "math", "dataclasses", "torch", "data", "model"
        }  # fmt: skip


def test_sft_s_file_says_nothing_about_a_teacher_but_that_it_has_none():
    doc = ast.get_docstring(ast.parse(SFT), clean=False).splitlines()
    lines = SFT.splitlines()[len(doc) :]
    in_doc, title, comment = [
        line for line in doc + lines if "teacher" in line.lower()
    ]
    assert "SFT has no teacher" in in_doc and in_doc in doc
    assert RULE.match(title) and "3. What happens to the teacher" in title
    assert comment == "# SFT has no teacher." and comment in section(SFT, 3)
    assert names(section(SFT, 3)) == []


# of the tiny world, and of a run on a machine: a trainer knows neither
FOREIGN = [
    *data.make_tasks(data.World(0), 1, 0)["prior"], *data.DOMAINS, "NOUNS", "STYLES",
    "OPERATIONS", "tqdm", "json", "Path", "os", "sys", "print", "open",
]  # fmt: skip


def foreign(source):
    """Words of FOREIGN in the code of a source, and names of files other than Python's
    anywhere in it. ("knowledge" in a comment is an English word.)"""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = "a docstring"
    code = ast.unparse(tree)  # without comments
    found = [word for word in FOREIGN if re.search(rf"\b{word}\b", code)]
    return found + re.findall(r"\b\w+\.(?:jsonl?|pt|txt|csv|png)\b", source)


def test_no_trainer_names_a_benchmark_a_file_or_a_bar():
    assert {"knowledge", "own_style", "in_context"} <= set(FOREIGN)
    assert foreign(SFT) == foreign(SDFT) == []
    for line in ('tasks["prior"]["knowledge"]', "bar = tqdm(steps)", "open(path)",
                 "# as in metrics.jsonl"):  # fmt: skip
        assert len(foreign(f"{SDFT}\n{line}\n")) == 1, line


# ---- Planted differences are caught ------------------------------------------------


@pytest.mark.parametrize(
    "old, new",
    [
        ("lr=cfg.lr", "lr=2 * cfg.lr"),  # another learning rate
        ("a cosine to 0", "a cosine to zero"),  # a comment counts, too
        ("\n\n\ndef get_lr", "\n\ndef get_lr"),  # and so does a blank line
    ],
)
def test_a_planted_difference_in_section_4_is_caught(old, new):
    text = section(SDFT, 4)
    assert text.count(old) >= 1
    with pytest.raises(AssertionError, match=ADVICE) as caught:
        check_equal(section(SFT, 4), text.replace(old, new, 1))
    message = str(caught.value)
    assert "--- sft.py\n+++ sdft.py\n@@" in message
    changes = [line for line in message.splitlines() if line[:1] in "+-"]
    assert any(new.strip() in line for line in changes) or changes[2:] == ["-"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("optimizer.step()", "optimizer.step(), optimizer.step()"),
        ("        run.all_reduce(student, sums)\n", ""),
        ("t == cfg.steps - 1 or", "t == cfg.steps or"),
        ("in place, on one stage", "on one stage"),
        ("cfg.seed, step, micro[0].id", "cfg.seed, t, micro[0].id"),
        ("        # one update\n", "        # an update\n"),
        ("        if t == 0:\n", "        if t == 0:  # compute_loss\n"),
        ("loss.backward()", "(loss + student.ln_f.weight.sum()).backward()"),
    ],
)
def test_a_planted_difference_in_the_loop_is_caught(old, new):
    text = section(SDFT, 5)
    assert text.count(old) == 1
    with pytest.raises(AssertionError, match=ADVICE) as caught:
        check_loop(section(SFT, 5), text.replace(old, new))
    assert "\n@@" in str(caught.value)


def test_a_planted_setting_is_caught():
    for old, new in (
        ("beta2: float = 0.999", "beta2: float = 0.95"),
        ("# of AdamW, on matrices", "# of AdamW"),
    ):
        assert old in SDFT
        with pytest.raises(AssertionError, match=ADVICE):
            check_equal(shared_config(SFT), shared_config(SDFT.replace(old, new)))


# ---- What both promise -------------------------------------------------------------

TOK = data.Tokenizer()
WORLD = data.World(0)
DEMOS = data.make_demos(WORLD, "A", 16, 0)
BATCH = [  # prompts and demonstrations of several lengths
    *DEMOS[:4],
    Example("garden button: owl", "bag", "", id=4),
    Example("kitchen kettle robot: apple", "copy equals apple beep stop", "", id=5),
    Example("harbour violin: candle spoon tower bag", "bag", "", id=6),
    Example("harbour fox: candle spoon tower", "last gives tower done sir", "", id=7),
]
SETTINGS = {"batch_size": len(BATCH), "max_new_tokens": 8}
BOTH = pytest.mark.parametrize("module", [sft, sdft], ids=["sft", "sdft"])


def small_model(seed=0):
    """In float64; about a fifth of what it predicts is the end."""
    sizes = {"vocab_size": TOK.vocab_size, "n_tokens": TOK.n_tokens, "n_layer": 1}
    return make_model(seed, end=TOK.end, **sizes)


@functools.cache
def the_teacher():
    return sdft.make_teacher(small_model(1))


def respond(module, student, batch=BATCH, **changes):
    cfg = module.Config(**{**SETTINGS, **changes})
    if module is sft:
        return sft.get_responses(batch, TOK, "cpu")
    return sdft.get_responses(student, batch, TOK, cfg, 1)


def loss_of(module, student, batch, response, mask, step=1, **changes):
    """The loss and what is recorded beside it; SDFT's teacher is another model."""
    cfg = module.Config(**{**SETTINGS, **changes})
    if module is sft:
        return sft.compute_loss(student, batch, response, mask, TOK, cfg)
    both = student, the_teacher()
    return sdft.compute_loss(*both, batch, response, mask, TOK, cfg, step)


@pytest.mark.usefixtures("float64")
@BOTH
def test_garbage_behind_the_end_changes_nothing(module):
    """Not a bit of loss or gradient."""
    student = small_model()
    response, mask = respond(module, student)
    garbage = torch.randint(0, TOK.n_tokens, response.shape, generator=make_rng(1))
    other = torch.where(mask, response, garbage)
    assert not torch.equal(other, response)
    a, _ = loss_of(module, student, BATCH, response, mask)
    b, _ = loss_of(module, student, BATCH, other, mask)
    assert torch.equal(a, b) and a > 0.1
    assert all(map(torch.equal, gradients(student, a), gradients(student, b)))


@pytest.mark.usefixtures("float64")
@BOTH
def test_a_row_s_response_and_loss_do_not_depend_on_its_neighbours(module):
    student = small_model()
    response, mask = respond(module, student)
    rows, total = rows_of(response, mask), 0
    for i, example in enumerate(BATCH):
        alone = respond(module, student, [example])
        assert rows_of(*alone) == [rows[i]]
        total += loss_of(module, student, [example], *alone)[0].item()
    loss, _ = loss_of(module, student, BATCH, response, mask)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert len({len(row) for row in rows}) > 2, "with padding, that is"


@pytest.mark.usefixtures("float64")
@BOTH
def test_a_long_and_a_short_response_weigh_the_same(module):
    """And duplicating a row keeps the mean."""
    student = small_model()
    long = torch.tensor([TOK.encode("copy: bag bag bag bag bag") + [TOK.end]])
    short = torch.full_like(long, TOK.end)
    masks = torch.ones_like(long).bool(), torch.arange(long.size(1))[None] < 1
    one = [
        loss_of(module, student, BATCH[:1], row, mask, batch_size=1)[0]
        for row, mask in zip((long, short), masks, strict=True)
    ]
    rows, mask = torch.cat((long, short)), torch.cat(masks)
    pair = [BATCH[0]] * 2
    mean = loss_of(module, student, pair, rows, mask, batch_size=2)[0].item()
    assert mean == pytest.approx(sum(one).item() / 2, rel=1e-12)
    assert abs(one[0] - one[1]) > 1e-3, "else this shows nothing"
    twice = rows.repeat(2, 1), mask.repeat(2, 1)
    again = loss_of(module, student, pair * 2, *twice, batch_size=4)[0].item()
    assert again == pytest.approx(mean, rel=1e-12)


@pytest.mark.usefixtures("float64")
@BOTH
@pytest.mark.parametrize("n", [2, 4, 8])
def test_gradients_and_records_do_not_depend_on_the_split(module, n):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, the responses sampled part by part."""
    student, cfg = small_model(), module.Config(**SETTINGS)

    def accumulated(n):
        sums = {}
        student.zero_grad()
        for micro in data.my_micro_batches(BATCH, n):
            response, mask = respond(module, student, micro)
            loss, extra = loss_of(module, student, micro, response, mask, step=10)
            loss.backward()
            module.accumulate(sums, loss, response, mask, extra, TOK, cfg)
        values = {key: value.item() for key, value in sums.items()}
        return values, [p.grad.clone() for p in student.parameters()]

    whole, by_parts = accumulated(1), accumulated(n)
    for a, b in zip(whole[1], by_parts[1], strict=True):
        assert (a - b).abs().max() < 1e-13
    assert max(g.abs().max() for g in whole[1]) > 1e-2
    assert by_parts[0] == pytest.approx(whole[0], rel=1e-6)
    response, mask = respond(module, student)
    rows = rows_of(response, mask)
    assert whole[0]["tokens"] == sum(map(len, rows))
    assert whole[0]["response_length"] == pytest.approx(sum(map(len, rows)) / 8)
    assert whole[0]["eos_rate"] == sum(row[-1] == TOK.end for row in rows) / 8
    assert len(whole[0]) == (4 if module is sft else 7)


@BOTH
def test_a_context_that_does_not_fit_is_refused_and_nothing_is_cut(module):
    """SFT's longest is prompt and demonstration, SDFT's the teacher's with response."""
    batch = [Example("garden button: owl", " ".join(["apple"] * 60), "")]
    student = small_model()
    response, mask = respond(module, student, batch)
    with pytest.raises(ValueError, match=r"need \d+ > block_size 64; nothing is cut"):
        loss_of(module, student, batch, response, mask, batch_size=1)


# ---- The loops ---------------------------------------------------------------------


def records(module, folder, tasks, student=None, **changes):
    """Three steps in a folder: the evaluations, and the lines of metrics.jsonl."""
    if student is None:
        config = GPTConfig(
            vocab_size=TOK.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32,
            n_inner=48,
        )  # fmt: skip
        student = GPT(config, make_rng(0, "weights"))
    settings = {"steps": 3, "batch_size": 4, "log_every": 1, "max_new_tokens": 6}
    cfg, stages = module.Config(**{**settings, **changes}), {"A": DEMOS[:8]}
    if tasks:
        stages = {name: DEMOS[:8] for name in list(tasks["new"])[:1]}
    args = student, stages, tasks, TOK, cfg, train.Run(folder)
    evaluations = module.train(*args)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return evaluations, [json.loads(line) for line in lines]


def test_records_of_sft_have_no_key_that_those_of_sdft_lack(tmp_path):
    """And both start from the same base: their first evaluations agree."""
    tasks = data.make_tasks(WORLD, 4, 0)
    _, by_sft = records(sft, tmp_path / "sft", tasks)
    _, by_sdft = records(sdft, tmp_path / "sdft", tasks)
    assert len(by_sft) == len(by_sdft) == 5
    for a, b in zip(by_sft, by_sdft, strict=True):
        assert a["step"] == b["step"] and a["skill"] == b["skill"]
        assert [key for key in b if key in a] == list(a), "in the same order, too"
    for key in ("new", "prior", "kl_student_base", "responses"):
        assert by_sft[0][key] == by_sdft[0][key]
    more = {key for record in by_sdft for key in record}
    more -= {key for record in by_sft for key in record}
    assert "kl_student_teacher" in more


@BOTH
def test_tasks_of_one_s_own_run_in_both(module, tmp_path, capsys):
    """Other names, other texts, any function as a grade, and no prior benchmark."""
    sums = [Example(f"{a} + {a} = ?", f"{2 * a}", f"{2 * a}", id=a) for a in range(5)]
    grade = functools.partial(lambda example, text, sign: sign in text, sign="<")
    tasks = {"new": {"sums": Benchmark(sums, grade)}, "prior": {}}
    evaluations, lines = records(module, tmp_path / "a", tasks, batch_size=2)
    assert [row["skill"] for row in lines] == ["sums"] * 5
    assert [row["new"].keys() for row in evaluations] == [{"sums"}] * 2
    assert [row["prior"] for row in evaluations] == [{}, {}]
    assert "new sums" in capsys.readouterr().out
    names = "mine", "yours"
    tasks["prior"] = {name: Benchmark(sums[1:], data.grade_items) for name in names}
    evaluations, _ = records(module, tmp_path / "b", tasks, batch_size=2)
    assert [tuple(row["prior"]) for row in evaluations] == [names, names]
    assert evaluations[0]["responses"][1]["prompt"] == sums[1].prompt


@pytest.mark.usefixtures("float64")
@BOTH
def test_the_loop_evaluates_when_it_is_due_and_returns_the_ends_of_stages(
    module, tmp_path
):
    """The base first, each stage's end, and every eval_every updates in between."""
    one = Benchmark(DEMOS[:2], data.grade_items)
    tasks = {"new": {"A": one, "B": one}, "prior": {}}
    student = small_model()
    cfg = module.Config(
        steps=4, batch_size=2, eval_every=3, max_new_tokens=4, log_every=9
    )
    stages = {"A": DEMOS[:4], "B": DEMOS[4:8]}
    rows = module.train(student, stages, tasks, TOK, cfg, train.Run(tmp_path))
    seen = [(row["step"], row["skill"], row["stage_end"]) for row in rows]
    assert seen == [
        (0, "A", False), (3, "A", False), (4, "A", True), (7, "B", False),
        (8, "B", True),
    ]  # fmt: skip


@pytest.mark.usefixtures("float64")
@BOTH
def test_a_step_whose_loss_is_not_finite_is_not_made(module, tmp_path):
    """Weights stay what they were; the error names the step and the examples."""
    student = small_model()
    with torch.no_grad():
        student.ln_f.weight[1] = math.inf
    before = small_model()
    before.load_state_dict(student.state_dict())
    with pytest.raises(FloatingPointError, match=r"step 0: loss nan.*\[\d, .*\d\]"):
        records(module, tmp_path, {}, student)
    assert equal_weights(student, before)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.usefixtures("float64")
@BOTH
def test_a_step_whose_gradient_is_not_finite_is_not_made(module, tmp_path, monkeypatch):
    """Though its loss is: step 1, after a good one, which is what stays."""
    compute_loss, student, seen = module.compute_loss, small_model(), []

    def broken(student, *args):
        loss, extra = compute_loss(student, *args)
        seen.append([p.detach().clone() for p in student.parameters()])
        if len(seen) == 2:
            loss = loss + 0 * (student.ln_f.weight - student.ln_f.weight).sum().sqrt()
        return loss, extra

    monkeypatch.setattr(module, "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="step 1: loss [0-9.]+, .* norm nan"):
        records(module, tmp_path, {}, student)
    assert all(map(torch.equal, student.parameters(), seen[1]))
    assert not all(map(torch.equal, seen[0], seen[1]))


@BOTH
def test_a_loop_of_more_examples_than_there_are_is_refused(module, tmp_path):
    with pytest.raises(AssertionError, match="a batch of 9 from 8 examples"):
        records(module, tmp_path / "a", {}, batch_size=9)
    with pytest.raises(AssertionError, match="4 examples in 1 x 3"):
        records(module, tmp_path / "b", {}, micro_batches=3)
