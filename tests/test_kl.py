"""The losses and their gradients, beside plain loops (oracles), enumeration, F.kl_div.

Everywhere the student comes first and the teacher second, s and t are their logits,
p_s and p_t their probabilities. F.kl_div(log b, log a, log_target=True) is KL(a || b).
"""

import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import LargestTensor, close, draw, make_model, pad

import model as model_py
from model import (
    KLS,
    LazyLogits,
    entropy,
    fused_kl,
    fused_linear_kl,
    fused_linear_nll,
    kl_models,
    kl_of_rows,
    kl_reference,
    kl_rows,
    kl_stats,
)

VERSIONS = (kl_reference, fused_kl, fused_linear_kl)
DENSE = (kl_reference, fused_kl)
every_kl = pytest.mark.parametrize("kl", KLS)


def lazy(logits):
    """LazyLogits that are these: the head has ones on its diagonal."""
    return LazyLogits(logits, torch.eye(logits.size(-1), dtype=logits.dtype))


def values_of(version, s, t, kl):
    """The divergence of each row of logits."""
    if version is fused_linear_kl:
        return kl_of_rows(lazy(s), lazy(t), kl)
    return version(s, t, kl)


def loss_of(version, s, t, weight, kl):
    if version is fused_linear_kl:
        return fused_linear_kl(lazy(s), lazy(t), weight, kl)
    return (weight * version(s, t, kl)).sum()


def gradient_of(version, s, t, weight, kl):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss_of(version, s, t, weight, kl), s)[0]


def by_torch(s, t, kl):
    """float64 (N,), whatever the dtype of the logits."""
    log_s, log_t = s.double().log_softmax(-1), t.double().log_softmax(-1)
    log_m = ((log_s.exp() + log_t.exp()) / 2).log()
    options = {"log_target": True, "reduction": "none"}
    if kl == "forward":
        return F.kl_div(log_s, log_t, **options).sum(-1)
    if kl == "reverse":
        return F.kl_div(log_t, log_s, **options).sum(-1)
    both = F.kl_div(log_m, log_t, **options) + F.kl_div(log_m, log_s, **options)
    return both.sum(-1) / 2


def gradients_of_log_p(s):
    """Row v: the gradient of log p_s(v) over the logits s (V,), by autograd."""
    s = s.clone().requires_grad_()
    log_p = s.log_softmax(-1)
    rows = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in log_p]
    return torch.stack(rows)


def make_lazy(N=11, C=3, V=7, seed=0, temperature=1.0):
    hidden, head = draw(N, C, seed=seed, scale=1), draw(V, C, seed=seed + 1, scale=1)
    return LazyLogits(hidden, head, temperature)


def make_pair(N=11, V=7, temperature=1.0):
    """LazyLogits of a student, whose hidden states and head want gradients, and of a
    teacher with wider hidden states; and weights."""
    student = make_lazy(N, 3, V, 1, temperature)
    student.hidden.requires_grad_()
    student.head.requires_grad_()
    weight = torch.rand(N, generator=torch.Generator().manual_seed(5)).double()
    return student, make_lazy(N, 4, V, 3, temperature), weight


def dense(logits):
    """All rows, as one tensor in float64."""
    return logits.hidden.double() @ logits.head.double().T / logits.temperature


def slopes(loss, logits):
    """d loss / d hidden states and d loss / d head."""
    return torch.autograd.grad(loss, (logits.hidden, logits.head))


def cut_chunks(monkeypatch, size):
    """From now on rows of LazyLogits are made `size` at a time."""

    def chunks(self):
        N = len(self.hidden)
        return [(i, min(N, i + size)) for i in range(0, N, size)]

    monkeypatch.setattr(LazyLogits, "chunks", chunks)


# ---- Values and gradients of rows --------------------------------------------------


def test_argument_order_gives_the_two_numbers():
    """Student [.5, .5], teacher [.9, .1]; swapped, they change places."""
    s = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    t = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    for version in VERSIONS:
        for kl, a, b in (("forward", s, t), ("reverse", t, s)):
            assert values_of(version, a, b, kl).item() == pytest.approx(0.36806, 1e-4)
            assert values_of(version, b, a, kl).item() == pytest.approx(0.51083, 1e-4)


@pytest.mark.parametrize("version", VERSIONS)
@every_kl
def test_values_and_gradients_equal_plain_loops(version, kl):
    """The formulas on paper and their closed-form gradients, token by token."""
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), draw(4, seed=2)
    values = values_of(version, s, t, kl).tolist()
    gradient = gradient_of(version, s, t, weight, kl)
    for i in range(4):
        rows = s[i].tolist(), t[i].tolist()
        assert values[i] == pytest.approx(oracles.divergence(*rows, kl), rel=1e-12)
        right = oracles.divergence_gradient(*rows, kl)
        close(gradient[i] / weight[i], torch.tensor(right, dtype=torch.float64))


@every_kl
def test_values_equal_those_of_torch(kl):
    for version, V in itertools.product(VERSIONS, (2, 7, 33, 257)):
        s, t = draw(6, V), draw(6, V, seed=1)
        close(values_of(version, s, t, kl), by_torch(s, t, kl))
        s, t = s.float(), t.float()
        close(values_of(version, s, t, kl).double(), by_torch(s, t, kl), 1e-5)


@every_kl
def test_gradcheck_of_logits(kl):
    s, t = draw(3, 5).requires_grad_(), draw(3, 5, seed=1)
    for version in DENSE:
        assert torch.autograd.gradcheck(lambda s, f=version: f(s, t, kl), s)


@every_kl
def test_any_leading_shape_and_layout_will_do(kl):
    s, t = draw(2, 3, 5), draw(5, 3, 2, seed=1).transpose(0, 2)
    for version in DENSE:
        close(version(s, t, kl), by_torch(s, t, kl))
        weight = draw(2, 3, seed=2)
        gradient = gradient_of(version, s, t, weight, kl)[1, 2]
        rows = s[1, 2].tolist(), t[1, 2].tolist()
        right = oracles.divergence_gradient(*rows, kl)
        close(gradient, weight[1, 2] * torch.tensor(right, dtype=torch.float64))


@every_kl
def test_kl_of_equal_is_zero_and_of_different_is_not(kl):
    s, t = draw(6, 7), draw(6, 7, seed=1)
    weight = s.new_ones(6)
    for version in VERSIONS:
        assert values_of(version, s, s.clone(), kl).abs().max() < 1e-14
        assert gradient_of(version, s, s.clone(), weight, kl).abs().max() < 1e-14
        assert values_of(version, s, t, kl).min() > 0.01


@every_kl
def test_near_equal_distributions_follow_the_second_order(kl):
    """Both KLs tend to half the variance of the difference of the logits, the JSD to an
    eighth; the gradients to p times the centred difference."""
    t = draw(6, 7)
    change = draw(6, 7, seed=1, scale=1e-5)
    p = t.softmax(-1)
    centred = change - (p * change).sum(-1, keepdim=True)
    factor = 0.25 if kl == "jsd" else 1.0
    right = factor * (p * centred**2).sum(-1) / 2, factor * p * centred
    for version in VERSIONS:
        values = values_of(version, t + change, t, kl)
        gradient = gradient_of(version, t + change, t, t.new_ones(6), kl)
        torch.testing.assert_close(values, right[0], rtol=1e-3, atol=1e-15)
        torch.testing.assert_close(gradient, right[1], rtol=1e-3, atol=1e-9)


def test_jsd_is_symmetric_and_at_most_log_2():
    s, t = draw(50, 7, scale=5), draw(50, 7, seed=1, scale=5)
    apart = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    for version in VERSIONS:
        values = values_of(version, s, t, "jsd")
        close(values, values_of(version, t, s, "jsd"))
        assert 0 < values.min() and values.max() < math.log(2)
        largest = values_of(version, apart, apart.flip(1), "jsd").item()
        assert largest == pytest.approx(math.log(2), rel=1e-12)


@every_kl
def test_a_number_added_to_all_logits_or_another_order_of_tokens_changes_nothing(kl):
    """Both are normalised inside, so log-probabilities may be given."""
    s, t, weight = draw(6, 7), draw(6, 7, seed=1), draw(6, seed=2)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for version in VERSIONS:
        values = values_of(version, s, t, kl)
        gradient = gradient_of(version, s, t, weight, kl)
        for a, b in ((s + 100, t), (s, t - 100), (s, t.log_softmax(-1))):
            close(values_of(version, a, b, kl), values)
            close(gradient_of(version, a, b, weight, kl), gradient)
        moved = s[:, order], t[:, order]
        close(values_of(version, *moved, kl), values)
        close(gradient_of(version, *moved, weight, kl), gradient[:, order])
        assert (values_of(version, moved[0], t, kl) - values).abs().min() > 1e-3


@every_kl
def test_logits_far_from_the_teacher_s_but_equal_in_shape_lose_no_digits(kl):
    """A near teacher whose logits all stand 100 higher, in float32."""
    s = draw(4, 4096, dtype=torch.float32)
    t = s + 0.1 * draw(4, 4096, seed=1, dtype=torch.float32) + 100
    assert (fused_kl(s, t, kl) - by_torch(s, t, kl)).abs().max() < 1e-5
    gradient = gradient_of(fused_kl, s, t, s.new_ones(4), kl)
    right = gradient_of(kl_reference, s.double(), t.double(), 1, kl)
    assert (gradient - right).norm() < 1e-4 * right.norm()


@every_kl
def test_no_rows_give_no_values_and_an_empty_gradient(kl):
    for shape in ((0, 7), (2, 0, 7)):
        s = torch.zeros(shape, requires_grad=True)
        values = fused_kl(s, torch.zeros(shape), kl)
        assert values.shape == shape[:-1]
        values.sum().backward()
        assert s.grad.shape == shape
    student, teacher, weight = make_pair(N=0)
    loss = fused_linear_kl(student, teacher, weight, kl)
    dh, dW = slopes(loss, student)
    assert loss == 0 and dh.shape == (0, 3) and not dW.any()


@every_kl
def test_logits_of_ten_thousand_stay_finite(kl):
    for version, dtype in itertools.product(VERSIONS, (torch.float32, torch.float64)):
        s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
        t = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
        right = {"forward": 2e4, "reverse": 2e4, "jsd": math.log(2)}[kl]
        assert values_of(version, s, t, kl).item() == pytest.approx(right, rel=1e-6)
        gradient = gradient_of(version, s, t, s.new_ones(1), kl)
        right = {"forward": [[1.0, -1.0, 0.0]]}.get(kl, [[0.0, 0.0, 0.0]])
        close(gradient, torch.tensor(right, dtype=dtype), 1e-6)


def test_teacher_probabilities_that_underflow_keep_their_logarithm():
    """In float32 exp(-200) is 0, and the log of that is infinite."""
    s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -200.0]])
    forward, reverse = by_torch(s, t, "forward"), by_torch(s, t, "reverse")
    assert reverse.item() > 99
    for version in VERSIONS:
        close(values_of(version, s, t, "forward").double(), forward, 1e-6)
        close(values_of(version, s, t, "reverse").double(), reverse, 1e-6)
        close(values_of(version, t, s, "forward").double(), reverse, 1e-6)


@every_kl
def test_padded_vocabulary_of_minus_infinity_adds_nothing(kl):
    """A token that neither model can take counts as if it were absent."""
    s, t = draw(4, 5), draw(4, 5, seed=1)
    pads = torch.full((4, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat((s, pads), 1), torch.cat((t, pads), 1)
    for version in DENSE:
        close(version(*padded, kl), by_torch(s, t, kl))
        gradient = gradient_of(version, *padded, s.new_ones(4), kl)
        close(gradient[:, :5], gradient_of(version, s, t, s.new_ones(4), kl))
        assert torch.equal(gradient[:, 5:], torch.zeros(4, 2, dtype=torch.float64))


@every_kl
def test_bfloat16_logits_are_summed_in_float32(kl):
    """Near-equal models differ by less than bfloat16 can tell."""
    t = draw(6, 257, dtype=torch.bfloat16)
    s = (t + draw(6, 257, seed=1, scale=0.05)).bfloat16()
    for version in DENSE:
        close(version(s, t, kl).double(), by_torch(s, t, kl), 1e-5)


@every_kl
def test_no_gradient_reaches_the_teacher_not_even_one_that_asks_for_it(kl):
    weight = torch.ones(4, dtype=torch.float64)
    for version in VERSIONS:
        s, t = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
        loss_of(version, s, t, weight, kl).backward()
        assert s.grad.abs().max() > 0.01 and t.grad is None
    student, teacher, weight = make_pair()
    teacher.hidden.requires_grad_()
    teacher.head.requires_grad_()
    fused_linear_kl(student, teacher, weight, kl).backward()
    assert teacher.hidden.grad is None and teacher.head.grad is None


@every_kl
def test_inputs_are_not_modified(kl):
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), draw(4, seed=2)
    student, teacher, weights = make_pair(temperature=0.7)
    tokens = torch.arange(11) % 7
    inputs = [s, t, weight, *student[:2], *teacher[:2], weights, tokens]
    before = [x.clone() for x in inputs]
    for version in VERSIONS:
        gradient_of(version, s, t, weight, kl)
        values_of(version, s, t, kl)
    fused_linear_kl(student, teacher, weights, kl).backward()
    fused_linear_nll(student, tokens, weights).backward()
    kl_stats(student, teacher, weights)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# ---- From hidden states, a chunk of rows at a time ---------------------------------


@every_kl
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_gradcheck_of_hidden_states_and_head(kl, temperature):
    student, teacher, weight = make_pair(temperature=temperature)
    tokens = torch.arange(11) % 7

    def loss(hidden, head):
        logits = LazyLogits(hidden, head, temperature)
        kl_loss = fused_linear_kl(logits, teacher, weight, kl)
        return kl_loss, fused_linear_nll(logits, tokens, weight)

    assert torch.autograd.gradcheck(loss, (student.hidden, student.head))


@every_kl
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_fused_linear_kl_equals_the_dense_formula(kl, temperature, monkeypatch):
    """Its loss is the weighted sum; hidden states and head get all of the gradient, and
    the factor from upstream; for chunks of any size, the last is often smaller."""
    student, teacher, weight = make_pair(temperature=temperature)
    rows = by_torch(dense(student), dense(teacher), kl)
    right = (weight * rows).sum()
    gradients = slopes(right, student)
    for size in (None, 1, 2, 3, 10, 11, 16):
        if size:
            cut_chunks(monkeypatch, size)
        loss = fused_linear_kl(student, teacher, weight, kl)
        close(loss, right)
        close(slopes(loss, student), gradients)
        close(kl_of_rows(student, teacher, kl), rows.detach())
        tripled = 3 * fused_linear_kl(student, teacher, weight, kl)
        close(slopes(tripled, student), tuple(3 * x for x in gradients))


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_fused_linear_nll_equals_the_log_likelihood(temperature, monkeypatch):
    """In value by plain loops, in gradients by autograd of the dense formula, and with
    the factor from upstream; for chunks of any size."""
    student, _, weight = make_pair(temperature=temperature)
    tokens = torch.arange(11) * 3 % 7
    log_p = dense(student).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    gradients = slopes(-(weight * log_p).sum(), student)
    on_paper = 0.0
    for row, token, w in zip(dense(student).tolist(), tokens, weight, strict=True):
        on_paper -= w.item() * oracles.log_softmax(row)[token]
    for size in (None, 1, 2, 3, 10, 11, 16):
        if size:
            cut_chunks(monkeypatch, size)
        loss = fused_linear_nll(student, tokens, weight)
        assert loss.shape == () and loss.item() == pytest.approx(on_paper, rel=1e-12)
        close(slopes(loss, student), gradients)
        tripled = 3 * fused_linear_nll(student, tokens, weight)
        close(slopes(tripled, student), tuple(3 * x for x in gradients))


def test_no_rows_give_a_log_likelihood_of_zero():
    student, _, weight = make_pair(N=0)
    loss = fused_linear_nll(student, torch.zeros(0, dtype=torch.int64), weight)
    dh, dW = slopes(loss, student)
    assert loss == 0 and dh.shape == (0, 3) and dW.shape == (7, 3) and not dW.any()


@pytest.mark.parametrize("loss_name", ("nll", *KLS))
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_bfloat16_hidden_states_become_float32_logits(loss_name, temperature):
    """Hidden states are rounded, what comes after them is not: not the product with the
    head, and not the division by the temperature."""
    student, teacher, weight = make_pair(N=9, V=33, temperature=temperature)
    hidden = (4 * student.hidden.detach()).bfloat16()
    head = student.head.detach().float()
    student = LazyLogits(hidden.requires_grad_(), head.requires_grad_(), temperature)
    teacher = LazyLogits(teacher.hidden.bfloat16(), teacher.head.float(), temperature)
    weight, tokens = weight.float(), torch.arange(9)
    exact = LazyLogits(*(x.detach().double() for x in student[:2]), temperature)
    exact.hidden.requires_grad_()
    exact.head.requires_grad_()
    if loss_name == "nll":
        loss = fused_linear_nll(student, tokens, weight)
        right = -dense(exact).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    else:
        loss = fused_linear_kl(student, teacher, weight, loss_name)
        right = by_torch(dense(exact), dense(teacher), loss_name)
    right = (weight.double() * right).sum()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    (dh, dW), (right_dh, right_dW) = slopes(loss, student), slopes(right, exact)
    assert dh.dtype == torch.bfloat16 and dW.dtype == torch.float32
    assert (dW - right_dW).norm() < 1e-5 * right_dW.norm()
    assert (dh - right_dh).norm() < 4e-3 * right_dh.norm()  # the gradient is rounded


@every_kl
def test_losses_are_the_same_without_gradients(kl):
    student, teacher, weight = make_pair()
    tokens = torch.arange(11) % 7
    with torch.no_grad():
        losses = (
            fused_linear_kl(student, teacher, weight, kl),
            fused_linear_nll(student, tokens, weight),
            fused_kl(dense(student), dense(teacher), kl),
        )
    assert not any(loss.requires_grad for loss in losses)
    assert not kl_of_rows(student, teacher, kl).requires_grad
    close(losses[0], fused_linear_kl(student, teacher, weight, kl).detach())
    close(losses[1], fused_linear_nll(student, tokens, weight).detach())
    close(losses[2], fused_kl(dense(student), dense(teacher), kl).detach())


def test_chunks_hold_each_row_once_and_bound_the_memory():
    """At the vocabularies of our world, of GPT-2 and of Qwen2.5."""
    for V, N in itertools.product((512, 50_304, 151_936, 2**24), (0, 1, 1024, 5000)):
        logits = LazyLogits(torch.empty(N, 1), torch.empty(V, 1, device="meta"))
        chunks = logits.chunks()
        assert [i for pair in chunks for i in range(*pair)] == list(range(N))
        assert all(j - i == 1 or (j - i) * V <= 2**23 for i, j in chunks)


def test_nothing_as_large_as_all_logits_is_ever_made(monkeypatch):
    """At 7 rows of 140,001 tokens, two rows at a time: no tensor is larger than a chunk
    or than the head, forward or backward. The formula makes them whole."""
    N, V, C, chunk = 7, 140_001, 2, 2
    cut_chunks(monkeypatch, chunk)
    student, teacher = make_lazy(N, C, V), make_lazy(N, C, V, 2, temperature=0.7)
    student.hidden.requires_grad_()
    student.head.requires_grad_()
    weight, tokens = torch.ones(N, dtype=torch.float64), torch.arange(N)
    sizes = dict(vocab_size=V, n_embd=2, n_head=1, n_kv_head=1, n_layer=1)
    p, q = (make_model(seed, **sizes) for seed in (0, 1))
    prompts, response = pad([[5, 6], [7]]), torch.arange(8).view(2, 4)
    mask = torch.arange(4) < torch.tensor([[4], [3]])
    work = {
        "nll": lambda: fused_linear_nll(student, tokens, weight).backward(),
        **{
            kl: lambda kl=kl: fused_linear_kl(student, teacher, weight, kl).backward()
            for kl in KLS
        },
        "rows": lambda: kl_of_rows(student, teacher),
        "entropy": lambda: entropy(student, weight),
        "stats": lambda: kl_stats(student, teacher, weight),
        "models": lambda: kl_models(p, prompts, q, prompts, response, mask),
    }
    for name, run in work.items():
        with LargestTensor() as seen:
            run()
        assert 0 < seen.numel <= chunk * V, (name, seen.shape, seen.operation)
    with LargestTensor() as seen:
        kl_reference(dense(student), dense(teacher))
    assert seen.numel == N * V, "else the counting shows nothing"


@every_kl
@pytest.mark.parametrize("V", (40_001, 150_001))
def test_rows_are_right_in_every_block_of_the_kernel(kl, V):
    """2^17 // V is 3 rows, and 0 rows, which has to become 1."""
    s, t = draw(5, V), draw(5, V, seed=1)
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    right = by_torch(s, t, kl)
    gradient = gradient_of(kl_reference, s, t, weight, kl)
    value = kl_rows(s, t, weight, kl)
    close(value, torch.where(weight == 0, 0, right))
    close(s, gradient, 1e-12)


@every_kl
def test_row_of_weight_zero_is_exactly_zero_whatever_it_holds(kl):
    """By choice, not by a product, which would be NaN."""
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    off = weight == 0
    clean_s, clean_t = draw(6, 7), draw(6, 7, seed=1)
    clean_value = kl_rows(clean_s, clean_t, weight, kl)
    for bad in (math.inf, -math.inf, math.nan):
        s, t = draw(6, 7), draw(6, 7, seed=1)
        s[1], s[3, 2], t[4] = bad, bad, bad
        value = kl_rows(s, t, weight, kl)
        assert torch.equal(value[off], torch.zeros(3, dtype=torch.float64))
        assert torch.equal(s[off], torch.zeros(3, 7, dtype=torch.float64))
        assert torch.equal(value, clean_value)
        assert torch.equal(s, clean_s)
        assert value[~off].min() > 0.01


@every_kl
def test_rows_of_weight_zero_change_neither_loss_nor_gradient(kl):
    """As if they were absent."""
    student, teacher, weight = make_pair()
    on = torch.tensor([i % 3 != 1 for i in range(11)])
    weight = torch.where(on, weight, 0)
    loss = fused_linear_kl(student, teacher, weight, kl)
    dh, dW = slopes(loss, student)
    fewer = [x._replace(hidden=x.hidden[on]) for x in (student, teacher)]
    right = fused_linear_kl(*fewer, weight[on], kl)
    right_dh, right_dW = slopes(right, student)
    close((loss, dh, dW), (right, right_dh, right_dW))
    assert torch.equal(dh[~on], torch.zeros_like(dh[~on]))
    assert dh[on].abs().sum(-1).min() > 0


# ---- What would be silently wrong is refused ----------------------------------------


def test_other_names_are_refused():
    s, t, one = draw(2, 3), draw(2, 3, seed=1), torch.ones(2).double()
    for kl in ("Forward", "kl", "", None):
        for version in VERSIONS:
            with pytest.raises(ValueError, match="forward.*reverse.*jsd"):
                values_of(version, s, t, kl)
        with pytest.raises(ValueError, match="forward.*reverse.*jsd"):
            kl_rows(s, t, one, kl)


@pytest.mark.parametrize("kernel", ("torch", "triton"))
@pytest.mark.parametrize("shapes", (((3, 64), (3, 72)), ((3, 64), (1, 64))))
def test_shapes_of_student_and_teacher_that_differ_are_refused(
    shapes, kernel, monkeypatch
):
    """A vocabulary that is longer in one, or one row for all: it would be broadcast, or
    read beyond its end by the kernel of a GPU (here in Triton's interpreter)."""
    if kernel == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(model_py, "kl_rows_torch", model_py.kl_rows_triton)
    for s, t in (shapes, shapes[::-1]):
        s, t = draw(*s, dtype=torch.float32), draw(*t, seed=1, dtype=torch.float32)
        weight = torch.ones(len(s))
        for run in (
            lambda s=s, t=t: kl_reference(s, t),
            lambda s=s, t=t: fused_kl(s, t),
            lambda s=s, t=t, w=weight: fused_linear_kl(lazy(s), lazy(t), w),
            lambda s=s, t=t: kl_of_rows(lazy(s), lazy(t)),
            lambda s=s, t=t, w=weight: kl_stats(lazy(s), lazy(t), w),
            lambda s=s, t=t, w=weight: kl_rows(s, t, w, "forward"),
        ):
            with pytest.raises(ValueError, match="student .*teacher .*differ in shape"):
                run()


def test_weights_and_tokens_that_fit_no_rows_are_refused():
    """One weight for all rows would be broadcast within a chunk, what is behind the
    last row left out; values of the dtype of a mask would be cut to whole numbers."""
    student, teacher, weight = make_pair()
    tokens = torch.arange(11) % 7
    for wrong in (weight[:1], weight[:10], weight.sum(), torch.cat((weight, weight)),
                  weight[:, None], weight > 0.5, weight.long()):  # fmt: skip
        for run in (
            lambda w=wrong: fused_linear_kl(student, teacher, w),
            lambda w=wrong: fused_linear_nll(student, tokens, w),
            lambda w=wrong: entropy(student, w),
            lambda w=wrong: kl_stats(student, teacher, w),
        ):
            with pytest.raises(ValueError, match="one float for each of 11 rows"):
                run()
        with pytest.raises(AssertionError):
            kl_rows(draw(11, 7), draw(11, 7, seed=1), wrong, "forward")
    for wrong in (tokens[:10], tokens[:1], torch.cat((tokens, tokens))):
        with pytest.raises(AssertionError):
            fused_linear_nll(student, wrong, weight)


# ---- Estimators of the gradient ----------------------------------------------------


def test_equation_2_as_printed_is_not_the_gradient():
    """Sum_v log(p_s/p_t)(v) * gradient of log p_s(v), without p_s(v)."""
    s, t = draw(7), draw(7, seed=1)
    ratio = s.log_softmax(-1) - t.log_softmax(-1)
    terms = ratio[:, None] * gradients_of_log_p(s)
    printed, weighted = terms.sum(0), (s.softmax(-1)[:, None] * terms).sum(0)
    for version in VERSIONS:
        gradient = gradient_of(version, s[None], t[None], s.new_ones(1), "reverse")[0]
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
    one = s.new_ones(1)
    for version in VERSIONS:
        close(gradient_of(version, s[None], t[None], one, "reverse")[0], reverse)
        close(gradient_of(version, s[None], t[None], one, "forward")[0], forward)


# A language of three tokens and three steps. A model is a table: the logits (3) after
# each of the 13 prefixes of at most two tokens.

PREFIXES = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
SEQUENCES = list(itertools.product(range(3), repeat=3))


def places(sequence):
    """The rows of a table from which the three tokens are predicted."""
    return [PREFIXES.index(sequence[:t]) for t in range(3)]


def log_probability(table, sequence):
    rows = [oracles.softmax(table[i]) for i in places(sequence)]
    return sum(math.log(p[y]) for p, y in zip(rows, sequence, strict=True))


def sequence_kl(student, teacher):
    """KL(student || teacher) of whole sequences, by enumeration, on lists of lists."""
    total = 0.0
    for y in SEQUENCES:
        log_s, log_t = log_probability(student, y), log_probability(teacher, y)
        total += math.exp(log_s) * (log_s - log_t)
    return total


def numeric_gradient(student, teacher, step=1e-5):
    student = [list(row) for row in student]
    gradient = torch.zeros(13, 3, dtype=torch.float64)
    for i, v in itertools.product(range(13), range(3)):
        x = student[i][v]
        student[i][v] = x + step
        above = sequence_kl(student, teacher)
        student[i][v] = x - step
        below = sequence_kl(student, teacher)
        student[i][v] = x
        gradient[i, v] = (above - below) / (2 * step)
    return gradient


def expected_gradient(surrogate, student, teacher):
    """The gradient over the student's table of a surrogate loss of one sequence, on
    average over all sequences, each as likely as the student makes it."""
    table, total = student.clone().requires_grad_(), 0.0
    for y in SEQUENCES:
        p = math.exp(log_probability(student.tolist(), y))
        total = total + p * surrogate(table, teacher, y)
    return torch.autograd.grad(total, table)[0]


@pytest.mark.parametrize("version", DENSE)
def test_sum_of_token_kls_has_a_partial_gradient_and_rao_blackwell_the_true_one(
    version,
):
    """What y_t does to later tokens is not in the analytic gradient;
    the second term of the Rao-Blackwell estimator puts it back."""
    student, teacher = draw(13, 3, scale=1), draw(13, 3, seed=1, scale=1)

    def log_tokens(table, y):
        return table[places(y)].log_softmax(-1)[[0, 1, 2], list(y)]  # (3,)

    def token(table, teacher, y):
        with torch.no_grad():
            ratio = log_tokens(table, y) - log_tokens(teacher, y)
        return (ratio * log_tokens(table, y)).sum()

    def analytic(table, teacher, y):
        return version(table[places(y)], teacher[places(y)], "reverse").sum()

    def rao_blackwell(table, teacher, y):
        with torch.no_grad():
            k = version(table[places(y)], teacher[places(y)], "reverse")
        later = k.sum() - k.cumsum(0)  # the sum over t > i
        return analytic(table, teacher, y) + (log_tokens(table, y) * later).sum()

    true = numeric_gradient(student.tolist(), teacher.tolist())
    partial = expected_gradient(analytic, student, teacher)
    close(expected_gradient(token, student, teacher), partial)
    close(expected_gradient(rao_blackwell, student, teacher), true, 1e-8)
    assert (partial - true).norm() > 0.05 * true.norm()
    assert F.cosine_similarity(partial.flatten(), true.flatten(), dim=0) > 0.8


# ---- What is watched ---------------------------------------------------------------


def test_stats_are_weighted_sums_over_rows():
    """Of the distributions at the temperature, in several chunks."""
    student, teacher, weight = make_pair(temperature=0.7)
    stats = kl_stats(student, teacher, weight)
    right = {"kl_student_teacher": 0.0, "student_entropy": 0.0, "teacher_entropy": 0.0}
    both = dense(student).tolist(), dense(teacher).tolist()
    for s, t, w in zip(*both, weight.tolist(), strict=True):
        right["kl_student_teacher"] += w * oracles.divergence(s, t, "reverse")
        right["student_entropy"] += w * oracles.entropy(s)
        right["teacher_entropy"] += w * oracles.entropy(t)
    assert stats.keys() == right.keys()
    for key, value in stats.items():
        assert value.item() == pytest.approx(right[key], rel=1e-12)
        assert not value.requires_grad
