"""The losses and their gradients, beside plain loops (oracles), autograd, enumeration.

Everywhere the student comes first and the teacher second, s and t are their logits,
p_s and p_t their probabilities.
"""

import itertools
from collections import namedtuple
from math import inf, log

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import LargestTensor, close, draw

import model
from model import KLS, chunked_kl, chunked_nll, fused_kl, kl_reference

VERSIONS = (kl_reference, fused_kl)  # of the losses of rows, from logits
every_kl = pytest.mark.parametrize("kl", KLS)
every_loss = pytest.mark.parametrize(
    "loss, temperature", [("nll", 1.0), *itertools.product(KLS, (1.0, 0.7))]
)


def run(version, s, t, kl, weight=None):
    """The divergence of each row (N,), and weight times its gradient over s (N, V)."""
    weight = s.new_ones(len(s)) if weight is None else weight
    s = s.clone().requires_grad_(version is kl_reference)
    if version is fused_kl:
        return fused_kl(s, t, weight, kl), s
    value = kl_reference(s, t, kl)
    return value.detach(), torch.autograd.grad(weight @ value, s)[0]


def by_loops(s, t, kl, weight):
    """The same from formulas on paper, one row and one entry after the other."""
    pairs = list(zip(s.tolist(), t.tolist(), strict=True))
    values = draw(0).new_tensor([oracles.divergence(*pair, kl) for pair in pairs])
    gradient = [oracles.divergence_gradient(*pair, kl) for pair in pairs]
    return values, values.new_tensor(gradient) * weight.double()[:, None]


# what the losses start from, for N rows: the arguments of chunked_kl, and tokens
Rows = namedtuple("Rows", "hidden teacher_hidden head teacher_head weight tokens")


def make_rows(N=11, V=7, C=3, dtype=torch.float64, hidden=torch.float64):
    """The teacher's hidden states are wider than the student's, who learns."""
    weight = torch.rand(N, generator=torch.Generator().manual_seed(5)).to(dtype)
    hiddens = draw(N, C, seed=1, dtype=hidden), draw(N, C + 1, seed=3, dtype=hidden)
    heads = draw(V, C, seed=2, scale=1, dtype=dtype), draw(V, C + 1, seed=4).to(dtype)
    x = Rows(*hiddens, *heads, weight, torch.arange(N) * 3 % V)
    x.hidden.requires_grad_()
    x.head.requires_grad_()
    return x


def dense(x, temperature=1.0):
    """All logits of student and teacher at once, in float64."""
    pairs = (x.hidden, x.head), (x.teacher_hidden, x.teacher_head)
    return [h.double() @ W.double().T / temperature for h, W in pairs]


def on_paper(loss, x, temperature):
    """The loss, from all logits at once; its gradients are autograd's, in float64."""
    s, t = dense(x, temperature)
    nll = -s.log_softmax(-1).gather(1, x.tokens[:, None])[:, 0]
    return x.weight.double() @ (nll if loss == "nll" else kl_reference(s, t, loss))


def chunked(loss, x, temperature=1.0, watch=False):
    if loss == "nll":
        return chunked_nll(x.hidden, x.head, x.tokens, x.weight)
    return chunked_kl(*x[:5], loss, temperature, watch)[0]


def slopes(loss, x, **more):
    """d loss / d hidden states and d loss / d head."""
    return torch.autograd.grad(loss, (x.hidden, x.head), **more)


@every_kl
@pytest.mark.parametrize("s, t, forward, reverse, jsd", [
    # [.5, .5] and [.9, .1], whose mean is [.7, .3]: 0.36806 and 0.51083
    ([0.0, 0.0], [log(9), 0.0], 0.9 * log(1.8) + 0.1 * log(0.2), -log(0.36) / 2,
     (0.9 * log(9 / 7) - 0.1 * log(3) + 0.5 * log(5 / 7) + 0.5 * log(5 / 3)) / 2),
    ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], 2e4, 2e4, log(2)),
    ([0.0, -800.0], [-800.0, 0.0], 800, 800, log(2)),
    # in float32 exp(-200) is 0, and the log of that is infinite
    ([0.0, 0.0], [0.0, -200.0], log(2), 100 - log(2), 1.5 * log(2) - 0.75 * log(3)),
    ([0.0, -200.0], [0.0, 0.0], 100 - log(2), log(2), 1.5 * log(2) - 0.75 * log(3)),
])  # fmt: skip
def test_values_are_those_computed_by_hand(s, t, forward, reverse, jsd, kl):
    """All stays finite where logits are far apart."""
    right = {"forward": forward, "reverse": reverse, "jsd": jsd}[kl]
    for version, dtype in itertools.product(VERSIONS, (torch.float32, torch.float64)):
        a, b = (torch.tensor([x], dtype=dtype) for x in (s, t))
        value, gradient = run(version, a, b, kl)
        digits = 1e-6 if dtype == torch.float32 else 1e-12
        assert value.item() == pytest.approx(right, rel=digits)
        if kl == "forward":
            close(gradient, a.softmax(-1) - b.softmax(-1), 1e-6)
        elif a.softmax(-1).max() == 1:
            close(gradient, torch.zeros_like(a), 1e-6)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
@every_kl
def test_values_and_gradients_equal_plain_loops(version, kl):
    """Values are not weighted, gradients are. A number added to all logits counts for
    nothing; neither does a token that both give minus infinity (padded vocabulary). The
    reference takes any shape and layout, and makes float32 of bfloat16, which does not
    tell near models apart."""
    for V, dtype in itertools.product((2, 7, 33, 257), (torch.float64, torch.float32)):
        s, t = draw(6, V, dtype=dtype), draw(6, V, seed=1, dtype=dtype)
        weight = draw(6, seed=2, dtype=dtype)
        right = by_loops(s, t, kl, weight)
        found = run(version, s, t, kl, weight)
        assert all(x.dtype == dtype for x in found)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        close(tuple(x.double() for x in found), right, tolerance)
        padded = [F.pad(x, (0, 2), value=-inf) for x in (s, t)]
        values, gradient = run(version, *padded, kl, weight)
        close((values, gradient[:, :V]), found, tolerance)
        assert not gradient[:, V:].any()
        if dtype == torch.float64:
            close(run(version, s + 100, t - 100, kl, weight), right)
    s, t = draw(2, 3, 5), draw(5, 3, 2, seed=1).transpose(0, 2)
    right, _ = by_loops(s.view(6, 5), t.reshape(6, 5), kl, torch.ones(6))
    close(kl_reference(s, t, kl), right.view(2, 3))
    t = draw(6, 257, dtype=torch.bfloat16)
    s = (t + draw(6, 257, seed=1, scale=0.05)).bfloat16()
    right, _ = by_loops(s, t, kl, torch.ones(6))
    close(kl_reference(s, t, kl).double(), right, 1e-5)


@every_kl
def test_near_equal_distributions_lose_no_digits(kl):
    """Both KLs tend to half the variance of the difference of logits, the JSD to an
    eighth. In float32, the logits of a near teacher may all be 100 higher."""
    t, change = draw(6, 7), draw(6, 7, seed=1, scale=1e-5)
    p, factor = t.softmax(-1), 0.25 if kl == "jsd" else 1.0
    centred = change - (p * change).sum(-1, keepdim=True)
    right = factor * (p * centred**2).sum(-1) / 2, factor * p * centred
    for version in VERSIONS:
        values, gradient = run(version, t + change, t, kl)
        torch.testing.assert_close(values, right[0], rtol=1e-3, atol=1e-15)
        torch.testing.assert_close(gradient, right[1], rtol=1e-3, atol=1e-9)
        assert all(x.abs().max() < 1e-14 for x in run(version, t, t.clone(), kl))
    s = draw(4, 4096, dtype=torch.float32)
    t = s + 0.1 * draw(4, 4096, seed=1, dtype=torch.float32) + 100
    values, gradient = run(fused_kl, s, t, kl)
    right_values, right = run(kl_reference, s.double(), t.double(), kl)
    assert (values - right_values).abs().max() < 1e-5
    assert (gradient - right).norm() < 1e-4 * right.norm()


@every_kl
@pytest.mark.parametrize("V", (7, 40_001, 150_001))
def test_rows_are_right_in_every_block_of_the_kernel(kl, V):
    """2^17 // V is all rows, 3 rows, and 0 rows, which has to become 1."""
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    for N in (5, 0):
        args = draw(N, V), draw(N, V, seed=1), kl, weight[:N]
        close(run(fused_kl, *args), run(kl_reference, *args), 1e-12)


@every_loss
def test_chunked_losses_equal_the_formula(loss, temperature, monkeypatch):
    """In value and, by autograd, in gradients, for chunks of any size: the last is
    often smaller. Without gradients it is the same. Of no rows, and of tensors of any
    layout: transposed, and every second entry of a longer one. Of hidden states in
    bfloat16, what comes after them is not rounded: not the product with the head, and
    not the division by the temperature."""
    views = [x.detach().T.contiguous().T.requires_grad_() for x in make_rows()[:4]]
    views += [x.repeat_interleave(2)[::2] for x in make_rows()[4:]]
    assert not any(x.is_contiguous() for x in views)
    for x in (make_rows(), Rows(*views), make_rows(N=0)):
        right = on_paper(loss, x, temperature)
        gradients = slopes(right, x)
        for size in (1, 2, 3, 10, 11, 16, 1024):
            monkeypatch.setattr(model, "chunk_rows", lambda head, size=size: size)
            value = chunked(loss, x, temperature)
            close(value, right, 1e-12)
            close(slopes(value, x), gradients)
            with torch.no_grad():
                alone = chunked(loss, x, temperature)
            assert torch.equal(alone, value) and not alone.requires_grad
    x = make_rows(9, 33, dtype=torch.float32, hidden=torch.bfloat16)
    monkeypatch.setattr(model, "chunk_rows", lambda head: 4)
    found, right = (of(loss, x, temperature) for of in (chunked, on_paper))
    found, right = ((value, *slopes(value, x)) for value in (found, right))
    assert [y.dtype for y in found] == [torch.float32, torch.bfloat16, torch.float32]
    for ours, exact, tolerance in zip(found, right, (1e-5, 1e-3, 1e-5), strict=True):
        assert (ours - exact).norm() < tolerance * exact.norm()


@every_loss
def test_the_student_alone_gets_gradients_and_no_input_is_changed(loss, temperature):
    """Not even a teacher that asks for them. Backward may be called twice, and has no
    derivative of its own. fused_kl changes s only."""
    x = make_rows()
    before = [y.detach().clone() for y in x]
    x.teacher_hidden.requires_grad_()
    x.teacher_head.requires_grad_()
    value = chunked(loss, x, temperature)
    value.backward(retain_graph=True)
    assert all(map(torch.equal, x, before))
    assert x.teacher_hidden.grad is None and x.teacher_head.grad is None
    once = x.hidden.grad, x.head.grad
    assert min(g.abs().max() for g in once) > 0.01
    assert all(map(torch.equal, slopes(value, x, retain_graph=True), once))
    close(slopes(-3 * value, x), tuple(-3 * g for g in once))
    dh, _ = slopes(chunked(loss, x, temperature) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()
    if loss != "nll":
        s, t = (logits.detach() for logits in dense(x))
        given = s.clone(), t.clone(), x.weight.clone()
        fused_kl(*given, loss)
        assert list(map(torch.equal, given, (s, t, x.weight))) == [False, True, True]
        kl_reference(s.requires_grad_(), t.requires_grad_(), loss).sum().backward()
        assert s.grad.abs().max() > 0.01 and t.grad is None


@pytest.mark.parametrize("loss", ("nll", *KLS))
def test_nothing_as_large_as_all_logits_is_ever_made(loss, monkeypatch):
    """At 7 rows of 140,001 tokens, two rows at a time: no tensor is larger than a chunk
    or than a head, forward or backward. The formula makes them whole. A chunk is of 32
    MB of float32 on a CPU, of 512 MB on a GPU; of one row, if it is larger."""
    on_gpu = type("OnGPU", (torch.Tensor,), {"is_cuda": True})
    for V in (1, 512, 50_304, 151_936, 2**24, 2**28):
        head = torch.empty(V, 1, device="meta")
        assert model.chunk_rows(head) == max(1, min(1024, 2**23 // V))
        assert model.chunk_rows(head.as_subclass(on_gpu)) == max(1, 2**27 // V)
    x = make_rows(7, V := 140_001, C=1)
    monkeypatch.setattr(model, "chunk_rows", lambda head: 2)
    with LargestTensor() as seen:
        chunked(loss, x, 0.7, watch=True).backward()
    assert 0 < seen.numel <= 2 * V, (seen.shape, seen.operation)
    with LargestTensor() as seen:
        kl_reference(*dense(x))
    assert seen.numel == 7 * V, "else the counting shows nothing"


@every_kl
def test_what_is_watched_are_weighted_sums_and_changes_no_loss(kl, monkeypatch):
    """Of the distributions at the temperature, in several chunks; to the bit."""
    monkeypatch.setattr(model, "chunk_rows", lambda head: 4)
    x = make_rows()
    pairs = zip(*(logits.tolist() for logits in dense(x, 0.7)), strict=True)
    kl_of, H = oracles.divergence, oracles.entropy
    right = [(kl_of(s, t, "reverse"), H(s), H(t)) for s, t in pairs]
    right = x.weight @ x.weight.new_tensor(right)
    loss, sums = chunked_kl(*x[:5], kl, 0.7, watch=True)
    assert list(sums) == ["kl_student_teacher", "student_entropy", "teacher_entropy"]
    assert not any(value.requires_grad for value in sums.values())
    close(torch.stack([*sums.values()]), right, 1e-12)
    alone, none = chunked_kl(*x[:5], kl, 0.7)
    assert none == {} and torch.equal(loss, alone)
    assert all(map(torch.equal, slopes(loss, x), slopes(alone, x)))


def test_names_and_shapes_that_would_be_silently_wrong_are_refused(monkeypatch):
    """They would be broadcast, left out, or read beyond their end by the kernel of a
    GPU; values of a mask's dtype would be cut to whole numbers."""

    def refused(do, *args):
        with pytest.raises(AssertionError):
            do(*args)

    monkeypatch.setattr(model, "chunk_rows", lambda head: 11)  # too many: a second
    x = make_rows()
    (s, t), w = (logits.detach() for logits in dense(x)), x.weight
    for kl in ("Forward", "kl", "", None):
        refused(kl_reference, s, t, kl)
        refused(fused_kl, s.clone(), t, w, kl)
    for a, b in ((s, t[:, :6]), (s[:, :6], t), (s, t[:1]), (s[:1], t)):
        for kl in KLS:
            refused(kl_reference, a, b, kl)
            refused(fused_kl, a.clone(), b, w[: len(a)], kl)
    for wrong in (w[:1], w[:10], w.sum(), torch.cat((w, w)), w[:, None], w > 0.5,
                  w.long(), w.float()):  # fmt: skip
        refused(fused_kl, s.clone(), t, wrong)
        for loss in ("nll", *KLS):
            refused(chunked, loss, x._replace(weight=wrong))
    for n in ([0], range(10), [*range(11)] * 2):
        refused(chunked, "nll", x._replace(tokens=x.tokens[n]))
        refused(chunked, "forward", x._replace(teacher_hidden=x.teacher_hidden[n]))
