"""What tests/test_reliability.py needs to kill runs, and to compare what they left.

Real processes, of which some are killed in the middle of a write: Linux and macOS.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
from test_train import METHODS, ROOT, SMALL, base_file, read, same, start

import train

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
    code, _, err = finish(begin(out, *args, "--resume"))
    assert code == 0, err
    assert_same(out, whole, "base", args[-1])
    return left


def run_two(*args, **environment):
    """PROGRAM as two processes: for each, exit code and texts. As torchrun does it, an
    error of the first ends the second."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    group = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2") | environment
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
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
