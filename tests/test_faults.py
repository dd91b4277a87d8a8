"""Faults that other projects had, and that this one must not have: each test is one of
their stories, or a neighbour of it. The title of a section is their kind, by which
tests/bench/faults.py counts them.
"""

import ast
import errno
import functools
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import sys
import types
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from test_train import (
    SMALL,
    assert_refused,
    base_file,
    files_in,
    finished,
    go,
    made,
    no_training,
    start,
    stop_at,
    with_base,
    without_times,
)

import data
import model
import sdft
import sft
import train
from model import GPT, GPTConfig

__all__ = ["finished", "go", "made", "no_training", "with_base"]  # fixtures
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


# ---- What the tests share ----------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def sources_are_read_once():
    """They do not change here, and to parse them is half of so small a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "field_help", functools.cache(train.field_help))
        yield


@pytest.fixture(scope="module")
def halted(made, tmp_path_factory):
    """A folder with a run of sdft that got SIGTERM in its fourth step of nine."""
    out = tmp_path_factory.mktemp("halted") / "out"
    shutil.copytree(made / "base", out / "base")
    assert stop_at(3, signal.SIGTERM, [*SMALL, "--out", str(out)]) == 143
    return out


@pytest.fixture
def stopped(halted, tmp_path):
    """A copy of it."""
    return shutil.copytree(halted, tmp_path / "stopped")


def rewrite(path, change):
    """Change what a checkpoint holds."""
    content = train.read_checkpoint(path)
    change(content)
    train.write_checkpoint(path, content)


def tiny_gpt(seed):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_inner=16))
    with torch.no_grad():
        for p in gpt.parameters():
            p *= 10
    return gpt


# ---- deletes or overwrites -----------------------------------------------------------

USERS = (
    "thesis.tmp", "notes/checkpoint.pt.tmp", "checkpoint.pt.tmp", "checkpoint.pt",
    "metrics.jsonl", "results.json", "base.pt", "lock", "base/lock", "base/base.pt.tmp",
    "sft/notes.txt", "sft/checkpoint.pt.tmp.7", "sft/below/checkpoint.pt.tmp",
    "sft/metrics.jsonl", "sft/lock", "sdft/checkpoint.pt.tmp", "sdft/results.json",
    "sft.previous1/results.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def visited(made, tmp_path_factory):
    """A folder with files of the user in which sft has run twice, as `--out .`"""
    out = tmp_path_factory.mktemp("visited") / "my folder"
    for name in USERS:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"mine: {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        shutil.copytree(made / "base", "base", dirs_exist_ok=True)
        for _ in range(2):
            assert train.main([*SMALL, "--out", ".", "--method", "sft"]) == 0
    return out


@pytest.mark.parametrize("name", USERS)
def test_a_file_of_the_user_stays_as_it_was(name, visited):
    """In its place, or in the folder of the first run, which was kept whole."""
    mine, kept = f"mine: {name}".encode(), visited / name
    if not kept.exists() or name == "sft/metrics.jsonl":
        kept = visited / name.replace("sft/", "sft.previous2/")
    assert kept.read_bytes() == mine


def test_a_third_run_keeps_the_first(with_base, go):
    for i in range(3):
        assert go(with_base, "--method sft")[0] == 0
        (with_base / "sft" / "mark").write_text(f"run {i}")
    found = sorted(path.read_text() for path in with_base.glob("sft*/mark"))
    assert found == ["run 0", "run 1", "run 2"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "model/config.json"])
@pytest.mark.parametrize("flags", ["", "--resume"])
def test_what_a_run_without_a_checkpoint_left_is_kept(name, flags, with_base, go):
    path = with_base / "sft" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"of an": "earlier run"}\n')
    assert go(with_base, f"--method sft {flags}")[0] == 0
    assert b'{"of an": "earlier run"}\n' in files_in(with_base).values()


def test_a_run_of_one_method_leaves_the_other_methods_files(finished, go):
    before = files_in(finished / "sdft")
    assert go(finished, "--method sft")[0] == 0
    assert files_in(finished / "sdft") == before


@pytest.mark.parametrize("flags", ["--show", "--sample x", "--show {0} {0}"])
def test_what_only_reads_writes_nothing_and_takes_a_folder_in_use(flags, finished, go):
    train.lock(finished)
    before = sorted(finished.rglob("*")), files_in(finished)
    assert go(finished, flags.format(shlex.quote(str(finished))), [])[0] == 0
    assert (sorted(finished.rglob("*")), files_in(finished)) == before


# ---- which model, by which key -------------------------------------------------------

MACHINE = {"torch": "1.0", "capability": "Z80", "threads": 77, "device": "cuda",
           "processes": 8, "dtype": "torch.bfloat16"}  # fmt: skip


def where(flags="", world_size=1, dtype=torch.float32, train=train, data=data):
    """The folder that train.py gives to the base of these flags."""
    args = train.parse_args([*SMALL, *shlex.split(flags)])
    world, tok = data.World(args.seed), data.Tokenizer()
    config, cfg = train.base_settings(args, world_size)
    return train.find_base(args, config, cfg, world, tok, dtype).parent.name


SAME = ("--steps 4 --lr 1 --method both", "--demos 99 --kl jsd", "--distance own",
        "--eval-size 9 --threads 2", "--seed 0 --dropout 0 --max-new-tokens 9")
OTHERS = "--seed 1", "--base-steps 3", "--n-layer 2", "--n-embd 64"


def test_flags_that_make_another_base_change_its_key_and_no_others_do():
    """Nor does the number of processes."""
    assert {where(flags) for flags in ("", *SAME)} == {where()} == {where("", 2)}
    others = [where(), where(dtype=torch.bfloat16), *map(where, OTHERS)]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(("name", "value", "same"), [
    ("log_every", 7, True), ("save_every", 11, True), ("micro_batches", 4, True),
    ("lr", 1.0, False), ("beta2", 0.5, False), ("dropout", 0.5, False),
])  # fmt: skip
def test_a_setting_of_the_base_changes_its_key_if_it_changes_the_base(
    name, value, same, monkeypatch
):
    before = where()
    monkeypatch.setattr(train, "BASE", replace(train.BASE, **{name: value}))
    assert (where() == before) == same


EDITS = {  # of which file, what stands there, what is to stand there
    "same: a docstring": ("sft", '"""Learning rate of update', '"""The rate of update'),
    "same: a comment": ("sft", "    # one update\n", "    # one step more\n"),
    "same: of a setting": ("sft", "# of AdamW, on matrices", "# AdamW, matrices"),
    "same: of the model": ("model", '"""tokens (B, T) -> log', '"""-> log'),
    "same: a column": ("train", '  KL(student || base)"]', '  KL"]'),
    "same: a record": ("data", 'record["kl_teacher_base"], record', 'record["x"], rec'),
    "the loss": ("sft", ") / cfg.batch_size  # (B, R)", ") / 7  # (B, R)"),
    "the optimizer": ("sft", "betas=(0.9, cfg.beta2)", "betas=(0.8, cfg.beta2)"),
    "a default": ("sft", "grad_clip: float = 10.0", "grad_clip: float = 9.0"),
    "the model": ("model", "rope_theta: float = 1", "rope_theta: float = 2"),
    "the corpus": ("data", "KNOWN = 120", "KNOWN = 119"),
    "a style": ("data", '("", "gives", "done sir")', '("", "gives", "done")'),
    "what is learnt": ("data", "row[list(example.skip)] = False", "row[:0] = False"),
    "the order of a batch": ("data", "{e.prompt} {e.shown} {e.demo}", "{e.prompt}"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_changes_the_key_of_the_base_if_it_changes_the_base(
    what, tmp_path, monkeypatch
):
    (name, old, new), before = EDITS[what], where()
    real = {"train": train, "model": model, "sft": sft, "data": data}[name]
    source = Path(real.__file__).read_text()
    assert source.count(old) == 1, old
    path, edited = tmp_path / f"{name}.py", types.ModuleType(name)
    path.write_text(source.replace(old, new))
    edited.__file__ = str(path)
    if name != "model":  # of which the key reads the source only
        exec(path.read_text(), vars(edited))
    if name == "train":
        key = where(train=edited)
    else:
        monkeypatch.setattr(train, name, edited)
        monkeypatch.setattr(sft, "data", train.data)
        key = where(data=train.data)
    assert (key == before) == what.startswith("same: ")


CODE = '''
"""A module."""
import math
def f(x, *, y: int = 0, **kw):
    """A docstring."""  # a comment
    with open(f"{x!r} {math.pi:.2f}") as z, open("b"):
        return [w async for w in z if not w] or (lambda: x[1, 2:3])
class A:
    """Only this."""
'''


def test_the_key_of_code_knows_no_comments_and_docstrings(monkeypatch):
    monkeypatch.setattr(train.inspect, "getsource", lambda text: text)
    other = CODE.replace("A docstring", "Another").replace("# a comment", "")
    other = other.replace("A module", "B").replace("x, *, y", "x,  *,\n    y")
    assert train.source_of(other) == train.source_of(CODE)
    assert train.source_of(CODE.replace("2:3", "2:4")) != train.source_of(CODE)


def test_a_base_that_another_machine_made_is_used_with_a_line(with_base, go):
    rewrite(base_file(with_base), lambda content: content["machine"].update(MACHINE))
    code, out, _ = go(with_base, "--method sft")
    assert code == 0
    assert all(f"{key}: {value} -> " in out for key, value in MACHINE.items()), out


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_BASES = {  # what becomes of base.pt, and what the error says
    "damaged": (flip_a_bit, "is damaged"),
    "cut": (lambda path: os.truncate(path, 999), "cannot be read"),
    "a text": (lambda path: path.write_text("mine"), "cannot be read"),
    "a folder": (lambda path: path.unlink() or path.mkdir(), "no such file"),
    "a run of a method": (lambda path: shutil.copy(
        path.parents[2] / "sft" / "checkpoint.pt", path), "is not a base model"),
    "of other sizes": (lambda path: rewrite(
        path, lambda x: x["base"].update(n_embd=48)), "n_embd: 48 -> 32"),
    "of another seed": (lambda path: rewrite(
        path, lambda x: x["base"].update(seed=1)), "seed: 1 -> 0"),
    "of another key": (lambda path: rewrite(
        path, lambda x: x["base"].update(key="abc")), "key: abc -> "),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_BASES)
def test_a_base_that_is_none_or_another_is_refused(what, finished, go, no_training):
    (spoil, message), path = BAD_BASES[what], base_file(finished)
    spoil(path)
    assert_refused(go(finished), str(path), message)


def test_a_sample_of_a_stopped_run_says_its_step(stopped, go):
    code, out, _ = go(stopped, "--sample x", [])
    assert code == 0 and "after update 4 of 9" in out


def test_a_folder_can_be_moved(finished, tmp_path, go):
    moved = shutil.move(finished, tmp_path / "another place")
    code, out, _ = go(moved, "--sample x", [])
    assert code == 0 and "not shown" not in out
    assert go(moved, "--show", [])[0] == 0
    code, out, _ = go(moved, "--resume --method both")
    assert code == 0 and "base model: found" in out


def test_a_device_with_a_number_reads_its_own_files_again(with_base, go):
    for flags in ("", "", "--sample x"):
        code, _, err = go(with_base, f"--method sft --device cpu:0 {flags}")
        assert code == 0, err


@pytest.mark.parametrize("flags", ["--sample x", "--resume"])
@pytest.mark.parametrize("what", ["a base", "of an earlier version"])
def test_a_checkpoint_that_is_no_run_of_this_version_is_refused(
    what, flags, finished, go, no_training
):
    path = finished / "sdft" / "checkpoint.pt"
    if what == "a base":
        shutil.copy(base_file(finished), path)
    else:  # as it was before this version
        rewrite(path, lambda content: [content.pop(k) for k in ("note", "config")])
    assert_refused(go(finished, flags), str(path), "is not a run of this train.py")


@pytest.mark.parametrize(("name", "text"), [
    *[("results.json", x) for x in ("", "{}", "[]", "{", '{"seconds": 1}', "caf\xe9")],
    *[("metrics.jsonl", x) for x in ("", "[1]\n", "mine\n", '{"new": {}}\n')],
])  # fmt: skip
def test_results_of_someone_else_are_refused_with_their_place(name, text, finished, go):
    (finished / "sft" / name).write_text(text, encoding="utf-8")
    assert_refused(go(finished, "--show", []), str(finished / "sft"))
    result = go(finished, "--resume --method sft")
    assert result[0] == 0 or assert_refused(result, str(finished / "sft")) is None


def test_runs_with_other_benchmarks_are_compared_in_what_both_have(made, finished):
    path = finished / "sdft" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"own_style"', '"own_format"'))
    rows = [train.read_metrics(folder / "sdft")[-1] for folder in (made, finished)]
    lines = train.table(rows, ["one", "two"]).splitlines()
    assert "own_style" in lines[0] and "own_format" in lines[0]
    assert [line.count("nan") for line in lines] == [0, 1, 1]


def test_a_grader_of_ones_own_needs_no_name_and_has_one_digest():
    class Grader:
        def __call__(self, example, text):
            return True

    example = data.Example("Q?", "D.", "A.")
    tasks = [{"new": {"A": data.Benchmark([example], Grader())}} for _ in range(2)]
    digests = [train.settings_of(sft.Config(), GPTConfig(), ({}, x)) for x in tasks]
    assert digests[0] == digests[1]
    tasks[1]["new"]["A"].examples.append(example)
    assert train.settings_of(sft.Config(), GPTConfig(), ({}, tasks[1])) != digests[0]


# ---- reported after a resume ---------------------------------------------------------


@pytest.mark.parametrize("recorded", [0, 1, 3])
def test_seconds_count_once_what_was_before_the_stop(recorded, tmp_path, monkeypatch):
    """A clock by hand: 5 s to a record, 7 s to the save, 100 s of a pause, 1 s."""
    now = [50.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    gpt, cfg = tiny_gpt(0), sft.Config()
    models, optimizer = {"student": gpt}, sft.make_optimizer(gpt, cfg)
    record = {"skill": "A", "eos_rate": 1.0, "response_length": 5.0, "grad_norm": 1.0}
    run = train.Run(tmp_path)
    run.load(models, optimizer, cfg, {})
    for step in range(recorded):
        now[0] += 5
        run.log({**record, "step": step})
    now[0] += 7
    run.save(recorded, models, optimizer, [])
    now[0] += 100
    run = train.Run(tmp_path, resume=True)
    assert run.load(models, optimizer, cfg, {})[0] == recorded
    now[0] += 1
    run.log({**record, "step": recorded})
    seconds = [row["seconds"] for row in train.read_metrics(tmp_path)]
    assert seconds == [5.0] * recorded + [8.0]


def test_a_base_that_was_stopped_goes_on_and_counts_its_seconds(tmp_path, go):
    argv = [*SMALL, "--out", str(tmp_path), "--method", "sft"]
    assert stop_at(2, signal.SIGINT, argv) == 130
    (saved,) = tmp_path.glob("base/*/checkpoint.pt")
    records = train.read_metrics(saved.parent)
    records[0]["seconds"] = 1000.0
    text = "".join(json.dumps(record) + "\n" for record in records)
    (saved.parent / "metrics.jsonl").write_text(text)
    code, out, err = go(tmp_path, "--method sft --resume")
    assert code == 0 and "nothing to resume" in out, err
    results = json.loads((tmp_path / "sft" / "results.json").read_text())
    assert 1000 < results["seconds"]["base"] < 1060


def test_a_resume_of_nothing_says_so(made, tmp_path, go):
    for name in ("base", "sdft"):  # the other method has a run
        shutil.copytree(made / name, tmp_path / name)
    code, text, _ = go(tmp_path, "--resume --method sft")
    assert code == 0 and "nothing to resume" in text[: text.index("teacher gate")]


def test_a_resume_on_another_machine_says_that_it_is_not_exact(stopped, go):
    path = stopped / "sdft" / "checkpoint.pt"
    rewrite(path, lambda content: content["machine"].update(MACHINE))
    code, out, _ = go(stopped, "--resume")
    assert code == 0 and "goes on after update 4" in out[: out.index("teacher gate")]
    (line,) = [line for line in out.splitlines() if "not to the bit" in line]
    assert all(f"{key}: {value} -> " in line for key, value in MACHINE.items()), line


def test_a_finished_run_that_is_resumed_keeps_its_results(finished, go):
    before = json.loads((finished / "sft" / "results.json").read_text())
    assert go(finished, "--method sft --resume")[0] == 0
    after = json.loads((finished / "sft" / "results.json").read_text())
    assert without_times(after) == without_times(before)
    assert not list(finished.glob("sft.previous*"))


# ---- checked before the work ---------------------------------------------------------


@pytest.mark.parametrize("place", [
    "out", "out/sdft", "out/base", "out/below", "out/lock",
])  # fmt: skip
def test_a_file_in_the_place_of_a_folder_is_refused(place, tmp_path, go, no_training):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    if place == "out/lock":  # and a folder in the place of a file
        path.mkdir()
    else:
        path.write_text("mine")
    out = path / "deeper" if place == "out/below" else tmp_path / "out"
    assert_refused(go(out), str(path))
    assert path.is_dir() or path.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(go, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert_refused(go(tmp_path / "out"), str(tmp_path / "out"))


@pytest.mark.parametrize("file", ["checkpoint.pt", "metrics.jsonl"])
def test_a_damaged_file_is_found_before_the_base_is_made(
    file, stopped, go, no_training
):
    path = stopped / "sdft" / file
    if file == "checkpoint.pt":
        flip_a_bit(path)
    else:
        path.write_text(path.read_text().replace('"step"', '"step', 1))
    shutil.rmtree(stopped / "base")
    assert_refused(go(stopped, "--resume"), str(path))
    assert not list(stopped.glob("base/*/*.pt"))


OTHER = {  # flags -> what the error says
    "--lr .5": f"lr: {sdft.Config.lr} -> 0.5", "--steps 4": "steps: 3 -> 4",
    "--seed 1": "seed: 0 -> 1", "--n-layer 2": "n_layer: 1 -> 2",
    "--n-embd 48": "n_embd: 32 -> 48", "--demos 32": "examples: ",
    "--distance own": "examples: ", "--eval-size 9": "examples: ",
    "--kl reverse": "kl: forward -> reverse", "--ema-rate 0": "ema_rate: 0.001 -> 0.0",
    "--max-new-tokens 9": "max_new_tokens: 16 -> 9", "--base-steps 3": "started from",
}  # fmt: skip


@pytest.mark.parametrize("flags", OTHER)
def test_a_resume_with_other_settings_is_refused_before_a_base_is_made(
    flags, stopped, go, no_training
):
    before = files_in(stopped / "sdft")
    result = go(stopped, f"--resume {flags}")
    assert_refused(result, str(stopped / "sdft"), OTHER[flags])
    assert files_in(stopped / "sdft") == before


# ---- platform, disk, terminal --------------------------------------------------------


@pytest.mark.parametrize("code", ["", "ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_system_or_a_disk_without_locks_is_said_and_used(
    code, with_base, go, monkeypatch
):
    """Without a code: Windows, as far as train.py asks."""
    def flock(*args):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    if code:
        monkeypatch.setattr(train.fcntl, "flock", flock)
    else:
        monkeypatch.setattr(train, "fcntl", None)
        for name in ("fork", "getuid", "killpg", "O_DIRECTORY", "statvfs", "link"):
            monkeypatch.delattr(os, name)
        for name in ("SIGKILL", "SIGSTOP", "SIGALRM", "SIGHUP"):
            monkeypatch.delattr(signal, name)
    for flags in ("", "--resume"):
        done, out, err = go(with_base, f"--method sft {flags}")
        reason = os.strerror(getattr(errno, code)) if code else "on this system"
        assert done == 0 and out.count("no locks here") == 1 and reason in out, err


def test_a_system_without_fcntl_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("train_without", train.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.fcntl is None


def test_nothing_asks_for_the_name_of_the_system():
    """What is tried works on a system nobody has heard of; a look-up may not."""
    for module in (train, data, model, sft, sdft):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                assert (getattr(node.value, "id", ""), node.attr) != ("os", "name")
                assert node.attr != "platform"


def test_a_lock_is_held_once_and_let_go_of_with_the_run(with_base, go):
    (with_base / "lock").write_text("my door key")
    train.lock(with_base)
    with pytest.raises(train.UserError, match=f"{with_base} is in use by another run"):
        train.lock(with_base)
    while train.LOCKS:
        train.LOCKS.pop().close()
    for flags, code in ("--lr nan", 2), ("--gate-margin 1", 2), ("--method sft", 0):
        assert go(with_base, flags)[0] == code
        assert train.LOCKS == []
    assert (with_base / "lock").read_text() == "my door key"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-16"])
def test_a_terminal_that_lacks_a_character_ends_nothing(
    encoding, with_base, monkeypatch
):
    """A model may say bytes that are no text; the folder is named in Danish. In its
    file, a record is whole."""
    strange, streams = " \ufffd \u6f22", (BytesIO(), BytesIO())
    out, real = with_base.rename(f"{with_base} \xf8 \u6f22"), data.greedy_responses
    monkeypatch.setattr(data, "greedy_responses", lambda *args: [
        text + strange for text in real(*args)])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, TextIOWrapper(stream, encoding=encoding))
        code = train.main([*SMALL, "--out", str(out), "--method", "sft"])
        bad = train.main(["--show", str(out / "\u6f22")])
        for stream in sys.stdout, sys.stderr:
            stream.flush()
        text, err = (stream.getvalue().decode(encoding) for stream in streams)
    assert code == 0 and "results.json" in text, err
    assert bad == 2 and "hint" in err
    (row, *_) = train.read_metrics(out / "sft")
    assert row["responses"][0]["response"].endswith(strange)


def test_a_reader_that_is_gone_gets_an_error_without_a_traceback(made):
    """python train.py --sample x | true"""
    process = start("--out", made, "--sample", "x")
    process.stdout.close()
    err = process.stderr.read()
    assert_refused((process.wait(timeout=60), "", err))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_program_without_a_terminal_runs(name, made, monkeypatch, capsys):
    """Python gives None for what is closed: `>&-`, or pythonw on Windows."""
    monkeypatch.setattr(sys, name, None)
    assert train.main(["--out", str(made), "--show"]) == 0
    assert train.main(["--out", str(made), "--steps", "x"]) == 2


# ---- several processes ---------------------------------------------------------------


def test_the_command_to_go_on_starts_as_many_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    line = train.command_line(["--out", "a b", "--resume"])
    assert line == (
        "torchrun --standalone --nproc_per_node=3 train.py --out 'a b' --resume"
    )


@pytest.mark.parametrize("names", [["RANK"], ["RANK", "WORLD_SIZE"], ["WORLD_SIZE"]])
def test_half_of_torchrun_s_variables_get_an_error_that_is_printed(
    names, tmp_path, go, monkeypatch
):
    for name in names:
        monkeypatch.setenv(name, "1")
    assert_refused(go(tmp_path / "out"), "MASTER_ADDR", "torchrun")
    assert not (tmp_path / "out").exists()


# ---- silent wrong values -------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "results.json"])
def test_a_run_in_the_folder_of_another_is_refused_unless_resumed(name, made, tmp_path):
    shutil.copy(made / "sft" / name, tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="holds a run"):
        train.Run(tmp_path).load({"student": tiny_gpt(0)}, None, sft.Config(), {})
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("change", [
    {"cfg": sft.Config(lr=1.0)}, {"examples": {"A": [1]}}, {"weights": 1},
])  # fmt: skip
def test_a_run_with_other_settings_examples_or_weights_is_refused(change, tmp_path):
    def load(cfg=sft.Config(), examples=(), weights=0, resume=True):  # noqa: B008
        gpt = tiny_gpt(weights)
        optimizer = sft.make_optimizer(gpt, cfg)
        run = train.Run(tmp_path, resume=resume)
        run.load({"student": gpt}, optimizer, cfg, examples)
        return run, gpt, optimizer

    run, gpt, optimizer = load(resume=False)
    run.save(1, {"student": gpt}, optimizer, [])
    load()
    with pytest.raises(ValueError, match="holds another run"):
        load(**change)


@pytest.mark.parametrize("temperature", [0.7, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_of_the_distribution_that_was_sampled(dtype, temperature):
    gpt = tiny_gpt(3)
    gpt.dtype = dtype
    tokens = torch.randint(512, (4, 9), generator=data.make_rng(0, "test"))
    with torch.no_grad():
        hidden = gpt.hidden(tokens)[:, -1]
        logits = gpt.logits(hidden)  # what the sampler divides
        p = torch.softmax(logits / temperature, -1)
        mine = model.make_logits(hidden, gpt.head(), temperature)
        assert torch.equal(torch.softmax(mine, -1), p)


BAD_CALLS = {
    "numbers that are not below 1": lambda: sample(torch.ones(2, 4)),
    "one number for all tokens": lambda: sample(torch.rand(2, 1)),
    "a temperature below 0": lambda: sample(torch.rand(2, 4), temperature=-1),
    "more tokens than rows of the embedding": lambda: GPTConfig(n_tokens=513),
    "examples with one id": lambda: data.get_uniform(
        [data.Example("a", "b", "c"), data.Example("d", "e", "f")], 4, 0, 0, "cpu"),
    "a distance that is none": lambda: data.make_demos(
        data.World(0), "A", 8, 0, "term"),
    "a skill that is none": lambda: data.make_demos(data.World(0), "D", 8, 0),
}  # fmt: skip


def sample(u, temperature=1):
    prompts, lengths = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 2])
    return model.generate(tiny_gpt(0), prompts, lengths, 4, 0, u, temperature)


@pytest.mark.parametrize("what", BAD_CALLS)
def test_an_argument_that_would_be_silently_wrong_is_refused(what):
    """Those of the losses and of the model are in test_kl and test_model."""
    with pytest.raises((ValueError, AssertionError, KeyError)) as caught:
        BAD_CALLS[what]()
    assert str(caught.value)


for section in Path(__file__).read_text().split("\n# ---- ")[1:]:
    for name in re.findall(r"(?m)^def (test_\w+)", section):
        globals()[name].kind = section.split(" --")[0]
