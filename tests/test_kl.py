"""The losses and their gradients, beside plain loops (oracles), autograd, enumeration.

Everywhere the student comes first and the teacher second, s and t are their logits,
p_s and p_t their probabilities.
"""

import itertools
import math
from collections import namedtuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import LargestTensor, close, draw, make_model, pad

import model
from model import KLS, chunked_kl, chunked_nll, fused_kl, kl_models, kl_reference

VERSIONS = (kl_reference, fused_kl, chunked_kl)
every_kl = pytest.mark.parametrize("kl", KLS)
every_loss = pytest.mark.parametrize(
    "loss, temperature", [("nll", 1.0), *itertools.product(KLS, (1.0, 0.7))]
)


def loss_of(version, s, t, weight, kl):
    """The weighted sum over rows, differentiable in s."""
    if version is kl_reference:
        return (weight * kl_reference(s, t, kl)).sum()
    head = torch.eye(s.size(-1), dtype=s.dtype)  # so that hidden states are logits
    return chunked_kl(s, t, head, head, weight, kl)[0]


def run(version, s, t, kl, weight=None):
    """The divergence of each row (N,), and weight times its gradient over s (N, V)."""
    weight = s.new_ones(len(s)) if weight is None else weight
    if version is fused_kl:
        gradient = s.clone()
        return fused_kl(gradient, t, weight, kl), gradient
    s = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(version, s, t, weight, kl), s)
    if version is kl_reference:
        return kl_reference(s, t, kl).detach(), gradient
    pairs = zip(s.split(1), t.split(1), strict=True)
    values = [loss_of(version, *pair, s.new_ones(1), kl) for pair in pairs]
    return torch.stack(values).detach(), gradient


def by_loops(s, t, kl, weight):
    """The same from formulas on paper, one row and one entry after the other."""
    pairs = list(zip(s.tolist(), t.tolist(), strict=True))
    values = [oracles.divergence(*pair, kl) for pair in pairs]
    gradient = [oracles.divergence_gradient(*pair, kl) for pair in pairs]
    gradient = torch.tensor(gradient, dtype=torch.float64) * weight.double()[:, None]
    return torch.tensor(values, dtype=torch.float64), gradient


def gradients_of_log_p(s):
    """Row v: the gradient of log p_s(v) over the logits s (V,), by autograd."""
    s = s.clone().requires_grad_()
    log_p = s.log_softmax(-1)
    rows = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in log_p]
    return torch.stack(rows)


# what the losses start from, for N rows: the arguments of chunked_kl, and tokens
Rows = namedtuple("Rows", "hidden teacher_hidden head teacher_head weight tokens")


def learning(x):
    """The same Rows, whose student wants gradients."""
    hidden, head = (y.detach().requires_grad_() for y in (x.hidden, x.head))
    return x._replace(hidden=hidden, head=head)


def make_rows(N=11, V=7, C=3, dtype=torch.float64, hidden=torch.float64):
    """The teacher's hidden states are wider than the student's."""
    weight = torch.rand(N, generator=torch.Generator().manual_seed(5))
    return learning(Rows(
        draw(N, C, seed=1, dtype=hidden), draw(N, C + 1, seed=3, dtype=hidden),
        draw(V, C, seed=2, scale=1, dtype=dtype),
        draw(V, C + 1, seed=4, scale=1, dtype=dtype),
        weight.to(dtype), torch.arange(N) * 3 % V,
    ))  # fmt: skip


def dense(x, temperature=1.0):
    """All logits of student and teacher at once, in float64."""
    pairs = (x.hidden, x.head), (x.teacher_hidden, x.teacher_head)
    return [h.double() @ W.double().T / temperature for h, W in pairs]


def on_paper(loss, x, temperature):
    """The loss, from all logits at once; its gradients are autograd's, in float64."""
    s, t = dense(x, temperature)
    nll = -s.log_softmax(-1).gather(1, x.tokens[:, None])[:, 0]
    return x.weight.double() @ (nll if loss == "nll" else kl_reference(s, t, loss))


def chunked(loss, x, temperature=1.0):
    if loss == "nll":
        return chunked_nll(x.hidden, x.head, x.tokens, x.weight)
    return chunked_kl(*x[:5], loss, temperature)[0]


def slopes(loss, x, **more):
    """d loss / d hidden states and d loss / d head."""
    return torch.autograd.grad(loss, (x.hidden, x.head), **more)


def cut_chunks(monkeypatch, size):
    """From now on so many rows of logits are made at a time."""
    monkeypatch.setattr(model, "chunk_rows", lambda head: size)


# ---- Values and gradients of rows --------------------------------------------------


def test_argument_order_gives_the_two_numbers():
    """Student [.5, .5], teacher [.9, .1]; swapped, they change places."""
    s = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    t = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    for version in VERSIONS:
        for kl, a, b in (("forward", s, t), ("reverse", t, s)):
            assert run(version, a, b, kl)[0].item() == pytest.approx(0.36806, 1e-4)
            assert run(version, b, a, kl)[0].item() == pytest.approx(0.51083, 1e-4)


@pytest.mark.parametrize("version", VERSIONS)
@every_kl
def test_values_and_gradients_equal_plain_loops(version, kl):
    """Values are not weighted, gradients are."""
    for V, dtype in itertools.product((2, 7, 33, 257), (torch.float64, torch.float32)):
        s, t = draw(6, V, dtype=dtype), draw(6, V, seed=1, dtype=dtype)
        weight = draw(6, seed=2, dtype=dtype)
        found = run(version, s, t, kl, weight)
        assert all(x.dtype == dtype for x in found)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        right = by_loops(s, t, kl, weight)
        close(tuple(x.double() for x in found), right, tolerance)


@every_kl
def test_reference_passes_gradcheck_and_takes_any_shape_layout_and_dtype(kl):
    """Of bfloat16 it makes float32: near models differ by less than bfloat16 tells."""
    s, t = draw(2, 3, 5).requires_grad_(), draw(5, 3, 2, seed=1).transpose(0, 2)
    assert torch.autograd.gradcheck(lambda s: kl_reference(s, t, kl), s)
    right, _ = by_loops(s.view(6, 5), t.reshape(6, 5), kl, torch.ones(6))
    close(kl_reference(s, t, kl).detach(), right.view(2, 3))
    t = draw(6, 257, dtype=torch.bfloat16)
    s = (t + draw(6, 257, seed=1, scale=0.05)).bfloat16()
    right, _ = by_loops(s, t, kl, torch.ones(6))
    close(kl_reference(s, t, kl).double(), right, 1e-5)


@every_kl
def test_near_equal_distributions_follow_the_second_order(kl):
    """Both KLs tend to half the variance of the difference of the logits, the JSD to an
    eighth; the gradients to p times the centred difference. Of equal ones all is 0."""
    t = draw(6, 7)
    change = draw(6, 7, seed=1, scale=1e-5)
    p = t.softmax(-1)
    centred = change - (p * change).sum(-1, keepdim=True)
    factor = 0.25 if kl == "jsd" else 1.0
    right = factor * (p * centred**2).sum(-1) / 2, factor * p * centred
    for version in VERSIONS:
        values, gradient = run(version, t + change, t, kl)
        torch.testing.assert_close(values, right[0], rtol=1e-3, atol=1e-15)
        torch.testing.assert_close(gradient, right[1], rtol=1e-3, atol=1e-9)
        values, gradient = run(version, t, t.clone(), kl)
        assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_jsd_is_symmetric_and_at_most_log_2():
    s, t = draw(50, 7, scale=5), draw(50, 7, seed=1, scale=5)
    for version in VERSIONS:
        values, _ = run(version, s, t, "jsd")
        close(values, run(version, t, s, "jsd")[0])
        assert 0 < values.min() and values.max() < math.log(2)


@every_kl
def test_a_number_added_to_all_logits_or_another_order_of_tokens_changes_nothing(kl):
    """Both are normalised inside, so log-probabilities may be given."""
    s, t, weight = draw(6, 7), draw(6, 7, seed=1), draw(6, seed=2)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for version in VERSIONS:
        values, gradient = right = run(version, s, t, kl, weight)
        for a, b in ((s + 100, t), (s, t - 100), (s, t.log_softmax(-1))):
            close(run(version, a, b, kl, weight), right)
        moved = s[:, order], t[:, order]
        close(run(version, *moved, kl, weight), (values, gradient[:, order]))
        assert (run(version, moved[0], t, kl)[0] - values).abs().min() > 1e-3


@every_kl
def test_logits_far_from_the_teacher_s_but_equal_in_shape_lose_no_digits(kl):
    """A near teacher whose logits all stand 100 higher, in float32."""
    s = draw(4, 4096, dtype=torch.float32)
    t = s + 0.1 * draw(4, 4096, seed=1, dtype=torch.float32) + 100
    values, gradient = run(fused_kl, s, t, kl)
    right_values, right = run(kl_reference, s.double(), t.double(), kl)
    assert (values - right_values).abs().max() < 1e-5
    assert (gradient - right).norm() < 1e-4 * right.norm()


LN2 = math.log(2)


@every_kl
@pytest.mark.parametrize("s, t, forward, reverse, jsd", [
    ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], 2e4, 2e4, LN2),
    ([0.0, -800.0], [-800.0, 0.0], 800, 800, LN2),
    # in float32 exp(-200) is 0, and the log of that is infinite
    ([0.0, 0.0], [0.0, -200.0], LN2, 100 - LN2, 1.5 * LN2 - 0.75 * math.log(3)),
    ([0.0, -200.0], [0.0, 0.0], 100 - LN2, LN2, 1.5 * LN2 - 0.75 * math.log(3)),
])  # fmt: skip
def test_logits_far_apart_stay_finite(s, t, forward, reverse, jsd, kl):
    right = {"forward": forward, "reverse": reverse, "jsd": jsd}[kl]
    for version, dtype in itertools.product(VERSIONS, (torch.float32, torch.float64)):
        a, b = (torch.tensor([x], dtype=dtype) for x in (s, t))
        value, gradient = run(version, a, b, kl)
        digits = 1e-6 if dtype == torch.float32 else 1e-12
        assert value.item() == pytest.approx(right, rel=digits)
        p_s, p_t = a.softmax(-1), b.softmax(-1)
        if kl == "forward":
            close(gradient, p_s - p_t, 1e-6)
        elif p_s.max() == 1:
            close(gradient, torch.zeros_like(a), 1e-6)
        assert gradient.isfinite().all()


@every_kl
def test_padded_vocabulary_of_minus_infinity_adds_nothing(kl):
    """A token that neither model can take counts as if it were absent."""
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), draw(4, seed=2)
    pads = torch.full((4, 2), -math.inf, dtype=torch.float64)
    for version in (kl_reference, fused_kl):  # (hidden states give no such logits)
        padded = torch.cat((s, pads), 1), torch.cat((t, pads), 1)
        values, gradient = run(version, *padded, kl, weight)
        close((values, gradient[:, :5]), run(version, s, t, kl, weight))
        assert torch.equal(gradient[:, 5:], torch.zeros(4, 2, dtype=torch.float64))


@every_kl
@pytest.mark.parametrize("V", (7, 40_001, 150_001))
def test_rows_are_right_in_every_block_of_the_kernel(kl, V):
    """2^17 // V is all rows, 3 rows, and 0 rows, which has to become 1."""
    s, t = draw(5, V), draw(5, V, seed=1)
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    args = s, t, kl, weight
    close(run(fused_kl, *args), run(kl_reference, *args), 1e-12)


# ---- From hidden states, a chunk of rows at a time ---------------------------------


@every_loss
def test_chunked_losses_equal_the_formula(loss, temperature, monkeypatch):
    """In value by plain loops, in gradients by autograd; for chunks of any size: the
    last is often smaller. Without gradients it is the same."""
    x, right = make_rows(), 0.0
    both = (logits.tolist() for logits in dense(x, temperature))
    for s, t, w, y in zip(*both, x.weight.tolist(), x.tokens, strict=True):
        nll = loss == "nll"
        value = -oracles.log_softmax(s)[y] if nll else oracles.divergence(s, t, loss)
        right += w * value
    gradients = slopes(on_paper(loss, x, temperature), x)
    for size in (None, 1, 2, 3, 10, 11, 16):
        if size:
            cut_chunks(monkeypatch, size)
        value = chunked(loss, x, temperature)
        assert value.shape == () and value.item() == pytest.approx(right, rel=1e-12)
        close(slopes(value, x), gradients)
        with torch.no_grad():
            alone = chunked(loss, x, temperature)
        assert torch.equal(alone, value) and not alone.requires_grad


@every_loss
def test_gradcheck_of_hidden_states_and_head(loss, temperature, monkeypatch):
    cut_chunks(monkeypatch, 4)
    x = make_rows()
    assert torch.autograd.gradcheck(
        lambda h, W: chunked(loss, x._replace(hidden=h, head=W), temperature),
        (x.hidden, x.head),
    )


@every_loss
def test_backward_may_be_called_twice_and_gets_the_factor_from_upstream(
    loss, temperature
):
    """But it has no derivative of its own, and says so."""
    x = make_rows()
    value = chunked(loss, x, temperature)
    once, again = (slopes(value, x, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    close(slopes(-3 * value, x), tuple(-3 * g for g in once))
    dh, _ = slopes(chunked(loss, x, temperature) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


@every_loss
def test_no_rows_give_a_loss_of_zero_and_empty_gradients(loss, temperature):
    x = make_rows(N=0)
    value = chunked(loss, x, temperature)
    dh, dW = slopes(value, x)
    assert value == 0 and dh.shape == (0, 3) and dW.shape == (7, 3) and not dW.any()
    if loss != "nll":
        s = torch.zeros(0, 7)
        assert fused_kl(s, s.clone(), torch.zeros(0), loss).shape == (0,)


@every_loss
def test_bfloat16_hidden_states_become_float32_logits(loss, temperature, monkeypatch):
    """Hidden states are rounded, what comes after them is not: not the product with the
    head, and not the division by the temperature."""
    cut_chunks(monkeypatch, 4)
    x = make_rows(9, 33, dtype=torch.float32, hidden=torch.bfloat16)
    value, right = chunked(loss, x, temperature), on_paper(loss, x, temperature)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(right.item(), rel=1e-5)
    (dh, dW), (right_dh, right_dW) = slopes(value, x), slopes(right, x)
    assert dh.dtype == torch.bfloat16 and dW.dtype == torch.float32
    assert (dW - right_dW).norm() < 1e-5 * right_dW.norm()
    assert (dh - right_dh).norm() < 1e-3 * right_dh.norm()  # both are rounded


@every_loss
def test_views_of_any_layout_will_do(loss, temperature, monkeypatch):
    """Transposed, and every second entry of a longer tensor."""
    cut_chunks(monkeypatch, 4)
    x = make_rows()
    views = [y.detach().T.contiguous().T for y in x[:4]]
    views += [y.repeat_interleave(2)[::2] for y in x[4:]]
    assert not any(y.is_contiguous() for y in views)
    views = learning(Rows(*views))
    value, right = chunked(loss, views, temperature), chunked(loss, x, temperature)
    close(value, right)
    close(slopes(value, views), slopes(right, x))


@every_loss
def test_no_gradient_reaches_the_teacher_and_no_input_is_changed(loss, temperature):
    """Not even a teacher that asks for a gradient gets one. fused_kl changes s only."""
    x = make_rows()
    x.teacher_hidden.requires_grad_()
    x.teacher_head.requires_grad_()
    before = [y.detach().clone() for y in x]
    chunked(loss, x, temperature).backward()
    assert all(map(torch.equal, x, before))
    assert x.hidden.grad.abs().max() > 0.01 and x.head.grad.abs().max() > 0.01
    assert x.teacher_hidden.grad is None and x.teacher_head.grad is None
    if loss != "nll":
        s, t = (logits.detach() for logits in dense(x))
        given = s.clone(), t.clone(), x.weight.clone()
        fused_kl(*given, loss)
        same = [torch.equal(a, b) for a, b in zip(given, (s, t, x.weight), strict=True)]
        assert same == [False, True, True]
        s.requires_grad_()
        t.requires_grad_()
        kl_reference(s, t, loss).sum().backward()
        assert s.grad.abs().max() > 0.01 and t.grad is None


class OnGPU(torch.Tensor):
    is_cuda = True


def test_chunks_bound_the_memory_and_are_not_needlessly_small():
    """At the vocabularies of our world, of GPT-2 and of Qwen2.5: 32 MB of float32 on a
    CPU, 512 MB on a GPU; one row, if it is larger."""
    for V in (1, 512, 50_304, 151_936, 2**24, 2**28):
        head = torch.empty(V, 1, device="meta")
        assert model.chunk_rows(head) == max(1, min(1024, 2**23 // V))
        assert model.chunk_rows(head.as_subclass(OnGPU)) == max(1, 2**27 // V)


def test_nothing_as_large_as_all_logits_is_ever_made(monkeypatch):
    """At 7 rows of 140,001 tokens, two rows at a time: no tensor is larger than a chunk
    or than a head, forward or backward. The formula makes them whole."""
    N, V, chunk = 7, 140_001, 2
    cut_chunks(monkeypatch, chunk)
    x = make_rows(N, V, C=1)
    sizes = dict(vocab_size=V, n_embd=2, n_head=1, n_kv_head=1, n_layer=1)
    p, q = (make_model(seed, **sizes) for seed in (0, 1))
    prompts, response = pad([[5, 6], [7]]), torch.arange(8).view(2, 4)
    mask = torch.arange(4) < torch.tensor([[4], [3]])
    work = {
        "models": lambda: kl_models(p, prompts, q, prompts, response, mask),
        "nll": lambda: chunked("nll", x).backward(),
    }
    for kl in KLS:
        args = *x[:5], kl, 0.7, True
        work[kl] = lambda args=args: chunked_kl(*args)[0].backward()
    for name, do in work.items():
        with LargestTensor() as seen:
            do()
        assert 0 < seen.numel <= chunk * V, (name, seen.shape, seen.operation)
    with LargestTensor() as seen:
        kl_reference(*dense(x))
    assert seen.numel == N * V, "else the counting shows nothing"


@every_kl
def test_what_is_watched_are_weighted_sums_and_changes_no_loss(kl, monkeypatch):
    """Of the distributions at the temperature, in several chunks; to the bit."""
    cut_chunks(monkeypatch, 4)
    x = make_rows()
    right = {"kl_student_teacher": 0.0, "student_entropy": 0.0, "teacher_entropy": 0.0}
    both = (logits.tolist() for logits in dense(x, 0.7))
    for s, t, w in zip(*both, x.weight.tolist(), strict=True):
        right["kl_student_teacher"] += w * oracles.divergence(s, t, "reverse")
        right["student_entropy"] += w * oracles.entropy(s)
        right["teacher_entropy"] += w * oracles.entropy(t)
    loss, sums = chunked_kl(*x[:5], kl, 0.7, watch=True)
    assert not any(value.requires_grad for value in sums.values())
    sums = {key: value.item() for key, value in sums.items()}
    assert sums == pytest.approx(right, rel=1e-12)
    alone, none = chunked_kl(*x[:5], kl, 0.7)
    assert none == {} and torch.equal(loss, alone)
    assert all(map(torch.equal, slopes(loss, x), slopes(alone, x)))


# ---- What would be silently wrong is refused ----------------------------------------


@pytest.mark.parametrize("kl, S, T", [
    *((kl, (3, 8), (3, 8)) for kl in ("Forward", "kl", "", None)),
    ("forward", (3, 64), (3, 72)), ("jsd", (3, 72), (3, 64)),
    ("forward", (3, 64), (1, 64)), ("reverse", (1, 64), (3, 64)),
])  # fmt: skip
def test_other_names_and_shapes_that_differ_are_refused(kl, S, T):
    """A vocabulary that is longer in one, or one row for all: it would be broadcast, or
    read beyond its end by the kernel of a GPU."""
    s, t = draw(*S), draw(*T, seed=1)
    heads = [torch.eye(x.size(-1), dtype=x.dtype) for x in (s, t)]
    weight = s.new_ones(len(s))
    refuse = [
        lambda: kl_reference(s, t, kl),
        lambda: fused_kl(s.clone(), t, weight, kl),
        lambda: chunked_kl(s, t, *heads, weight, kl),
    ]
    for do in refuse if S[0] == T[0] else refuse[:2]:
        with pytest.raises(ValueError) as caught:
            do()
        assert str(caught.value) == f"{kl!r}, one of {KLS}? logits {S} and {T}"


def test_weights_tokens_and_teachers_that_fit_no_rows_are_refused(monkeypatch):
    """One weight for all rows would be broadcast within a chunk, what is behind the
    last row left out; values of the dtype of a mask would be cut to whole numbers."""
    x = make_rows()
    w, tokens, shown = x.weight, x.tokens, x.teacher_hidden
    s, t = (logits.detach() for logits in dense(x))
    cut_chunks(monkeypatch, 11)  # so that a second chunk would hold what is too many
    for wrong in (w[:1], w[:10], w.sum(), torch.cat((w, w)), w[:, None], w > 0.5,
                  w.long(), w.float()):  # fmt: skip
        with pytest.raises(AssertionError):
            fused_kl(s.clone(), t, wrong, "forward")
        for loss in ("nll", *KLS):
            with pytest.raises(AssertionError):
                chunked(loss, x._replace(weight=wrong))
    for wrong in (tokens[:10], tokens[:1], torch.cat((tokens, tokens))):
        with pytest.raises(AssertionError):
            chunked("nll", x._replace(tokens=wrong))
    for wrong in (shown[:10], shown[:1], torch.cat((shown, shown))):
        with pytest.raises(AssertionError):
            chunked("forward", x._replace(teacher_hidden=wrong))


# ---- Estimators of the gradient ----------------------------------------------------


def test_equation_2_as_printed_is_not_the_gradient():
    """Sum_v log(p_s/p_t)(v) * gradient of log p_s(v), without p_s(v)."""
    s, t = draw(7), draw(7, seed=1)
    ratio = s.log_softmax(-1) - t.log_softmax(-1)
    terms = ratio[:, None] * gradients_of_log_p(s)
    printed, weighted = terms.sum(0), (s.softmax(-1)[:, None] * terms).sum(0)
    for version in VERSIONS:
        gradient = run(version, s[None], t[None], "reverse")[1][0]
        close(weighted, gradient)
        assert (printed - gradient).norm() > gradient.norm()
        assert F.cosine_similarity(printed, gradient, dim=0) < 0.9


def test_expected_sampled_gradient_is_the_analytic_one():
    """Over v ~ student for reverse, over v ~ teacher for forward."""
    s, t = draw(5), draw(5, seed=1)
    scores = gradients_of_log_p(s)
    p_s, p_t = oracles.softmax(s.tolist()), oracles.softmax(t.tolist())
    reverse, forward = torch.zeros_like(s), torch.zeros_like(s)
    for v in range(5):
        reverse += p_s[v] * math.log(p_s[v] / p_t[v]) * scores[v]
        forward -= p_t[v] * scores[v]
    for version in VERSIONS:
        close(run(version, s[None], t[None], "reverse")[1][0], reverse)
        close(run(version, s[None], t[None], "forward")[1][0], forward)


@pytest.mark.parametrize("version", (kl_reference, chunked_kl))
def test_sum_of_token_kls_has_a_partial_gradient_and_rao_blackwell_the_true_one(
    version,
):
    """What y_t does to later tokens is not in the analytic gradient; the second term of
    the Rao-Blackwell estimator puts it back. By enumeration of a language of three
    tokens and three steps, where a model is a table: the logits (3) after each of the
    13 prefixes of at most two tokens."""
    prefixes = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
    student, teacher = draw(13, 3, scale=1), draw(13, 3, seed=1, scale=1)
    student.requires_grad_()

    def expected_gradient(term):
        """Of terms of sequences y: the rows of both that predict its tokens, log p of
        these tokens, log p_s - log p_t of them without gradient, and p of them all."""
        total = 0.0
        for y in itertools.product(range(3), repeat=3):
            rows = [prefixes.index(y[:t]) for t in range(3)]
            s, t = student[rows], teacher[rows]  # (3, 3)
            log_s, log_t = (x.log_softmax(-1)[range(3), y] for x in (s, t))  # (3,)
            total = total + term(s, t, log_s, log_s - log_t, log_s.sum().exp())
        return torch.autograd.grad(total, student)[0]

    def whole(s, t, log_p, ratio, p):
        return p * ratio.sum()

    def token(s, t, log_p, ratio, p):
        return p.detach() * (ratio.detach() * log_p).sum()

    def analytic(s, t, log_p, ratio, p):
        return p.detach() * loss_of(version, s, t, s.new_ones(3), "reverse")

    def rao_blackwell(s, t, log_p, ratio, p):
        k, _ = run(version, s.detach(), t, "reverse")  # (3,)
        later = k.sum() - k.cumsum(0)  # the sum over t > i
        return analytic(s, t, log_p, ratio, p) + p.detach() * (log_p * later).sum()

    true, partial = expected_gradient(whole), expected_gradient(analytic)
    close(expected_gradient(token), partial)
    close(expected_gradient(rao_blackwell), true)
    assert (partial - true).norm() > 0.05 * true.norm()
    assert F.cosine_similarity(partial.flatten(), true.flatten(), dim=0) > 0.8
