"""The KL kernel beside its peers: time and extra memory, forward and backward.

    python tests/bench/kernel.py                 # a CPU: minutes (a GPU: gpu.py)
    python tests/bench/kernel.py --quick

Two tables of KL(teacher || student). "logits": of given logits (N, V). "head": from
hidden states, two heads included. Every entry is checked against float64 on a few rows
before it is timed. The roof of "logits" is a copy: both logits read once and the
gradient written, 12 bytes an entry; that of "head" a large matrix product: 8 N V C
flop. Time and memory: measure.py. Peers that are not installed are named;
requirements.txt has their versions.
"""

import math
from functools import cache, partial

import measure
import torch
import torch.nn.functional as F
from measure import DEVICE

from model import chunked_kl, fused_kl, kl_reference

# Entries: (inputs) -> values (N,) or their mean, with the gradient of the mean made


def backward_mean(values):
    values.mean().backward()
    return values.detach()


def torch_kl_div(s, t):
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


@cache
def compiler():  # when it is needed: it takes seconds to import
    return torch.compile(kl_reference, dynamic=False)


def in_place(s, t):
    """The row kernel as chunked_kl uses it: on logits that it may overwrite."""
    values = fused_kl(s.detach(), t, s.new_full((len(s),), 1 / len(s)))
    s.grad = s.detach()
    return values


def trl_head(h, W, t, U):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as theirs

    # the last one, beta: 0 is KL(teacher || student)
    return backward_mean(theirs.apply(h, W, None, t, U, None, 0.0)[0])


def liger(s, t):
    from liger_kernel.transformers.jsd import LigerJSD

    return LigerJSD(0.0)(s.log_softmax(-1), t.log_softmax(-1))  # the mean


def liger_head(h, W, t, U):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return backward_mean(LigerFusedLinearJSD(0.0)(h, W, t, U, None))


def our_head(h, W, t, U):
    return backward_mean(chunked_kl(h, t, W, U, h.new_full((len(h),), 1 / len(h)))[0])


def of_logits(formula, s, t):
    return backward_mean(formula(s, t))


def of_heads(formula, h, W, t, U):
    return of_logits(formula, h @ W.T, (t @ U.T).detach())


ENTRIES = {
    "logits": {
        "eager formula": partial(of_logits, kl_reference),
        "F.kl_div": partial(of_logits, torch_kl_div),
        "torch.compile": lambda *args: of_logits(compiler(), *args),
        "Liger JSD": partial(of_logits, liger),
        "ours, fused_kl": in_place,
    },
    "head": {
        "eager formula": partial(of_heads, kl_reference),
        "torch.compile": lambda *args: of_heads(compiler(), *args),
        "TRL chunked_divergence": trl_head,
        "Liger fused_linear_jsd": liger_head,
        "ours, chunked_kl": our_head,
    },
}


def make_inputs(level, N, V, C):
    g = torch.Generator(DEVICE).manual_seed(0)
    randn = partial(torch.randn, generator=g, device=DEVICE)
    # in place: a temporary of their size would hide the peak that is measured later
    if level == "logits":
        s = randn(N, V).mul_(2)
        return [s.requires_grad_(), randn(N, V).mul_(0.5).add_(s.detach())]
    W, h = randn(V, C).mul_(C**-0.5), randn(N, C).mul_(2)
    U = randn(V, C).mul_(0.1 * C**-0.5).add_(W)
    t = randn(N, C).mul_(0.1).add_(h)
    return [h.requires_grad_(), W.requires_grad_(), t, U]


def check(level, name):
    """Values and gradients must be those of the formula in float64."""
    inputs = make_inputs(level, 16, 4096, 64)
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    right = ENTRIES[level]["eager formula"](*double)
    values = ENTRIES[level][name](*inputs)
    error = (values - (right if values.dim() else right.mean())).abs().max().item()
    gradients = [((a.grad - b.grad).norm() / b.grad.norm()).item()
                 for a, b in zip(inputs, double, strict=True) if b.requires_grad]
    if not (error <= 1e-4 and all(x <= 1e-3 for x in gradients)):  # nan is wrong, too
        raise ValueError(f"values are off by {error}, gradients by {gradients}")


def runner(level, name, inputs):
    """A function without arguments: one forward and backward."""

    def run():
        for x in inputs:
            x.grad = None
        ENTRIES[level][name](*inputs)

    return run


def memory_of(level, name, N, V, C):
    """Extra MB of one run, in this (measure.fresh) process."""
    runner(level, name, make_inputs(level, 8, 64, 8))()  # code and threads: loaded
    if name == "torch.compile":
        runner(level, name, make_inputs(level, N, V, C))()  # compiled for the size
    return measure.extra_memory(runner(level, name, make_inputs(level, N, V, C)))


def measure_cell(level, N, V, C, copy, flop, args):
    print(f"\n{level}, N={N}, V={V}" + (f", C={C}" if C else ""))
    inputs, runs, rows = make_inputs(level, N, V, C), {}, {}
    roof = 8 * N * V * C / flop if C else 12 * N * V / copy  # seconds
    for name in ENTRIES[level]:
        # one entry overwrites its logits: it gets a copy, which soon is a gradient
        own = [inputs[0].detach().clone()] if name == "ours, fused_kl" else inputs[:1]
        run = runner(level, name, [*own, *inputs[1:]])
        reason = measure.error_of(check, level, name) or measure.error_of(run)
        if reason:  # (a run compiles and fills caches)
            print(f"  {name}: {reason}")
            rows[name] = {"not timed": reason}
        else:
            runs[name] = run
    times = measure.in_turns(runs, args.turns)
    del inputs, runs, own, run
    for name, seconds in times.items():
        mb = None if args.quick else measure.fresh(level, name, N, V, C)
        gain = min(times.get("eager formula", [math.nan])) / min(seconds)
        of = {"speed_up_over_eager": gain, "of_roof": roof / min(seconds)}
        rows[name] = measure.row(name, seconds, **of, extra_mb=mb)
    return {"level": level, "N": N, "V": V, "C": C, "kl": "forward", "rows": rows}


def main():
    args = measure.begin(__doc__, 7, memory_of)
    cells = [  # level, rows, vocabulary, channels (a GPU: gpu.py)
        *(("logits", 2048, V, 0) for V in (512, 4096, 50304)),
        ("logits", 512, 151936, 0), ("head", 2048, 4096, 256),
        ("head", 1024, 50304, 768),
    ]  # fmt: skip
    if args.quick:
        cells = [("logits", 256, 512, 0), ("head", 128, 512, 64)]
    measure.each_cell("kernel", cells, measure_cell, args)


if __name__ == "__main__":
    main()
