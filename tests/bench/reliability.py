"""Kills, saves that fail, and memory, counted: the figures of the notebook.

    python tests/bench/reliability.py            # minutes, on one core
    python tests/bench/reliability.py --quick    # a tenth of the kills
    python tests/bench/reliability.py --faults   # one minute: only the second table

Prints two tables and writes them to tests/bench/results. tests/test_reliability.py does
each of the first once, with what is here: real processes, of which some are killed in
the middle of a write (Linux and macOS). The second counts the cases of test_faults.py,
faults that other projects had, by kind. What cannot be tried here is not counted.
"""

import argparse
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_train import METHODS, SMALL, base_file, read, same, start  # noqa: E402

import train  # noqa: E402

FLAGS = [*SMALL, "--method", "both"]
# train.py, with the base saved often, in which signals come before a step, or seconds
# later: AT is [part, step, names, processes, seconds]; "half" is a death in the next
# save. The disk may be FULL, for files of more than 32 KiB.
PROGRAM = """
import json, os, resource, signal, sys, threading, time
import train
# (started in the background, as by a script, a process ignores Ctrl-C)
signal.signal(signal.SIGINT, signal.default_int_handler)
*place, names, ranks, later = json.loads(os.environ.get("AT", "[0, 0, 0, 0, 0]"))
progress, load, rank = train.Run.progress, train.Run.load, os.environ.get("RANK", "0")
train.BASE.save_every = 3
if "FULL" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))
if rank == "1":
    train.Run.load = lambda *args: time.sleep(0.2) or load(*args)

def act():
    for name in names:
        if name == "half":
            os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), getattr(signal, name))

def watched(run, start, end):
    for step in progress(run, start, end):
        if place == [run.folder.name if run.note else "base", step] and rank in ranks:
            threading.Timer(later, act).start() if later else act()
        yield step

train.Run.progress = watched
code = train.main(sys.argv[2:])
if "PEAK" in os.environ:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


# ---- Processes, and what they leave --------------------------------------------------


def at(part, step, *names, ranks="0", later=0.0):
    """For the environment of a process: signals before a step, see PROGRAM."""
    return {"AT": json.dumps([part, step, names, ranks, later])}


def begin(out, *args, flags=FLAGS, **environment):
    """Start PROGRAM as a process of its own."""
    argv, launcher = (*flags, "--out", out, *args), [sys.executable, "-c", PROGRAM]
    return start(*argv, launcher=launcher, PYTHONPATH=str(ROOT), **environment)


def finish(process, timeout=1200):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def succeed(process):
    code, text, err = finish(process)
    assert code == 0, err
    return text


def contents(out, part):
    """All that a run of one method, or the base, has left."""
    folder = base_file(out).parent if part == "base" else out / part
    parts = train.read_checkpoint(folder / "checkpoint.pt", ())
    parts["metrics"] = train.read_metrics(folder)
    if (folder / "results.json").exists():
        parts["results"] = read(out, part)[0]
    if part == "base":
        parts["base"] = train.read_checkpoint(folder / "base.pt")
        del parts["settings"]["save_every"]  # see PROGRAM
    return parts


def assert_same(out, other, *parts):
    """Base and methods, to the bit: tensors, metrics and results."""
    for part in parts or ("base", *METHODS):
        one, two = contents(out, part), contents(other, part)
        assert [k for k in two if not same({k: one.get(k)}, {k: two[k]})] == [], part


def killed_and_resumed(part, out, whole, rng, in_save):
    """Kill a run in one part, at random or in a save, and resume it, which must end as
    the uninterrupted one. Did the kill leave half a file?"""
    if part != "base":
        shutil.copytree(whole / "base", out / "base")
    later = 0 if in_save else rng.uniform(0.001, 0.05)
    moment = at(part, rng.randrange(6), "half" if in_save else "SIGKILL", later=later)
    args = "--method", "sft" if part == "base" else part
    code, _, err = finish(begin(out, *args, **moment))
    assert code in (-signal.SIGKILL, 0), err  # 0: it was done before
    left = any(out.rglob("*.tmp"))
    succeed(begin(out, *args, "--resume"))
    assert_same(out, whole, "base", args[-1])
    return left


def run_two(*args, **environment):
    """PROGRAM as two processes: for each, exit code and texts. As torchrun does it, an
    error of the first ends the second."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
             "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none",
             **environment}  # fmt: skip
    both = [begin(*args, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    first = finish(both[0])
    if first[0] == 2:
        both[1].terminate()
    return [first, finish(both[1])]


def assert_stopped(both, code, argv):
    """Once, whoever got the signal."""
    (one, _, first), (two, _, second) = both
    assert (one, two) == (code, code), first + second
    assert "Traceback" not in first + second and "to go on" not in second
    (command,) = re.findall("stopped; to go on: (.*)", first)
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2", "train.py"]
    assert shlex.split(command) == [*torchrun, *argv]


# ---- Saves ---------------------------------------------------------------------------


def wrap_calls(what, n):
    """Wrap each call of a save that touches the disk, in this process. There is a
    moment before it, one after it and, where it writes, one in its middle. At moment n
    the process "dies", the call "fails", or the disk "is full" from there."""

    def moment(name):
        nonlocal n
        n -= 1
        if n == -1 and what == "dies":
            os._exit(9)
        full = what == "is full" and name != "unlink"  # nothing else fails then
        if n == -1 or (n < 0 and full):
            raise OSError(28, "No space left on device")

    def wrap(owner, name, real):
        def call(*args, **kwargs):
            moment(name)
            result = real(*args, **kwargs)
            moment(name)
            return result

        setattr(owner, name, call)

    class File(io.FileIO):  # what is written is at once on the disk
        def write(self, content):
            middle = len(content) // 2
            for part in content[:middle], content[middle:]:
                moment("write")
                super().write(part)
            moment("write")
            return len(content)

    wrap(train, "open", lambda path, mode: File(path, "w"))
    wrapped = (os, "fsync", "replace"), (Path, "unlink"), (File, "flush", "close")
    for owner, *names in wrapped:
        for name in names:
            wrap(owner, name, getattr(owner, name))


def moments_of_a_save(folder, what):
    """Let a save die or fail at each of its moments, in a process of its own: the file
    is the old one or the new one, whole. A death leaves half a file at most, and the
    next save takes its place; a failure leaves nothing and is an error with the path,
    unless the new file is there. Returns how many moments there are."""
    path, n, ended, steps, left = folder / "checkpoint.pt", -1, None, set(), set()
    old, new = ({"step": i, "model": torch.full((2000,), i)} for i in (1, 2))
    folder.mkdir()
    while ended != 0:
        train.write_checkpoint(path, old)
        assert [each.name for each in folder.iterdir()] == [path.name]
        n += 1
        child = os.fork()
        if not child:
            code = 2
            try:
                wrap_calls(what, n)
                train.write_checkpoint(path, new)
                code = 0
            except OSError as error:
                code = 1 if str(error).startswith(f"{path} not written: ") else 2
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = train.read_checkpoint(path)
        assert same(found, new) or (same(found, old) and ended != 0), n
        assert ended in (0, 9 if what == "dies" else 1), n
        steps.add(found["step"])
        left |= {each.name for each in folder.iterdir()}
    assert steps == {1, 2}, "this shows nothing"
    assert left == {path.name, *["checkpoint.pt.tmp"] * (what == "dies")}
    return n


# ---- The figures ---------------------------------------------------------------------


def begin_usual(out, *args, **environment):
    """A short run with a model of the usual size, that tells its peak at its end."""
    few = "--device cpu --method sdft --base-steps 8 --steps 4 --gate-margin -1"
    few += " --log-every 1 --save-every 1"
    return begin(out, *args, flags=few.split(), PEAK="1", **environment)


def peak_memory(process):
    """In MiB."""
    return int(re.search(r"peak (\d+)", succeed(process))[1]) / 1024


def measure(quick, work):
    """The rows of the table: what was done, and the figure. Any that is not right ends
    it with an error."""
    rng, rows, whole = random.Random(0), [], work / "whole"
    succeed(begin(whole))
    for part, kills in ("base", 10), ("sft", 20), ("sdft", 20):
        n = -(-kills // 10) if quick else kills
        halves = 0
        for i in tqdm(range(n), desc=f"kills, {part}"):
            out = work / f"{part}{i}"
            halves += killed_and_resumed(part, out, whole, rng, i % 2 == 1)
            shutil.rmtree(out)
        what = f"`kill -9` of {part}, {halves} of {n} left half a file; resumed"
        rows.append((what, f"{n}/{n} equal to the bit"))
    for end in ("dies", "fails"):
        n = moments_of_a_save(work / end, end)
        what = f"a save that {end} before, in or after a call that touches the disk"
        rows.append((what, f"{n}/{n} lose nothing"))
    out = work / "memory"
    succeed(begin_usual(out))  # makes the base
    shutil.rmtree(out / "sdft")
    fresh = peak_memory(begin_usual(out))
    shutil.rmtree(out / "sdft")
    code, _, err = finish(begin_usual(out, **at("sdft", 6, "SIGKILL")))
    assert code == -signal.SIGKILL, err
    again = peak_memory(begin_usual(out, "--resume"))
    what = f"peak memory of a resume, against {fresh:.0f} MiB of a fresh start"
    return [*rows, (what, f"{again:.0f} MiB, {again / fresh:.2f} times")]


class Count:
    """A plugin of pytest: kind -> [cases tried, cases right]."""

    def __init__(self):
        self.kinds, self.wrong = {}, []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        right = report.when == "call" and report.passed
        if right or report.failed:  # an error of a fixture is a case that failed
            tried = self.kinds.setdefault(item.function.kind, [0, 0])
            tried[0] += 1
            tried[1] += right
            if not right:
                self.wrong.append(item.name)


def count_faults():
    """The rows of the second table, and the names of the cases that are wrong."""
    count, path = Count(), str(ROOT / "tests" / "test_faults.py")
    pytest.main(["-q", "-p", "no:cacheprovider", path], [count])
    rows = [(kind, *numbers) for kind, numbers in count.kinds.items()]
    rows.append(("together", *(sum(row[i] for row in rows) for i in (1, 2))))
    return rows, count.wrong


def show(name, heads, rows, **more):
    """Print a table, and keep it as results/<name>.json."""
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    content = {"machine": platform.machine(), "python": platform.python_version(),
               "torch": str(torch.__version__), **more, "rows": rows}  # fmt: skip
    path = ROOT / "tests" / "bench" / "results" / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the kills")
    parser.add_argument("--faults", action="store_true", help="only the second table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.faults:
        with tempfile.TemporaryDirectory() as work:
            rows = measure(args.quick, Path(work))
        show("reliability", ("what", "figure"), rows, quick=args.quick)
    rows, wrong = count_faults()
    show("faults", ("kind", "cases tried", "cases right"), rows, wrong=wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
