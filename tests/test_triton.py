"""The Triton kernel: interpreted (see conftest.py), or compiled on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from oracles import draw

import model

triton = pytest.importorskip("triton", reason="triton is in tests/requirements.txt")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: interpreted
every_kl = pytest.mark.parametrize("kl", ("forward", "reverse"))


def draw_logits(N, V, scale, distance, seed=0):
    """float32 logits of student and teacher, (N, V): the teacher is `distance` away."""
    s = draw(N, V, seed=seed, scale=scale, dtype=torch.float32)
    return s, s + draw(N, V, seed=seed + 1, scale=distance, dtype=torch.float32)


def run_kernel(s, t, weight, kl):
    """Values (N,) and weighted gradients (N, V) on the CPU; the inputs stay."""
    s, t, weight = (x.clone().to(DEVICE) for x in (s, t, weight))
    return model.kl_rows_triton(s, t, weight, kl).cpu(), s.cpu()


def assert_right(value, gradient, s, t, weight, kl, digits=1e-5):
    """As in float64: values within 1e-5 (of the largest, if that is above 1)."""
    s = s.double().requires_grad_()
    right = model.kl_reference(s, t.double(), kl)
    (right_gradient,) = torch.autograd.grad(weight.double() @ right, s)
    assert (value - right).abs().max() < 1e-5 * max(1, right.max())
    assert (gradient - right_gradient).norm() <= digits * right_gradient.norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_kl
@pytest.mark.parametrize("V", [1, 33, 512, 1000, 4096, 4099, 9000])
def test_kernel_equals_float64(kl, V):
    """Ragged vocabularies, far and near teachers: gradients within 1e-5 relative. Only
    forward loses digits to a teacher nearer than 0.1: log_ratio is right to about 1e-7.
    A vocabulary padded with minus infinity adds nothing. What is not finite does not
    come out as a number: it must reach the check before the optimizer step."""
    weight, pads = torch.tensor([1.0, 0.25, 2.0]), torch.full((3, 68), float("-inf"))
    for scale, distance in ((1, 3), (2, 0.1), (2, 0.01), (2, 0.001), (10, 1)):
        args = *draw_logits(3, V, scale, distance, seed=V), weight, kl
        value, gradient = run_kernel(*args)
        digits = 1e-6 / min(distance, 0.1) if kl == "forward" else 1e-5
        assert_right(value, gradient, *args, digits)
    padded = run_kernel(*(torch.cat((x, pads), 1) for x in args[:2]), *args[2:])
    torch.testing.assert_close(padded[0], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded[1][:, :V], gradient, rtol=1e-6, atol=1e-7)
    assert not padded[1][:, V:].any()
    s, t = draw_logits(2, V, 2, 1)
    for s[1, V // 2] in (float("nan"), float("inf")):
        value, gradient = run_kernel(s, t, torch.ones(2), kl)
        assert value[0].isfinite() and not value[1].isfinite()
        assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


def test_what_is_no_plain_rows_in_memory_is_refused(monkeypatch):
    """The kernel finds a row at row * V: a view of other rows would be read wrongly. No
    rows at all launch no kernel."""
    args = [x.to(DEVICE) for x in (*draw_logits(5, 33, 2, 1), torch.ones(5))]
    for place, x in enumerate(args):
        views = x.repeat_interleave(2, -1)[..., ::2], x[:1].expand_as(x)
        for view in views if x.dim() == 1 else (*views, x.T.contiguous().T):
            wrong = [view if i == place else y for i, y in enumerate(args)]
            with pytest.raises(AssertionError, match="row [*] V"):
                model.kl_rows_triton(*wrong, kl="forward")
    monkeypatch.setattr(model, "kl_kernel", None)
    assert run_kernel(*(x[:0] for x in args), "reverse")[0].shape == (0,)


@pytest.mark.parametrize("kl", model.KLS)
def test_losses_on_a_gpu_take_the_kernel_and_equal_the_formula(kl, monkeypatch):
    """In chunks, at a temperature, from transposed views; jsd is left to autograd."""
    kernel = mock.Mock(wraps=model.kl_rows_triton)
    monkeypatch.setattr(model, "kl_rows_triton", kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # a CPU is taken for a GPU
    monkeypatch.setattr(model, "chunk_rows", lambda head: 3)
    x = draw(8, 7).T, draw(8, 600, seed=1, scale=0.3).T, draw(8, 7, seed=2).T
    weight, results = torch.tensor([1, 0.5, 0, 2, 1, 1, 0.25]), []
    for dtype in (torch.float32, torch.float64):
        h, W, t, w = (y.to(DEVICE, dtype).requires_grad_() for y in (*x, weight))
        loss = w @ model.kl_reference(h @ W.T / 0.7, t @ W.T / 0.7, kl)
        if dtype == torch.float32:
            loss, _ = model.chunked_kl(h, t, W, W.detach(), w.detach(), kl, 0.7)
        results.append([loss.detach(), *torch.autograd.grad(loss, (h, W))])
    for ours, right in zip(*results, strict=True):
        assert (ours - right).norm() < 1e-5 * right.norm()
    assert kernel.call_count == (0 if kl == "jsd" else 3)


@pytest.mark.skipif(DEVICE == "cpu", reason="40 GB of GPU memory")
@every_kl
def test_rows_behind_two_to_the_31_elements_are_right(kl):
    for N, V in ((64, 512), (2**31 // 50304 + 2, 50304)):
        s = torch.randn(N, V, device="cuda")
        t = s.roll(1, 0)
        last = s[-64:].cpu(), t[-64:].cpu(), torch.ones(64), kl
        value = model.fused_kl(s, t, torch.ones(N, device="cuda"), kl)
        assert_right(value[-64:].cpu(), s[-64:].cpu(), *last)


COMPILE = """
import pathlib, subprocess, sys, torch, triton
from unittest import mock
import model
from triton.backends.compiler import GPUTarget
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
kl_kernel, model.kl_kernel = model.kl_kernel, mock.MagicMock()
for kl, V in (("forward", 512), ("forward", 50304), ("reverse", 50304)):
    x = torch.empty(1, V)
    model.kl_rows_triton(x, x, x[0, :1], kl)
    args, options = model.kl_kernel[1].call_args  # what it would be launched with
    kinds = dict(zip(kl_kernel.arg_names, ["*fp32"] * 4 + ["constexpr"] * 3))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    constants = {(i,): args[i] for i in (4, 5, 6)}
    source = triton.compiler.ASTSource(kl_kernel, kinds, constants, aligned)
    built = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    pathlib.Path(sys.argv[1]).write_bytes(built.asm["cubin"])
    command = tool, "--dump-resource-usage", "--dump-sass", sys.argv[1]
    print(subprocess.check_output(command, text=True), "next")
"""


def test_compiled_for_sm_90_nothing_spills_and_loads_are_wide(tmp_path):
    """Ahead of time, without a GPU: STACK is what spills, LDG.E.128 are loads of 16
    bytes a thread. One narrow load: the weight of the row."""
    env = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=Path(model.__file__).parent)
    args = sys.executable, "-c", COMPILE, tmp_path / "kl.cubin"
    run = subprocess.run(args, capture_output=True, text=True, env=env)
    dumps = run.stdout.split("next\n")
    assert len(dumps) == 3 + 1, run.stderr
    for dump in dumps[:3]:
        assert re.findall(r"STACK:(\d+)", dump) == ["0"], dump[:2000]
        wide, every = (len(re.findall(x, dump)) for x in (r"LDG\.E\.128", r"LDG\.E"))
        assert wide >= 2 and every - wide <= 1, (wide, every)
