"""e09, three estimators of one gradient. Difficulty 4, 60 minutes, 8 points.

The truths are closed forms, row after row, and a world of three tokens and responses of
three, in which every response can be written down: means are sums over all 27.
"""

import functools
import itertools
import math

import oracles
import torch
from kit import compare, is_close, unchanged

FLOAT64 = True
ESTIMATORS = ("token", "full", "rao_blackwell")
V = 5


def setting(rng, lengths, scale=1.5):
    """Logits (B, R, V) of both, tokens (B, R) and mask (B, R)."""
    B, R = len(lengths), max(lengths)
    student = scale * torch.randn(B, R, V, generator=rng)
    teacher = scale * torch.randn(B, R, V, generator=rng)
    tokens = torch.randint(V, (B, R), generator=rng)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    return student, teacher, tokens, mask


def surrogate(impl, student, teacher, tokens, mask, estimator):
    value = impl.extra.kl_surrogate(student, teacher, tokens, mask, estimator)
    assert torch.is_tensor(value) and value.shape == mask.shape[:1], (
        f"{estimator}: the result is one number for each response, ({len(mask)},); "
        f"yours is {tuple(value.shape) if torch.is_tensor(value) else value!r}"
    )
    assert value.requires_grad or not student.requires_grad, (
        f"{estimator}: no gradient reaches student_logits"
    )
    return value


def slopes(impl, student, teacher, tokens, mask, estimator, weight):
    """The gradient of the sum of weight * surrogate over student_logits (B, R, V)."""
    s = student.clone().requires_grad_()
    value = surrogate(impl, s, teacher, tokens, mask, estimator)
    (grad,) = torch.autograd.grad((weight * value).sum(), s, allow_unused=True)
    assert grad is not None, f"{estimator}: no gradient reaches student_logits"
    return grad


# ---- Closed forms --------------------------------------------------------------------


class Response:
    """What the gradients of one response are made of, each a list over its tokens."""

    def __init__(self, student, teacher, tokens, mask):
        self.rows, self.n, self.V = len(tokens), int(mask.sum()), student.size(-1)
        n = self.n
        self.log_p = [oracles.log_softmax(x) for x in student[:n].tolist()]
        self.log_q = [oracles.log_softmax(x) for x in teacher[:n].tolist()]
        both = list(zip(self.log_p, self.log_q, strict=True))
        self.k = [oracles.kl_of_log_p(p, q) for p, q in both]
        self.dk = [
            torch.tensor(oracles.divergence_gradient(p, q, "reverse")) for p, q in both
        ]
        y = tokens[:n].tolist()
        self.own = [p[v] for (p, _), v in zip(both, y, strict=True)]  # log p(y_t)
        self.ratio = [p[v] - q[v] for (p, q), v in zip(both, y, strict=True)]
        p = torch.tensor(self.log_p).exp()
        self.p = p
        self.q = torch.tensor(self.log_q).exp()
        self.d_own = list(torch.eye(self.V)[y] - p)  # of log p(y_t) over the logits
        self.later = [math.fsum(self.k[i + 1 :]) for i in range(n)]

    def whole(self, rows):
        """(R, V), with zeros behind the response."""
        grad = torch.zeros(self.rows, self.V)
        for t, row in enumerate(rows):
            grad[t] = row
        return grad

    def of(self, factors):
        """sum_t factor_t * d log p(y_t)."""
        return self.whole([f * d for f, d in zip(factors, self.d_own, strict=True)])

    def plain(self, factors):
        """sum_v factor_tv * d log p(v), for factors (n, V)."""
        return self.whole(factors - self.p * factors.sum(-1, keepdim=True))

    def truth(self, estimator):
        full = self.whole(self.dk)
        return {
            "token": lambda: self.of(self.ratio),
            "full": lambda: full,
            "rao_blackwell": lambda: full + self.of(self.later),
        }[estimator]()

    def mistakes(self, estimator):
        log_ratio = torch.tensor(self.log_p) - torch.tensor(self.log_q)
        to_go = [math.fsum(self.ratio[i:]) for i in range(self.n)]
        own_sum = list(itertools.accumulate(self.own, initial=0.0))[:-1]
        k3 = [1 - math.exp(-x) for x in self.ratio]
        k_from = [math.fsum(self.k[i:]) for i in range(self.n)]
        k_past = [math.fsum(self.k[:i]) for i in range(self.n)]
        sampled = [math.fsum(self.ratio[i + 1 :]) for i in range(self.n)]
        undetached = self.whole(
            [s * d for s, d in zip(own_sum, self.dk, strict=True)]
        )
        full, rest = self.whole(self.dk), self.of(self.later)
        yours = "the gradient of yours"
        printed = self.plain(log_ratio)
        common = {
            f"{yours} has the opposite sign: the KL is to fall, so it is no reward":
                -self.truth(estimator),
            f"{yours} is 0": 0 * full,
            f"{yours} is divided by the tokens of the response: a sum is asked for":
                self.truth(estimator) / self.n,
        }  # fmt: skip
        if estimator == "token":
            return common | {
                f"{yours} is that of log p - log q itself, d log p(y): its mean over y "
                "is 0. The log-ratio is a factor, without gradient, of log p(y)":
                    self.of([1.0] * self.n),
                f"{yours} goes through the factor, too: detach log p - log q":
                    self.of([a + b for a, b in zip(self.ratio, self.own, strict=True)]),
                f"{yours} is that of k3 = q/p - 1 - log(q/p): right as a value, but "
                "its gradient has another mean, that of KL(teacher || student)":
                    self.of(k3),
                f"{yours} has the factor p(y): y was drawn from p already": self.of(
                    [math.exp(a) * b for a, b in zip(self.own, self.ratio, strict=True)]
                ),
                f"{yours} counts the log-ratios of later tokens, too: that is an "
                "estimator of the whole sequence's KL, not this one": self.of(to_go),
                f"{yours} is that of estimator \"full\"": full,
                f"{yours} has log p(y) as its factor: where is the teacher?":
                    self.of(self.own),
            }  # fmt: skip
        shared = {
            f"{yours} is Eq. 2 as it is printed, without the weight p(v): "
            + effect(printed, full): printed,
            f"{yours} is that of KL(teacher || student)": self.whole(self.p - self.q),
            f"{yours} is that of estimator \"token\"": self.of(self.ratio),
        }  # fmt: skip
        if estimator == "full":
            return common | shared | {
                f"{yours} is that of estimator \"rao_blackwell\"": full + rest,
                f"{yours} is that of the cross entropy -sum p log q: it lacks log p":
                    self.plain(-self.p * torch.tensor(self.log_q)),
                f"{yours} has p(v) twice": self.plain(self.p**2 * log_ratio),
            }  # fmt: skip
        return common | {
            f"{yours} is that of estimator \"full\": the second term is missing, or "
            "has no gradient": full,
            f"{yours} is the second term alone: the sum of k_t is missing": rest,
            f"{yours} counts k_i of the token itself, too, t >= i: that adds noise and "
            "no bias. A token has an effect on what comes after it, t > i":
                full + self.of(k_from),
            f"{yours} counts the tokens before each token, t < i: it has no effect on "
            "them. Count those behind it, t > i": full + self.of(k_past),
            f"{yours} goes through the k_t of the second term: they are a factor, "
            "detach them": full + rest + undetached,
            f"{yours} has the sampled log-ratios in the second term, not the k_t: "
            "unbiased, but with more noise": full + self.of(sampled),
            f"{yours} has the second term with the wrong sign": full - rest,
            f"{yours} has the first term of estimator \"token\"":
                self.of(self.ratio) + rest,
            f"{yours} is Eq. 2 as it is printed, without the weight p(v), and the "
            "second term": printed + rest,
        }  # fmt: skip


def effect(wrong, right):
    """How far the one is from the other, in words."""
    length = (wrong.norm() / right.norm()).item()
    cosine = (wrong * right).sum() / wrong.norm() / right.norm()
    return (
        f"{length:.1f} times as long as the right one, cosine {cosine.item():.2f}. A "
        "token that is hardly ever sampled would count as much as the others"
    )


def check(impl, args, estimator, what):
    """Each response's gradient, with weights 1, 2, ... so that none is mixed up."""
    student, teacher, tokens, mask = args
    weight = torch.arange(1.0, len(mask) + 1)
    yours = slopes(impl, *args, estimator, weight) / weight[:, None, None]
    responses = [Response(*x) for x in zip(*args, strict=True)]
    truth = torch.stack([r.truth(estimator) for r in responses])

    def mistakes():
        found = [r.mistakes(estimator) for r in responses]
        # a text that holds numbers differs from response to response: take the first's
        return {
            f"{estimator}: {text}": torch.stack([list(m.values())[i] for m in found])
            for i, text in enumerate(found[0])
        } | {
            f"{estimator}: the gradient of yours counts the pads behind a response: "
            "where is the mask?": torch.stack([
                Response(s, t, y, torch.ones_like(m)).truth(estimator)
                for s, t, y, m in zip(*args, strict=True)
            ]),
        }  # fmt: skip

    compare(yours, truth, mistakes, f"{estimator}: the gradient over {what}")


def test_one_token(impl, rng):
    args = setting(rng, [1])
    for estimator in ESTIMATORS:
        check(impl, args, estimator, "the logits of one token")


def test_one_response(impl, rng):
    args = setting(rng, [4])
    for estimator in ESTIMATORS:
        check(impl, args, estimator, "the logits of one response")


def test_a_ragged_batch(impl, rng):
    args = setting(rng, [3, 1, 4])
    for estimator in ESTIMATORS:
        check(impl, args, estimator, "the logits of a ragged batch")


# ---- Enumeration ---------------------------------------------------------------------


@functools.cache
def world():
    """All 27 responses (27, 3) of three tokens, and the row of the tables (13 prefixes)
    that predicts each token (27, 3)."""
    prefixes = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
    responses = list(itertools.product(range(3), repeat=3))
    rows = [[prefixes.index(y[:t]) for t in range(3)] for y in responses]
    return torch.tensor(responses), torch.tensor(rows)


def sequence_log_p(table):
    """log p of each of the 27 responses, from logits (13, 3): one row a prefix."""
    responses, rows = world()
    log_p = table.log_softmax(-1)[rows]  # (27, 3, 3)
    return log_p.gather(-1, responses[..., None])[..., 0].sum(1)


def tables(rng):
    student, teacher = (1.5 * torch.randn(13, 3, generator=rng) for _ in range(2))
    return student.requires_grad_(), teacher


def estimates(impl, student, teacher, estimator):
    """The gradient over the table that each response gives, (27, 13, 3)."""
    responses, rows = world()
    mask = torch.ones(27, 3, dtype=torch.bool)
    value = surrogate(impl, student[rows], teacher[rows], responses, mask, estimator)
    eye = torch.eye(27)
    (grads,) = torch.autograd.grad(value, student, eye, is_grads_batched=True)
    return grads


def truths(student, teacher):
    """The gradient of the KL of whole responses; and without the effect that a token
    has on what comes after it: the mean of each prefix's own gradient."""
    log_p, log_q = sequence_log_p(student), sequence_log_p(teacher)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    (whole,) = torch.autograd.grad(kl, student)
    p, rows = log_p.exp().detach(), world()[1]
    partial = torch.zeros(13, 3)
    for n, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        reached = (p[:, None] * (rows == n)).sum()
        own = oracles.divergence_gradient(s, t, "reverse")
        partial[n] = reached * torch.tensor(own)
    return p, whole, partial


def test_token_and_full_have_one_mean_and_rao_blackwell_that_of_the_truth(impl, rng):
    student, teacher = tables(rng)
    p, whole, partial = truths(student, teacher)
    assert not is_close(whole, partial, 1e-4), "these inputs show no bias"
    means = {
        estimator: (p[:, None, None] * estimates(impl, student, teacher, estimator))
        .sum(0)
        for estimator in ESTIMATORS
    }  # fmt: skip
    for estimator in ("token", "full"):
        compare(means[estimator], partial, {
            f"{estimator}: the mean over all responses is unbiased, but {estimator!r} "
            "is to ignore the effect of a token on what comes after it": whole,
            f"{estimator}: the mean over all responses is 0: with the weight detached, "
            "sum of p * grad log p is 0": 0 * whole,
            f"{estimator}: the mean over all responses has the opposite sign": -partial,
        }, f"{estimator}: the mean over all responses")  # fmt: skip
    compare(means["rao_blackwell"], whole, {
        "rao_blackwell: the mean over all responses has the bias of \"full\": the "
        "second term is missing": partial,
    }, "rao_blackwell: the mean over all responses")  # fmt: skip


def test_full_has_less_noise_than_token_in_its_own_terms(impl, rng):
    """Given what was written so far, the full sum is the mean of the sampled term."""
    student, teacher = tables(rng)
    p = truths(student, teacher)[0][:, None, None]
    noise = {}
    for estimator in ("token", "full"):
        grads = estimates(impl, student, teacher, estimator)
        noise[estimator] = (p * (grads - (p * grads).sum(0)) ** 2).sum().item()
    assert noise["full"] < noise["token"], (
        f"the variance over all responses is {noise['full']:.4f} for \"full\" and "
        f"{noise['token']:.4f} for \"token\": a sum over the vocabulary has less noise "
        "than one sample from it"
    )


# ---- Edges ---------------------------------------------------------------------------


def test_the_teacher_gets_no_gradient(impl, rng):
    student, teacher, tokens, mask = setting(rng, [2, 3])
    for estimator in ESTIMATORS:
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        value = surrogate(impl, s, t, tokens, mask, estimator)
        (grad,) = torch.autograd.grad(value.sum(), t, allow_unused=True)
        assert grad is None or not grad.any(), (
            f"{estimator}: the teacher gets a gradient: detach its logits"
        )


def test_large_logits_stay_finite(impl, rng):
    args = setting(rng, [2, 3], scale=1e4)
    for estimator in ESTIMATORS:
        yours = slopes(impl, *args, estimator, torch.ones(2))
        assert yours.isfinite().all(), (
            f"{estimator}: the gradient is not finite for logits of 1e4: "
            "log(softmax(x)) is log(0) where a probability rounds to 0; log_softmax(x) "
            "is not"
        )
        truth = torch.zeros_like(args[0])
        for b, x in enumerate(zip(*args, strict=True)):
            truth[b] = large_truth(*x, estimator)
        compare(yours, truth, what=f"{estimator}: the gradient for logits of 1e4")


def large_truth(student, teacher, tokens, mask, estimator):
    """As Response.truth, with nothing that needs log 0."""
    n, grad = int(mask.sum()), torch.zeros_like(student)
    log_p = [oracles.log_softmax(x) for x in student[:n].tolist()]
    log_q = [oracles.log_softmax(x) for x in teacher[:n].tolist()]
    k = [oracles.kl_of_log_p(p, q) for p, q in zip(log_p, log_q, strict=True)]
    for t in range(n):
        p, q, y = log_p[t], log_q[t], int(tokens[t])
        factor = p[y] - q[y] if estimator == "token" else math.fsum(k[t + 1 :])
        for v in range(V):
            if estimator != "full":
                grad[t, v] += factor * ((v == y) - math.exp(p[v]))
            if estimator != "token":
                grad[t, v] += math.exp(p[v]) * (p[v] - q[v] - k[t])
    return grad


def test_what_it_is_given_stays_as_it_is(impl, rng):
    names = ("student_logits", "teacher_logits", "tokens", "mask")
    given = dict(zip(names, setting(rng, [1, 3]), strict=True))
    for estimator in ESTIMATORS:
        with unchanged(estimator, **given):
            impl.extra.kl_surrogate(**given, estimator=estimator)
