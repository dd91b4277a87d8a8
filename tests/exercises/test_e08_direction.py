"""e08, the direction of the KL matters. Difficulty 3, 40 minutes, 6 points.

The truths are loops over the vocabulary in plain Python floats (oracles.py), and a toy
in which the best of many students is searched for, with no gradient at all.
"""

import functools
import math

import oracles
import torch
from kit import by_row, compare, unchanged

FLOAT64 = True
KLS = ("forward", "reverse", "jsd")
NAME = {
    "forward": "KL(teacher || student)",
    "reverse": "KL(student || teacher)",
    "jsd": "the Jensen-Shannon divergence",
}


def draw(rng, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=rng)


def kl_of(impl, student, teacher, *kl):
    values = impl.model.kl_reference(student, teacher, *kl)
    assert torch.is_tensor(values), f"the result is a {type(values).__name__}"
    if student.dtype == torch.float64:
        assert values.dtype == torch.float64, (
            f"float64 logits give {values.dtype} values: they should stay float64"
        )
    return values


def log_mean(log_p, log_q):
    """log (p + q) / 2 of two lists; where both round to 0, too."""
    return [
        max(a, b) + math.log1p(math.exp(-abs(a - b))) - math.log(2)
        for a, b in zip(log_p, log_q, strict=True)
    ]


def truth_of_log_p(s, t, kl):
    m = log_mean(s, t)
    return {
        "forward": lambda: oracles.kl_of_log_p(t, s),
        "reverse": lambda: oracles.kl_of_log_p(s, t),
        "jsd": lambda: oracles.kl_of_log_p(t, m) / 2 + oracles.kl_of_log_p(s, m) / 2,
    }[kl]()


def truth_of(student, teacher, kl):
    return by_row(lambda s, t: truth_of_log_p(s, t, kl), student, teacher)


def total(term):
    """A value of two rows: the sum over the vocabulary of term(log p_s, log p_t)."""
    return lambda s, t: math.fsum(term(a, b) for a, b in zip(s, t, strict=True))


exp = math.exp
KL = oracles.kl_of_log_p
DIRECTED = {  # what usual mistakes give for "forward"; for "reverse" s and t swapped
    "yours equals {other}: which of the two is in front of the ||? (F.kl_div(a, b) "
    "has b in front)": lambda s, t: KL(s, t),
    "yours is the negative of {own}": lambda s, t: -KL(t, s),
    "yours is a cross entropy: it lacks the entropy of the one in front of the ||":
        total(lambda a, b: -exp(b) * a),
    "yours lacks the probabilities as weights: it is a plain sum over the vocabulary":
        total(lambda a, b: b - a),
    "yours weighs the right difference by the wrong one's probabilities":
        total(lambda a, b: exp(a) * (b - a)),
    "yours is the mean over the vocabulary, it should be a sum":
        lambda s, t: KL(t, s) / len(s),
    "yours is the Jensen-Shannon divergence": lambda s, t: truth_of_log_p(s, t, "jsd"),
}  # fmt: skip
JSD = {
    "yours equals KL(teacher || student)": lambda s, t: KL(t, s),
    "yours equals KL(student || teacher)": lambda s, t: KL(s, t),
    "yours is the mean of the two KLs: each of them is to be taken against the mixture "
    "m, not against the other": lambda s, t: (KL(s, t) + KL(t, s)) / 2,
    "yours is the sum of both halves: each of them weighs 1/2":
        lambda s, t: 2 * truth_of_log_p(s, t, "jsd"),
    "the mixture of yours is the mean of the logarithms: m = (p_s + p_t) / 2 is a mean "
    "of probabilities": lambda s, t: (KL(s, t) + KL(t, s)) / 4,
    "the mixture of yours is p_s + p_t: it lacks the 1/2, and its sum is 2":
        lambda s, t: truth_of_log_p(s, t, "jsd") - math.log(2),
    "yours has KL(teacher || m) and no KL(student || m)":
        lambda s, t: KL(t, log_mean(s, t)) / 2,
    "yours has KL(student || m) and no KL(teacher || m)":
        lambda s, t: KL(s, log_mean(s, t)) / 2,
    "yours has the mixture in front of the ||: it is KL(. || m)": lambda s, t: (
        KL(log_mean(s, t), s) + KL(log_mean(s, t), t)) / 2,
    "yours is the square root of the divergence":
        lambda s, t: math.sqrt(truth_of_log_p(s, t, "jsd")),
    "the mixture of yours is the softmax of the mean of the logits, not the mean of "
    "the probabilities":
        lambda s, t: (KL(s, geometric(s, t)) + KL(t, geometric(s, t))) / 2,
}  # fmt: skip


def geometric(s, t):
    return oracles.log_softmax([(a + b) / 2 for a, b in zip(s, t, strict=True)])


def mistakes(student, teacher, kl):
    return functools.partial(values_of_mistakes, student, teacher, kl)


def values_of_mistakes(student, teacher, kl):
    if kl == "jsd":
        found = {
            text: by_row(value, student, teacher) for text, value in JSD.items()
        }
    else:
        swap = kl == "reverse"
        other = "forward" if swap else "reverse"
        pair = (teacher, student) if swap else (student, teacher)
        found = {
            text.format(own=NAME[kl], other=NAME[other]): by_row(value, *pair)
            for text, value in DIRECTED.items()
        }
    raw = (student, teacher)
    raw = {
        "forward": (raw[1].softmax(-1) * (raw[1] - raw[0])).sum(-1),
        "reverse": (raw[0].softmax(-1) * (raw[0] - raw[1])).sum(-1),
    }
    if kl in raw:
        found["yours takes logits for log-probabilities: a log_softmax is missing"] = (
            raw[kl]
        )
    return {f"kl {kl!r}: {text}": value for text, value in found.items()}


def test_the_numbers_by_hand(impl):
    """Student [.5, .5], teacher [.9, .1]: forward 0.36806, reverse 0.51083."""
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    by_hand = {
        "forward": 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
        "reverse": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
        "jsd": 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
        + 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)),
    }
    for kl, truth in by_hand.items():
        compare(kl_of(impl, student, teacher, kl), torch.tensor(truth),
                mistakes(student, teacher, kl), f"kl {kl!r} by hand")  # fmt: skip


def test_rows_of_any_logits_in_any_shape(impl, rng):
    for shape in ((7,), (3, 7), (2, 3, 7)):
        student, teacher = draw(rng, *shape), draw(rng, *shape)
        for kl in KLS:
            compare(kl_of(impl, student, teacher, kl), truth_of(student, teacher, kl),
                    mistakes(student, teacher, kl),
                    f"kl {kl!r} of logits {shape}")  # fmt: skip


def test_forward_is_meant_if_nothing_is_said(impl, rng):
    student, teacher = draw(rng, 7), draw(rng, 7)
    compare(kl_of(impl, student, teacher), truth_of(student, teacher, "forward"),
            mistakes(student, teacher, "forward"), "without a kl")  # fmt: skip


def test_jsd_is_symmetric_and_at_most_log_2(impl, rng):
    student, teacher = draw(rng, 20, 7, scale=6), draw(rng, 20, 7, scale=6)
    one = kl_of(impl, student, teacher, "jsd")
    other = kl_of(impl, teacher, student, "jsd")
    compare(one, other, what="the JSD, with student and teacher exchanged,")
    assert one.min() > 0 and one.max() <= math.log(2), (
        f"the JSD is between 0 and log 2 = {math.log(2):.4f}; yours goes from "
        f"{one.min().item():.4f} to {one.max().item():.4f}"
    )


def test_the_gradient_of_the_student(impl, rng):
    student, teacher = draw(rng, 4, 7), draw(rng, 4, 7)
    weight = torch.rand(4, generator=rng) + 0.5
    for kl in KLS:
        s = student.clone().requires_grad_()
        values = kl_of(impl, s, teacher, kl)
        assert values.requires_grad, f"kl {kl!r}: no gradient reaches student_logits"
        (grad,) = torch.autograd.grad((weight * values).sum(), s, allow_unused=True)
        assert grad is not None, f"kl {kl!r}: no gradient reaches student_logits"
        truths = {
            name: weight[:, None] * torch.tensor([
                oracles.divergence_gradient(*rows, name)
                for rows in zip(student.tolist(), teacher.tolist(), strict=True)
            ])
            for name in KLS
        }  # fmt: skip
        p, log_p = student.softmax(-1), student.log_softmax(-1)
        log_t = teacher.log_softmax(-1)
        compare(grad, truths[kl], {
            f"kl {kl!r}: the gradient of yours is 0: something is detached that the "
            "student has to move": torch.zeros_like(grad),
            **{
                f"kl {kl!r}: the gradient of yours is that of {NAME[name]}": value
                for name, value in truths.items() if name != kl
            },
            f"kl {kl!r}: the gradient of yours has the opposite sign": -truths[kl],
            f"kl {kl!r}: the gradient of yours lacks that of the softmax":
                weight[:, None] * p * (log_p - log_t),
        }, f"the gradient of kl {kl!r}")  # fmt: skip


def test_the_teacher_gets_no_gradient(impl, rng):
    for kl in KLS:
        student, teacher = draw(rng, 3, 7), draw(rng, 3, 7).requires_grad_()
        student.requires_grad_()
        values = kl_of(impl, student, teacher, kl)
        assert values.requires_grad, f"kl {kl!r}: no gradient reaches student_logits"
        (grad,) = torch.autograd.grad(values.sum(), teacher, allow_unused=True)
        assert grad is None or not grad.any(), (
            f"kl {kl!r}: the teacher gets a gradient: it would be pulled towards the "
            "student. Compute its log-probabilities under no_grad, or detach them"
        )


def test_large_logits_stay_finite(impl, rng):
    student, teacher = draw(rng, 4, 7, scale=1e4), draw(rng, 4, 7, scale=1e4)
    for kl in KLS:
        s = student.clone().requires_grad_()
        values = kl_of(impl, s, teacher, kl)
        assert values.isfinite().all(), (
            f"kl {kl!r}: the result is not finite for logits of 1e4: log(softmax(x)) "
            "is log(0) where a probability rounds to 0; log_softmax(x) is not. A "
            "mixture is added by logaddexp"
        )
        truth = truth_of(student, teacher, kl)
        small = (values >= 0) & (values < truth / 10 - 1e-9)
        assert kl == "jsd" or not small.any(), (
            f"kl {kl!r} is {values.tolist()} for logits of 1e4, it should be "
            f"{truth.tolist()}: is something added to the probabilities, or clamped, "
            "before the logarithm?"
        )
        compare(values, truth, what=f"kl {kl!r} of logits of 1e4")
        (grad,) = torch.autograd.grad(values.sum(), s)
        assert grad.isfinite().all(), (
            f"kl {kl!r}: the gradient is not finite for logits of 1e4"
        )


def test_a_token_that_neither_can_say_adds_nothing(impl, rng):
    """Rows of a padded vocabulary have the logit -inf in both."""
    student, teacher = draw(rng, 3, 5), draw(rng, 3, 5)
    padded = [torch.cat((x, torch.full((3, 2), -math.inf)), -1)
              for x in (student, teacher)]  # fmt: skip
    for kl in KLS:
        s = padded[0].clone().requires_grad_()
        values = kl_of(impl, s, padded[1], kl)
        assert not values.isnan().any(), (
            f"kl {kl!r}: the result is nan where a logit is -inf in both: 0 * (-inf "
            "- -inf) is nan. Keep the logarithms above some large negative number, "
            "such as LOG_ZERO"
        )
        compare(values, truth_of(student, teacher, kl),
                what=f"kl {kl!r} with tokens that neither can say")  # fmt: skip
        (grad,) = torch.autograd.grad(values.sum(), s)
        assert not grad.isnan().any(), (
            f"kl {kl!r}: the gradient is nan where a logit is -inf in both"
        )
        own = student.clone().requires_grad_()
        (truth,) = torch.autograd.grad(kl_of(impl, own, teacher, kl).sum(), own)
        compare(grad[:, :5], truth, what=f"the gradient of kl {kl!r} beside them")
        assert not grad[:, 5:].any(), (
            f"kl {kl!r}: a logit of -inf gets a gradient, {grad[:, 5:].tolist()}"
        )


def test_bfloat16_logits_are_computed_in_float32(impl, rng):
    student, teacher = draw(rng, 4, 7).bfloat16(), draw(rng, 4, 7).bfloat16()
    for kl in KLS:
        values = kl_of(impl, student, teacher, kl)
        assert values.dtype in (torch.float32, torch.float64), (
            f"kl {kl!r} of bfloat16 logits is {values.dtype}: two or three digits are "
            "left. Turn the logits into float32 first"
        )
        truth = truth_of(student.double(), teacher.double(), kl)
        compare(values, truth, {
            f"kl {kl!r} of bfloat16 logits has two or three digits only: turn the "
            "logits into float32 before the softmax, not the result":
                values if not torch.allclose(values.double(), truth, 1e-5, 1e-5)
                and torch.allclose(values.double(), truth, 0.1, 0.1) else truth,
        }, f"kl {kl!r} of bfloat16 logits", tolerance=1e-5)  # fmt: skip


def test_shapes_that_differ_and_unknown_names_are_refused(impl, rng):
    student = draw(rng, 3, 7)
    for teacher, kl, what in (
        (draw(rng, 1, 7), "forward", "a teacher of one row for a student of three"),
        (draw(rng, 3, 7), "backward", 'kl "backward"'),
    ):
        try:
            values = impl.model.kl_reference(student, teacher, kl)
        except (AssertionError, ValueError):
            continue
        raise AssertionError(
            f"{what} gives {tuple(values.shape)} values: an assert should refuse it"
        )


def test_what_it_is_given_stays_as_it_is(impl, rng):
    student, teacher = draw(rng, 2, 7), draw(rng, 2, 7)
    student[:, -1] = teacher[:, -1] = -math.inf
    for kl in KLS:
        with unchanged(f"kl {kl!r}", student_logits=student, teacher_logits=teacher):
            kl_of(impl, student, teacher, kl)


def test_reverse_picks_one_of_two_peaks_and_forward_covers_both(impl, rng):
    """A teacher with two peaks, and students that have one each, of any place and
    width: which of them is nearest?"""
    V, share = 41, 0.5 + 0.15 * torch.rand((), generator=rng)
    place = torch.arange(V, dtype=torch.float64)
    peak = [torch.softmax(-((place - c) ** 2) / 8, -1) for c in (10, 30)]
    teacher = (share * peak[0] + (1 - share) * peak[1]).log()
    width = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 15.0])
    students = -((place - place[:, None, None]) ** 2) / (2 * width[:, None] ** 2)
    students = students.reshape(-1, V)
    mass = {}
    for kl in ("forward", "reverse"):
        values = kl_of(impl, students, teacher.expand_as(students), kl)
        nearest = students[values.argmin()].softmax(-1)
        mass[kl] = max(nearest[:20].sum().item(), nearest[21:].sum().item())
    assert mass["reverse"] > 0.9, (
        f"the student nearest by \"reverse\" has {mass['reverse']:.0%} in its larger "
        "half: KL(student || teacher) is large where only the student has a "
        "probability, so it should pick one peak. Are the directions exchanged?"
    )
    assert mass["forward"] < 0.7, (
        f"the student nearest by \"forward\" has {mass['forward']:.0%} in its larger "
        "half: KL(teacher || student) is large where only the teacher has a "
        "probability, so it should cover both peaks. Are the directions exchanged?"
    )
