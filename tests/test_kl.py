"""The divergences and their gradients, beside plain loops, enumeration and F.kl_div.

Everywhere the student comes first and the teacher second, s and t are their logits,
p_s and p_t their probabilities. F.kl_div(log b, log a, log_target=True) is KL(a || b).
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from model import (
    KLS,
    FusedLinearKL,
    entropy,
    fused_kl,
    fused_linear_kl,
    kl_reference,
    kl_rows,
    kl_stats,
)

VERSIONS = (kl_reference, fused_kl, fused_linear_kl)
every_version = pytest.mark.parametrize("version", VERSIONS)
every_kl = pytest.mark.parametrize("kl", KLS)


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def values_of(version, s, t, kl):
    """The divergence of each row of logits; with a head of ones on the diagonal, the
    states of fused_linear_kl are logits."""
    if version is not fused_linear_kl:
        return version(s, t, kl)
    head = torch.eye(s.size(-1), dtype=s.dtype)
    return fused_linear_kl(s, head, t, head, s.new_ones(len(s)), kl)[1]


def loss_of(version, s, t, weight, kl):
    if version is not fused_linear_kl:
        return (weight * version(s, t, kl)).sum()
    head = torch.eye(s.size(-1), dtype=s.dtype)
    return fused_linear_kl(s, head, t, head, weight, kl)[0]


def gradient_of(version, s, t, weight, kl):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss_of(version, s, t, weight, kl), s)[0]


def values_by_torch(s, t, kl):
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


def softmax_by_hand(logits):
    powers = [math.exp(x) for x in logits]
    return [power / sum(powers) for power in powers]


def kl_by_hand(p, q):
    """KL(p || q) of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def value_by_hand(s, t, kl):
    p_s, p_t = softmax_by_hand(s), softmax_by_hand(t)
    m = [(a + b) / 2 for a, b in zip(p_s, p_t, strict=True)]
    return {
        "forward": kl_by_hand(p_t, p_s),
        "reverse": kl_by_hand(p_s, p_t),
        "jsd": kl_by_hand(p_t, m) / 2 + kl_by_hand(p_s, m) / 2,
    }[kl]


def gradient_by_hand(s, t, kl):
    """The closed forms, over the student's logits, one token after the other."""
    gradient = []
    p_s, p_t = softmax_by_hand(s), softmax_by_hand(t)
    m = [(a + b) / 2 for a, b in zip(p_s, p_t, strict=True)]
    for a, b, c in zip(p_s, p_t, m, strict=True):
        if kl == "forward":
            gradient.append(a - b)
        elif kl == "reverse":
            gradient.append(a * (math.log(a / b) - kl_by_hand(p_s, p_t)))
        else:
            gradient.append(0.5 * a * (math.log(a / c) - kl_by_hand(p_s, m)))
    return gradient


def gradients_of_log_p(s):
    """Row v: the gradient of log p_s(v) over the logits s (V,), by autograd."""
    s = s.clone().requires_grad_()
    log_p = s.log_softmax(-1)
    rows = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in log_p]
    return torch.stack(rows)


def states_and_heads(N=11, C=3, V=7, teacher_C=4):
    h, W = draw(N, C, seed=1, scale=1), draw(V, C, seed=2, scale=1)
    teacher = draw(N, teacher_C, seed=3, scale=1), draw(V, teacher_C, seed=4, scale=1)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(5)).double()
    return h.requires_grad_(), W.requires_grad_(), *teacher, weight


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Values ------------------------------------------------------------------------


@every_version
def test_argument_order_gives_the_two_numbers(version):
    """Invariant 1: student [.5, .5], teacher [.9, .1]; swapped, they change places."""
    s = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    t = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    assert values_of(version, s, t, "forward").item() == pytest.approx(0.36806, 1e-4)
    assert values_of(version, s, t, "reverse").item() == pytest.approx(0.51083, 1e-4)
    assert values_of(version, t, s, "forward").item() == pytest.approx(0.51083, 1e-4)
    assert values_of(version, t, s, "reverse").item() == pytest.approx(0.36806, 1e-4)


@every_version
@every_kl
@pytest.mark.parametrize("V", (2, 5, 7, 33, 257))
def test_values_equal_those_of_torch(version, kl, V):
    """Invariant 2."""
    s, t = draw(6, V), draw(6, V, seed=1)
    close(values_of(version, s, t, kl), values_by_torch(s, t, kl))
    s, t = s.float(), t.float()
    close(values_of(version, s, t, kl).double(), values_by_torch(s, t, kl), 1e-5)


@every_version
@every_kl
def test_values_equal_a_plain_loop(version, kl):
    """Invariant 2."""
    s, t = draw(4, 5), draw(4, 5, seed=1)
    values = values_of(version, s, t, kl).tolist()
    for i in range(4):
        by_hand = value_by_hand(s[i].tolist(), t[i].tolist(), kl)
        assert values[i] == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
@every_kl
def test_any_leading_shape_and_layout_will_do(version, kl):
    s, t = draw(2, 3, 5), draw(5, 3, 2, seed=1).transpose(0, 2)
    values = version(s, t, kl)
    close(values, values_by_torch(s, t, kl))
    s.requires_grad_()
    version(s, t, kl).sum().backward()
    by_hand = gradient_by_hand(s[1, 2].tolist(), t[1, 2].tolist(), kl)
    close(s.grad[1, 2], torch.tensor(by_hand, dtype=torch.float64))


@every_version
@every_kl
def test_kl_of_equal_is_zero_and_of_different_is_not(version, kl):
    """Invariant 10: no setting gives 0 for different distributions."""
    s, t = draw(6, 7), draw(6, 7, seed=1)
    weight = s.new_ones(6)
    assert values_of(version, s, s.clone(), kl).abs().max() < 1e-14
    assert gradient_of(version, s, s.clone(), weight, kl).abs().max() < 1e-14
    assert values_of(version, s, t, kl).min() > 0.01


@every_version
@every_kl
def test_near_equal_distributions_follow_the_second_order(version, kl):
    """Invariants 2, 3: both KLs tend to half the variance of the difference of the
    logits, the JSD to an eighth; the gradients to p times the centred difference."""
    t = draw(6, 7)
    change = draw(6, 7, seed=1, scale=1e-5)
    p = t.softmax(-1)
    centred = change - (p * change).sum(-1, keepdim=True)
    factor = 0.25 if kl == "jsd" else 1.0
    values = values_of(version, t + change, t, kl)
    gradient = gradient_of(version, t + change, t, t.new_ones(6), kl)
    torch.testing.assert_close(
        values, factor * (p * centred**2).sum(-1) / 2, rtol=1e-3, atol=1e-15
    )
    torch.testing.assert_close(gradient, factor * p * centred, rtol=1e-3, atol=1e-9)


@every_version
@every_kl
def test_order_of_the_vocabulary_does_not_matter(version, kl):
    s, t, weight = draw(6, 7), draw(6, 7, seed=1), draw(6, seed=2)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    close(
        values_of(version, s[:, order], t[:, order], kl), values_of(version, s, t, kl)
    )
    gradient = gradient_of(version, s, t, weight, kl)
    close(
        gradient_of(version, s[:, order], t[:, order], weight, kl), gradient[:, order]
    )
    moved = values_of(version, s[:, order], t, kl) - values_of(version, s, t, kl)
    assert moved.abs().min() > 1e-3


@every_version
def test_jsd_is_symmetric_and_at_most_log_2(version):
    """Invariant 10."""
    s, t = draw(50, 7, scale=5), draw(50, 7, seed=1, scale=5)
    values = values_of(version, s, t, "jsd")
    close(values, values_of(version, t, s, "jsd"))
    assert values.min() > 0
    assert values.max() < math.log(2)
    apart = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    assert values_of(version, apart, apart.flip(1), "jsd").item() == pytest.approx(
        math.log(2), rel=1e-12
    )


@every_version
@every_kl
def test_adding_a_number_to_all_logits_changes_nothing(version, kl):
    """Invariants 6, 12: both are normalised inside; log-probabilities may be given."""
    s, t, weight = draw(6, 7), draw(6, 7, seed=1), draw(6, seed=2)
    values = values_of(version, s, t, kl)
    gradient = gradient_of(version, s, t, weight, kl)
    for a, b in ((s + 100, t), (s, t - 100), (s, t.log_softmax(-1))):
        close(values_of(version, a, b, kl), values)
        close(gradient_of(version, a, b, weight, kl), gradient)


@every_kl
def test_logits_far_from_the_teacher_s_but_equal_in_shape_lose_no_digits(kl):
    """A near teacher whose logits all stand 100 higher, in float32."""
    s = draw(4, 4096, dtype=torch.float32).requires_grad_()
    t = s.detach() + 0.1 * draw(4, 4096, seed=1, dtype=torch.float32) + 100
    values = fused_kl(s, t, kl)
    assert (values - values_by_torch(s, t, kl)).abs().max() < 1e-5
    values.sum().backward()
    right = s.detach().double().requires_grad_()
    kl_reference(right, t.double(), kl).sum().backward()
    assert (s.grad - right.grad).norm() < 1e-4 * right.grad.norm()


@every_kl
@pytest.mark.parametrize("shape", ((0, 7), (2, 0, 7)))
def test_no_rows_give_no_values_and_an_empty_gradient(kl, shape):
    s = torch.zeros(shape, requires_grad=True)
    values = fused_kl(s, torch.zeros(shape), kl)
    assert values.shape == shape[:-1]
    values.sum().backward()
    assert s.grad.shape == shape


@every_version
@every_kl
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_logits_of_ten_thousand_stay_finite(version, kl, dtype):
    """Invariant 6."""
    s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    t = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    expected = {"forward": 2e4, "reverse": 2e4, "jsd": math.log(2)}[kl]
    assert values_of(version, s, t, kl).item() == pytest.approx(expected, rel=1e-6)
    gradient = gradient_of(version, s, t, s.new_ones(1), kl)
    expected = {"forward": [[1.0, -1.0, 0.0]]}.get(kl, [[0.0, 0.0, 0.0]])
    close(gradient, torch.tensor(expected, dtype=dtype), 1e-6)


@every_version
def test_teacher_probabilities_that_underflow_keep_their_logarithm(version):
    """Invariant 12: in float32 exp(-200) is 0, and the log of that is infinite."""
    s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -200.0]])
    forward = values_by_torch(s, t, "forward")
    reverse = values_by_torch(s, t, "reverse")
    assert reverse.item() > 99
    close(values_of(version, s, t, "forward").double(), forward, 1e-6)
    close(values_of(version, s, t, "reverse").double(), reverse, 1e-6)
    assert values_of(version, t, s, "forward").item() == pytest.approx(reverse.item())


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
@every_kl
def test_padded_vocabulary_of_minus_infinity_adds_nothing(version, kl):
    """Invariant 6: a place that neither model can take counts as if it were absent."""
    s, t = draw(4, 5), draw(4, 5, seed=1)
    pads = torch.full((4, 2), -math.inf, dtype=torch.float64)
    padded_s, padded_t = torch.cat((s, pads), 1), torch.cat((t, pads), 1)
    close(version(padded_s, padded_t, kl), values_by_torch(s, t, kl))
    gradient = gradient_of(version, padded_s, padded_t, s.new_ones(4), kl)
    close(gradient[:, :5], gradient_of(version, s, t, s.new_ones(4), kl))
    assert torch.equal(gradient[:, 5:], torch.zeros(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
@every_kl
def test_bfloat16_logits_are_summed_in_float32(version, kl):
    """Invariant 6: near-equal models differ by less than bfloat16 can tell."""
    t = draw(6, 257, dtype=torch.bfloat16)
    s = (t + draw(6, 257, seed=1, scale=0.05)).bfloat16()
    close(version(s, t, kl).double(), values_by_torch(s, t, kl), 1e-5)


@every_kl
def test_bfloat16_states_become_float32_logits(kl):
    """Invariant 6: the states are rounded, what comes after them is not."""
    h, W, teacher_h, teacher_W, weight = states_and_heads(N=9, C=16, V=33)
    h, teacher_h = h.detach().bfloat16().requires_grad_(), teacher_h.bfloat16()
    W = W.detach().float().requires_grad_()
    teacher_W, weight = teacher_W.float(), weight.float()
    loss, values = fused_linear_kl(h, W, teacher_h, teacher_W, weight, kl)
    loss.backward()
    s = (h.double() @ W.double().T).detach()
    t = teacher_h.double() @ teacher_W.double().T
    close(values.double(), values_by_torch(s, t, kl), 1e-5)
    ds = gradient_of(kl_reference, s, t, weight.double(), kl)
    assert h.grad.dtype == torch.bfloat16
    assert W.grad.dtype == torch.float32
    close(W.grad.double(), ds.T @ h.detach().double(), 1e-5)
    close(h.grad.double(), ds @ W.detach().double(), 1e-2)


# ---- Gradients ---------------------------------------------------------------------


@every_version
@every_kl
def test_gradient_equals_the_closed_form(version, kl):
    """Invariant 3."""
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), draw(4, seed=2)
    gradient = gradient_of(version, s, t, weight, kl)
    for i in range(4):
        by_hand = gradient_by_hand(s[i].tolist(), t[i].tolist(), kl)
        close(gradient[i] / weight[i], torch.tensor(by_hand, dtype=torch.float64))


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
@every_kl
def test_gradcheck_of_logits(version, kl):
    """Invariant 3."""
    s, t = draw(3, 5).requires_grad_(), draw(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: version(s, t, kl), s)


@every_kl
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_gradcheck_of_states_and_head(kl, temperature):
    """Invariant 3, with the temperature where the trainer has it."""
    h, W, teacher_h, teacher_W, weight = states_and_heads()

    def loss(h, W):
        teacher = teacher_h / temperature, teacher_W
        return fused_linear_kl(h / temperature, W, *teacher, weight, kl)[0]

    assert torch.autograd.gradcheck(loss, (h, W))


@every_version
@every_kl
def test_temperature_divides_the_gradient(version, kl):
    """Invariant 3: no factor but 1/temperature."""
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), torch.ones(4, dtype=torch.float64)
    scaled = s.clone().requires_grad_()
    loss_of(version, scaled / 0.5, t / 0.5, weight, kl).backward()
    for i in range(4):
        by_hand = gradient_by_hand((s[i] / 0.5).tolist(), (t[i] / 0.5).tolist(), kl)
        close(scaled.grad[i], torch.tensor(by_hand, dtype=torch.float64) / 0.5)


@every_kl
def test_fused_linear_kl_equals_the_dense_formula(kl):
    """Invariants 2, 3: the loss is the weighted sum; the head and states get all."""
    h, W, teacher_h, teacher_W, weight = states_and_heads()
    loss, values = fused_linear_kl(h, W, teacher_h, teacher_W, weight, kl)
    dense = values_by_torch(h @ W.T, teacher_h @ teacher_W.T, kl)
    close(values, dense.detach())
    close(loss, (weight * dense).sum())
    assert not values.requires_grad
    fused = torch.autograd.grad(loss, (h, W))
    close(fused, torch.autograd.grad((weight * dense).sum(), (h, W)))


@every_version
@every_kl
def test_gradient_is_multiplied_by_the_factor_from_upstream(version, kl):
    """Invariant 3."""
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), draw(4, seed=2)
    tripled = s.clone().requires_grad_()
    (3 * loss_of(version, tripled, t, weight, kl)).backward()
    close(tripled.grad, 3 * gradient_of(version, s, t, weight, kl))
    h, W, *rest = states_and_heads()
    once = torch.autograd.grad(fused_linear_kl(h, W, *rest, kl)[0], (h, W))
    thrice = torch.autograd.grad(3 * fused_linear_kl(h, W, *rest, kl)[0], (h, W))
    close(thrice, tuple(3 * x for x in once))


@every_version
@every_kl
def test_no_gradient_reaches_the_teacher(version, kl):
    """Not even one who asks for it."""
    s, t = draw(4, 5).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    loss_of(version, s, t, torch.ones(4, dtype=torch.float64), kl).backward()
    assert s.grad.abs().max() > 0.01
    assert t.grad is None
    h, W, teacher_h, teacher_W, weight = states_and_heads()
    teacher_h.requires_grad_()
    teacher_W.requires_grad_()
    fused_linear_kl(h, W, teacher_h, teacher_W, weight, kl)[0].backward()
    assert teacher_h.grad is None
    assert teacher_W.grad is None


@every_version
@every_kl
def test_inputs_are_not_modified(version, kl):
    s, t, weight = draw(4, 5), draw(4, 5, seed=1), draw(4, seed=2)
    before = s.clone(), t.clone(), weight.clone()
    gradient_of(version, s, t, weight, kl)
    values_of(version, s, t, kl)
    s.requires_grad_()
    loss_of(version, s, t, weight, kl).backward()
    assert all(torch.equal(a, b) for a, b in zip((s, t, weight), before, strict=True))
    tensors = states_and_heads()
    before = [x.clone() for x in tensors]
    fused_linear_kl(*tensors, kl)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@every_kl
def test_values_are_the_same_without_gradients(kl):
    s, t = draw(4, 5).requires_grad_(), draw(4, 5, seed=1)
    tensors = states_and_heads()
    with torch.no_grad():
        values = fused_kl(s, t, kl)
        loss, rows = fused_linear_kl(*tensors, kl)
    assert not (values.requires_grad or loss.requires_grad or rows.requires_grad)
    close(values, fused_kl(s, t, kl).detach())
    close(loss, fused_linear_kl(*tensors, kl)[0].detach())
    close(rows, fused_linear_kl(*tensors, kl)[1])


@every_version
@pytest.mark.parametrize("kl", ("Forward", "kl", "", None))
def test_other_names_are_refused(version, kl):
    with pytest.raises(ValueError, match="forward.*reverse.*jsd"):
        values_of(version, draw(2, 3), draw(2, 3, seed=1), kl)


# ---- Chunks, blocks and masked rows ------------------------------------------------


@every_kl
@pytest.mark.parametrize("chunk", (1, 2, 3, 10, 11, 16))
def test_size_of_the_chunks_changes_nothing(kl, chunk):
    """Invariant 4: 11 rows; the last chunk is often a smaller one."""
    h, W, teacher_h, teacher_W, weight = states_and_heads(N=11)
    loss, values = FusedLinearKL.apply(
        h, W, teacher_h, teacher_W, weight, kl, chunk, True
    )
    dense = values_by_torch(h @ W.T, teacher_h @ teacher_W.T, kl)
    close(loss, (weight * dense).sum())
    close(values, dense.detach())
    gradients = torch.autograd.grad(loss, (h, W))
    close(gradients, torch.autograd.grad((weight * dense).sum(), (h, W)))


@every_kl
@pytest.mark.parametrize("V", (40_001, 150_001))
def test_rows_are_right_in_every_block_of_the_kernel(kl, V):
    """Invariant 4: 2^17 // V is 3 rows, and 0 rows, which has to become 1."""
    s, t = draw(5, V), draw(5, V, seed=1)
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    expected = values_by_torch(s, t, kl)
    gradient = gradient_of(kl_reference, s, t, weight, kl)
    value = kl_rows(s, t, weight, kl)
    close(value, torch.where(weight == 0, 0, expected))
    close(s, gradient, 1e-12)


@every_kl
@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
def test_row_of_weight_zero_is_exactly_zero_whatever_it_holds(kl, bad):
    """Invariant 5: by choice, not by a product, which would be NaN."""
    s, t = draw(6, 7), draw(6, 7, seed=1)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    clean_s = s.clone()
    clean_value = kl_rows(clean_s, t.clone(), weight, kl)
    s[1], s[3, 2], t[4] = bad, bad, bad
    value = kl_rows(s, t, weight, kl)
    off = weight == 0
    assert torch.equal(value[off], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(s[off], torch.zeros(3, 7, dtype=torch.float64))
    assert torch.equal(value, clean_value)
    assert torch.equal(s, clean_s)
    assert value[~off].min() > 0.01


@every_kl
def test_masked_rows_change_neither_loss_nor_gradient(kl):
    """Invariant 5: as if they were absent."""
    h, W, teacher_h, teacher_W, weight = states_and_heads(N=11)
    on = torch.tensor([i % 3 != 1 for i in range(11)])
    weight = torch.where(on, weight, 0)
    loss, values = fused_linear_kl(h, W, teacher_h, teacher_W, weight, kl)
    dh, dW = torch.autograd.grad(loss, (h, W))
    fewer, _ = fused_linear_kl(h[on], W, teacher_h[on], teacher_W, weight[on], kl)
    fewer_dh, fewer_dW = torch.autograd.grad(fewer, (h, W))
    close(loss, fewer)
    close((dh, dW), (fewer_dh, fewer_dW))
    assert torch.equal(dh[~on], torch.zeros_like(dh[~on]))
    assert torch.equal(values[~on], torch.zeros_like(values[~on]))
    assert dh[on].abs().sum(-1).min() > 0


# ---- Estimators of the gradient ----------------------------------------------------


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
def test_equation_2_as_printed_is_not_the_gradient(version):
    """Invariant 7: sum_v log(p_s/p_t)(v) * gradient of log p_s(v), without p_s(v)."""
    s, t = draw(7), draw(7, seed=1)
    ratio = s.log_softmax(-1) - t.log_softmax(-1)
    terms = ratio[:, None] * gradients_of_log_p(s)
    gradient = gradient_of(version, s[None], t[None], s.new_ones(1), "reverse")[0]
    close((s.softmax(-1)[:, None] * terms).sum(0), gradient)
    printed = terms.sum(0)
    assert (printed - gradient).norm() > gradient.norm()
    assert F.cosine_similarity(printed, gradient, dim=0) < 0.9


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
def test_expected_sampled_gradient_is_the_analytic_one(version):
    """Invariant 8: over v ~ student for reverse, over v ~ teacher for forward."""
    s, t = draw(5), draw(5, seed=1)
    scores = gradients_of_log_p(s)
    p_s, p_t = softmax_by_hand(s.tolist()), softmax_by_hand(t.tolist())
    reverse, forward = torch.zeros_like(s), torch.zeros_like(s)
    for v in range(5):
        reverse += p_s[v] * math.log(p_s[v] / p_t[v]) * scores[v]
        forward -= p_t[v] * scores[v]
    one = s.new_ones(1)
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
    rows = [softmax_by_hand(table[i]) for i in places(sequence)]
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


@pytest.mark.parametrize("version", (kl_reference, fused_kl))
def test_sum_of_token_kls_has_a_partial_gradient_and_rao_blackwell_the_true_one(
    version,
):
    """Invariants 8, 9: what y_t does to later tokens is not in the analytic gradient;
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
    h, W, teacher_h, teacher_W, weight = states_and_heads()
    stats = kl_stats(h, W, teacher_h, teacher_W, weight)
    s, t = (h @ W.T).tolist(), (teacher_h @ teacher_W.T).tolist()
    kl, student_entropy, teacher_entropy = 0.0, 0.0, 0.0
    for i, w in enumerate(weight.tolist()):
        p_s, p_t = softmax_by_hand(s[i]), softmax_by_hand(t[i])
        kl += w * kl_by_hand(p_s, p_t)
        student_entropy -= w * sum(p * math.log(p) for p in p_s)
        teacher_entropy -= w * sum(p * math.log(p) for p in p_t)
    assert stats["kl_student_teacher"].item() == pytest.approx(kl)
    assert stats["student_entropy"].item() == pytest.approx(student_entropy)
    assert stats["teacher_entropy"].item() == pytest.approx(teacher_entropy)
    assert entropy(h, W, weight).item() == pytest.approx(student_entropy)
