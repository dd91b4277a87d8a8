"""What must hold when things go wrong: real processes, real SIGKILL, damaged files.

Short versions; the full figures come from tests/bench/reliability.py. A kill comes at a
step that a test names, and in the midst of what the process does then: so each test
asserts only what holds at every moment. That a save may die at any moment is shown in
test_a_save_may_die_or_fail_at_any_moment, call by call.
"""

import ast
import fcntl
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
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from test_train import (
    METHODS,
    ROOT,
    SMALL,
    assert_refused,
    base_file,
    files_in,
    go,
    read,
    small_run,
    start,
    stop_at,
    without_times,
)

import data
import train

FLAGS = [*SMALL, "--base-steps", "40", "--steps", "6", "--save-every", "2"]
FLAGS += ["--method", "both"]
# The base model, too, is to be saved and shown often: no flag does that.
OFTEN = {"log_every": 1, "save_every": 3}
# train.py, in which something happens right after the record of a step: AT is a list of
# [part, step, what, seconds later, processes], part one of "base model", "sft", "sdft".
# The disk may be FULL, for files of more than 32 KiB; process 1 may be slower.
PROGRAM = f"""
import json, os, signal, sys, threading, time
import train
vars(train.BASE).update({OFTEN})
log, moments = train.Run.log, json.loads(os.environ.get("AT", "[]"))
if "FULL" in os.environ:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))
if os.environ.get("RANK") == "1":
    load = train.Run.load
    train.Run.load = lambda *args: time.sleep(0.2) or load(*args)

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

__all__ = ["go"]  # a fixture
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


def at(part, step, what, later=0.0, processes="0"):
    """For the environment of a process: what happens after a step, see PROGRAM."""
    return json.dumps([[part, step, what, later, processes]])


def begin(out, *args, **kwargs):
    """Start train.py with FLAGS as a process of its own."""
    kwargs = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **kwargs}
    return start(*FLAGS, "--out", out, *args, launcher=PYTHON, **kwargs)


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


def plain(x):
    if isinstance(x, torch.Tensor):
        return [str(x.dtype), x.tolist()]
    if isinstance(x, dict):
        return sorted((repr(k), plain(v)) for k, v in x.items())
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


def digest(x):
    """Two things with the same digest are the same to the bit, but for times."""
    return hashlib.sha256(repr(plain(without_times(x))).encode()).hexdigest()[:12]


def digests(folder):
    """A digest of each part of what a run of one method, or the base, has left."""
    parts = without_times(train.read_checkpoint(folder / "checkpoint.pt"))
    parts["metrics"] = train.read_metrics(folder)
    if (folder / "results.json").exists():
        parts["results"] = read(folder.parent, folder.name)[0]
    if (folder / "base.pt").exists():
        parts["base"] = train.read_checkpoint(folder / "base.pt")
    return {name: digest(part) for name, part in parts.items()}


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
    every two steps there is a checkpoint, wherever it struck."""
    out = shutil.copytree(killed[0], tmp_path / "unfinished")
    train.read_checkpoint(out / "sdft" / "checkpoint.pt")
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
    assert not list(out.rglob("*.tmp*"))


def save_forever(path, step, weights):
    while True:
        step += 1
        train.write_checkpoint(path, {"step": step, "weights": weights})


def kill_in_saves(path, kills, seed):
    """Kill a process that only saves, so many times, at any moment. Returns how often
    the file could not be read afterwards, how often half a file was left, and the steps
    that were read."""
    rng, weights = random.Random(seed), torch.randn(1 << 18)
    train.write_checkpoint(path, {"step": 0, "weights": weights})
    unreadable, stale, steps = 0, 0, [0]
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(
            target=save_forever, args=(path, steps[-1], weights)
        )
        process.start()
        time.sleep(rng.uniform(0.02, 0.08))
        process.kill()
        process.join()
        stale += len(list(path.parent.glob("*.tmp*")))
        try:
            read = train.read_checkpoint(path)
        except (OSError, ValueError):
            unreadable += 1
        else:
            assert torch.equal(read["weights"], weights)
            steps.append(read["step"])
    return unreadable, stale, steps


def test_a_kill_inside_a_save_leaves_a_checkpoint_that_loads(tmp_path):
    """What was saved once is never lost: the steps do not go back."""
    unreadable, stale, steps = kill_in_saves(tmp_path / "checkpoint.pt", 10, seed=0)
    assert unreadable == 0
    assert len(steps) == 11 and steps == sorted(steps)
    assert stale > 0, "no kill came in the middle of a write"


class Calls:
    """Wraps each call of a save that touches the disk, in this process. There is a
    moment before it, one after it and, where it writes, one in its middle. What happens
    at moment n: the process "dies", the call "fails", or the disk "is full" from there.
    """

    def __init__(self, what, n):
        self.what, self.left = what, n
        for owner, name in (
            (os, "fsync"), (os, "replace"), (Path, "unlink"), (train, "open"),
        ):  # fmt: skip
            setattr(owner, name, self.wrap(name, getattr(owner, name, open)))

    def moment(self, name):
        self.left -= 1
        if self.left == -1 and self.what == "dies":
            os._exit(9)
        full = self.what == "is full" and name != "unlink"  # nothing else fails then
        if self.left == -1 or (self.left < 0 and full):
            raise OSError(28, "No space left on device")

    def wrap(self, name, real):
        def call(*args, **kwargs):
            self.moment(name)
            result = real(*args, **kwargs)
            result = File(result, self) if name == "open" else result
            self.moment(name)
            return result

        return call


class File:
    """A file whose calls are wrapped so; what is written is at once on the disk."""

    def __init__(self, file, calls):
        self.file, self.calls, self.fileno = file, calls, file.fileno
        self.flush, self.close = (calls.wrap("", f) for f in (file.flush, file.close))

    def write(self, content):
        middle = len(content) // 2
        for part in content[:middle], content[middle:]:
            self.calls.moment("write")
            self.file.write(part)
            self.file.flush()
        self.calls.moment("write")
        return len(content)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def content_of(step):
    return {"step": step, "weights": {n: torch.full((n,), step) for n in (9, 2000)}}


def save_in_a_fork(path, step, what, n):
    """Save in a process of its own, which leaves no trace here; its exit code: 0 it
    saved, 1 it raised OSError with the path, 9 it died."""
    child = os.fork()
    if not child:
        code = 2
        try:
            Calls(what, n)
            train.write_checkpoint(path, content_of(step))
            code = 0
        except OSError as error:
            code = 1 if str(error).startswith(f"{path} not written: ") else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moments_of_a_save(folder, what):
    """Let a save die or fail at each of its moments: the file is the old one or the new
    one, whole. A death leaves half a file at most, and the next save takes its place; a
    failure leaves nothing and is an error with the path, unless the new file is there.
    Returns how many moments there are."""
    path, codes, steps, left = folder / "checkpoint.pt", [], set(), set()
    folder.mkdir()
    while codes[-1:] != [0]:
        train.write_checkpoint(path, content_of(1))
        assert [each.name for each in folder.iterdir()] == [path.name]
        codes.append(save_in_a_fork(path, 2, what, len(codes)))
        step = (read := train.read_checkpoint(path))["step"]
        assert digest(read) == digest(content_of(step)), codes
        assert codes[-1] == (9 if what == "dies" else 1) or (codes[-1], step) == (0, 2)
        steps.add(step)
        left |= {each.name for each in folder.iterdir()}
    assert steps == {1, 2}, "this shows nothing"
    half = {"checkpoint.pt.tmp"} if what == "dies" else set()
    assert left == {path.name} | half, codes
    return len(codes) - 1


@pytest.mark.parametrize("what", ["dies", "fails", "is full"])
def test_a_save_may_die_or_fail_at_any_moment(what, tmp_path, monkeypatch):
    """Before, in and after each call that touches the disk, those of torch as well. (A
    process that dies takes no page of the system's with it; syncs only cost.)"""
    monkeypatch.setattr(os, "fsync", lambda number: None)
    assert moments_of_a_save(tmp_path / "saves", what) > 50


def test_a_resume_after_a_death_in_the_middle_of_a_save_loses_nothing(
    unfinished, whole, monkeypatch, capsys
):
    """It goes on, not from 0, and removes the half of a file that was left. Of a line
    of metrics, too, there may be a half."""
    real, half = os.replace, unfinished / "sdft" / "checkpoint.pt.tmp"

    def die(source, target):
        if Path(source) == half:
            raise SystemExit
        real(source, target)

    args = unfinished, "--resume", "--method", "sdft"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(SystemExit):
            go_on(*args)
    assert half.exists()
    with open(half.with_name("metrics.jsonl"), "a") as file:
        file.write('{"step": 18, "ski')
    capsys.readouterr()
    assert go_on(*args) == 0
    assert first_step(capsys.readouterr().out.splitlines(), "sdft") > 0
    assert not half.exists() and digests(half.parent) == digests(whole / "sdft")


# ---- Damaged files and a full disk -------------------------------------------------


def count_refused(source, path, flips, cuts, seed):
    """How many copies of a checkpoint, with one bit flipped or cut, are refused with
    the path, or are what they were: a bit may be one that says nothing."""
    right, same = 0, digest(train.read_checkpoint(source))
    good, rng = source.read_bytes(), random.Random(seed)
    for i in range(flips + cuts):
        bad, place = bytearray(good), rng.randrange(len(good))
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad if i < flips else good[:place])
        try:
            right += digest(train.read_checkpoint(path)) == same
        except train.UserError as error:
            right += str(error).startswith(f"{path} cannot be read: ")
    return right


def test_flipped_bits_and_cut_files_are_refused(whole, tmp_path):
    """Every bit of a small file is tried in test_files."""
    source, path = whole / "sdft" / "checkpoint.pt", tmp_path / "checkpoint.pt"
    assert count_refused(source, path, 20, 5, seed=0) == 25


def test_a_full_disk_is_an_error_and_loses_nothing(unfinished, whole, go):
    """No file may grow beyond 32 KiB. Python itself ignores SIGXFSZ."""
    resource = pytest.importorskip("resource")
    path = unfinished / "sdft" / "checkpoint.pt"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        result = go(unfinished, "--resume --method sdft", FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, f"error: {path} not written: [Errno 27] File too large")
    assert path.read_bytes() == before and not list(unfinished.rglob("*.tmp*"))
    assert go_on(unfinished, "--resume", "--method", "sdft") == 0
    assert digests(path.parent) == digests(whole / "sdft")


# ---- Signals and numbers that are not finite ---------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_end_by_the_command_that_it_prints(
    method, whole, tmp_path, go, capsys
):
    """Stopped in the first and in the last step of a stage, where a save and an
    evaluation stand beside the stop."""
    out = with_base(tmp_path / "my out", whole)
    argv = [*FLAGS, "--out", str(out), "--method", method]
    for step, number in (6, signal.SIGINT), (11, signal.SIGTERM):
        assert stop_at(step, number, argv) == 128 + number
        words = shlex.split(capsys.readouterr().err.split("to go on: ")[1])
        argv = [arg for arg in argv if arg != "--resume"] + ["--resume"]
        assert words == ["python", "train.py", *argv]
        saved = train.read_checkpoint(out / method / "checkpoint.pt")
        assert saved["step"] == step + 1
        assert train.read_metrics(out / method)[-1]["step"] == step
        result = go(out, f"--method {method}", FLAGS)  # not by accident from the start
        assert_refused(result, "was not finished", "--resume")
    assert train.main(argv) == 0
    assert digests(out / method) == digests(whole / method)


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


def test_a_run_is_stopped_and_saved_though_nobody_reads_its_errors(whole, tmp_path):
    """Ctrl-C ends `python train.py 2>&1 | tee log` and tee, too."""
    out = with_base(tmp_path / "out", whole)
    process = begin(out, "--method", "sdft", AT=at("sdft", 5, "SIGTERM"))
    process.stderr.close()
    process.stdout.read()
    assert process.wait(timeout=120) == 143
    assert train.read_checkpoint(out / "sdft" / "checkpoint.pt")["step"] == 7


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

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc_per_node=2"]


def run_two(*args, **environment):
    """train.py as two processes without torchrun: for each, exit code and texts."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
             "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none",
             "PYTHONPATH": str(ROOT), **environment}  # fmt: skip
    both = [start(*args, launcher=PYTHON, RANK=rank, LOCAL_RANK=rank, **group)
            for rank in "01"]  # fmt: skip
    return [finish(process) for process in both]


@pytest.fixture(scope="module")
def stopped_twice(whole, tmp_path_factory):
    """The folder of a run on two processes that was stopped in sft by SIGTERM, which
    one of them got, went on, was stopped in sdft by SIGINT, which both got, and went on
    by the command that was printed, to the end; and the two stops."""
    out = with_base(tmp_path_factory.mktemp("two") / "out", whole)
    argv = [*FLAGS, "--out", out]
    stops = [
        run_two(*argv, AT=at("sft", 8, "SIGTERM", processes="1")),
        run_two(*argv, "--resume", AT=at("sdft", 11, "SIGINT", processes="01")),
    ]
    words = shlex.split(stops[1][0][2].split("to go on: ")[1])
    place = words.index("train.py")
    assert words[:place] == ["torchrun", *TORCHRUN[3:]]
    code, text, err = finish(start(*words[place + 1 :], launcher=TORCHRUN))
    assert code == 0, err
    return out, stops, text


def test_two_processes_that_are_stopped_end_with_143_or_130_and_go_on(stopped_twice):
    """Once, whoever got the signal: the numbers are not added up."""
    _, stops, text = stopped_twice
    for (codes, _, (first, second)), code in zip(
        (zip(*stop, strict=True) for stop in stops), (143, 130), strict=True
    ):
        assert codes == (code, code), first + second
        assert "Traceback" not in first + second and "to go on" not in second
        (command,) = re.findall("stopped; to go on: (.*)", first)
        assert command.startswith("torchrun --standalone --nproc_per_node=2 train.py ")
        assert command.split().count("--resume") == 1
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
    busy.mkdir()
    with open(busy / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for message, args in {
            f"{busy} is in use": ["--out", busy],
            "cannot be cut into equal parts": ["--out", full, "--batch-size", 9],
            "was not finished": ["--out", unfinished],
            "checkpoint.pt not written": ["--out", full, "--method", "sft"],
        }.items():
            disk = {"FULL": "1"} if "written" in message else {}
            first, second = run_two(*FLAGS, *args, **disk)
            assert_refused(first, message)
            out = re.sub(r"\[Gloo\].*\n", "", second[1])  # torch 2.9 says it is there
            assert (second[0], out, second[2]) == (2, "", ""), second
    assert "step    1 A" in first[1] and "step    2 A" not in first[1]


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


def test_a_resume_of_another_method_s_file_is_refused_by_name(unfinished, go):
    shutil.copy(unfinished / "sft" / "checkpoint.pt", unfinished / "sdft")
    result = go(unfinished, "--resume --method sdft", FLAGS)
    assert_refused(result, "kl: None -> forward")


# ---- No dead setting ---------------------------------------------------------------

CHANGES = {
    "seed": 1, "steps": 4, "batch_size": 16, "micro_batches": 2, "lr": 2e-3,
    "warmup_steps": 0, "beta2": 0.9, "weight_decay": 0.1, "grad_clip": 0.1,
    "dropout": 0.5, "max_new_tokens": 4, "log_every": 2, "eval_every": 2,
    "save_every": 2, "kl": "reverse", "ema_rate": 0.5, "temperature": 2.0,
    "skip_first_tokens": 1,
}  # fmt: skip


def trace(method, folder, **changes):
    """Three steps; a digest of metrics and final weights, the steps that were saved,
    and in how many parts each batch was cut."""
    demos = data.make_demos(data.World(0), "A", 2, 1)
    queries = data.Benchmark(demos, data.grade_items)
    tasks = {"new": {"A": queries}, "prior": {"knowledge": queries}}
    settings = {"steps": 3, "warmup_steps": 1, "max_new_tokens": 6, **changes}
    saves, parts = [], []
    save, share = train.write_checkpoint, data.my_micro_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_checkpoint", lambda path, content: (
            saves.append(content["step"]), save(path, content)))  # fmt: skip
        patch.setattr(data, "my_micro_batches", lambda batch, n: (
            parts.append(n) or share(batch, n)))  # fmt: skip
        small_run(method, folder, tasks, **settings)
    left = digests(folder)
    return left["metrics"], left["models"], saves, parts


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_changes_metrics_weights_or_files(method, tmp_path):
    """There is no dead setting, without exceptions."""
    names = {field.name for field in fields(METHODS[method].Config)}
    assert names <= set(CHANGES) and (names == set(CHANGES)) == (method == "sdft")
    usual = trace(method, tmp_path / "usual")
    assert usual == trace(method, tmp_path / "again")
    dead = [
        name for name in names
        if trace(method, tmp_path / name, **{name: CHANGES[name]}) == usual
    ]  # fmt: skip
    assert dead == []


# ---- No code from files, no network ------------------------------------------------

MODULES = {  # that may be imported
    "argparse", "ast", "collections", "contextlib", "copy", "dataclasses", "datetime",
    "fcntl", "functools", "hashlib", "inspect", "itertools", "json", "math", "os",
    "pathlib", "random", "re", "shlex", "shutil", "signal", "sys", "tempfile", "time",
    "unicodedata", "zipfile", "tiktoken", "torch", "tqdm", "triton", "transformers",
    "huggingface_hub", "data", "model", "sdft", "sft",
}  # fmt: skip
FORBIDDEN = re.compile(
    r"(?<![.\w])(?:eval|exec|compile|__import__)\(|torch\.load\((?![^)]*ly=True)|"
    r"weights_only=(?!True)|\.hub\b|get_encoding|encoding_for_model|"
    r"(?m:^(?:import|from) (?:transformers|huggingface_hub))"  # in functions of --init
)


def faults(source):
    """What must not be in a source, as a list of texts."""
    found = FORBIDDEN.findall(source)
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in getattr(node, "names", ())
                 if isinstance(node, ast.Import)]  # fmt: skip
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += {name.split(".")[0] for name in names} - MODULES
    return found


def test_the_sources_run_no_code_from_files_and_open_no_connection():
    found = {path.stem: faults(path.read_text()) for path in ROOT.glob("*.py")}
    assert found == {name: [] for name in ("data", "model", "sdft", "sft", "train")}


def test_the_scan_finds_what_it_looks_for_and_lets_pass_what_is_harmless():
    for line in (
        "import pickle", "from pickle import loads", "import urllib.request as u",
        "def f():\n    from socket import socket", "x = eval('1')", "exec(text)",
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.hub.load('a')",
        "load(f, weights_only=x)", "tiktoken.get_encoding('gpt2')",
        "import transformers",
    ):  # fmt: skip
        assert faults(line) != [], line
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


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path, go):
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
        before = files_in(out)
        for folder, used in ((out, out), (other, base_folder(out))):
            name = folder / used.relative_to(out)
            if folder == other:
                name = other / "base" / used.name
            result = go(folder, "--method sft", FLAGS)
            assert_refused(result, f"error: {name} is in use by another run\n", "--out")
            assert files_in(out) == before
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert first_step([line.rstrip() for line in printed], "base model") == 0
    code, text, _ = go(other, "--method sft", FLAGS)
    assert code == 0 and first_step(text.splitlines(), "base model") >= 9
    made = base_file(out).read_bytes()
    code, text, _ = go(out, "--method sft", FLAGS)
    assert code == 0 and "base model: found" in text
    assert base_file(out).read_bytes() == made
    assert digests(out / "sft")["models"] == digests(other / "sft")["models"]


def test_a_base_that_was_made_while_one_looked_is_not_made_again(
    whole, tmp_path, capsys, monkeypatch
):
    """Another run finishes it between the look and the lock."""
    out, real = tmp_path / "out", train.lock

    def lock(folder):
        real(folder)
        if folder.parent.name == "base":
            shutil.copy(base_file(whole), folder)

    monkeypatch.setattr(train, "lock", lock)
    assert go_on(out, "--method", "sft") == 0
    text = capsys.readouterr().out
    assert "will be made" in text and "base model: found" in text
    assert not (base_folder(out) / "checkpoint.pt").exists()
    assert digests(out / "sft")["models"] == digests(whole / "sft")["models"]
