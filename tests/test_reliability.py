"""What must hold when things go wrong: real processes, real SIGKILL, damaged files.

Short versions; the full figures come from tests/bench/reliability.py. A kill comes at a
step that a test names, and in the midst of what the process does then: so each test
asserts only what holds at every moment. That a save may die at any moment is shown in
test_a_save_may_die_at_any_moment, call by call.
"""

import ast
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_train import (
    METHODS,
    ROOT,
    SMALL,
    base_file,
    files_in,
    read,
    start,
    without_times,
)

import data
import model
import sdft
import sft
import train
from model import GPT, GPTConfig

FLAGS = [*SMALL, "--base-steps", "40", "--steps", "6", "--save-every", "2"]
FLAGS += ["--method", "both"]
# The base model, too, is to be saved and shown often: no flag does that.
OFTEN = {"log_every": 1, "save_every": 3}
# train.py, in which something happens right after the record of a step: AT is a list of
# [part, step, what, seconds later, processes], part one of "base model", "sft", "sdft".
PROGRAM = f"""
import json, os, signal, sys, threading, time
import train
vars(train.BASE).update({OFTEN})
log, moments = train.Run.log, json.loads(os.environ.get("AT", "[]"))

def log_and_act(run, record):
    log(run, record)
    part = run.folder.name if run.note else "base model"
    for *place, what, later, processes in moments:
        here = os.environ.get("RANK", "0") in processes
        if place == [part, record["step"]] and "loss" in record and here:
            if what == "wait":  # until it is asked to stop
                while not run.stop.signal:
                    time.sleep(0.01)
            elif what == "sleep":
                time.sleep(60)
            else:
                kill = os.kill, (os.getpid(), getattr(signal, what))
                threading.Timer(later, *kill).start() if later else kill[0](*kill[1])

train.Run.log = log_and_act
"""
PYTHON = [sys.executable, "-c", PROGRAM + "sys.exit(train.main(sys.argv[2:]))"]

pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


def at(part, step, what, later=0.0, processes="0"):
    """For the environment of a process: what happens after a step, see PROGRAM."""
    return json.dumps([[part, step, what, later, processes]])


def begin(out, *args, before=(), **kwargs):
    """Start train.py with FLAGS as a process of its own."""
    kwargs = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **kwargs}
    return start(*FLAGS, "--out", out, *args, launcher=[*before, *PYTHON], **kwargs)


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for(process, part, step):
    """Read its output up to a step of "base model", "sft" or "sdft"; the lines."""
    lines, begun = [], False
    for line in process.stdout:
        lines.append(line)
        begun = begun or line.startswith(f"{part}: ")
        if begun and line.startswith(f"step {step:4d} "):
            return lines
    raise AssertionError(f"no step {step} of {part}: {process.stderr.read()}")


def killed_at(out, *args, part, step, later=0.0, **kwargs):
    """A run that was killed so many seconds after a step: the lines that it printed."""
    moment = at(part, step, "SIGKILL", later)
    code, text, err = finish(begin(out, *args, AT=moment, **kwargs))
    assert code == -signal.SIGKILL, f"it ended before the kill: {err}"
    return text.splitlines()


def first_step(lines, part):
    """The first step that a run made of "base model", "sft" or "sdft"."""
    place = next(i for i, line in enumerate(lines) if line.startswith(f"{part}: "))
    steps = [re.match(r"step +(\d+) .*loss", line) for line in lines[place:]]
    return next(int(match[1]) for match in steps if match)


def go_on(out, *args):
    """The same in this process: returns the exit code."""
    return train.main([*FLAGS, "--out", str(out), *map(str, args)])


def name_of(item):
    return repr(item[0])


def plain(x):
    if isinstance(x, torch.Tensor):
        return [str(x.dtype), x.tolist()]
    if isinstance(x, dict):
        return [(repr(k), plain(v)) for k, v in sorted(x.items(), key=name_of)]
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


def digest(x):
    """Two things with the same digest are the same to the bit, but for times."""
    return hashlib.sha256(repr(plain(without_times(x))).encode()).hexdigest()[:12]


def digests(folder):
    """A digest of each part of what a run of one method, or the base, has left."""
    parts = train.read_checkpoint(folder / "checkpoint.pt")
    parts = {name: part for name, part in parts.items() if name not in TIMES}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parts["metrics"] = [json.loads(line) for line in lines]
    if (folder / "results.json").exists():
        parts["results"] = read(folder.parent, folder.name)[0]
    if (folder / "base.pt").exists():
        parts["base"] = train.read_checkpoint(folder / "base.pt")
    return {name: digest(part) for name, part in parts.items()}


TIMES = ("seconds", "unrecorded")


def base_folder(out):
    return next((out / "base").iterdir())


def with_base(out, whole):
    """A new folder for a run, with the base model of another."""
    shutil.copytree(whole / "base", out / "base")
    return out


@pytest.fixture(autouse=True)
def base_saved_often(monkeypatch):
    monkeypatch.setattr(train, "BASE", replace(train.BASE, **OFTEN))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of both methods."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "BASE", replace(train.BASE, **OFTEN))
        assert go_on(out) == 0
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed while the base was made, then in sft, then
    in sdft, and resumed after the first two; and what the processes printed. Each has
    an order of sets and a working folder of its own."""
    out, rng = tmp_path_factory.mktemp("killed") / "out", random.Random(5)
    printed = []
    for part, steps in (("base model", 40), ("sft", 18), ("sdft", 18)):
        moment = {
            "part": part, "step": rng.randrange(steps // 3, steps * 2 // 3),
            "later": rng.uniform(0, 0.02), "PYTHONHASHSEED": f"{len(printed)}7",
        }  # fmt: skip
        again = ["--resume"] * bool(printed)
        printed.append(killed_at(out, *again, cwd=out.parent, **moment))
    return out, printed


@pytest.fixture
def unfinished(killed, tmp_path):
    """A copy of that folder. The kill came in sdft, after step 6 or later: with a save
    every two steps there are a checkpoint and a previous one, wherever it struck."""
    out = shutil.copytree(killed[0], tmp_path / "unfinished")
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        train.read_checkpoint(out / "sdft" / name)
    return out


# ---- Kills -------------------------------------------------------------------------


def test_a_run_killed_three_times_ends_as_an_uninterrupted_one(
    killed, whole, tmp_path, capsys
):
    """Base model, sft and sdft; tensors, metrics and results, to the bit."""
    out = shutil.copytree(killed[0], tmp_path / "out")
    saved = train.read_checkpoint(out / "sdft" / "checkpoint.pt")["step"]
    assert go_on(out, "--resume") == 0
    text, (first, base, fine_tuned) = capsys.readouterr().out, killed[1]
    assert first_step(first, "base model") == 0
    assert first_step(base, "base model") > 0 and first_step(fine_tuned, "sft") > 0
    assert first_step(text.splitlines(), "sdft") == saved > 0
    assert digests(base_folder(out)) == digests(base_folder(whole))
    for method in METHODS:
        assert digests(out / method) == digests(whole / method)
    assert not list(out.rglob("*.tmp.*"))


def save_forever(path, step, weights):
    while True:
        step += 1
        train.write_checkpoint(path, {"step": step, "weights": weights})


def stop_in_a_write(process, path):
    """Stop a process that saves while it has a temporary file."""
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # it has stopped, not only been told to
        if path.with_name(f"{path.name}.tmp.{process.pid}").exists():
            return
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.001)


def kill_in_saves(path, kills, seed):
    """Kill a process that only saves, so many times: at any moment, and the last time
    in the middle of a write, wherever the others fell. Returns how often the file, or
    the previous one, could not be read afterwards, how many temporary files were left,
    and the steps read."""
    rng, weights = random.Random(seed), data.make_rng(seed, "weights")
    weights = torch.randn(1 << 18, generator=weights)
    for step in (-1, 0):  # from the second save on there is a previous one, too
        train.write_checkpoint(path, {"step": step, "weights": weights})
    unreadable, steps = 0, [0]
    for i in range(kills):
        process = multiprocessing.get_context("fork").Process(
            target=save_forever, args=(path, steps[-1], weights)
        )
        process.start()
        time.sleep(rng.uniform(0.02, 0.08))
        if i == kills - 1:
            stop_in_a_write(process, path)
        process.kill()
        process.join()
        try:
            train.read_checkpoint(path.with_name(f"{path.name}.previous"))
            read = train.read_checkpoint(path)
        except (OSError, ValueError):
            unreadable += 1
        else:
            assert torch.equal(read["weights"], weights)
            steps.append(read["step"])
    return unreadable, len(list(path.parent.glob("*.tmp.*"))), steps


def test_a_kill_inside_a_save_leaves_a_checkpoint_that_loads(tmp_path):
    """What was saved once is never lost: the steps do not go back."""
    unreadable, stale, steps = kill_in_saves(tmp_path / "checkpoint.pt", 10, seed=0)
    assert unreadable == 0
    assert len(steps) == 11 and steps == sorted(steps)
    assert stale > 0, "no kill came in the middle of a write"


class Calls:
    """Wraps each call of a save that touches the disk, in this process. There is a
    moment before it, one after it and, where it writes, one in its middle; what happens
    at a moment decides act(number of the moment, name of the call)."""

    def __init__(self, act, links=True):
        self.act, self.count, self.links = act, 0, links
        for owner, name in (
            (os, "link"), (os, "replace"), (os, "fsync"), (os, "close"),
            (shutil, "copyfile"), (Path, "unlink"), (train, "open"),
        ):  # fmt: skip
            real = getattr(owner, name, open)
            setattr(owner, name, self.wrap(name, real))

    def moment(self, name):
        self.count += 1
        self.act(self.count - 1, name)

    def wrap(self, name, real):
        def call(*args, **kwargs):
            self.moment(name)
            if name == "link" and not self.links:
                raise PermissionError(1, "Operation not permitted")
            if name == "copyfile" and not Path(args[1]).exists():
                source = Path(args[0]).read_bytes()
                Path(args[1]).write_bytes(source[: len(source) // 2])
                self.moment("half of copyfile")
            result = real(*args, **kwargs)
            if name == "open":
                result = self.halve(result)
            self.moment(name)
            return result

        return call

    def halve(self, file):
        calls, write = self, file.write

        class File:
            def write(self, content):
                write(content[: len(content) // 2])
                file.flush()
                calls.moment("half of write")
                write(content[len(content) // 2 :])

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

        return File()


def save_in_a_fork(path, content, act, links):
    """Save in a process of its own, which leaves no trace here; its exit code: 0 it
    saved, 1 it raised OSError with the path, 9 it died."""
    child = os.fork()
    if not child:
        code = 2
        try:
            Calls(act, links)
            train.write_atomically(path, content, keep=True)
            code = 0
        except OSError as error:
            code = 1 if str(path) in str(error) else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_saves(folder):
    folder.mkdir(parents=True)
    for content in CONTENTS[:2]:
        train.write_atomically(folder / "checkpoint.pt", content, keep=True)
    return folder / "checkpoint.pt", folder / "checkpoint.pt.previous"


CONTENTS = [bytes([48 + i]) * 10**4 for i in range(5)]


def deaths_in_a_save(folder, links):
    """Let a save die at each of its moments: the file is the old one or the new one,
    there is a previous one, saves after it work, and half a file is left for the next
    start to remove. Returns how many moments there are."""
    first, second, third, fourth, fifth = CONTENTS
    die_at, codes, left = 0, [], set()
    while codes[-1:] != [0]:
        path, previous = two_saves(folder / str(die_at))

        def act(moment, name, die_at=die_at):
            if moment == die_at:
                os._exit(9)

        codes.append(save_in_a_fork(path, third, act, links))
        assert codes[-1] in (0, 9), die_at
        now = path.read_bytes(), previous.read_bytes()
        assert now in ((second, first), (second, second), (third, second)), die_at
        names = {each.name for each in path.parent.iterdir()}
        left.add(len(names - {path.name, previous.name}))
        # another process goes on in the same folder, whether it cleans up or not
        for content, before in ((fourth, now[0]), (fifth, fourth)):
            train.write_atomically(path, content, keep=True)
            assert (path.read_bytes(), previous.read_bytes()) == (content, before)
        train.remove_temporary(path.parent)
        names = {each.name for each in path.parent.iterdir()}
        assert names == {path.name, previous.name}
        die_at += 1
    assert {0, 1} <= left, "no death left a temporary file: this shows nothing"
    return len(codes) - 1


def failures_in_a_save(folder, links):
    """Let each of its moments fail as on a full disk: nothing is lost, nothing is left,
    and there is an error with the path unless the new file is there. Returns how many
    moments there are."""
    fail_at, reached = 0, folder / "reached"
    folder.mkdir()
    while True:
        path, previous = two_saves(folder / str(fail_at))

        def act(moment, name, fail_at=fail_at):
            if moment == fail_at:
                reached.touch()
                raise OSError(28, "No space left on device")

        code = save_in_a_fork(path, CONTENTS[2], act, links)
        first, second, third = CONTENTS[:3]
        now = path.read_bytes(), previous.read_bytes()
        assert now in ((second, first), (second, second), (third, second)), fail_at
        assert code == 1 or code == 0 and now[0] == third, fail_at
        names = {each.name for each in path.parent.iterdir()}
        assert names == {path.name, previous.name}, fail_at
        if not reached.exists():
            return fail_at
        reached.unlink()
        fail_at += 1


@pytest.fixture
def no_sync(monkeypatch):
    """A process that dies takes no page of the system's with it; syncs only cost."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.mark.parametrize("links", [True, False])
def test_a_save_may_die_at_any_moment(links, tmp_path, no_sync):
    """Before, in and after each call that touches the disk; with hard links, and where
    there are none."""
    assert deaths_in_a_save(tmp_path / "saves", links) > 15


@pytest.mark.parametrize("links", [True, False])
def test_a_save_may_fail_at_any_moment(links, tmp_path, no_sync):
    assert failures_in_a_save(tmp_path / "saves", links) > 15


def test_temporary_files_of_a_killed_process_are_gone_after_the_next_start(unfinished):
    stale = [unfinished / "sdft" / "checkpoint.pt.tmp.12345",
             unfinished / "sdft" / "metrics.jsonl.tmp.6"]  # fmt: skip
    for path in stale:
        path.write_bytes(b"half of")
    assert go_on(unfinished, "--resume", "--method", "sdft") == 0
    assert not any(path.exists() for path in stale)


@pytest.mark.parametrize("method", METHODS)
def test_a_line_of_metrics_cut_in_half_does_not_stop_a_resume(
    method, whole, tmp_path, capsys
):
    """The last line is half there when a kill or a full disk comes in its write."""
    out = shutil.copytree(whole, tmp_path / "out")
    with open(out / method / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "ski')
    code = go_on(out, "--resume", "--method", method)
    assert code == 0, capsys.readouterr().err
    assert digests(out / method) == digests(whole / method)


@pytest.mark.parametrize(("call", "after"), [("link", True), ("replace", False)])
def test_a_resume_after_a_death_in_the_middle_of_a_save_loses_nothing(
    call, after, unfinished, capsys
):
    """It goes on, and not from 0."""
    real = getattr(os, call)

    def die(source, target):
        if "checkpoint.pt" not in os.path.basename(target):
            return real(source, target)
        if after:
            real(source, target)
        raise SystemExit

    args = unfinished, "--resume", "--method", "sdft"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(SystemExit):
            go_on(*args)
    capsys.readouterr()
    assert go_on(*args) == 0
    assert first_step(capsys.readouterr().out.splitlines(), "sdft") > 0


# ---- Damaged files and a full disk -------------------------------------------------


def damaged(good, flips, cuts, seed):
    """Bytes with one bit flipped, then bytes that end too early."""
    rng = random.Random(seed)
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        yield bytes(bad)
    for _ in range(cuts):
        yield good[: rng.randrange(len(good))]


def count_refused(source, path, flips, cuts, seed):
    """How many damaged copies of a checkpoint are refused with path, size, reason."""
    refused = 0
    for bad in damaged(source.read_bytes(), flips, cuts, seed):
        path.write_bytes(bad)
        try:
            train.read_checkpoint(path)
        except ValueError as error:
            reason = f"{path}: {len(bad)} bytes, checksum differs"
            refused += str(error).startswith(reason)
    return refused


def test_flipped_bits_and_cut_files_are_refused(whole, tmp_path):
    source, path = whole / "sdft" / "checkpoint.pt", tmp_path / "checkpoint.pt"
    assert count_refused(source, path, 20, 5, seed=0) == 25
    shutil.copy(source, path)
    assert train.read_checkpoint(path)["step"] == 18


def test_a_resume_from_a_damaged_file_is_refused_and_offers_the_one_before(
    unfinished, capsys
):
    path = unfinished / "sdft" / "checkpoint.pt"
    (bad,) = damaged(path.read_bytes(), 1, 0, seed=1)
    path.write_bytes(bad)
    assert go_on(unfinished, "--resume", "--method", "sdft") == 2
    err = capsys.readouterr().err
    assert f"error: {path}" in err and f"{path}.previous" in err
    os.replace(f"{path}.previous", path)
    assert go_on(unfinished, "--resume", "--method", "sdft") == 0


def test_a_full_disk_is_an_error_and_the_checkpoint_before_still_loads(
    unfinished, capsys
):
    """No file may grow beyond 32 KiB. Python itself ignores SIGXFSZ."""
    resource = pytest.importorskip("resource")
    path = unfinished / "sdft" / "checkpoint.pt"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        code = go_on(unfinished, "--resume", "--method", "sdft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 2
    size = re.search(rf"error: {re.escape(str(path))} not written: .* (\d+) bytes", err)
    assert size and int(size[1]) == pytest.approx(len(before), rel=0.1)
    assert path.read_bytes() == before and train.read_checkpoint(path)["step"] > 0
    assert not list(unfinished.rglob("*.tmp.*"))


def test_a_full_disk_is_told_with_the_path_when_metrics_are_written(tmp_path):
    run = train.Run(tmp_path)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match="metrics.jsonl not written: No space"):
        run.log({"step": 0, "skill": "A", "loss": 1.0, "grad_norm": 1.0,
                 "eos_rate": 1.0, "response_length": 2.0})  # fmt: skip


# ---- Signals and numbers that are not finite ---------------------------------------


def test_ctrl_c_saves_the_last_step_and_the_command_it_prints_goes_on(
    whole, tmp_path, capsys
):
    out = with_base(tmp_path / "out", whole)
    process = begin(out, "--method", "sdft", AT=at("sdft", 5, "wait"))
    wait_for(process, "sdft", 5)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    last = json.loads((out / "sdft" / "metrics.jsonl").read_text().splitlines()[-1])
    saved = train.read_checkpoint(out / "sdft" / "checkpoint.pt")
    assert saved["step"] == last["step"] + 1
    assert go_on(out, "--method", "sdft") == 2  # not by accident from the start
    assert "was not finished" in capsys.readouterr().err
    words = shlex.split(err.split("to go on: ")[1])
    assert words[:2] == ["python", "train.py"] and words[-1] == "--resume"
    assert train.main(words[2:]) == 0
    assert digests(out / "sdft") == digests(whole / "sdft")


@pytest.mark.parametrize("method", METHODS)
def test_sigterm_in_the_first_or_the_last_step_goes_on_to_the_same_end(
    method, whole, tmp_path
):
    """Of a stage, where a save and an evaluation stand beside the stop."""
    out = with_base(tmp_path / "out", whole)
    real, steps = train.Run.log, [6, 10]

    def log(run, record):
        real(run, record)
        if run.note and "loss" in record and record["step"] in steps:
            steps.remove(record["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "log", log)
        assert go_on(out, "--method", method) == 143
        assert train.read_checkpoint(out / method / "checkpoint.pt")["step"] == 8
        assert go_on(out, "--method", method, "--resume") == 143
        assert train.read_checkpoint(out / method / "checkpoint.pt")["step"] == 12
    assert go_on(out, "--method", method, "--resume") == 0
    assert steps == [] and digests(out / method) == digests(whole / method)


def test_the_first_signal_asks_to_stop_and_the_second_stops_at_once(tmp_path):
    """The process stands still inside a step, so it cannot end by itself."""
    process = begin(tmp_path / "out", AT=at("base model", 7, "sleep"))
    try:
        wait_for(process, "base model", 7)
        process.send_signal(signal.SIGTERM)
        while "once more stops at once" not in (line := process.stderr.readline()):
            assert line, "it ended at the first signal"
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()
    (path,) = (tmp_path / "out").rglob("checkpoint.pt")
    assert train.read_checkpoint(path)["step"] == 6  # the save before step 7


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_weight_ends_with_3_and_a_checkpoint_that_is_sound(
    method, whole, tmp_path, monkeypatch, capsys
):
    """The step, its examples and the last good checkpoint are named."""
    real, calls = METHODS[method].compute_loss, []

    def poisoned(student, *args):
        calls.append(student)
        if len(calls) == 6:  # step 5
            student.lm_head.weight.data[3, 4] = math.nan
        return real(student, *args)

    monkeypatch.setattr(METHODS[method], "compute_loss", poisoned)
    out = with_base(tmp_path / "out", whole)
    assert go_on(out, "--method", method) == 3
    err, path = capsys.readouterr().err, out / method / "checkpoint.pt"
    assert re.search(r"error: step 5: .*its examples: \[\d", err)
    assert f"last good checkpoint: {path}" in err and "lower --lr" in err
    saved = train.read_checkpoint(path)
    assert saved["step"] == 4
    weights = [w for m in saved["models"].values() for w in m.values()]
    assert all(w.isfinite().all() for w in weights)


# ---- Several processes -------------------------------------------------------------

# Both processes of a group, one command line after the other, without torchrun.
GROUP = f"""
{PROGRAM}
import resource
real = time.sleep
time.sleep = lambda seconds: real(min(seconds, 0.3))  # of those that wait for the first

if os.environ["RANK"] == "1":  # the slower one sees what the first has done meanwhile
    load = train.Run.load
    train.Run.load = lambda *args: real(0.2) or load(*args)

for line in json.loads(os.environ["LINES"]):
    os.environ["MASTER_PORT"], moments = line["port"], line["at"]
    if line["full"] and os.environ["RANK"] == "0":
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limit[1]))
    code = train.main(line["argv"])
    for stream in (sys.stdout, sys.stderr):
        print(f"code {{code}}", file=stream, flush=True)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc_per_node=2"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def run_group(*lines):
    """Run command lines (argv, what happens at a step, is the disk full?) one after
    the other in a group of two. Returns a list: for each of them its two exit codes,
    the two outputs and the two texts of errors."""
    lines = [
        {"argv": list(map(str, argv)), "at": at, "full": full, "port": free_port()}
        for argv, at, full in lines
    ]
    group = {"LINES": json.dumps(lines), "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2",
             "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    launcher = [sys.executable, "-c", GROUP]
    processes = [
        start(launcher=launcher, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"
    ]
    results = [finish(process) for process in processes]
    for code, _, err in results:
        assert code == 0, err[-2000:]
    outputs, errors = ([
        re.split(r"^code (\d+)$", result[i], flags=re.MULTILINE) for result in results
    ] for i in (1, 2))  # fmt: skip
    for texts in (*outputs, *errors):
        assert len(texts) == 2 * len(lines) + 1
    return [
        ([int(texts[i + 1]) for texts in outputs], [texts[i] for texts in outputs],
         [texts[i] for texts in errors])
        for i in range(0, 2 * len(lines), 2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def stopped_twice(whole, tmp_path_factory):
    """The folder of a run on two processes that was stopped in sft by SIGTERM, which
    one of them got, went on, was stopped in sdft by SIGINT, which both got, and went on
    by the command that was printed, to the end; and the two stops."""
    out = with_base(tmp_path_factory.mktemp("two") / "out", whole)
    argv = [*FLAGS, "--out", out]
    stops = run_group(
        (argv, [["sft", 8, "SIGTERM", 0, "1"]], False),
        ([*argv, "--resume"], [["sdft", 11, "SIGINT", 0, "01"]], False),
    )
    words = shlex.split(stops[1][2][0].split("to go on: ")[1])
    place = words.index("train.py")
    assert words[:place] == ["torchrun", *TORCHRUN[3:]]
    code, text, err = finish(start(*words[place + 1 :], launcher=TORCHRUN))
    assert code == 0, err
    return out, stops, text


def test_two_processes_that_are_stopped_end_with_143_or_130(stopped_twice):
    """Once, whoever got the signal: the numbers are not added up."""
    term, interrupt = stopped_twice[1]
    assert term[0] == [143, 143] and interrupt[0] == [130, 130]
    for codes, _, (first, second) in (term, interrupt):
        assert first.count("stopped; to go on: ") == 1, codes
        assert "Traceback" not in first + second and "to go on" not in second


def test_two_processes_print_a_torchrun_command_that_goes_on(stopped_twice):
    _, stops, text = stopped_twice
    start_of_it = "to go on: torchrun --standalone --nproc_per_node=2 train.py "
    for _, _, (first, _) in stops:
        line = next(line for line in first.splitlines() if start_of_it in line)
        assert line.split().count("--resume") == 1
    assert "processes 2" in text
    assert first_step(text.splitlines(), "sdft") == 13  # 11 + the next one + 1


def test_two_processes_equal_two_micro_batches_to_the_bit(
    stopped_twice, whole, tmp_path
):
    """From the same base, for both methods; and though the two were stopped twice."""
    one, two = with_base(tmp_path / "one", whole), stopped_twice[0]
    assert go_on(one, "--micro-batches", 2) == 0
    for method in METHODS:
        rows = [read(out, method)[1] for out in (one, two)]
        assert len([row for row in rows[0] if "loss" in row]) == 18
        assert digest(rows[0]) == digest(rows[1])
        saved = [
            train.read_checkpoint(out / method / "checkpoint.pt") for out in (one, two)
        ]
        assert digest(saved[0]["models"]) == digest(saved[1]["models"])
        assert [each["machine"]["processes"] for each in saved] == [1, 2]


def test_an_error_of_several_processes_is_printed_once(whole, killed, tmp_path):
    """Whichever of them has it: no traceback, and nobody waits for one that is gone."""
    unfinished = shutil.copytree(killed[0], tmp_path / "unfinished")
    busy, full = tmp_path / "busy", with_base(tmp_path / "full", whole)
    lines = {
        "did you mean --steps": [*SMALL, "--stpes", 5],
        f"{busy} is in use": [*FLAGS, "--out", busy],
        "cannot be cut into equal parts": [*SMALL, "--batch-size", 9],
        "was not finished": [*FLAGS, "--out", unfinished],
        "checkpoint.pt not written": [*FLAGS, "--method", "sft", "--out", full],
    }
    with train.lock(busy):
        results = run_group(
            *((argv, [], "written" in message) for message, argv in lines.items())
        )
    for message, (codes, outputs, (first, second)) in zip(lines, results, strict=True):
        assert codes == [2, 2], (message, first, second)
        assert first.count("error: ") == first.count("hint: ") == 1, first
        assert message in first
        for word in ("error: ", "hint: ", "Traceback"):
            assert word not in second, second
        assert "Traceback" not in first and outputs[1] == "\n" * (outputs[1] != "")
    assert "step    1 A" in outputs[0] and "step    2 A" not in outputs[0]


def test_a_process_that_is_not_the_first_waits_with_its_end(monkeypatch, capsys):
    """torchrun ends all when one ends. The first, which tells the error, may still be
    loading when another knows it."""
    waited = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    for name in train.TORCHRUN:
        monkeypatch.setenv(name, "2")
    for rank, silent in ("1", True), ("0", False):
        monkeypatch.setenv("RANK", rank)
        assert train.main(["--stpes", "5"]) == 2
        assert (capsys.readouterr().err == "") == silent
        assert bool(waited) == silent and (not silent or waited.pop() >= 1)


# ---- The same numbers --------------------------------------------------------------


def test_records_and_evaluations_do_not_change_the_weights(whole, tmp_path):
    """The killed run has another PYTHONHASHSEED and another working folder than
    the whole one; here, the base made again, others are the intervals."""
    out = tmp_path / "out"
    assert go_on(out, "--log-every", 4, "--eval-every", 3) == 0
    for folder in (base_folder(whole).relative_to(whole), *METHODS):
        one, other = (digests(each / folder) for each in (whole, out))
        for key in ("step", "models", "optimizer"):
            assert one[key] == other[key], (folder, key)
        changed = folder in METHODS
        assert (one["metrics"] != other["metrics"]) == changed, folder


OTHER = {
    "--lr 0.01": f"lr: {sdft.Config.lr} -> 0.01",
    "--n-embd 48": "n_embd: 32 -> 48",
    "--distance own": "examples: ",
    "--seed 1": "seed: 0 -> 1",
    "--steps 7": "steps: 6 -> 7",
    "--eval-size 9": "(saved -> now): ",
}


@pytest.mark.parametrize("flags", OTHER)
def test_a_resume_with_other_settings_is_refused_by_name(flags, unfinished, capsys):
    files = [unfinished / "sdft" / name for name in ("checkpoint.pt", "metrics.jsonl")]
    before = [path.read_bytes() for path in files]
    args = ["--resume", "--method", "sdft", *flags.split()]
    assert go_on(unfinished, *args) == 2
    err = capsys.readouterr().err
    assert "error: " in err and OTHER[flags] in err
    assert [path.read_bytes() for path in files] == before


def test_a_resume_of_another_method_s_file_is_refused_by_name(unfinished, capsys):
    shutil.copy(unfinished / "sft" / "checkpoint.pt", unfinished / "sdft")
    assert go_on(unfinished, "--resume", "--method", "sdft") == 2
    assert "kl: None -> forward" in capsys.readouterr().err


def test_a_resume_with_other_threads_says_so_and_goes_on(unfinished, capsys):
    assert go_on(unfinished, "--resume", "--method", "sdft", "--threads", 2) == 0
    text = capsys.readouterr().out
    assert text.count("not to the bit (saved -> now): threads: 1 -> 2") == 1
    assert (unfinished / "sdft" / "results.json").exists()


# ---- No dead setting ---------------------------------------------------------------

TOK = data.Tokenizer()
CHANGES = {
    "seed": 1, "steps": 4, "batch_size": 16, "micro_batches": 2, "lr": 2e-3,
    "warmup_steps": 0, "beta2": 0.9, "weight_decay": 0.1, "grad_clip": 0.1,
    "dropout": 0.5, "max_new_tokens": 4, "log_every": 2, "eval_every": 2,
    "save_every": 2, "kl": "reverse", "teacher": "live", "ema_rate": 0.5,
    "temperature": 2.0, "skip_first_tokens": 1,
}  # fmt: skip


def trace(method, folder, **changes):
    """Three steps; a digest of metrics and final weights, the steps that were saved,
    and in how many parts each batch was cut."""
    trainer, world = METHODS[method], data.World(0)
    config = GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_inner=16)
    student = GPT(config, data.make_rng(0, "weights"))
    with torch.no_grad():  # far from uniform, so that teacher and student differ
        for p in student.parameters():
            if p.dim() == 2:
                p *= 12
    settings = {"steps": 3, "batch_size": 8, "warmup_steps": 1, "lr": 1e-3,
                "log_every": 1, "max_new_tokens": 6, **changes}  # fmt: skip
    stages, saves, parts = {"A": data.make_demos(world, "A", 16, 0)}, [], []
    save, cut = train.write_checkpoint, data.my_micro_batches

    def write_checkpoint(path, content):
        saves.append(content["step"])
        save(path, content)

    def my_micro_batches(*args):
        parts.append(cut(*args))
        return parts[-1]

    queries = data.Benchmark(data.make_demos(world, "A", 2, 1), data.grade_items)
    tasks = {"new": {"A": queries}, "prior": {"knowledge": queries}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_checkpoint", write_checkpoint)
        patch.setattr(data, "my_micro_batches", my_micro_batches)
        cfg, run = trainer.Config(**settings), train.Run(folder)
        trainer.train(student, stages, tasks, TOK, cfg, run)
    all_parts = digests(folder)
    sizes = [len(part) for part in parts]
    return all_parts["metrics"], all_parts["models"], saves, sizes


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_changes_metrics_weights_or_files(method, tmp_path):
    """There is no dead setting, without exceptions."""
    names = [field.name for field in fields(METHODS[method].Config)]
    usual = trace(method, tmp_path / "usual")
    assert usual == trace(method, tmp_path / "again")
    dead = [
        name for name in names
        if trace(method, tmp_path / name, **{name: CHANGES[name]}) == usual
    ]  # fmt: skip
    assert dead == []


def test_every_setting_has_a_changed_value():
    assert set(CHANGES) == {field.name for field in fields(sdft.Config)}
    assert {field.name for field in fields(sft.Config)} < set(CHANGES)


# ---- The name of a base model ------------------------------------------------------

CONFIG, BASE = GPTConfig(n_head=4, n_kv_head=1), train.BASE


def key_of(config=CONFIG, dtype=torch.float32, train=train, data=data, **changes):
    """The folder that train.py gives to a base model."""
    cfg, corpus = replace(BASE, **changes), data.make_base_corpus
    args = types.SimpleNamespace(base=None, out="out")
    world, tok = data.World(cfg.seed), data.Tokenizer()
    with pytest.MonkeyPatch.context() as patch:  # a smaller sample is as good, here
        patch.setattr(data, "make_base_corpus", lambda w, t, n, s: corpus(w, t, 99, s))
        return train.find_base(args, config, cfg, world, tok, dtype).parent.name


def test_all_that_makes_the_base_model_gives_it_another_name():
    keys = [key_of()]
    for name in train.MODEL_FLAGS:
        keys.append(key_of(replace(CONFIG, **{name: getattr(CONFIG, name) * 2})))
    for change in ({"seed": 1}, {"lr": 1.0}, {"steps": BASE.steps + 1}):
        keys.append(key_of(**change))
    keys.append(key_of(dtype=torch.bfloat16))
    assert key_of() == keys[0]
    assert len(set(keys)) == len(keys)


def test_what_does_not_make_the_base_model_leaves_its_name():
    """How many processes share the work, and how often it is recorded and saved."""
    for change in ({"micro_batches": 4}, {"log_every": 7}, {"save_every": 11}):
        assert key_of(**change) == key_of()


def edited(module, folder, old, new):
    """A module whose source is that of another, with an edit."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, old
    path = folder / f"{module.__name__}.py"
    path.write_text(source.replace(old, new))
    made = types.ModuleType(module.__name__)
    made.__file__ = str(path)
    if module is not model:  # of which the key reads the source only
        exec(path.read_text(), vars(made))
    return made


# a name of what is edited -> module, what stands there, and what is to stand there
KEEP = {
    "a docstring": ("sft", '"""Learning rate of update', '"""The rate of update'),
    "a comment": ("sft", "    # one update\n", "    # one step more\n"),
    "a comment of a setting": ("sft", "# of AdamW, on matrices", "# AdamW, matrices"),
    "a docstring of the model": ("model", '"""tokens (B, T) -> log', '"""-> log'),
    "a column of the table": ("train", '  KL(student || base)"]', '  KL"]'),
    "a record": ("data", 'record["kl_teacher_base"], record', 'record["x"], record'),
}
CHANGE = {
    "the loss": ("sft", ") / cfg.batch_size  # (B, R)", ") / 7  # (B, R)"),
    "the optimizer": ("sft", "betas=(0.9, cfg.beta2)", "betas=(0.8, cfg.beta2)"),
    "a default": ("sft", "grad_clip: float = 10.0", "grad_clip: float = 9.0"),
    "the model": ("model", "rope_theta: float = 1", "rope_theta: float = 2"),
    "the corpus": ("data", 'KNOWN = 120', 'KNOWN = 119'),
    "a style": ("data", '("", "gives", "done sir")', '("", "gives", "done")'),
    "what carries loss": ("data", "row[list(example.skip)] = False", "row[:0] = False"),
    "the order of a batch": ("data", "{e.prompt} {e.shown} {e.demo}", "{e.prompt}"),
}
def key_with(edit, folder, monkeypatch):
    name, old, new = edit
    module = edited({"train": train, "model": model, "sft": sft, "data": data}[name],
                    folder, old, new)  # fmt: skip
    if name == "train":
        return key_of(train=module)
    with monkeypatch.context() as patch:
        patch.setattr(train, name, module)
        if name == "data":
            patch.setattr(sft, name, module)
            return key_of(data=module)
        return key_of()


@pytest.mark.parametrize("what", KEEP)
def test_an_edit_that_makes_no_other_base_keeps_its_name(what, tmp_path, monkeypatch):
    assert key_with(KEEP[what], tmp_path, monkeypatch) == key_of()


@pytest.mark.parametrize("what", CHANGE)
def test_an_edit_that_makes_another_base_changes_its_name(what, tmp_path, monkeypatch):
    assert key_with(CHANGE[what], tmp_path, monkeypatch) != key_of()


# ---- No code from files, no network ------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "socket", "ssl", "urllib", "urllib3", "http", "requests", "httpx", "aiohttp",
    "ftplib", "smtplib", "telnetlib", "xmlrpc", "datasets", "wandb",
}  # fmt: skip
OF_REAL_MODELS = {"transformers", "huggingface_hub"}  # only within functions of --init
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"hub", "get_encoding", "encoding_for_model"}  # of downloads


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def is_unsafe_load(node):
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
        return False
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    return given.get("weights_only") != "True"


def faults(source):
    """What must not be in a source, as a list of texts."""
    found, tree = [], ast.parse(source)
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) not in inside:
            found += OF_REAL_MODELS & {m.split(".")[0] for m in imported(node)}
        found += [m for m in imported(node) if m.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            found += ["weights_only"] if ast.unparse(node.value) != "True" else []
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            found.append(node.attr)
        found += ["torch.load"] if is_unsafe_load(node) else []
    return found


@pytest.mark.parametrize("name", ["data", "model", "sdft", "sft", "train"])
def test_a_source_runs_no_code_from_files_and_opens_no_connection(name):
    assert faults((ROOT / f"{name}.py").read_text()) == []


def test_no_top_level_source_is_left_out():
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names == {"data", "model", "sdft", "sft", "train"}


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import urllib.request as u",
    "def f():\n    from socket import socket", "x = eval('1')", "exec(text)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "load(f, weights_only=x)",
    "torch.hub.load('a')", "tiktoken.get_encoding('gpt2')", "import transformers",
])  # fmt: skip
def test_the_scan_finds_what_it_looks_for(line):
    assert faults(line) != []


def test_the_scan_lets_pass_what_is_harmless():
    assert faults("model.eval()\ntorch.load(f, weights_only=True)") == []
    assert faults("def f():\n    import transformers") == []


def test_nothing_connects_to_anything(tmp_path, monkeypatch, capsys):
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("there is no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", 9))
    calls.clear()
    code = go_on(tmp_path / "out", "--base-steps", 8, "--steps", 2)
    assert code == 0, capsys.readouterr().err
    assert calls == []


# ---- Two at once; what a user types ------------------------------------------------


def lasting(folder):
    """What a run would notice if another wrote there."""
    return {path: content for path, content in files_in(folder).items()
            if ".tmp." not in path.name}  # fmt: skip


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path, capsys):
    """The first stands still in the middle of making the base. A second one in its
    folder is refused, and so is one elsewhere that shares its folder of bases. When it
    is gone they go on, and the base is made once."""
    out, other = tmp_path / "out", tmp_path / "other"
    moment = at("base model", 10, "SIGSTOP")
    process = begin(out, "--method", "sft", AT=moment)
    try:
        printed = wait_for(process, "base model", 10)
        os.waitpid(process.pid, os.WUNTRACED)
        other.mkdir()
        (other / "base").symlink_to(out / "base")
        before = lasting(out)
        for folder, used in ((out, out), (other, base_folder(out))):
            assert go_on(folder, "--method", "sft") == 2
            err, name = capsys.readouterr().err, folder / used.relative_to(out)
            message = f"{name} is in use by another run, process {process.pid}\n"
            if folder == other:
                message = message.replace(str(name), str(other / "base" / used.name))
            assert f"error: {message}" in err
            assert "--out" in err.splitlines()[-1]
            assert lasting(out) == before
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert first_step([line.rstrip() for line in printed], "base model") == 0
    assert go_on(other, "--method", "sft") == 0
    assert first_step(capsys.readouterr().out.splitlines(), "base model") >= 9
    made = base_file(out).read_bytes()
    assert go_on(out, "--method", "sft") == 0
    assert "base model: found" in capsys.readouterr().out
    assert base_file(out).read_bytes() == made
    assert digests(out / "sft")["models"] == digests(other / "sft")["models"]


def test_a_base_that_was_made_while_one_looked_is_not_made_again(
    whole, tmp_path, capsys, monkeypatch
):
    """Another run finishes it between the look and the lock."""
    out, real = tmp_path / "out", train.lock

    def lock(folder):
        file = real(folder)
        if folder.parent.name == "base":
            shutil.copy(base_file(whole), folder)
        return file

    monkeypatch.setattr(train, "lock", lock)
    assert go_on(out, "--method", "sft") == 0
    text = capsys.readouterr().out
    assert "will be made" in text and "base model: found" in text
    assert not (base_folder(out) / "checkpoint.pt").exists()
    assert digests(out / "sft")["models"] == digests(whole / "sft")["models"]


@pytest.mark.parametrize("flags", ["--sample kitchen", "--show"])
def test_what_does_not_train_makes_nothing_in_a_folder_that_is_in_use(
    flags, tmp_path, capsys
):
    with train.lock(tmp_path / "out"):
        before = files_in(tmp_path)
        assert train.main([*flags.split(), "--out", str(tmp_path / "out")]) == 2
        assert "error: " in capsys.readouterr().err
        assert files_in(tmp_path) == before


@pytest.mark.parametrize("text", ["<|end|>", "kitchen kettle: <|start|> apple"])
def test_special_tokens_cannot_be_injected_through_sample(
    text, whole, monkeypatch, capsys
):
    seen, real = [], data.greedy_responses

    def greedy_responses(model, contexts, *args):
        seen.extend(contexts)
        return real(model, contexts, *args)

    monkeypatch.setattr(data, "greedy_responses", greedy_responses)
    assert go_on(whole, "--sample", text) == 0
    assert len(seen) == 3  # base, sft, sdft
    for ids in seen:
        assert ids[-1] == TOK.start and TOK.start not in ids[:-1]
        assert TOK.end not in ids and TOK.decode(ids[:-1]) == text
