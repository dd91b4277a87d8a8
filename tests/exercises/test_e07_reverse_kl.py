"""e07, reverse KL over the whole vocabulary. Difficulty 2, 30 minutes, 5 points.

The truth is a loop over tokens and over the vocabulary, in plain Python floats.
"""

import functools
import math

import oracles
import torch
from kit import by_row, compare, mean, one_number, unchanged

FLOAT64 = True
V = 7


def setting(rng, lengths, scale=2.0, size=V):
    """Logits (B, R, V) of student and teacher, and a mask (B, R) of these lengths."""
    B, R = len(lengths), max(1, *lengths)
    student = scale * torch.randn(B, R, size, generator=rng)
    teacher = scale * torch.randn(B, R, size, generator=rng)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    return student, teacher, mask


def reverse(s, t):
    """KL(student || teacher) of two rows of log-probabilities."""
    return oracles.kl_of_log_p(s, t)


def pairs(s, t):
    return list(zip(s, t, strict=True))


ONE_TOKEN = {  # what usual mistakes give at one token, from log-probabilities
    "yours equals KL(teacher || student): are the arguments swapped? (F.kl_div(a, b) "
    "has the second one in front of the ||)": lambda s, t: reverse(t, s),
    "yours is the negative of KL(student || teacher)": lambda s, t: -reverse(s, t),
    "yours lacks the weight p: it is the sum of log p_student - log p_teacher over the "
    "vocabulary, as Eq. 2 is printed, not their mean under the student":
        lambda s, t: math.fsum(a - b for a, b in pairs(s, t)),
    "yours weighs log p_student - log p_teacher by the teacher's probabilities, not by "
    "the student's":
        lambda s, t: math.fsum(math.exp(b) * (a - b) for a, b in pairs(s, t)),
    "yours is the mean over the vocabulary: it is a sum, divided by V once too often":
        lambda s, t: reverse(s, t) / len(s),
    "yours is the cross entropy -sum p_student log p_teacher: it lacks the student's "
    "own entropy": lambda s, t: -math.fsum(math.exp(a) * b for a, b in pairs(s, t)),
    "yours drops the terms that are below 0: only their sum cannot be negative":
        lambda s, t: math.fsum(max(0.0, math.exp(a) * (a - b)) for a, b in pairs(s, t)),
    "yours adds up absolute values: terms below 0 belong to the sum":
        lambda s, t: math.fsum(abs(math.exp(a) * (a - b)) for a, b in pairs(s, t)),
    "yours is in bits (log2), it should be in nats":
        lambda s, t: reverse(s, t) / math.log(2),
    "yours is the Jensen-Shannon divergence, which compares both with their mean":
        lambda s, t: reverse(s, oracles.mixture(s, t)) / 2
        + reverse(t, oracles.mixture(s, t)) / 2,
}  # fmt: skip


def truth_of(student, teacher, mask):
    return mean(by_row(reverse, student, teacher), mask)


def mistakes(student, teacher, mask):
    return functools.partial(values_of_mistakes, student, teacher, mask)


def values_of_mistakes(student, teacher, mask):
    found = {
        message: mean(by_row(value, student, teacher), mask)
        for message, value in ONE_TOKEN.items()
    }
    right = by_row(reverse, student, teacher)
    raw = (student.softmax(-1) * (student - teacher)).sum(-1)
    wrong_axis = [x.log_softmax(1) for x in (student, teacher)]
    wrong_axis = (wrong_axis[0].exp() * (wrong_axis[0] - wrong_axis[1])).sum(-1)
    n = mask.sum(1).clamp(min=1)
    found |= {
        "yours counts the pads behind the response: where is the mask?":
            mean(right, torch.ones_like(mask)),
        "yours is the mean over all tokens of the batch: a long response then weighs "
        "more than a short one": (right * mask).sum() / mask.sum(),
        "yours is the sum over the tokens of a response, not their mean":
            (right * mask).sum() / len(mask),
        "yours is divided by R, the longest response, not by the tokens of each":
            (right * mask).mean(),
        "yours is the sum over the responses, not their mean: divide by B":
            mean(right, mask) * len(mask),
        "yours leaves the empty responses out of the mean: divide by B, all rows":
            mean(right, mask) * len(mask) / mask.any(1).sum(),
        "yours takes logits for log-probabilities: a log_softmax is missing":
            mean(raw, mask),
        "the softmax of yours is over the tokens, not over the vocabulary":
            mean(wrong_axis, mask),
        "yours masks before the mean over tokens and after it, too: divided twice":
            ((right * mask).sum(1) / n / n).mean(),
    }  # fmt: skip
    return found


def loss_of(impl, student, teacher, mask):
    return one_number(impl.extra.reverse_kl(student, teacher, mask))


def test_the_two_numbers_by_hand(impl):
    """Student [.5, .5], teacher [.9, .1]: 0.51083 nats; the other way round 0.36806."""
    student = torch.tensor([[[0.5, 0.5]]]).log()
    teacher = torch.tensor([[[0.9, 0.1]]]).log()
    mask = torch.tensor([[True]])
    truth = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    yours = loss_of(impl, student, teacher, mask)
    compare(yours, torch.tensor(truth), mistakes(student, teacher, mask),
            "KL of [.5, .5] and [.9, .1]")  # fmt: skip


def test_one_token_of_any_logits(impl, rng):
    args = setting(rng, [1])
    compare(loss_of(impl, *args), truth_of(*args), mistakes(*args), "KL of one token")


def test_each_response_of_a_ragged_batch_weighs_the_same(impl, rng):
    args = setting(rng, [3, 1, 5])
    compare(loss_of(impl, *args), truth_of(*args), mistakes(*args), "KL of the batch")


def test_tokens_at_the_front_and_in_the_middle_may_be_left_out(impl, rng):
    student, teacher, mask = setting(rng, [4, 5])
    mask[0, 0] = mask[1, 2] = False
    args = student, teacher, mask
    compare(loss_of(impl, *args), truth_of(*args), mistakes(*args),
            "KL with holes in the mask")  # fmt: skip


def test_a_response_of_which_nothing_counts_adds_zero(impl, rng):
    args = setting(rng, [3, 0, 2])
    yours = loss_of(impl, *args)
    assert yours.isfinite(), (
        f"the result is {yours.item()} when no token of a row counts: 0 / 0?"
    )
    compare(yours, truth_of(*args), mistakes(*args), "KL with an empty response")


def slopes(loss, student, what="student_logits"):
    assert loss.requires_grad, (
        f"no gradient reaches {what}: is something detached, or under no_grad?"
    )
    (grad,) = torch.autograd.grad(loss, student, allow_unused=True)
    assert grad is not None, f"no gradient reaches {what}: is something detached?"
    return grad


def gradient_by_hand(student, teacher, mask):
    """p * (log p - log q - KL) at each token that counts, times its weight."""
    grad = torch.zeros_like(student)
    for i, j in mask.nonzero().tolist():
        s = oracles.log_softmax(student[i, j].tolist())
        t = oracles.log_softmax(teacher[i, j].tolist())
        value, n = reverse(s, t), int(mask[i].sum()) * len(mask)
        row = [math.exp(a) * (a - b - value) / n for a, b in pairs(s, t)]
        grad[i, j] = torch.tensor(row)
    return grad


def test_the_gradient_of_the_student_is_that_of_the_kl(impl, rng):
    student, teacher, mask = setting(rng, [2, 4])
    truth = gradient_by_hand(student, teacher, mask)
    student.requires_grad_()
    grad = slopes(loss_of(impl, student, teacher, mask), student)

    def wrong():
        p = student.detach().softmax(-1)
        log_ratio = p.log() - teacher.log_softmax(-1)
        weight = (mask / mask.sum(1, keepdim=True) / len(mask))[..., None]
        own = weight * (p - p * p.sum(-1, keepdim=True))
        ones = torch.ones_like(p)
        return {
            "the gradient of yours is 0: with p detached, p * grad log p sums to 0 "
            "over the vocabulary. The gradient has to go through p, too": 0 * p,
            "the gradient of yours is that of the sum without the weight p":
                weight * (ones - p * ones.sum(-1, keepdim=True)),
            "the gradient of yours is that of KL(teacher || student): p_student - "
            "p_teacher": weight * (p - teacher.softmax(-1)),
            "the gradient of yours has the opposite sign": -truth,
            "the gradient of yours lacks that of the softmax": weight * p * log_ratio,
            "the gradient of yours is that of the entropy": own,
        }  # fmt: skip

    compare(grad, truth, wrong, "the gradient over student_logits")


def test_the_teacher_gets_no_gradient(impl, rng):
    student, teacher, mask = setting(rng, [2, 3])
    student.requires_grad_()
    teacher.requires_grad_()
    loss = loss_of(impl, student, teacher, mask)
    slopes(loss, student)
    loss = loss_of(impl, student, teacher, mask)
    (grad,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    assert grad is None or not grad.any(), (
        "the teacher gets a gradient: it would be pulled towards the student. Detach it"
    )


def test_large_logits_stay_finite(impl, rng):
    """Logits of 1e4: most probabilities are 0 in any dtype, no logarithm is."""
    student, teacher, mask = setting(rng, [2, 3], scale=1e4)
    truth = truth_of(student, teacher, mask)
    grad_truth = gradient_by_hand(student, teacher, mask)
    student.requires_grad_()
    loss = loss_of(impl, student, teacher, mask)
    assert loss.isfinite(), (
        f"the result is {loss.item()} for logits of 1e4: log(softmax(x)) is log(0) "
        "where a probability rounds to 0; log_softmax(x) is not. (torch.distributions "
        "makes probabilities of logits, which round to 0 in there)"
    )
    assert loss < 0 or loss > truth / 10 - 1e-9, (
        f"the result is {loss.item():.6g} for logits of 1e4, it should be "
        f"{truth.item():.6g}: is something added to the probabilities, or clamped, "
        "before the logarithm? Use log_softmax and nothing else"
    )
    compare(loss, truth, what="KL of logits of 1e4")
    grad = slopes(loss, student)
    assert grad.isfinite().all(), "the gradient is not finite for logits of 1e4"
    compare(grad, grad_truth, what="the gradient for logits of 1e4")


def test_what_stands_behind_the_mask_may_be_anything(impl, rng):
    student, teacher, mask = setting(rng, [1, 3])
    truth = truth_of(student, teacher, mask)
    grad_truth = gradient_by_hand(student, teacher, mask)
    for filler in (1e30, math.inf, math.nan):
        s = student.masked_fill(~mask[..., None], filler).requires_grad_()
        t = teacher.masked_fill(~mask[..., None], filler)
        loss = loss_of(impl, s, t, mask)
        assert loss.isfinite(), (
            f"the result is {loss.item()} where logits behind the mask are {filler}: "
            "0 * nan is nan, a product is no mask. Take the rows under the mask first"
        )
        compare(loss, truth, what=f"KL with {filler} behind the mask")
        grad = slopes(loss, s)
        assert grad.isfinite().all(), (
            f"the gradient is nan where logits behind the mask are {filler}: masking "
            "the values is too late for it. Take the rows under the mask first"
        )
        compare(grad, grad_truth, what=f"the gradient with {filler} behind the mask")


def test_float32_logits_will_do(impl, rng):
    student, teacher, mask = setting(rng, [2, 3])
    s, t = student.float(), teacher.float()
    yours = loss_of(impl, s, t, mask)
    # a float32 rounds by 6e-8; a row sums V terms of at most about 10
    compare(yours, truth_of(s, t, mask), what="KL of float32 logits", tolerance=1e-5)


def test_what_it_is_given_stays_as_it_is(impl, rng):
    student, teacher, mask = setting(rng, [1, 3])
    given = {"student_logits": student, "teacher_logits": teacher, "mask": mask}
    with unchanged("reverse_kl", **given):
        loss_of(impl, student, teacher, mask)
