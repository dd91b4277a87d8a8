"""Faults that other projects had, and that this one must not have: each test is one of
their stories, or a neighbour of it."""

import inspect
import json
import os
import pickle
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

from test_train import (  # isort: skip
    SIGNALS, SMALL, TOK, assert_refused, base_file, files_in, finished, go, made,
    no_training, read, same, send, sources_are_read_once, with_base,
)  # fmt: skip

import data
import model
import sdft
import sft
import train
from model import GPT, GPTConfig

__all__ = ["finished", "go", "made", "no_training", "sources_are_read_once",
           "with_base"]  # fmt: skip
TINY = GPTConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=16, n_inner=16)

USERS = """thesis.tmp notes/checkpoint.pt.tmp checkpoint.pt.tmp checkpoint.pt lock
metrics.jsonl results.json base.pt base/lock base/base.pt.tmp sft/notes.txt sft/lock
sft/metrics.jsonl sft/checkpoint.pt.tmp.7 sft/below/checkpoint.pt.tmp
sdft/checkpoint.pt.tmp sdft/results.json sft.previous1/results.json""".split()


def test_every_file_of_the_user_stays_and_so_does_every_run(with_base, go, monkeypatch):
    """In its place, or in a folder that was kept whole. sft runs three times."""
    (with_base / "sft.previous4").symlink_to("nowhere")
    for name in USERS:
        (with_base / name).parent.mkdir(parents=True, exist_ok=True)
        (with_base / name).write_text(f"mine: {name}")
    monkeypatch.chdir(with_base)
    places, runs = ["sft.previous2", "sft.previous3", "sft.previous5", "sft"], []
    for place in places[:3]:  # at first, there is no run to go on with
        code, text, _ = go(".", f"--method sft --steps 1{' --resume' * (not runs)}")
        assert code == 0 and f"the old run in sft is kept, in {place}\n" in text
        runs.append(files_in(Path("sft")))
        assert Path("results.json") in runs[-1] and runs.count(runs[-1]) == 1
    for name in USERS:
        kept = re.sub("^sft/", "sft.previous2/", name)
        assert Path(kept).read_text() == f"mine: {name}"
    assert [files_in(Path(place)) for place in places[1:]] == runs


@pytest.mark.parametrize("flags", ["--show", "--sample x", "--show {0} {0}"])
def test_what_only_reads_writes_nothing_and_takes_a_folder_in_use_or_moved(
    flags, finished, tmp_path, go
):
    moved = Path(shutil.move(finished, tmp_path / "another place"))
    before, flags = files_in(moved), flags.format(shlex.quote(str(moved)))
    with open(moved / "lock", "a") as file:
        train.fcntl.flock(file, train.fcntl.LOCK_EX)
        code, text, err = go(moved, flags, [])
        assert code == 0 and "is gone" not in text, err
        assert files_in(moved) == before
    code, text, err = go(moved, "--resume --method both --device cpu:0")  # a number
    assert code == 0 and "base model: found" in text, err


def test_the_key_of_a_base_is_of_what_decides_it_and_of_nothing_else(monkeypatch):
    def key(flags="", *change):
        args = train.parse_args([*SMALL, *shlex.split(flags)])
        with monkeypatch.context() as patch:
            if change:
                patch.setattr(*change)
            settings = *train.base_settings(args), data.World(args.seed), TOK
            return train.find_base(args, *settings).parent.name

    usual, real, batch = key(), train.inspect.getsource, data.get_batch
    alike = """--steps 4 --lr 1 --method both --demos 99 --kl jsd --distance own
    --eval-size 9 --threads 2 --seed 0 --dropout 0 --max-new-tokens 9"""
    records = replace(train.BASE, log_every=7, save_every=11, micro_batches=4)
    assert usual == key(alike) == key("", train, "BASE", records)
    assert usual == key("", train, "world_size", lambda: 4)
    others = "--seed 1", "--base-steps 3", "--n-layer 2", "--n-embd 64"
    changes = [(train, "world_size", lambda: 8)]  # 8 parts, with a noise for each
    for name, value in {"lr": 1.0, "beta2": 0.5, "dropout": 0.5, "weight_decay": 0.2,
                        "batch_size": 32, "grad_clip": 3.0}.items():  # fmt: skip
        changes.append((train, "BASE", replace(train.BASE, **{name: value})))
    changes += [(data, name, value) for name, value in {
        # the corpus, what is learnt of it, the order of a batch
        "KNOWN": 119, "GUESSED": 0.5, "STYLES": {**data.STYLES, "poet": ("", "so", "")},
        "loss_mask": lambda batch, lengths: torch.ones(len(batch), 1, dtype=torch.bool),
        "get_batch": lambda *args: batch(*args)[::-1],
    }.items()]  # fmt: skip
    code = {}
    for module in (model, sft, sdft, data, train):
        edited = types.SimpleNamespace(
            getsource=lambda x, module=module: real(x) + "#" * (x is module)
        )
        code[module] = key("", train, "inspect", edited)
    assert [module for module in code if code[module] != usual] == [model, sft]
    keys = [usual, code[model], code[sft], *map(key, others)]
    keys += [key("", *change) for change in changes]
    assert len(set(keys)) == len(keys) == 19


@pytest.mark.parametrize("recorded", [0, 1, 3])
def test_seconds_count_once_what_was_before_the_stop(recorded, tmp_path, monkeypatch):
    """A clock by hand: 5 s to a record, 7 s to the save, 100 s of a pause, 1 s."""
    now, gpt, cfg = [50.0], GPT(TINY), sft.Config()
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    state = {"student": gpt}, sft.make_optimizer(gpt, cfg)
    record = {"skill": "A", "eos_rate": 1.0, "response_length": 5.0, "grad_norm": 1.0}
    run = train.Run(tmp_path)
    run.load(*state, cfg, {})
    for step in range(recorded):
        now[0] += 5
        run.log({**record, "step": step})
    now[0] += 7
    run.save(recorded, *state)
    now[0] += 100
    run = train.Run(tmp_path, resume=True)
    assert run.load(*state, cfg, {}) == recorded
    now[0] += 1
    run.log({**record, "step": recorded})
    seconds = [row["seconds"] for row in train.read_metrics(tmp_path)]
    assert seconds == [5.0] * recorded + [8.0]


def test_a_base_that_was_stopped_goes_on_and_counts_its_seconds(tmp_path, go):
    assert go(tmp_path, "--method sft", act=send(signal.SIGINT, "base", 2))[0] == 130
    (path,) = tmp_path.glob("base/*/metrics.jsonl")
    record, *others = train.read_metrics(path.parent)
    rows = {**record, "seconds": 1000.0}, *others
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text, err = go(tmp_path, "--method sft --resume")
    assert code == 0 and "plan: sft: nothing to resume, a new run in" in text, err
    assert 1000 <= read(tmp_path, "sft")[0]["seconds"]["base"] < 2000


def test_a_resume_on_another_machine_is_said_and_on_another_base_refused(
    finished, made, go
):
    """And a finished run that is resumed keeps its results."""
    path = finished / "sft" / "checkpoint.pt"
    names = ("torch", "capability", "threads", "device", "processes", "dtype")
    machine = {"machine": {name: f"no {name}" for name in names}}
    train.write_checkpoint(path, train.read_run(path, mmap=False) | machine)
    code, out, _ = go(finished, "--method sft --resume")
    assert code == 0 and "goes on after update 9" in out[: out.index("teacher gate")]
    (line,) = [line for line in out.splitlines() if "not to the bit" in line]
    assert all(f"{name}: no {name} -> " in line for name in names), line
    assert same(read(finished, "sft"), read(made, "sft"))
    assert not (finished / "sft.previous1").exists()
    before = files_in(finished / "sdft")
    assert_refused(go(finished, "--resume --base-steps 3"), "first weights: ")
    assert files_in(finished / "sdft") == before


@pytest.mark.parametrize(("skills", "earlier", "now", "then"), [
    ({"A": 0.9, "B": 0.51}, [], 0.5, []),  # a skill is compared with itself
    ({"A": 0.4, "B": 0.53}, [], 0.5, ["0.53"]), ({"A": 0.4}, [], 0.0, []),
    (None, [], 0.5, []), (None, [("B", 0.6), ("B", 0.4)], 0.5, ["0.60"]),
    ({"A": 0.9, "B": 0.2}, [("A", 0.9), ("B", 0.6)], 0.5, ["0.60"]),
    ({"A": 0.9, "B": 0.9}, [], None, []),  # SFT
])  # fmt: skip
def test_a_teacher_that_has_fallen_is_told_by_skill(skills, earlier, now, then):
    row = {"step": 3, "skill": "B", "stage_end": True, "new": {"A": 0.5, "B": 0.5},
           "prior": {}, "responses": [], "kl_student_base": 0.0}  # fmt: skip
    before = [{**row, "skill": s, "teacher_gate": x} for s, x in earlier]
    gate = {"teacher": 0.99, "skills": skills} if skills else None
    text = train.describe({**row, "teacher_gate": now}, before, gate)
    assert re.findall(r"warning: on B the teacher has fallen from (\S+):", text) == then
    assert ("the teacher, shown the demonstration" in text) == (now is not None)


@pytest.mark.parametrize(("eos_rate", "length", "norm", "warnings"), [
    (0.0, 2.0, 1.0, ["EOS rate 0 %, mean length 2.0: no response came to its end"]),
    (1.0, 1.0, 1.0, ["every response is empty: it ends at once"]), (1.0, 2.0, 0.1, []),
    (0.5, 1.5, 0.0, ["the gradient is 0, nothing is learnt"]),
    (0.0, 9.0, 0.0, ["EOS rate 0 %, mean length 9.0: no response came to its end",
                     "the gradient is 0, nothing is learnt"]),
])  # fmt: skip
def test_little_that_is_learnt_is_reported(eos_rate, length, norm, warnings):
    numbers = {"eos_rate": eos_rate, "response_length": length, "grad_norm": norm}
    text = train.describe({"step": 7, "skill": "A", **numbers})
    assert text.startswith(f"step    7 A  eos_rate {eos_rate:g}  response_length ")
    assert re.findall("(?m)^warning: (.*?)(?:;|, but|: no token|$)", text) == warnings


def spoil(path, how):
    """Damage a file, or put another one, a folder or a text in its place."""
    if how == "a bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "a cut":
        os.truncate(path, 999)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "older":
        saved = train.read_run(path, mmap=False)
        del saved["note"], saved["config"]
        train.write_checkpoint(path, saved)
    elif how[-3:] == ".pt":
        shutil.copy(next(path.parents[2].rglob(how)), path)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_text(how)


BASE, SAVED, ROWS = "base.pt", "sdft/checkpoint.pt", "sdft/metrics.jsonl"
WRONG = [  # a file, what is done to it, flags, words of the error
    ("sdft", None, "", "sdft holds a run that was not finished"),
    *[("sdft", None, f"--resume {flags}", words) for flags, words in {
        "--lr .5": "(saved -> now): lr: 0.05 -> 0.5\n", "--steps 4": ": 3 -> 4\n",
        "--seed 1": ": seed: 0 -> 1, examples: ", "--n-layer 2": "n_layer: 1 -> 2\n",
        "--n-embd 48": "n_embd: 32 -> 48", "--demos 32": ": examples: ",
        "--distance own": ": examples: ", "--eval-size 9": ": examples: ",
        "--kl reverse": ": kl: forward -> reverse\n", "--ema-rate 0": "0.001 -> 0.0\n",
        "--max-new-tokens 9": ": max_new_tokens: 16 -> 9\n",
    }.items()],
    (SAVED, "sft/checkpoint.pt", "--resume", "kl: None -> forward"),
    (SAVED, BASE, "--resume", "no step"), (SAVED, BASE, "--sample x", "no step"),
    (SAVED, "older", "--resume", "no config"), (SAVED, "older", "--sample x", "config"),
    (SAVED, "a bit", "--resume", "damaged"), (BASE, "a bit", "--resume", "damaged"),
    (BASE, "a cut", "--resume", "cannot be"), (BASE, "mine", "--resume", "cannot be"),
    (BASE, "a folder", "--resume", "no such"), (BASE, SAVED, "--resume", "no model"),
    *[(ROWS, text, "--resume", "not every line is a record")
      for text in ("mine\n", "[1]\n", "{}\n", '{"step": 1, "skill": "A"}\n')],
    *[("sft/results.json", text, "--show", "is not what a run writes")
      for text in ("", "{}", "[]", "{", '{"seconds": 1}', "caf\xe9")],
    ("sdft", "mine", "--resume", "File exists"), (".", "mine", "", "File exists"),
    ("base", "mine", "--resume", "Not a directory"), ("lock", "a folder", "", "Is a d"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "flags", "words"), WRONG)
def test_what_is_wrong_in_a_folder_is_refused_with_its_place_before_the_work(
    name, how, flags, words, finished, go, no_training
):
    """Nothing was changed. The run of sdft was not finished."""
    (finished / "sdft" / "results.json").unlink()
    path = base_file(finished) if name == BASE else finished / name
    if how is not None:
        spoil(path, how)
    before = files_in(finished.parent)
    assert_refused(go(finished, flags), str(path).removesuffix("/checkpoint.pt"), words)
    assert files_in(finished.parent) == before


def test_a_system_without_locks_and_most_signals_is_said_and_used(
    with_base, go, monkeypatch
):
    """Some disks; Windows, as far as train.py asks, which asks for no name."""
    monkeypatch.setattr(train.fcntl, "flock", lambda *args: os.close(-1))  # OSError
    assert "no locks here ([Errno" in go(with_base, "--method sft --steps 1")[1]
    gone = "fork getuid killpg O_DIRECTORY statvfs link SIGKILL SIGALRM SIGHUP SIGUSR1"
    for name in gone.split():
        monkeypatch.delattr(signal if name.startswith("SIG") else os, name)
    monkeypatch.setattr("test_train.SIGNALS", SIGNALS[:2])
    monkeypatch.setitem(sys.modules, "fcntl", None)
    exec(inspect.getsource(train), other := {"__name__": "of a system without fcntl"})
    monkeypatch.setattr(train, "fcntl", other["fcntl"])
    code, out, err = go(with_base, "--method sft --steps 1")
    assert code == 0 and out.count("no locks here (no locks on this system)") == 1, err
    for module in (train, data, model, sft, sdft):
        assert not re.search(r"\bos\.name\b|\bplatform\b", inspect.getsource(module))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-16"])
def test_a_terminal_that_lacks_a_letter_ends_nothing(encoding, finished, monkeypatch):
    """A model may say bytes that are no text. In its file, a record is whole."""
    strange, streams = " \ufffd \u6f22", [BytesIO(), BytesIO()]
    out, real = finished.rename(f"{finished} \xf8 \u6f22"), data.get_texts
    monkeypatch.setattr(data, "get_texts", lambda *args: [
        text + strange for text in real(*args)])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            text = TextIOWrapper(stream, encoding, write_through=True)
            patch.setattr(sys, name, text)
        argv = [*SMALL, "--out", str(out), "--method", "sft", "--resume"]
        code, bad = train.main(argv), train.main(["--show", str(out / "\u6f22")])
        text, err = (stream.getvalue().decode(encoding) for stream in streams)
    assert code == 0 and "results.json" in text, err
    assert bad == 2 and "hint" in err
    assert read(out, "sft")[1][-1]["responses"][0]["response"].endswith(strange)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_program_without_a_terminal_runs(name, made, monkeypatch, capsys):
    """What is closed is None: `>&-`, or pythonw on Windows."""
    monkeypatch.setattr(sys, name, None)
    assert train.main(["--out", str(made), "--show"]) == 0
    assert train.main(["--out", str(made), "--steps", "x"]) == 2


def test_several_processes_are_whole_share_out_a_batch_and_go_on_as_several(
    tmp_path, go, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(train, "world_size", lambda: 5)
        assert_refused(go(tmp_path), "base model: a batch of 64 ", "a multiple of 5")
    monkeypatch.setenv("RANK", "1")
    assert_refused(go(tmp_path / "out"), "only ['RANK'] are set", "torchrun")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert train.command_line(["--out", "a b", "--resume"]) == (
        "torchrun --standalone --nproc_per_node=3 train.py --out 'a b' --resume"
    )


def test_runs_with_other_benchmarks_are_compared_in_what_both_have(made):
    one, other = (read(made, "sdft")[1][-1] for _ in range(2))
    other["prior"]["own_format"] = other["prior"].pop("own_style")
    lines = train.table([one, other], ["one", "two"]).splitlines()
    assert "own_style" in lines[0] and "own_format" in lines[0]
    assert [line.count("nan") for line in lines] == [0, 1, 1]


def test_a_grader_of_ones_own_needs_no_name_and_has_one_digest():
    example = data.Example("Q?", "D.", "A.")
    one, two, other = (
        train.settings_of(sft.Config(), GPTConfig(), data.Benchmark(rows, lambda *x: 1))
        for rows in ([example], [example], [])
    )
    assert one == two != other


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "results.json",
                                  "model"])  # fmt: skip
def test_a_run_in_the_folder_of_another_is_refused_and_kept(name, tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / name).write_text("of an earlier run")
    with pytest.raises(ValueError, match="holds a run"):
        train.Run(folder).load({"student": GPT(TINY)}, None, sft.Config(), {})
    train.make_room(folder)
    assert list(files_in(tmp_path)) == [Path("sft.previous1") / name]


CONTENT = {"step": 3, "model": {"w": torch.arange(6.0)}, "list": [1, "a"]}


@pytest.fixture
def path(tmp_path):
    train.write_checkpoint(tmp_path / "checkpoint.pt", CONTENT)
    return tmp_path / "checkpoint.pt"


def read_or_refused(path, read=train.read_checkpoint):
    """What a file holds, or None if it is refused with its path."""
    try:
        return read(path)
    except train.UserError as error:
        assert str(error).startswith(f"{path} cannot be read: "), error
        assert "\n" not in str(error) and "--out" in error.hint


def test_a_checkpoint_comes_back_as_it_was_and_a_damaged_one_never_otherwise(path):
    """It is a plain file of torch. Each cut is seen; so is every bit of what says where
    things are (the zip's directory, at the end), and one of each byte before it."""
    assert same(torch.load(path, weights_only=True), CONTENT)
    assert same(train.read_checkpoint(path, mmap=True), CONTENT)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    good, refused = path.read_bytes(), 0
    start = good.index(b"PK\1\2")
    assert 0 < start < len(good) - 500
    file = os.open(path, os.O_RDWR)
    for place, byte in enumerate(good):
        for bit in range(8) if place >= start else [place % 8]:
            os.pwrite(file, bytes([byte ^ 1 << bit]), place)
            found = read_or_refused(path)
            refused += found is None
            assert found is None or same(found, CONTENT), (place - start, bit)
        os.pwrite(file, bytes([byte]), place)
    assert path.read_bytes() == good and refused > 2000
    path.write_bytes(good + b"\0")
    assert (found := read_or_refused(path)) is None or same(found, CONTENT)
    for n in reversed(range(len(good))):
        os.truncate(path, n)
        assert read_or_refused(path) is None, n


@pytest.mark.parametrize("write", [
    lambda bomb, path: train.write_checkpoint(path, bomb),
    lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
])  # fmt: skip
def test_nothing_in_a_file_is_executed(write, path, tmp_path):
    folder = tmp_path / "executed"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(folder),))})()
    write({"model": bomb}, path)
    assert read_or_refused(path) is None and not folder.exists()
    pickle.loads(pickle.dumps(bomb))
    assert folder.exists(), "the bomb is none: this shows nothing"


@pytest.mark.parametrize("content", [
    b"", b"mine\n", b"PK\5\6" + 18 * b"\0", [1], 3, torch.ones(2), {"step": 1},
])  # fmt: skip
def test_a_file_of_someone_else_is_refused(content, path):
    is_text = isinstance(content, bytes)
    path.write_bytes(content) if is_text else torch.save(content, path)
    assert read_or_refused(path) is read_or_refused(path, train.read_run) is None
    for other in path.parent, path.with_name("none"):
        with pytest.raises(train.UserError, match=f"{other}: no such file"):
            train.read_checkpoint(other)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("n", [6, 10**6])
def test_a_full_disk_is_an_error_with_the_path_and_the_old_file_stays(n, path):
    """The system's own error, in the writing of torch; of a text; of a record."""
    text, new = path.with_name("results.json"), {"model": torch.zeros(n)}
    text.write_text("old")
    for file, write, content in (
        (path, train.write_checkpoint, new), (text, train.write_text, "new"),
    ):  # fmt: skip
        file.with_name(f"{file.name}.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"^{file} not written: .*No space left"):
            write(file, content)
    assert same(train.read_checkpoint(path), CONTENT) and text.read_text() == "old"
    assert len(list(path.parent.iterdir())) == 2
    path.with_name("metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train.Run(path.parent).append("{}\n")
