"""What the benchmarks share: machine, clock, turns, fresh processes, rooflines, files.

Entries of a table run in turns, so that noise of the machine meets all of them. Extra
memory is the peak above what was resident when the run began, each in a fresh process:
on a CPU the kernel's high-water mark, reset before the run; on CUDA the allocator's.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "exercises")]


def machine():
    """The machine and versions, as one line."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    if DEVICE == "cuda":
        of = torch.cuda.get_device_properties(0)
        name = f"{of.name} ({of.total_memory / 1e9:.0f} GB, sm_{of.major}{of.minor})"
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def clock():
    """Seconds, when all that was asked of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def error_of(run, *args):
    """What keeps it from running (no package, compiler or memory); None if it runs."""
    try:
        run(*args)
    except ImportError as error:
        return f"not installed ({error.name})"
    except Exception as error:
        return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"


def in_turns(entries, turns):
    """name -> function to name -> seconds of its runs, one after the other."""
    seconds = {name: [] for name in entries}
    for _ in range(turns):
        for name, run in entries.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def row(name, seconds, per=1, **more):
    """What the JSON has of an entry, said: least and median time in milliseconds, for
    one of `per` equal parts of a run, and more."""
    ms = [1e3 * s / per for s in seconds]
    values = {"min_ms": min(ms), "median_ms": median(ms), **more}
    shown = [f"{key} {x:,.3g}" for key, x in values.items() if x is not None]
    print(f"  {name:24}{'  '.join(shown)}", flush=True)
    return values


def resident(key):
    """VmRSS, what is in memory now, or VmHWM, the most so far; in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024


def mark_memory():
    """MB in use now; from here on peak_memory counts."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.init()  # else it knows no device to reset
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed would hide new memory
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now VmRSS
    return resident("VmRSS")


def peak_memory():
    """MB at the peak since mark_memory."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident("VmHWM")


def extra_memory(run):
    """Peak MB of run() above what is resident before it."""
    before = mark_memory()
    run()
    return peak_memory() - before


def fresh(*args):
    """What serve's entry returns for these words and numbers, in a process of its own
    with as many threads; None if it fails: its last words are said."""
    job = [sys.executable, sys.argv[0], "--entry", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(job, capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  {' '.join(map(str, args))}: {last}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def roofs():
    """Bytes of a large copy (read and write) and flop of a large float32 matrix product
    per second, said and for the JSON: roofs of what moves memory or multiplies."""
    gpu = DEVICE == "cuda"
    x, n = torch.ones(2**28 if gpu else 2**27, device=DEVICE), 8192 if gpu else 1024
    y, square = torch.empty_like(x), x[: n * n].view(n, n)
    runs = {"copy": lambda: y.copy_(x), "product": lambda: square @ square}
    seconds = in_turns(runs, 11)
    copy = 2 * 4 * x.numel() / min(seconds["copy"])
    flop = 2 * n**3 / min(seconds["product"])
    print(f"roofs: copy {copy / 1e9:.1f} GB/s, products {flop / 1e9:.0f} GFLOP/s")
    return copy, flop, {"copy_gb_per_s": copy / 1e9, "gflop_per_s": flop / 1e9}


def each_cell(name, cells, measure_cell, args):
    """Measure the cells of a table, and after each write what is there."""
    copy, flop, result = roofs()
    result["cells"] = []
    for cell in cells:
        result["cells"].append(measure_cell(*cell, copy, flop, args))
        write(name, result, args)


def write(name, result, args):
    """results/<name>_<device>.json, or --out; nothing of a --quick run without it."""
    if args.quick and not args.out:
        return
    path = args.out or ROOT / "tests" / "bench" / "results" / f"{name}_{DEVICE}.json"
    command = " ".join(["python", f"tests/bench/{name}.py", *sys.argv[1:]])
    result = {"machine": machine(), "command": command, **result}
    path.write_text(json.dumps(result, indent=1) + "\n")


def serve(entry):
    """In a process that fresh started: print what entry returns, and end."""
    if sys.argv[1:2] == ["--entry"]:
        args = [int(x) if x.isdigit() else x for x in sys.argv[2:]]
        print(json.dumps(entry(*args)))
        sys.exit()


def begin(about, turns, entry):
    """Serve entry, or read the flags. Sets one thread, says what runs where."""
    serve(entry)
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--turns", type=int, default=turns, help="runs of each entry")
    parser.add_argument("--quick", action="store_true", help="small, writes no file")
    parser.add_argument("--out", type=Path, help="JSON; default: beside the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print("command: python", *sys.argv, flush=True)
    return args
