"""e01, log-softmax: shift, dimension, -inf, gradient. Difficulty 1, 15 min, 3 points.

The truth is oracles.log_softmax: Python floats, math.fsum, one row after the other.
"""

import math

import oracles
import torch
from kit import compare, is_close, unchanged


def draw(rng, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=rng, dtype=torch.float64)


def truth(x):
    rows = [oracles.log_softmax(row) for row in x.reshape(-1, x.size(-1)).tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


def mistakes(x):
    p = truth(x).exp()
    right = truth(x)
    return {
        "yours is minus the logarithm: a minus sign too many": -right,
        "yours are the probabilities, not their logarithms": p,
        "yours divides by the mean of exp, not by its sum":
            right + math.log(x.size(-1)),
        "yours has a small number added to the sum: log-softmax needs none":
            right - (1 + 1e-6 / (x - x.amax(-1, keepdim=True)).exp()
                     .sum(-1, keepdim=True)).log(),
    }  # fmt: skip


def test_one_row_of_logits(impl, rng):
    x = draw(rng, 7)
    compare(impl.extra.log_softmax(x.clone()), truth(x), mistakes(x), "log_softmax(x)",
            1e-12)  # fmt: skip


def test_each_row_of_a_batch_is_normalized_by_itself(impl, rng):
    x = draw(rng, 2, 3, 5)
    y = impl.extra.log_softmax(x.clone())
    sums = [y.exp().sum()] + [y.exp().sum(d) for d in (0, 1)]
    for total in sums:
        assert not is_close(total, torch.ones_like(total), 1e-9), (
            "your probabilities sum to 1 over another dimension than the last"
        )
    compare(y, truth(x), mistakes(x),
            "log_softmax of (2, 3, 5)", 1e-12)  # fmt: skip


def test_it_has_the_dtype_of_its_argument(impl, rng):
    for dtype in (torch.float32, torch.float64):
        x = draw(rng, 4, 6).to(dtype)
        y = impl.extra.log_softmax(x.clone())
        assert y.dtype == dtype, f"the dtype of the result is {y.dtype}, of x {dtype}"
        compare(y.double(), truth(x.double()), what="its values", tolerance=1e-6)


def test_its_argument_stays_as_it_is(impl, rng):
    x = draw(rng, 3, 4)
    with unchanged("log_softmax", x=x):
        impl.extra.log_softmax(x)


def test_large_logits_give_finite_numbers(impl, rng):
    x = draw(rng, 4, 7)
    for at in (1e4, -1e4):
        y = impl.extra.log_softmax(x + at)
        assert y.isfinite().all(), (
            f"with logits near {at:g} yours gives {y[0, 0].item()}: exp overflows, or "
            "all of its values round to 0. Which number can be subtracted first?"
        )
        compare(y, truth(x + at), what=f"with logits near {at:g}", tolerance=1e-11)


def test_a_small_probability_has_a_finite_logarithm(impl, rng):
    x = torch.tensor([0.0, 2000.0 + 100 * float(torch.rand((), generator=rng)), 1.0])
    y = impl.extra.log_softmax(x.double())
    assert y.isfinite().all(), (
        f"of logits {x.tolist()} yours gives {y.tolist()}: the logarithm of a "
        "probability that has rounded to 0"
    )
    compare(y, truth(x.double()), what="of small probabilities", tolerance=1e-12)


def test_rows_far_apart_do_not_meet(impl, rng):
    x = draw(rng, 2, 5) + torch.tensor([[0.0], [3000.0]])
    y = impl.extra.log_softmax(x)
    shifts = impl.extra.log_softmax(x[1:]).isfinite().all()
    assert y.isfinite().all(), "one row is 3000 above the other, and yours is not " + (
        "finite: is it the largest logit of all rows that you subtract? Each row has "
        "its own" if shifts else "finite: nothing is subtracted from the rows"
    )
    compare(y, truth(x), what="of rows far apart", tolerance=1e-11)


def test_a_logit_of_minus_infinity_is_a_probability_of_zero(impl, rng):
    x = draw(rng, 3, 6)
    without = truth(torch.cat((x[:, :2], x[:, 3:]), 1))
    x[:, 2] = -math.inf
    y = impl.extra.log_softmax(x)
    assert not y.isnan().any(), "a logit of -inf makes NaN: -inf - (-inf)?"
    assert (y[:, 2] == -math.inf).all(), (
        f"where a logit is -inf yours gives {y[0, 2].item()}, it should be -inf"
    )
    kept = torch.cat((y[:, :2], y[:, 3:]), 1)
    compare(kept, without, what="beside a logit of -inf", tolerance=1e-12)


def test_the_gradient_is_one_minus_the_probabilities(impl, rng):
    x = draw(rng, 2, 5).requires_grad_()
    y = impl.extra.log_softmax(x)
    assert y.requires_grad, "no gradient flows: is something detached, or a list?"
    weight = draw(rng, 2, 5)
    (gradient,) = torch.autograd.grad((weight * y).sum(), x)
    p = truth(x.detach()).exp()
    right = weight - p * weight.sum(-1, keepdim=True)
    compare(gradient, right, {
        "the gradient leaves the sum of exp out: is it detached?": weight,
    }, "the gradient", 1e-11)  # fmt: skip
