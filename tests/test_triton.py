"""The Triton kernel, in Triton's interpreter; on the GPU where there is one.

conftest.py sets TRITON_INTERPRET before model.py is imported. Without triton all of
this is skipped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import draw

import model
from model import KLS

triton = pytest.importorskip("triton", reason="triton is in tests/requirements.txt")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: interpreted
every_kl = pytest.mark.parametrize("kl", KLS)


def draw_logits(N, V, scale, distance, seed=0):
    """float32 logits of student and teacher, (N, V): the teacher is `distance` away."""
    s = draw(N, V, seed=seed, scale=scale, dtype=torch.float32)
    return s, s + draw(N, V, seed=seed + 1, scale=distance, dtype=torch.float32)


def run_kernel(s, t, weight, kl):
    """Values (N,) and weighted gradients (N, V) on the CPU; the inputs stay."""
    s, t, weight = (x.clone().to(DEVICE) for x in (s, t, weight))
    value = model.kl_rows_triton(s, t, weight, kl)
    return value.cpu(), s.cpu()


def in_float64(s, t, weight, kl):
    s = s.double().requires_grad_()
    value = model.kl_reference(s, t.double(), kl)
    (gradient,) = torch.autograd.grad(weight.double() @ value, s)
    return value.detach(), gradient


@every_kl
@pytest.mark.parametrize("V", [1, 33, 512, 1000, 4096, 4099, 9000])
def test_kernel_equals_float64(kl, V):
    """Ragged vocabularies, far and near teachers: values within 1e-5 absolute (of the
    largest, if that is above 1), gradients within 1e-5 relative. Only forward loses
    digits to a teacher nearer than 0.1: log_ratio is right to about 1e-7."""
    for scale, distance in ((1, 3), (2, 0.1), (2, 0.01), (2, 0.001), (10, 1)):
        s, t = draw_logits(3, V, scale, distance, seed=V)
        weight = torch.tensor([1.0, 0.25, 2.0])
        value, gradient = run_kernel(s, t, weight, kl)
        right_value, right_gradient = in_float64(s, t, weight, kl)
        where = f"logits of size {scale}, a teacher {distance} away"
        tolerance = 1e-5 * max(1, right_value.max())
        assert (value - right_value).abs().max() < tolerance, where
        error = (gradient - right_gradient).norm()
        tolerance = 1e-6 / min(distance, 0.1) if kl == "forward" else 1e-5
        assert error <= tolerance * right_gradient.norm(), where


@every_kl
def test_vocabulary_padded_with_minus_infinity_adds_nothing(kl):
    s, t = draw_logits(2, 700, 2, 1)
    pad = torch.full((2, 68), float("-inf"))
    weight = torch.ones(2)
    value, gradient = run_kernel(s, t, weight, kl)
    padded = run_kernel(torch.cat([s, pad], 1), torch.cat([t, pad], 1), weight, kl)
    torch.testing.assert_close(padded[0], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[1][:, :700], gradient, rtol=0, atol=1e-7)
    assert not padded[1][:, 700:].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@every_kl
def test_what_is_not_finite_does_not_come_out_as_a_number(kl):
    """It must reach the check before the optimizer step."""
    for bad in (float("nan"), float("inf")):
        s, t = draw_logits(2, 600, 2, 1)
        s[1, 500] = bad
        value, gradient = run_kernel(s, t, torch.ones(2), kl)
        assert value[0].isfinite() and not value[1].isfinite()
        assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@pytest.mark.parametrize("place", ("s", "t", "weight"))
def test_what_is_no_plain_rows_in_memory_is_refused(place):
    """The kernel finds a row at row * V: a padded vocabulary that is cut off, a
    transposed matrix, or one teacher for all rows would be read wrongly."""
    for view in (
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.T.contiguous().T if x.dim() == 2 else x[:1].expand(5),
        lambda x: x[:1].expand_as(x),
    ):
        s, t = (x.to(DEVICE) for x in draw_logits(5, 33, 2, 1))
        args = {"s": s, "t": t, "weight": torch.ones(5, device=DEVICE)}
        args[place] = view(args[place])
        with pytest.raises(AssertionError, match="row [*] V"):
            model.kl_rows_triton(**args, kl="forward")


@every_kl
def test_no_rows_launch_no_kernel(kl, monkeypatch):
    monkeypatch.setattr(model, "kl_kernel", None)
    value, gradient = run_kernel(*draw_logits(0, 33, 2, 1), torch.ones(0), kl)
    assert value.shape == (0,) and gradient.shape == (0, 33)


@every_kl
def test_losses_from_hidden_states_through_the_kernel_equal_the_formula(
    kl, monkeypatch
):
    """In chunks, at a temperature, and from views that are transposed."""
    monkeypatch.setattr(model, "kl_rows_torch", model.kl_rows_triton)
    monkeypatch.setattr(model, "chunk_rows", lambda head: 3)
    hidden, head = draw(8, 7).T, draw(8, 600, seed=1, scale=0.3).T
    shown, weight = draw(8, 7, seed=2).T, torch.tensor([1, 0.5, 0, 2, 1, 1, 0.25])
    gradients, losses = [], []
    for dtype in (torch.float32, torch.float64):
        h, W, t, w = (x.to(DEVICE, dtype) for x in (hidden, head, shown, weight))
        h.requires_grad_()
        W.requires_grad_()
        if dtype == torch.float32:
            loss, _ = model.chunked_kl(h, t, W, W, w, kl, 0.7)
        else:
            loss = w @ model.kl_reference(h @ W.T / 0.7, t @ W.T / 0.7, kl)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, (h, W)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, right in zip(*gradients, strict=True):
        assert (ours - right).norm() < 1e-5 * right.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float32 on CUDA takes it")
@every_kl
def test_cuda_takes_the_kernel_and_gives_what_the_cpu_gives(kl, monkeypatch):
    used, kernel = [], model.kl_rows_triton
    monkeypatch.setattr(
        model, "kl_rows_triton", lambda *x: (used.append(1), kernel(*x))[1]
    )
    results = []
    for device in ("cpu", "cuda"):
        s, t = (x.to(device) for x in draw_logits(64, 512, 2, 1))
        value = model.fused_kl(s, t, torch.ones(64, device=device), kl)
        results.append((value.cpu(), s.cpu()))
    assert used == [1]
    torch.testing.assert_close(*[r[0] for r in results], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*[r[1] for r in results], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="40 GB of GPU memory")
@every_kl
def test_rows_behind_two_to_the_31_elements_are_right(kl):
    N, V = 2**31 // 50304 + 2, 50304
    s = torch.randn(N, V, device="cuda")
    t = s.roll(1, 0)
    last, weight = (s[-1:].cpu(), t[-1:].cpu()), torch.ones(N, device="cuda")
    value = model.kl_rows_triton(s, t, weight, kl)
    right_value, right_gradient = in_float64(*last, torch.ones(1), kl)
    assert (value[-1:].cpu() - right_value).abs().max() < 1e-5 * right_value.max()
    error = (s[-1:].cpu() - right_gradient).norm() / right_gradient.norm()
    assert error < 1e-5


COMPILE = """
import sys, subprocess, tempfile, pathlib, torch, triton
sys.path.insert(0, {root!r})
import model
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

class Launch:  # in place of the kernel: what it would be launched with
    def __getitem__(self, grid):
        def launch(*args, **options):
            self.args, self.options = args, options
        return launch

kl_kernel, model.kl_kernel = model.kl_kernel, Launch()
x = torch.empty(1, {V})
model.kl_rows_triton(x, x, x[0, :1], {kl!r})
*_, V, kl = model.kl_kernel.args
options = model.kl_kernel.options
names = kl_kernel.arg_names
kind = dict.fromkeys(("s_ptr", "t_ptr", "weight_ptr", "value_ptr"), "*fp32")
signature = {{name: kind.get(name, "constexpr") for name in names}}
constants = dict(V=V, KL=kl, BLOCK=options["BLOCK"])
places = {{(names.index(name),): value for name, value in constants.items()}}
aligned = {{(i,): [["tt.divisibility", 16]] for i in range(4)}}
source = ASTSource(kl_kernel, signature, places, aligned)
warps = dict(num_warps=options["num_warps"])
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=warps)
with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
    f.write(compiled.asm["cubin"]); f.flush()
    for what in ("--dump-resource-usage", "--dump-sass"):
        print(subprocess.check_output([tools / "cuobjdump", what, f.name], text=True))
"""


@pytest.mark.parametrize(
    "kl, V", [("forward", 512), ("forward", 50304), ("reverse", 50304), ("jsd", 50304)]
)
def test_compiled_for_sm_90_nothing_spills_and_loads_are_wide(kl, V):
    """Ahead of time, without a GPU: STACK is what spills, LDG.E.128 are loads of 16
    bytes a thread."""
    code = COMPILE.format(root=str(Path(model.__file__).parent), V=V, kl=kl)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr
    assert re.findall(r"STACK:(\d+)", run.stdout) == ["0"], run.stdout[:2000]
    wide = len(re.findall(r"LDG\.E\.128", run.stdout))
    narrow = len(re.findall(r"LDG\.E", run.stdout)) - wide
    print(re.findall(r"REG:\d+", run.stdout), f"{wide} wide loads, {narrow} others")
    assert wide >= 2 and narrow <= 1, "one narrow load: the weight of the row"
