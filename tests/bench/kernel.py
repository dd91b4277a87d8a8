"""The KL kernel beside its peers: time and extra memory, forward and backward.

    python tests/bench/kernel.py                 # CPU: minutes; CUDA: when there is one
    python tests/bench/kernel.py --kl reverse --quick

Two tables. "logits": a divergence of given logits (N, V). "head": from hidden states,
two heads included (chunked_kl beside eager matmul + formula and TRL's
chunked_divergence). Every entry is checked against float64 on a few rows before it is
timed. The roof of "logits" is a copy: both logits read once and the gradient written,
12 bytes an entry; that of "head" a large matrix product: 8 N V C flop. How time and
memory are taken: measure.py. Peers that are not installed are named;
tests/bench/requirements.txt has their versions.
"""

import argparse
import json
import sys

import measure
import torch
import torch.nn.functional as F
from measure import DEVICE, ROOT

sys.path.insert(0, str(ROOT))
from model import KLS, chunked_kl, fused_kl, kl_reference  # noqa: E402

BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # TRL's and Liger's name for it

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
    """The row kernel as chunked_kl uses it: on logits that it may overwrite."""
    weight = s.new_full((len(s),), 1 / len(s))
    values = fused_kl(s.detach(), t, weight, kl)
    s.grad = s.detach()
    return values


def liger(s, t, kl):
    """Of log-probabilities; its value is one number, the mean of the rows."""
    from liger_kernel.ops.jsd import LigerJSDFunction

    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    loss = LigerJSDFunction.apply(log_s, log_t, None, BETA[kl])
    loss.backward()
    return loss.detach()


LOGITS = {
    "eager formula": lambda s, t, kl: backward_mean(kl_reference(s, t, kl)),
    "F.kl_div": lambda s, t, kl: backward_mean(torch_kl_div(s, t, kl)),
    "torch.compile": lambda s, t, kl: backward_mean(compiled(s, t, kl)),
    "Liger JSD": liger,  # Triton: for a GPU only
    "ours, fused_kl": in_place,
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
    loss, _ = chunked_kl(h, t, W, U, weight, kl)
    loss.backward()
    return loss.detach()  # the mean of the rows


HEADS = {
    "eager formula": eager_head,
    "torch.compile": compiled_head,
    "TRL chunked_divergence": trl_head,
    "ours, chunked_kl": our_head,
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


ENTRIES = {"logits": LOGITS, "head": HEADS}


def why_not(level, name, kl):
    """Why an entry cannot run here; None if it can. It is checked: values and gradients
    against the formula in float64."""
    if name == "F.kl_div" and kl == "jsd":
        return "has no jsd"
    if name == "Liger JSD" and DEVICE == "cpu":
        return "needs a GPU"
    inputs = make_inputs(level, 16, 4096, 64)
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    right = ENTRIES[level]["eager formula"](*double, kl)
    try:
        values = ENTRIES[level][name](*inputs, kl)
    except ImportError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # torch.compile without a compiler: say so and go on
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    right = right if values.dim() else right.mean()
    error = (values.double() - right).abs().max().item()
    if not error <= 1e-4:  # nan is wrong, too
        return f"wrong: values are off by {error}"
    for a, b in zip(inputs, double, strict=True):
        if b.grad is not None:
            error = ((a.grad - b.grad).norm() / b.grad.norm()).item()
            if not error <= 1e-3:
                return f"wrong: gradients are off by {error}"
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


def measure_cell(level, N, V, C, kl, turns, memory, roof):
    print(f"\n{level}, N={N}, V={V}" + (f", C={C}" if level == "head" else ""))
    inputs, runs, rows = make_inputs(level, N, V, C), {}, {}
    for name in ENTRIES[level]:
        reason = why_not(level, name, kl)
        if reason:
            print(f"  {name}: {reason}")
            continue
        # one entry overwrites its logits: it gets a copy, which soon is a gradient
        own = [inputs[0].detach().clone()] if name == "ours, fused_kl" else inputs[:1]
        runs[name] = runner(level, name, [*own, *inputs[1:]], kl)
        runs[name]()  # compiles, fills caches
    times = measure.in_turns(runs, turns)
    del inputs, runs, own
    eager = min(times["eager formula"])
    print(f"  {'':24}{'min ms':>10}{'median':>10}{'eager /':>9}{'of roof':>9}"
          f"{'extra MB':>10}")
    for name, seconds in times.items():
        job = ("--memory-of", level, name, N, V, C, kl)
        rows[name] = {
            **measure.min_and_median(seconds),
            "speed_up_over_eager": eager / min(seconds),
            "of_roof": roof / min(seconds),
            "extra_mb": measure.fresh(*job) if memory else None,
        }
        r, rate = rows[name], ""
        if DEVICE == "cuda" and name == "ours, fused_kl":  # passes: see kl_kernel
            passes = 3 if V <= 4096 else 7 if kl == "jsd" else 5
            r["moved_gb_per_s"] = passes * 4 * N * V / min(seconds) / 1e9
            rate = f"  {r['moved_gb_per_s']:.0f} GB/s of what it moves"
        shown = "-" if r["extra_mb"] is None else f"{r['extra_mb']:.0f}"
        print(f"  {name:24}{r['min_ms']:10.2f}{r['median_ms']:10.2f}"
              f"{r['speed_up_over_eager']:8.2f}x{r['of_roof']:8.0%}{shown:>10}{rate}",
              flush=True)
    return {"level": level, "N": N, "V": V, "C": C, "kl": kl, "rows": rows}


def main():
    if sys.argv[1:2] == ["--memory-of"]:
        level, name, N, V, C, kl = sys.argv[2:]
        print(json.dumps(memory_of(level, name, int(N), int(V), int(C), kl)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kl", choices=KLS, default="forward")
    measure.add_arguments(parser, turns=7)
    args = parser.parse_args()
    measure.begin(args)
    gpu = DEVICE == "cuda"
    cells = [("logits", 8192 if gpu else 2048, V, 0) for V in (512, 4096, 50304)]
    cells += [("logits", 8192 if gpu else 512, 151936, 0)]
    cells += [("head", 8192 if gpu else 2048, 4096, 256),
              ("head", 8192 if gpu else 1024, 50304, 768)]  # fmt: skip
    if args.quick:
        cells = [("logits", 256, 512, 0), ("head", 128, 512, 64)]
    copy, flop, result = measure.roofs()
    result["cells"] = []
    for level, N, V, C in cells:
        roof = 8 * N * V * C / flop if C else 12 * N * V / copy  # seconds
        memory = not args.quick
        done = measure_cell(level, N, V, C, args.kl, args.turns, memory, roof)
        result["cells"].append(done)
        measure.write("kernel", result, args.quick, args.out)


if __name__ == "__main__":
    main()
