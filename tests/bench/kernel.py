"""The KL kernel beside its peers: time and extra memory, forward and backward.

    python tests/bench/kernel.py                 # CPU: minutes; CUDA: when there is one
    python tests/bench/kernel.py --kl reverse --quick

Two tables. "logits": a divergence of given logits (N, V). "head": from hidden states,
two heads included. Every entry is checked against float64 on a few rows before it is
timed. The roof of "logits" is a copy: both logits read once and the gradient written,
12 bytes an entry; that of "head" a large matrix product: 8 N V C flop. Time and memory:
measure.py. Peers that are not installed are named; requirements.txt has their versions.
"""

import argparse
from functools import partial

import measure
import torch
import torch.nn.functional as F
from measure import DEVICE

from model import KLS, chunked_kl, fused_kl, kl_reference

# Entries: (inputs) -> values (N,), with the gradient of their mean made


def backward_mean(values):
    values.mean().backward()
    return values.detach()


def torch_kl_div(s, t, kl):
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    p, q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # KL(p || q)


compiled = torch.compile(kl_reference, dynamic=False)


def in_place(s, t, kl):
    """The row kernel as chunked_kl uses it: on logits that it may overwrite."""
    values = fused_kl(s.detach(), t, s.new_full((len(s),), 1 / len(s)), kl)
    s.grad = s.detach()
    return values


def trl_head(h, W, t, U, kl):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}[kl]
    out = ChunkedDivergenceFunction.apply(h, W, None, t, U, None, beta)
    return backward_mean(out[0])


def our_head(h, W, t, U, kl):
    loss, _ = chunked_kl(h, t, W, U, h.new_full((len(h),), 1 / len(h)), kl)
    loss.backward()
    return loss.detach()  # the mean of the rows


def of_logits(formula, s, t, kl):
    return backward_mean(formula(s, t, kl))


def of_heads(formula, h, W, t, U, kl):
    return backward_mean(formula(h @ W.T, (t @ U.T).detach(), kl))


ENTRIES = {
    "logits": {
        "eager formula": partial(of_logits, kl_reference),
        "F.kl_div": partial(of_logits, torch_kl_div),
        "torch.compile": partial(of_logits, compiled),
        "ours, fused_kl": in_place,
    },
    "head": {
        "eager formula": partial(of_heads, kl_reference),
        "torch.compile": partial(of_heads, compiled),
        "TRL chunked_divergence": trl_head,
        "ours, chunked_kl": our_head,
    },
}


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
    h, W, t, U = (x.to(DEVICE) for x in (h, W, t, U))
    return [h.requires_grad_(), W.requires_grad_(), t, U]


def why_not(level, name, kl):
    """Why an entry cannot run here; None if it can. It is checked: values and gradients
    against the formula in float64."""
    if name == "F.kl_div" and kl == "jsd":
        return "has no jsd"
    inputs = make_inputs(level, 16, 4096, 64)
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    right = ENTRIES[level]["eager formula"](*double, kl)
    try:
        values = ENTRIES[level][name](*inputs, kl)
    except ImportError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # torch.compile without a compiler: say so and go on
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    error = (values - (right if values.dim() else right.mean())).abs().max().item()
    gradients = [((a.grad - b.grad).norm() / b.grad.norm()).item()
                 for a, b in zip(inputs, double, strict=True) if b.requires_grad]
    if not (error <= 1e-4 and all(x <= 1e-3 for x in gradients)):  # nan is wrong, too
        return f"wrong: values are off by {error}, gradients by {gradients}"
    return None


def runner(level, name, inputs, kl):
    """A function without arguments: one forward and backward."""

    def run():
        for x in inputs:
            x.grad = None
        ENTRIES[level][name](*inputs, kl)

    return run


def memory_of(level, name, N, V, C, kl):
    """Extra MB of one run, in this (measure.fresh) process."""
    runner(level, name, make_inputs(level, 8, 64, 8), kl)()  # code and threads: loaded
    if name == "torch.compile":
        runner(level, name, make_inputs(level, N, V, C), kl)()  # compiled for the size
    return measure.extra_memory(runner(level, name, make_inputs(level, N, V, C), kl))


def measure_cell(level, N, V, C, roof, args):
    print(f"\n{level}, N={N}, V={V}" + (f", C={C}" if C else ""))
    inputs, runs, rows, kl = make_inputs(level, N, V, C), {}, {}, args.kl
    for name in ENTRIES[level]:
        if reason := why_not(level, name, kl):
            print(f"  {name}: {reason}")
            continue
        # one entry overwrites its logits: it gets a copy, which soon is a gradient
        own = [inputs[0].detach().clone()] if name == "ours, fused_kl" else inputs[:1]
        runs[name] = runner(level, name, [*own, *inputs[1:]], kl)
        runs[name]()  # compiles, fills caches
    times = measure.in_turns(runs, args.turns)
    del inputs, runs, own
    for name, seconds in times.items():
        mb = None if args.quick else measure.fresh(level, name, N, V, C, kl)
        gain = min(times["eager formula"]) / min(seconds)
        of = {"speed_up_over_eager": gain, "of_roof": roof / min(seconds)}
        rows[name] = measure.row(name, seconds, **of, extra_mb=mb)
    return {"level": level, "N": N, "V": V, "C": C, "kl": kl, "rows": rows}


def main():
    measure.serve(memory_of)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl", choices=KLS, default="forward")
    args = measure.begin(parser, turns=7)
    cells = [  # level, rows on a CPU, vocabulary, channels
        *(("logits", 2048, V, 0) for V in (512, 4096, 50304)),
        ("logits", 512, 151936, 0), ("head", 2048, 4096, 256),
        ("head", 1024, 50304, 768),
    ]  # fmt: skip
    if args.quick:
        cells = [("logits", 256, 512, 0), ("head", 128, 512, 64)]
    copy, flop, result = measure.roofs()
    result["cells"] = []
    for level, N, V, C in cells:
        N = 8192 if DEVICE == "cuda" and not args.quick else N
        roof = 8 * N * V * C / flop if C else 12 * N * V / copy  # seconds
        result["cells"].append(measure_cell(level, N, V, C, roof, args))
        measure.write("kernel", result, args)


if __name__ == "__main__":
    main()
