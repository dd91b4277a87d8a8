"""All that one GPU is asked, in one command of at most eight minutes.

    python tests/bench/gpu.py              # one GPU from 12 GB up, a T4 as well
    python tests/bench/gpu.py --small      # does all of it run? Without a GPU, too
    python tests/bench/gpu.py --check mps  # only: does it compute what a CPU computes?

Each part is a process of its own with a time limit. What fails, or takes too long, is a
row that says so, and the others go on. At the end come a table for the notebook, and
its rows as one line of JSON. transformers, TRL and liger-kernel are measured where
they are installed. --check ends with 0 if it does, with 1 if not, with 2 if there is no
such device: there have been silently wrong kernels (MPS: attention with a mask).
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from itertools import product
from types import SimpleNamespace

import kernel
import measure
import memory
import sampler
import torch
from measure import DEVICE, ROOT

import train
from data import make_rng
from model import GPTConfig, generate

SECONDS = 480  # in which all of it ends
SMALL, QUICK = "--small" in sys.argv, SimpleNamespace(turns=5, quick=True)
AS_ONE = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def tell(row, **values):
    """A row of the table, as a line of JSON: main reads it."""
    print(json.dumps({"row": row, **values}), flush=True)


def attempt(row, run):
    """Tell what run returns, {end of the row: values}, or the error, and return it."""
    found = {}
    if error := measure.error_of(lambda: found.update(run())):
        tell(row, error=error)
    for end, values in found.items():
        tell(row + end, **values)
    torch.cuda.empty_cache()  # does nothing on a CPU
    return error


# ---- The parts -----------------------------------------------------------------------


@torch.no_grad()
def compare(one, other):
    """The largest difference of log-probabilities of two models, and whether they write
    the same tokens from a cache. Each computes on its own device."""
    prompts = torch.randint(512, (4, 12), generator=make_rng(0, "prompts"))  # (B, P)
    lengths, log_p, tokens = torch.tensor([12, 7, 3, 1]), [], []
    for gpt in (one, other):
        both = [x.to(next(gpt.parameters()).device) for x in (prompts, lengths)]
        log_p.append(gpt(both[0]).log_softmax(-1).cpu())  # (B, P, V)
        tokens.append(generate(gpt, *both, 8, 0, temperature=0)[0].cpu())
    difference = (log_p[0] - log_p[1]).abs().max().item()
    return difference, torch.equal(*tokens)


def check(device):
    one, other = (sampler.make_model(GPTConfig()) for _ in range(2))
    difference, same = compare(one, other.to(device))
    right = difference < 1e-2 and same  # nan is wrong, too
    tell(f"{device} beside a CPU", right=right, log_p_difference=difference,
         greedy_tokens_equal=same)  # fmt: skip
    return 0 if right else 1


def machine():
    attempt("roofs", lambda: {"": measure.roofs()[2]})
    check(DEVICE)


def tests():
    """Those that take a GPU where there is one."""
    names = "refused" if SMALL else "not compiled_for"  # (which needs none)
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 48e9:
        names += " and not two_to_the_31"
    job = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names]
    done = subprocess.run([*job, "tests/test_triton.py"], cwd=ROOT, **AS_ONE)
    print(done.stdout[-4000:])
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    wrong = re.findall(r"(?:FAILED|ERROR) \S+::(\S+)", done.stdout)
    of = {"error": " ".join(wrong) or "see above"} if done.returncode else {}
    tell("tests/test_triton.py", **{what: int(n) for n, what in counts}, **of)


def tell_cells(what, measure_cell, cells):
    copy, flop, _ = measure.roofs()

    def rows_of(*cell):
        of = measure_cell(*cell, copy, flop, QUICK)["rows"]
        return {f": {entry}": values for entry, values in of.items()}

    for name, cell in cells.items():
        attempt(f"{what}, {name}", partial(rows_of, *cell))


def kernels():
    """With as many rows as a chunk of the loss has: 0.5 GB of logits."""
    cells = {f"V = {V:,}": ("logits", 2**27 // V, V, 0)
             for V in (512, 4096, 50304, 151936)}  # fmt: skip
    cells["V = 151,936, head"] = "head", 1024, 151936, 896
    if SMALL:
        for entries in kernel.ENTRIES.values():
            del entries["torch.compile"]  # takes its time
        cells = {"logits": ("logits", 64, 512, 0), "head": ("head", 64, 512, 64)}
    tell_cells("kernel", kernel.measure_cell, cells)


def samplers():
    cells = [("0.9M", 16, 64), ("0.9M", 64, 64), ("124M", 16, 16), ("124M", 64, 16)]
    cells = [("0.9M", 4, 4)] if SMALL else cells
    cells = {"{}, batch {}, {} tokens".format(*cell): cell for cell in cells}
    tell_cells("sampler", sampler.measure_cell, cells)


def steps(method):
    """Of the largest shape that fits, by the plan, into what is free; where the plan is
    too low, which is a row, of the next one."""
    rows, shapes = 16, ["Qwen2.5-0.5B", "SmolLM2-360M", "SmolLM2-135M"]
    if SMALL:
        memory.SHAPES["tiny"] = memory.shape(512, 0, 2, 2, 2, 32, 64)
        rows, shapes, memory.PROMPT, memory.RESPONSE = 2, ["tiny"], 8, 8
    new = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    dtype, n = torch.bfloat16 if new else torch.float32, memory.PROMPT + memory.RESPONSE

    def row_of(name, checkpointing, planned):
        run = memory.train_shape(name, method, checkpointing, rows, 3, dtype)
        seconds = min(run["seconds"])
        rate = {"response_tokens_per_second": rows * memory.RESPONSE / seconds}
        parts = {f"{part}_ms": 1e3 * min(x) for part, x in run["parts"].items()}
        gb = {"peak_gb": run["peak_gb"], "planned_gb": planned}
        return {"": {**rate, "ms": 1e3 * seconds, **parts, **gb}}

    for name, checkpointing in product(shapes, (0, 1)):
        of = rows * n, dtype.itemsize, checkpointing
        planned = memory.memory_of(name, method, *of)
        if planned < train.free_memory(torch.device(DEVICE)):
            what = f"{name}, {rows} x ({memory.PROMPT} + {memory.RESPONSE}) tokens, "
            what += str(dtype)[6:] + ", --checkpointing" * checkpointing
            run = partial(row_of, name, checkpointing, planned)
            if not attempt(f"{method} step, {what}", run):
                return
    tell(f"{method} step", error="no shape fits into what is free")


def default_run():
    """`python train.py`; its table is among the lines."""
    few = "--quick --base-steps 2 --steps 1 --eval-size 8 --gate-margin -1".split()
    flags = ["--method", "sdft", "--out", "out", "--device", DEVICE]
    begin = time.perf_counter()
    if code := train.main(flags + few * SMALL):
        return tell("default run", error=f"ended with {code}")
    seconds = time.perf_counter() - begin
    with open("out/sdft/results.json", encoding="utf-8") as file:
        last = json.load(file)["evaluations"][-1]
    tell("default run", seconds=seconds, **last["new"], **last["prior"])


PARTS = {  # name: what it does, and its seconds at most
    "machine": (machine, 60), "tests": (tests, 90), "kernel": (kernels, 120),
    "sampler": (samplers, 60), "sft": (partial(steps, "sft"), 60),
    "sdft": (partial(steps, "sdft"), 90), "default": (default_run, SECONDS),
}  # fmt: skip


def run_part(name, seconds, folder):
    """Its rows, one of them what kept it from its end."""
    job = [sys.executable, "-u", os.path.abspath(__file__), "--part", name]
    how = {"cwd": folder, "start_new_session": True, **AS_ONE}
    process = subprocess.Popen(job + ["--small"] * SMALL, **how)
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    rows, last = [], "no output"
    for line in process.stdout:
        print(" ", line, end="", flush=True)
        if line.startswith('{"row"'):
            rows.append(json.loads(line))
        last = line.strip() or last
    if code := process.wait():
        late = f"stopped after {seconds:.0f} s" if code == -signal.SIGKILL else "failed"
        rows.append({"row": name, "error": f"{late}; the last line: {last}"})
    timer.cancel()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="does all of it run?")
    parser.add_argument("--check", metavar="DEVICE", help="only this: mps, cuda:1")
    parser.add_argument("--part", choices=PARTS, help="one part, without a limit")
    args = parser.parse_args()
    if args.part:
        return PARTS[args.part][0]()
    if args.check:
        try:
            return check(train.choose_device(args.check))
        except train.UserError as error:
            parser.error(f"{error}\nhint: {error.hint}")  # exit code 2
    if DEVICE == "cpu" and not SMALL:
        parser.error("no GPU\nhint: --small shows that all of it runs")
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, limit) in PARTS.items():
            print(f"{name}:", flush=True)
            left = begin + SECONDS - time.monotonic()
            rows += run_part(name, min(limit, max(left, 1)), folder)
    print(f"\n| {measure.machine()} | |\n|---|---|")
    for row in rows:
        shown = {key: f"{value:,.4g}" if isinstance(value, float) else value
                 for key, value in row.items() if value is not None}  # fmt: skip
        parts = [f"{key.replace('_', ' ')}: {value}" for key, value in shown.items()]
        print(f"| {row['row']} | {', '.join(parts[1:])} |")
    print(json.dumps({"machine": measure.machine(), "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
