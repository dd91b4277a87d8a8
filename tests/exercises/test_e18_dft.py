"""e18, DFT: each token weighed by its own probability, and no gradient through that
weight. Difficulty 2, 25 minutes, 4 points.

The truth is plain floats: log-softmax of one row as a list, then p * -log p.
"""

import functools
import math

import oracles
import torch
from kit import compare, one_number, unchanged
from variants import Modules, changes_of

FLOAT64 = True


def draw(rng, N=6, V=7, scale=2.0):
    """logits (N, V), tokens (N,), and weights of which no two are equal and whose sum
    is not 1."""
    logits = scale * torch.randn(N, V, generator=rng)
    tokens = torch.randint(V, (N,), generator=rng)
    return logits, tokens, 0.1 + torch.rand(N, generator=rng)


def rows(logits, tokens):
    """log p of the token, and the row's log p, as floats, row after row."""
    for row, token in zip(logits.tolist(), tokens.tolist(), strict=True):
        log_p = oracles.log_softmax(row)
        yield log_p[token], log_p


def weighed(logits, tokens, weight, factor):
    """sum of weight * factor(log p, row's log p) * -log p."""
    total = 0.0
    for w, (x, row) in zip(weight.tolist(), rows(logits, tokens), strict=True):
        total += w * factor(x, row) * -x
    return torch.tensor(total)


def truth(logits, tokens, weight):
    return weighed(logits, tokens, weight, lambda x, row: math.exp(x))


def gradient(logits, tokens, weight, factor=lambda p: p):
    """Over the logits: weight * factor(p) * (softmax - 1 at the token), by loops."""
    result = []
    for w, token, (x, row) in zip(
        weight.tolist(), tokens.tolist(), rows(logits, tokens), strict=True
    ):
        by = w * factor(math.exp(x))
        result.append([by * (math.exp(y) - (v == token)) for v, y in enumerate(row)])
    return torch.tensor(result)


def values_of_mistakes(logits, tokens, weight):
    args, right = (logits, tokens, weight), truth(logits, tokens, weight)
    log_p = [x for x, _ in rows(logits, tokens)]
    p, N = [math.exp(x) for x in log_p], max(1, len(log_p))
    mean_p, ones = sum(p) / N, torch.ones_like(weight)
    scaled = sum(w * x for w, x in zip(weight.tolist(), p, strict=True))
    entropy = sum(
        w * -sum(math.exp(y) * y for y in row)
        for w, (_, row) in zip(weight.tolist(), rows(logits, tokens), strict=True)
    )
    across = logits.T.tolist()
    across = torch.tensor([oracles.log_softmax(column) for column in across]).T
    across = across.gather(1, tokens[:, None])[:, 0]
    return {
        "yours is -loss: where is the minus sign?": -right,
        "yours is SFT's loss: the factor p is missing": weighed(
            *args, lambda x, row: 1.0),
        "yours is -p: its gradient is DFT's indeed, but the loss is p * -log p, which "
        "is never below 0": torch.tensor(-scaled),
        "yours is weighed by 1 - p (that is a focal loss): DFT trusts what the student "
        "believes": weighed(*args, lambda x, row: 1 - math.exp(x)),
        "yours is divided by p: it is multiplied": weighed(
            *args, lambda x, row: math.exp(-x)),
        "yours is weighed by p squared": weighed(*args, lambda x, row: math.exp(2 * x)),
        "yours is weighed by -log p, not by p": weighed(*args, lambda x, row: -x),
        "yours has p divided by its mean: the weights need not average to 1":
            right / mean_p,
        "yours is divided by the sum of the weights: weight is a mean already":
            right / scaled,
        "yours is without weight": truth(logits, tokens, ones),
        "yours is without weight, and divided by N": truth(logits, tokens, ones) / N,
        "yours is divided by N: weight is a mean already, so the loss is a sum":
            right / N,
        "yours is weighed by the probability of the most likely token, not of its own":
            weighed(*args, lambda x, row: math.exp(max(row))),
        "yours is weighed by the product of all p, the probability of the whole "
        "response: each token has its own":
            weighed(*args, lambda x, row: math.exp(sum(log_p))),
        "yours has a weight that is the same for each row: each token has its own":
            weighed(*args, lambda x, row: math.exp(sum(log_p) / N)),
        "yours has a weight that is the same for each row, the mean of p: each token "
        "has its own": weighed(*args, lambda x, row: mean_p),
        "yours is the entropy: the sum over the vocabulary of p * -log p; DFT has the "
        "one token that is imitated": torch.tensor(entropy),
        "yours has a softmax over the rows: it is over the vocabulary":
            -(weight * across.exp() * across).sum(),
        "yours multiplies (N, 1) times (N,), which makes (N, N): each row meets each "
        "other's weight": -weight.sum() * sum(
            x * y for x, y in zip(p, log_p, strict=True)),
        "yours is the mean loss times exp(-mean): each token has its own p, and weight "
        "says what it counts": torch.tensor(
            -sum(log_p) / N * math.exp(sum(log_p) / N)),
        **{f"yours has a small number inside of the logarithm (as {eps}): log_softmax "
           "needs none": weighed(
               *args, lambda x, row, eps=eps: math.exp(x) * math.log(math.exp(x) + eps)
               / (x or 1)) for eps in (1e-6, 1e-7, 1e-8, 1e-10)},
        "yours has its weight p in bits, or log p in bits: nats, please":
            right / math.log(2),
    }  # fmt: skip


def loss_of(impl, *args):
    return one_number(impl.extra.dft_loss(*args))


def check(impl, args, what):
    wrong = functools.partial(values_of_mistakes, *args)
    compare(loss_of(impl, *args), truth(*args), wrong, what)


def test_one_token_by_hand(impl):
    """p = 3/4 and 1/4: 3/4 log 4/3 = 0.2158, 1/4 log 4 = 0.3466."""
    logits = torch.tensor([[math.log(3), 0.0]])
    for token, hand in ((0, 0.75 * math.log(4 / 3)), (1, 0.25 * math.log(4))):
        args = logits, torch.tensor([token]), torch.tensor([2.0])
        compare(truth(*args), torch.tensor(2 * hand), what="the grader's own loop",
                tolerance=1e-12)  # fmt: skip
        check(impl, args, f"the loss of a token of p = {[0.75, 0.25][token]}")


def test_the_loss_of_several_tokens(impl, rng):
    check(impl, draw(rng), "the loss")


def test_a_token_that_is_not_believed_weighs_next_to_nothing(impl, rng):
    logits, tokens, weight = draw(rng)
    logits[torch.arange(6), tokens] -= 12
    yours = loss_of(impl, logits, tokens, weight)
    right = truth(logits, tokens, weight)
    assert yours < 10 * right, (
        f"the loss is {yours.item():.3g} where it should be {right.item():.3g}: in "
        "yours a token that is not believed weighs too much (no lower bound for p)"
    )
    check(impl, (logits, tokens, weight), "the loss of unlikely tokens")


def test_the_gradient_is_that_of_sft_times_p(impl, rng):
    logits, tokens, weight = draw(rng)
    logits.requires_grad_()
    yours = loss_of(impl, logits, tokens, weight)
    assert yours.requires_grad, "the loss has no gradient: is log p detached, too?"
    (found,) = torch.autograd.grad(yours, logits, allow_unused=True)
    assert found is not None, "no gradient reaches the logits"
    args = logits.detach(), tokens, weight
    compare(found, gradient(*args), lambda: {
        "the gradient of yours flows through p, too: p is a weight; detach it":
            gradient(*args, lambda p: p * (1 + math.log(p))),
        "the gradient of yours flows through p alone: log p has it, p is detached":
            gradient(*args, lambda p: p * math.log(p)),
        "the gradient is SFT's: the factor p is missing": gradient(*args, lambda p: 1),
        "the gradient has the wrong sign": -gradient(*args),
    }, "the gradient over the logits")  # fmt: skip


def test_it_is_finite_where_a_probability_rounds_to_zero(impl, rng):
    logits, tokens, weight = draw(rng, scale=1.0)
    logits[torch.arange(6), tokens] -= 1e4
    logits.requires_grad_()
    yours = loss_of(impl, logits, tokens, weight)
    assert yours.isfinite(), (
        f"the loss is {yours.item()} where p rounds to 0: log(softmax(x)) is log(0), "
        "and 0 times that is no number; log_softmax(x) is finite"
    )
    (found,) = torch.autograd.grad(yours, logits)
    assert found.isfinite().all(), (
        "the gradient is not finite where p rounds to 0: log(softmax(x)) is log(0)"
    )
    compare(yours, torch.tensor(0.0), what="the loss of tokens of probability 0")


def test_no_token_gives_zero(impl):
    yours = loss_of(impl, torch.zeros(0, 5, requires_grad=True),
                    torch.zeros(0, dtype=torch.long), torch.zeros(0))  # fmt: skip
    assert yours == 0, f"the loss of no token is {yours.item()}, it should be 0"


def test_float32_logits_are_enough(impl, rng):
    logits, tokens, weight = draw(rng)
    args = logits.float(), tokens, weight.float()
    wrong = functools.partial(values_of_mistakes, *args)
    compare(loss_of(impl, *args), truth(*args), wrong, "the float32 loss", 1e-5)


def test_what_it_is_given_stays_as_it_is(impl, rng):
    logits, tokens, weight = draw(rng)
    with unchanged("dft_loss", logits=logits, tokens=tokens, weight=weight):
        loss_of(impl, logits, tokens, weight)


@functools.cache
def variant():
    return Modules(changes_of("dft"))


def test_it_is_what_the_variant_of_sft_does(impl, rng):
    """variants.py dft, the diff, computes the same from hidden states."""
    m = variant()
    tok, words = m.data.Tokenizer(), ("fox owl", "bag", "key lamp moon")
    batch = [m.data.Example(word, word, "", id=i) for i, word in enumerate(words)]
    student = oracles.make_model(seed=1, vocab_size=tok.vocab_size)
    response, mask = m.sft.get_responses(batch, tok, "cpu")
    cfg = m.sft.Config(batch_size=3)
    loss, _ = m.sft.compute_loss(student, batch, response, mask, tok, cfg)
    bare = m.data.pad_batch(m.data.student_prompt, batch, tok, "cpu")
    logits = student.logits(m.model.response_hidden(student, *bare, response, mask))
    weight = (mask / mask.sum(1, keepdim=True) / 3)[mask]
    yours = loss_of(impl, logits, response[mask], weight)
    compare(yours, loss, what="the loss that `variants.py dft` has here")
    grads = oracles.gradients(student, yours), oracles.gradients(student, loss)
    for pair in zip(*grads, strict=True):
        compare(*pair, what="the gradient that `variants.py dft` has here")
