"""The KL kernel beside its peers: time and extra memory, forward and backward.

    python tests/bench/kernel.py                 # CPU: minutes; CUDA: when there is one
    python tests/bench/kernel.py --kl reverse --quick

Two tables. "logits": a divergence of given logits (N, V). "head": from hidden states,
two heads included (fused_linear_kl beside eager matmul + formula and TRL's
chunked_divergence). Every entry is checked against float64 on a few rows before it is
timed. Entries run in turns, so that noise of the machine meets all of them; time is the
minimum (median) of the turns. Extra memory is the peak above the resident inputs, from
a fresh process each (on CUDA: of the allocator). Peers that are not installed are
named: tests/bench/requirements.txt has their versions.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from model import (  # noqa: E402
    KLS,
    fused_kl,
    fused_linear_kl,
    kl_reference,
    kl_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # TRL's name of a divergence

# ---- Entries: (inputs) -> values (N,), with the gradient of their mean made ---------


def backward_mean(values):
    values.mean().backward()
    return values.detach()


def torch_kl_div(s, t, kl):
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    p, q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # KL(p || q)


compiled = torch.compile(kl_reference, dynamic=False)


def in_place(s, t, kl):
    """The row kernel as fused_linear_kl uses it: on logits that it may overwrite."""
    weight = s.new_full((len(s),), 1 / len(s))
    values = kl_rows(s.detach(), t, weight, kl)
    s.grad = s.detach()
    return values


LOGITS = {
    "eager formula": lambda s, t, kl: backward_mean(kl_reference(s, t, kl)),
    "F.kl_div": lambda s, t, kl: backward_mean(torch_kl_div(s, t, kl)),
    "torch.compile": lambda s, t, kl: backward_mean(compiled(s, t, kl)),
    "ours, fused_kl": lambda s, t, kl: backward_mean(fused_kl(s, t, kl)),
    "ours, in place": in_place,
}


def eager_head(h, W, t, U, kl):
    return backward_mean(kl_reference(h @ W.T, (t @ U.T).detach(), kl))


def compiled_head(h, W, t, U, kl):
    return backward_mean(compiled(h @ W.T, (t @ U.T).detach(), kl))


def trl_head(h, W, t, U, kl):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    no_bias = None
    out = ChunkedDivergenceFunction.apply(h, W, no_bias, t, U, no_bias, BETA[kl])
    return backward_mean(out[0])


def our_head(h, W, t, U, kl):
    weight = h.new_full((len(h),), 1 / len(h))
    loss, values = fused_linear_kl(h, W, t, U, weight, kl)
    loss.backward()
    return values


HEADS = {
    "eager formula": eager_head,
    "torch.compile": compiled_head,
    "TRL chunked_divergence": trl_head,
    "ours, fused_linear_kl": our_head,
}


# ---- Measuring ---------------------------------------------------------------------


def make_inputs(level, N, V, C):
    g = torch.Generator().manual_seed(0)
    # in place: a temporary of their size would hide the peak that is measured later
    if level == "logits":
        s = torch.randn(N, V, generator=g).mul_(2)
        t = torch.randn(N, V, generator=g).mul_(0.5).add_(s)
        return [s.to(DEVICE).requires_grad_(), t.to(DEVICE)]
    W = torch.randn(V, C, generator=g).mul_(C**-0.5)
    U = torch.randn(V, C, generator=g).mul_(0.1 * C**-0.5).add_(W)
    h = torch.randn(N, C, generator=g).mul_(2)
    t = torch.randn(N, C, generator=g).mul_(0.1).add_(h)
    both = [h.to(DEVICE).requires_grad_(), W.to(DEVICE).requires_grad_()]
    return [*both, t.to(DEVICE), U.to(DEVICE)]


def entries_of(level):
    return LOGITS if level == "logits" else HEADS


def check(level, name, kl):
    """Values and gradients against the formula in float64; an Error if they differ."""
    inputs = make_inputs(level, 16, 4096, 64)
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    plain = LOGITS if level == "logits" else HEADS
    right = plain["eager formula"](*double, kl)
    values = entries_of(level)[name](*inputs, kl)
    error = (values.double() - right).abs().max().item()
    if error > 1e-4:
        raise ValueError(f"{name}: values are off by {error}")
    for a, b in zip(inputs, double, strict=True):
        if b.grad is not None:
            error = ((a.grad - b.grad).norm() / b.grad.norm()).item()
            if error > 1e-3:
                raise ValueError(f"{name}: gradients are off by {error}")


def run_once(entry, inputs, kl):
    """Seconds of one forward and backward."""
    first = inputs[0].detach().clone()  # one entry overwrites it
    for x in inputs:
        x.grad = None
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    entry(*inputs, kl)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    inputs[0].data.copy_(first)
    return seconds


def extra_memory(level, name, N, V, C, kl):
    """Peak MB above the inputs, in this (fresh) process; the first run is measured: on
    a CPU a process never gets smaller again."""
    inputs = make_inputs(level, N, V, C)
    run = entries_of(level)[name]
    small = make_inputs(level, 8, 64, 8)
    run(*small, kl)  # code and thread pools are loaded now
    if name == "torch.compile":
        run(*make_inputs(level, N, V, C), kl)  # compilers run in this process too
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*inputs, kl)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(*inputs, kl)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure(level, N, V, C, kl, turns, memory):
    print(f"\n{level}, N={N}, V={V}" + (f", C={C}" if level == "head" else ""))
    inputs, times, rows = make_inputs(level, N, V, C), {}, {}
    for name in entries_of(level):
        if name == "F.kl_div" and kl == "jsd":
            continue
        try:
            check(level, name, kl)
            run_once(entries_of(level)[name], inputs, kl)  # compiles, fills caches
            times[name] = []
        except ImportError as error:
            print(f"  {name}: not installed ({error.name})")
        except Exception as error:  # a compiler may be missing: say so and go on
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    for _ in range(turns):
        for name in times:
            times[name].append(run_once(entries_of(level)[name], inputs, kl))
    del inputs
    eager = min(times["eager formula"])
    print(f"  {'':24}{'min ms':>10}{'median':>10}{'eager /':>9}{'extra MB':>10}")
    for name, seconds in times.items():
        extra = None
        if memory:
            job = [sys.executable, __file__, "--memory-of", level, name, N, V, C, kl]
            done = subprocess.run(map(str, job), capture_output=True, text=True)
            if done.returncode == 0:
                extra = float(done.stdout.split()[-1])
        rows[name] = {
            "min_ms": 1e3 * min(seconds), "median_ms": 1e3 * median(seconds),
            "speed_up_over_eager": eager / min(seconds), "extra_mb": extra,
        }  # fmt: skip
        if level == "logits" and name == "ours, in place" and DEVICE == "cuda":
            moved = (7 if kl == "jsd" else 5 if V > 4096 else 3) * 4 * N * V
            rows[name]["gb_per_s"] = moved / min(seconds) / 1e9
        r = rows[name]
        shown = "-" if extra is None else f"{extra:.0f}"
        rate = f"  {r['gb_per_s']:.0f} GB/s" if "gb_per_s" in r else ""
        print(f"  {name:24}{r['min_ms']:10.2f}{r['median_ms']:10.2f}"
              f"{r['speed_up_over_eager']:8.2f}x{shown:>10}{rate}", flush=True)
    return {"level": level, "N": N, "V": V, "C": C, "kl": kl, "rows": rows}


def copy_bandwidth():
    """GB/s of a large copy on the GPU, read and write counted."""
    x = torch.empty(2**30, device="cuda")
    y = torch.empty_like(x)
    best = 1e9
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        y.copy_(x)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 4 * x.numel() / best / 1e9


def machine():
    name = platform.processor() or platform.machine()
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    return (f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
            f"Python {platform.python_version()}")


def main():
    if sys.argv[1:2] == ["--memory-of"]:
        level, name, N, V, C, kl = sys.argv[2:]
        torch.set_num_threads(1)
        print(extra_memory(level, name, int(N), int(V), int(C), kl))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl", choices=KLS, default="forward")
    parser.add_argument("--turns", type=int, default=7, help="runs of each entry")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, no memory")
    parser.add_argument("--out", type=Path, help="JSON; default: beside the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    print("command: python tests/bench/kernel.py", *sys.argv[1:])
    gpu = DEVICE == "cuda"
    cells = [("logits", 8192 if gpu else 2048, V, 0) for V in (512, 4096, 50304)]
    cells += [("logits", 8192 if gpu else 512, 151936, 0)]
    cells += [("head", 8192 if gpu else 2048, 4096, 256),
              ("head", 8192 if gpu else 512, 50304, 768)]  # fmt: skip
    if args.quick:
        cells = [("logits", 256, 512, 0), ("head", 128, 512, 64)]
    result = {"machine": machine(), "command": sys.argv, "cells": []}
    if gpu:
        result["copy_gb_per_s"] = copy_bandwidth()
        print(f"copy: {result['copy_gb_per_s']:.0f} GB/s")
    for cell in cells:
        done = measure(*cell, args.kl, args.turns, memory=not args.quick)
        result["cells"].append(done)
    default = ROOT / "tests" / "bench" / "results" / f"kernel_{DEVICE}.json"
    if args.out or not args.quick:
        (args.out or default).write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {args.out or default}")


if __name__ == "__main__":
    main()
