"""What the benchmarks share: machine, clock, turns, fresh processes, rooflines, files.

Entries of a table run in turns, so that noise of the machine meets all of them; time is
the minimum (median) of the turns. Extra memory is the peak above what was resident when
the run began, each in a fresh process: on a CPU the kernel's high-water mark, reset
before the run; on CUDA that of the allocator.
"""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine():
    """The machine and versions, as one line."""
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [x.split(": ")[1] for x in lines if x.startswith("model name")]
        name = (names or [platform.machine()])[0]
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


def in_turns(entries, turns):
    """name -> function to name -> seconds of its runs, one after the other."""
    seconds = {name: [] for name in entries}
    for _ in range(turns):
        for name, run in entries.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def min_and_median(seconds, per=1):
    """In milliseconds, for one of `per` equal parts of a run."""
    ms = [1e3 * s / per for s in seconds]
    return {"min_ms": min(ms), "median_ms": median(ms)}


def resident(key):
    """VmRSS, what is in memory now, or VmHWM, the most so far; in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) / 1024


def mark_memory():
    """MB in use now; from here on peak_memory counts."""
    gc.collect()
    if DEVICE == "cuda":
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
    """The JSON that this program prints last when it is started with these arguments in
    a process of its own, with as many threads; None if it fails, and then its last
    words are shown."""
    job = [sys.executable, sys.argv[0], *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(job, capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  {' '.join(map(str, args))}: {last}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def best_of(run, n=10):
    run()
    return min(in_turns({"": run}, n)[""])


def copy_bytes_per_second():
    """Of a large copy, read and write counted: the roof of what moves memory."""
    x = torch.ones(2**30 if DEVICE == "cuda" else 2**27, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / best_of(lambda: y.copy_(x))


def flop_per_second():
    """Of a large float32 matrix product: the roof of what multiplies matrices."""
    n = 8192 if DEVICE == "cuda" else 1024
    x, y = (torch.ones(n, n, device=DEVICE) for _ in range(2))
    return 2 * n**3 / best_of(lambda: x @ y)


def roofs():
    """Bytes of a copy and flop of a product per second, said and for the JSON."""
    copy, flop = copy_bytes_per_second(), flop_per_second()
    print(f"roofs: copy {copy / 1e9:.1f} GB/s, products {flop / 1e9:.0f} GFLOP/s")
    return copy, flop, {"copy_gb_per_s": copy / 1e9, "gflop_per_s": flop / 1e9}


def write(name, result, quick, out=None):
    """results/<name>_<device>.json, or `out`; nothing of a --quick run without out."""
    if quick and not out:
        return
    path = out or ROOT / "tests" / "bench" / "results" / f"{name}_{DEVICE}.json"
    command = " ".join(["python", f"tests/bench/{name}.py", *sys.argv[1:]])
    result = {"machine": machine(), "command": command, **result}
    path.write_text(json.dumps(result, indent=1) + "\n")


def add_arguments(parser, turns):
    """The flags that all of them have."""
    parser.add_argument("--turns", type=int, default=turns, help="runs of each entry")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small, writes no file")
    parser.add_argument("--out", type=Path, help="JSON; default: beside the results")


def begin(args):
    """Set the threads, say what runs where."""
    torch.set_num_threads(args.threads)
    print(machine())
    print("command: python", *sys.argv, flush=True)
