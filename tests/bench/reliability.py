"""Kills, damaged files, bad inputs and memory, counted: the figures of the notebook.

    python tests/bench/reliability.py            # about ten minutes on one core
    python tests/bench/reliability.py --quick    # about two minutes

Prints a table and writes it to tests/bench/results/reliability.json, and after it the
table of faults.py, which counts the faults that other projects had by kind. The short
versions of the same run with the tests, in tests/test_reliability.py. Real processes,
of which some are killed in the middle of a write: Linux and macOS.
"""

import argparse
import contextlib
import io
import json
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import faults  # noqa: E402
import test_reliability as short  # noqa: E402
from test_train import BAD, assert_refused, bad_argv, start  # noqa: E402

import train  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results"
EACH = "--save-every", "1"
MEASURE = short.PROGRAM + (
    "import resource; code = train.main(sys.argv[2:]); "
    "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
)


def succeed(process):
    code, text, err = short.finish(process, timeout=1200)
    assert code == 0, err
    return text


def kill_in_a_write(process, part, step, later, folder):
    """So many seconds after a step, and then in the next write of a checkpoint."""
    short.wait_for(process, part, step)
    time.sleep(later)
    while process.poll() is None and not any(folder.rglob("checkpoint.pt.tmp")):
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"


def killed_and_resumed(part, folder, whole, rng, in_write):
    """Kill one run in one part, at random or in a write, and resume it: is it then
    the uninterrupted one? And did the kill leave half a file?"""
    method = "sft" if part == "base model" else part
    steps = 40 if part == "base model" else 18
    step, later = rng.randrange(3, steps - 5), rng.uniform(0, 0.03)
    out, args = folder / "out", (*EACH, "--method", method)
    if part != "base model":
        short.with_base(out, whole)
    if in_write:
        kill_in_a_write(short.begin(out, *args), part, step, later, out)
    else:
        short.killed_at(out, *args, part=part, step=step, later=later)
    half = any(out.rglob("*.tmp"))
    succeed(short.begin(out, *args, "--resume"))
    folders = [short.base_folder(out).relative_to(out), method]
    same = all(short.digests(out / f) == short.digests(whole / f) for f in folders)
    return same, half


def count_kills(part, kills, whole, work, rng):
    same = halves = 0
    for i in tqdm(range(kills), desc=f"kills, {part}"):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            result = killed_and_resumed(part, Path(folder), whole, rng, i % 2 == 1)
            same, halves = same + result[0], halves + result[1]
    return same, halves


def refused(argv, message):
    """Does a bad input get an error that names it, a hint and exit code 2?"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main(argv)
    try:
        assert_refused((code, out.getvalue(), err.getvalue()), message)
    except AssertionError:
        return False
    return True


def start_usual(out, *args, **environment):
    """A short run with a model of the usual size, that tells its peak at its end."""
    few = "--device cpu --method sdft --base-steps 8 --steps 4 --gate-margin -1"
    few += " --log-every 1 --save-every 1"
    launcher = [sys.executable, "-c", MEASURE]
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return start(*few.split(), "--out", out, *args, launcher=launcher, **environment)


def peak_memory(process):
    """In MiB."""
    return int(re.search(r"peak (\d+)", succeed(process))[1]) / 1024


def measure(quick, work):
    """The rows of the table: what was done, and the figure."""
    rng, rows, whole = random.Random(0), [], work / "whole"
    succeed(short.begin(whole, *EACH))
    kills = {"base model": 1, "sft": 2, "sdft": 2} if quick else {
        "base model": 10, "sft": 20, "sdft": 20,
    }  # fmt: skip
    for part, n in kills.items():
        same, halves = count_kills(part, n, whole, work, rng)
        what = f"`kill -9` of {part}, {halves} of {n} left half a file; resumed"
        rows.append((what, f"{same}/{n} equal to the bit"))
    n, path = (20 if quick else 100), work / "saves" / "checkpoint.pt"
    path.parent.mkdir()
    unreadable, halves, _ = short.kill_in_saves(path, n, seed=1)
    what = f"`kill -9` inside a loop that only saves, {halves} of {n} left half a file"
    rows.append((what, f"{unreadable}/{n} unreadable"))
    flips, cuts = (40, 10) if quick else (200, 50)
    source = whole / "sdft" / "checkpoint.pt"
    right = short.count_refused(source, work / "checkpoint.pt", flips, cuts, seed=1)
    what = f"{flips} flipped bits and {cuts} cut files: refused, or as they were"
    rows.append((what, f"{right}/{flips + cuts}"))
    for end in ("dies", "fails"):
        n = short.moments_of_a_save(work / end, end)
        what = f"a save that {end} before, in or after a call that touches the disk"
        rows.append((what, f"{n}/{n} lose nothing"))
    n = sum(refused(bad_argv(flags, work / "bad"), BAD[flags]) for flags in BAD)
    what = "bad inputs: an error that names it, a hint, exit code 2"
    rows.append((what, f"{n}/{len(BAD)}"))
    out = work / "memory"
    succeed(start_usual(out))  # makes the base
    shutil.rmtree(out / "sdft")
    fresh = peak_memory(start_usual(out))
    shutil.rmtree(out / "sdft")
    killed = start_usual(out, AT=short.at("sdft", 5, "SIGKILL"))
    code, _, err = short.finish(killed, timeout=1200)
    assert code == -signal.SIGKILL, err
    again = peak_memory(start_usual(out, "--resume"))
    what = f"peak memory of a resume, against {fresh:.0f} MiB of a fresh start"
    rows.append((what, f"{again:.0f} MiB, {again / fresh:.2f} times"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the kills")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(args.quick, Path(work))
    print("| what | figure |\n|---|---|")
    for row in rows:
        print(f"| {row[0]} | {row[1]} |")
    machine = {"machine": platform.machine(), "python": platform.python_version(),
               "torch": str(torch.__version__), "quick": args.quick}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "reliability.json"
    path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    print("\nfaults that other projects had, by kind:")
    return faults.main()


if __name__ == "__main__":
    sys.exit(main())
