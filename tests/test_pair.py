"""sft.py and sdft.py are a pair: their diff is the method and nothing else."""

import ast
import difflib
import json
import re
from pathlib import Path

import pytest

import data
import sdft
import sft
from data import make_rng
from model import GPT, GPTConfig

ROOT = Path(sft.__file__).parent
SFT, SDFT = ((ROOT / f"{name}.py").read_text() for name in ("sft", "sdft"))
ADVICE = "change both files, or move it to data.py or model.py"
TEACHER = ["make_teacher", "update_teacher"]  # functions that SFT does not have
METHOD = [*TEACHER, "get_responses", "compute_loss", "models ="]  # section 5 may differ
RULE = re.compile(r"^# ---- (.*?) -+$", re.MULTILINE)
MOST_CHANGED, MOST_LINES, MOST_COLUMNS = 90, 320, 88


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
    assert "def evaluate" in section(SFT, 4)
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


def test_the_pair_do_not_import_each_other():
    for source, other in ((SFT, "sdft"), (SDFT, "sft")):
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import)]
        imported = {alias.name for node in nodes for alias in node.names}
        nodes = ast.walk(ast.parse(source))
        imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        assert "data" in imported and other not in imported


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
        ("        add_up(student, sums)\n", ""),
        ("t == cfg.steps - 1 or", "t == cfg.steps or"),
        ("in place, on one stage", "on one stage"),
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


# ---- The records -------------------------------------------------------------------


def records(module, folder):
    """The records of three steps, with an evaluation before and after."""
    tok, world = data.Tokenizer(), data.World(0)
    config = GPTConfig(
        vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32,
        n_inner=48,
    )  # fmt: skip
    student = GPT(config, make_rng(0, "weights"))
    stages = {"A": data.make_demos(world, "A", 8, 0)}
    cfg = module.Config(steps=3, batch_size=4, log_every=1, max_new_tokens=6)
    folder.mkdir()
    tasks = data.make_tasks(world, 4, 0)
    evaluations = module.train(student, stages, tasks, tok, cfg, folder)
    assert len(evaluations) == 2
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_records_of_sft_have_no_key_that_those_of_sdft_lack(tmp_path):
    """And both start from the same base: their first evaluations agree."""
    by_sft, by_sdft = records(sft, tmp_path / "sft"), records(sdft, tmp_path / "sdft")
    assert len(by_sft) == len(by_sdft) == 5
    for a, b in zip(by_sft, by_sdft, strict=True):
        assert a["step"] == b["step"] and a["skill"] == b["skill"]
        assert [key for key in b if key in a] == list(a), "in the same order, too"
    for key in ("new", "prior", "kl_student_base", "samples"):
        assert by_sft[0][key] == by_sdft[0][key]
    more = {key for record in by_sdft for key in record}
    more -= {key for record in by_sft for key in record}
    assert "kl_student_teacher" in more
