"""e12, memory: the loss in chunks. Difficulty 5, 90 minutes, 12 points.

The truth is a loop over rows and over the vocabulary, in plain Python floats. How much
memory is asked for is counted by oracles.LargestTensor, which sees every tensor.
"""

import contextlib
import math

import oracles
import torch
from kit import compare, one_number, unchanged
from torch.utils._pytree import tree_leaves

FLOAT64 = True
KLS = ("forward", "reverse", "jsd")
LOSSES = ("nll", *KLS)  # of chunked_nll and chunked_kl


class Rows:
    """Hidden states and head of a student, which want gradients, and of a teacher with
    wider hidden states; tokens and weights."""

    def __init__(self, rng, N=7, V=9, temperature=1.0, dtype=torch.float64):
        def draw(*shape):
            return torch.randn(*shape, generator=rng)

        self.hidden = draw(N, 3).to(dtype).requires_grad_()
        self.head = draw(V, 3).requires_grad_()
        self.teacher_hidden, self.teacher_head = draw(N, 4).to(dtype), draw(V, 4)
        self.tokens = torch.randint(V, (N,), generator=rng)
        self.weight = torch.rand(N, generator=rng) + 0.1
        self.temperature = temperature


@contextlib.contextmanager
def chunks_of(impl, size):
    """chunk_rows gives this many rows inside."""
    kept = impl.model.chunk_rows
    impl.model.chunk_rows = lambda head: size
    try:
        yield
    finally:
        impl.model.chunk_rows = kept


def true_rows(x, name, temperature=None, places=None):
    """The losses (N,), and their gradients over the logits (N, V), by a loop.
    temperature: another one for the student; places: other rows of the teacher."""
    places = range(len(x.hidden)) if places is None else places
    s = x.hidden.detach().double() @ x.head.detach().double().T
    s = s / (temperature or x.temperature)
    t = x.teacher_hidden.double() @ x.teacher_head.double().T / x.temperature
    losses, slopes, t, tokens = [], [], t.tolist(), x.tokens.tolist()
    for row, n in zip(s.tolist(), places, strict=True):
        if name == "nll":
            log_p = oracles.log_softmax(row)
            losses.append(-log_p[tokens[n]])
            slopes.append([math.exp(p) - (v == tokens[n]) for v, p in enumerate(log_p)])
        else:
            losses.append(oracles.divergence(row, t[n], name))
            slopes.append(oracles.divergence_gradient(row, t[n], name))
    return torch.tensor(losses), torch.tensor(slopes).view(s.shape)


def true_gradients(x, name, weight):
    """Of the loss over hidden states (N, C) and head (V, C)."""
    slopes = true_rows(x, name)[1] * weight[:, None].double() / x.temperature  # (N, V)
    hidden, head = x.hidden.detach().double(), x.head.detach().double()
    return slopes @ head, slopes.T @ hidden


def loss_of(impl, x, name):
    with untouched(x):
        if name == "nll":
            loss = impl.model.chunked_nll(x.hidden, x.head, x.tokens, x.weight)
        else:
            args = x.hidden, x.teacher_hidden, x.head, x.teacher_head, x.weight
            loss, _ = impl.model.chunked_kl(*args, name, x.temperature)
    return one_number(loss)


def untouched(x):
    return unchanged("your loss", **{
        "the student's hidden states": x.hidden,
        "the student's head": x.head,
        "the teacher's hidden states": x.teacher_hidden,
        "the teacher's head": x.teacher_head,
        "weight": x.weight,
    })  # fmt: skip


def check_value(loss, x, name, what):
    truth, w, T = true_rows(x, name)[0], x.weight, x.temperature

    def mistakes():
        ones, twice = ((true_rows(x, name, t)[0] * w).sum() for t in (1.0, T**2))
        last = (len(w) - 1) // 2 * 2  # chunks of two rows
        first = [n % 2 for n in range(len(w))]
        found = {
            "the weights are not in the loss of yours": truth.sum(),
            "the loss of yours is a mean, it should be the sum of weight * loss":
                (truth * w).mean(),
            "the weights are in the loss of yours twice": (truth * w**2).sum(),
            "the temperature is not in yours": ones,
            "the temperature is in the logits of yours twice: make_logits has divided "
            "by it": twice,
            "the loss of yours is 0": torch.tensor(0.0),
            "the last chunk of rows is missing": (truth * w)[:last].sum(),
            "row_loss is told the rows of the first chunk each time":
                (true_rows(x, name, places=first)[0] * w).sum(),
            "the loss of yours is divided by the temperature: that is for the gradient":
                (truth * w).sum() / T,
        }  # fmt: skip
        return {f"loss {name!r}: {text}": value for text, value in found.items()}

    compare(loss, (truth * w).sum(), mistakes, what)


def check_gradients(grads, x, name, factor=1.0):
    truths, T = true_gradients(x, name, x.weight), x.temperature
    for i, over in enumerate(("hidden states", "head")):
        truth = factor * truths[i]

        def mistakes(i=i, truth=truth, over=over):
            last = (len(x.weight) - 1) // 2 * 2
            tail = torch.where(torch.arange(len(x.weight)) >= last, x.weight, 0)
            plain = true_gradients(x, name, torch.ones_like(x.weight))
            logits = x.hidden.detach() @ x.head.detach().T
            left = logits @ x.head.detach(), logits.T @ x.hidden.detach()
            found = {
                "is not multiplied by what comes from upstream, the argument of "
                "backward": truths[i],
                "lacks 1 / temperature": truth * T,
                "has 1 / temperature twice": truth / T,
                "of yours takes s for the gradient: it is what row_loss returns":
                    factor * left[i],
                "is 0": 0 * truth,
                "has the opposite sign": -truth,
                "is that of the last chunk: add up the chunks":
                    factor * true_gradients(x, name, tail)[i],
                "lacks the weights": factor * plain[i],
            }  # fmt: skip
            what = f"loss {name!r}: the gradient over the {over}"
            return {f"{what} {text}": value for text, value in found.items()}

        assert grads[i] is not None, f"loss {name!r}: no gradient over the {over}"
        compare(grads[i].double(), truth, mistakes,
                f"the gradient of loss {name!r} over the {over}")  # fmt: skip


def slopes(loss, x, **options):
    assert loss.requires_grad, "no gradient reaches the loss"
    return torch.autograd.grad(loss, (x.hidden, x.head), allow_unused=True, **options)


def test_the_value_of_one_row(impl, rng):
    x = Rows(rng, N=1)
    for name in LOSSES:
        check_value(loss_of(impl, x, name), x, name, f"loss {name!r} of one row")


def test_the_loss_is_the_weighted_sum(impl, rng):
    x = Rows(rng)
    for name in LOSSES:
        with chunks_of(impl, 2):
            loss = loss_of(impl, x, name)
        check_value(loss, x, name, f"loss {name!r} of seven rows")


def test_the_gradients_over_hidden_states_and_head(impl, rng):
    x = Rows(rng)
    for name in LOSSES:
        with chunks_of(impl, 2):
            grads = slopes(loss_of(impl, x, name), x)
        check_gradients(grads, x, name)


def test_a_factor_from_upstream_multiplies_the_gradients(impl, rng):
    x = Rows(rng)
    for name in LOSSES:
        check_gradients(slopes(-3 * loss_of(impl, x, name), x), x, name, factor=-3.0)


def test_the_temperature_divides_logits_and_gradients(impl, rng):
    x = Rows(rng, temperature=0.37)
    for name in KLS:
        loss = loss_of(impl, x, name)
        check_value(loss, x, name, f"loss {name!r} at temperature .37")
        check_gradients(slopes(loss, x), x, name)


def test_the_size_of_the_chunks_changes_nothing(impl, rng):
    x = Rows(rng, N=8)
    for size in (1, 3, 4, 8, 20):
        with chunks_of(impl, size):
            loss = loss_of(impl, x, "reverse")
            grads = slopes(loss, x)
        what = f"the loss in chunks of {size} rows, of 8,"
        compare(loss, (true_rows(x, "reverse")[0] * x.weight).sum(), what=what)
        check_gradients(grads, x, "reverse")


def test_row_loss_is_called_once_for_each_row(impl, rng):
    x, calls = Rows(rng, temperature=0.37), [0] * 7
    truth = (x.hidden @ x.head.T).detach() / 0.37

    def row_loss(s, w, rows):
        """The sum of the logits of a row: each of them has the slope 1."""
        for n in torch.arange(7)[rows].tolist():
            calls[n] += 1
        right = truth[rows]
        compare(s, right, what=f"s, the logits that row_loss is given for {rows},")
        compare(w.new_ones(w.shape), right.new_ones(len(right)), what="w of row_loss")
        losses, ds = s.sum(-1), w[:, None].repeat(1, s.size(1))
        s.fill_(math.nan)
        return losses, ds

    with chunks_of(impl, 3):
        args = x.hidden, x.head, x.weight, x.temperature, row_loss
        loss = impl.model.ChunkedLoss.apply(*args)
        grads = slopes(loss, x)
    for n, count in enumerate(calls):
        assert count == 1, (
            f"row_loss is called {count} times for row {n}: call it once for each, "
            "chunked_kl counts in it what is recorded"
        )
    right = ((truth * x.weight[:, None]).sum(), torch.autograd.grad(
        ((x.hidden @ x.head.T).sum(1) * x.weight).sum() / 0.37, (x.hidden, x.head)))
    compare(loss, right[0], what="the loss of a function of the grader")
    for grad, wanted in zip(grads, right[1], strict=True):
        compare(grad, wanted, what="its gradient: is s used after row_loss had it?")


def test_nothing_as_large_as_all_logits_is_made_or_kept(impl, rng):
    """600 rows of 512 tokens are 307,200 logits. A chunk of 64 rows has 32,768, and
    chunks of up to 256 rows pass."""
    N, V = 600, 512
    x = Rows(rng, N, V)
    with chunks_of(impl, 64):
        with oracles.LargestTensor() as seen:
            loss = loss_of(impl, x, "forward")
        assert seen.numel <= 2**17, (
            f"the forward pass makes a tensor {seen.shape} ({seen.operation}): all "
            f"{N} x {V} logits at once. Make them a chunk at a time, of "
            "chunk_rows(head) rows"
        )
        node = loss.grad_fn
        kept = tree_leaves((node.saved_tensors, vars(node)))
        total = sum(each.numel() for each in kept if torch.is_tensor(each))
        assert total <= N * V // 8, (
            f"{total:,} numbers are kept for the backward pass, all logits are "
            f"{N * V:,}. Keep the gradients over hidden states and head"
        )
        with oracles.LargestTensor() as seen:
            slopes(loss, x)
        assert seen.numel <= 2**17, (
            f"the backward pass makes a tensor {seen.shape} ({seen.operation}): all "
            f"{N} x {V} logits at once"
        )


def test_backward_twice_gives_the_same_gradients(impl, rng):
    x = Rows(rng)
    loss = 2 * loss_of(impl, x, "forward")
    slopes(loss, x, retain_graph=True)
    try:
        again = slopes(loss, x)
    except RuntimeError as error:
        assert "inplace" not in str(error), (
            "the second backward pass fails: the first one has changed what is kept, "
            "in place"
        )
        raise
    check_gradients(again, x, "forward", factor=2.0)


def test_hidden_states_in_bfloat16_are_computed_in_float32(impl, rng):
    x = Rows(rng, dtype=torch.bfloat16)
    x.head = x.head.detach().float().requires_grad_()
    x.teacher_head, x.weight = x.teacher_head.float(), x.weight.float()
    for name in LOSSES:
        loss = loss_of(impl, x, name)
        truth = (true_rows(x, name)[0] * x.weight.double()).sum()
        far = abs(loss.item() - truth.item())
        assert far < 0.05 * truth, (
            f"loss {name!r} of bfloat16 hidden states is {loss.item():.6g}, it should "
            f"be {truth.item():.6g}"
        )
        assert far < 2e-6 * (1 + truth), (
            f"loss {name!r} of bfloat16 hidden states is off by {far:.1e}: logits are "
            "float32, the hidden states are cast to the head's dtype before the product"
        )
        over_hidden, over_head = slopes(loss, x)
        assert over_hidden.dtype == torch.bfloat16, (
            f"the gradient over bfloat16 hidden states is {over_hidden.dtype}"
        )
        truth = true_gradients(x, name, x.weight.double())[1]
        what = f"the float32 gradient of loss {name!r} over the head"
        compare(over_head.double(), truth, tolerance=1e-5, what=what)


def test_no_rows_at_all_give_zero(impl, rng):
    x = Rows(rng, N=0)
    loss = loss_of(impl, x, "forward")
    assert loss == 0, f"the loss of no rows is {loss.item()}, it should be 0"
    for name, grad in zip(("hidden", "head"), slopes(loss, x), strict=True):
        assert grad is not None and not grad.any(), (
            f"no rows give a gradient over {name} that is {grad}, it should be 0"
        )


def test_a_teacher_with_another_vocabulary_is_refused(impl, rng):
    x = Rows(rng)
    args = x.hidden, x.teacher_hidden, x.head, x.teacher_head[:-1], x.weight
    try:
        impl.model.chunked_kl(*args)
    except AssertionError:
        return
    raise AssertionError(
        "a teacher of 8 tokens, for 9 of the student, is not refused: row_loss raises "
        "AssertionError, let it through"
    )


def test_what_it_is_given_stays_as_it_is(impl, rng):
    x = Rows(rng, temperature=0.37)
    with untouched(x):
        try:
            slopes(loss_of(impl, x, "jsd"), x)
        except RuntimeError as error:
            assert "inplace" not in str(error), f"something given is changed: {error}"
            raise


def test_a_head_or_hidden_states_that_want_no_gradient(impl, rng):
    x = Rows(rng)
    pair = true_gradients(x, "forward", x.weight)
    hidden, head = x.hidden, x.head
    for i, (name, other) in enumerate((("hidden", "head"), ("head", "hidden"))):
        x.hidden, x.head = hidden, head
        setattr(x, other, getattr(x, other).detach())
        loss = loss_of(impl, x, "forward")
        (grad,) = torch.autograd.grad(loss, getattr(x, name), allow_unused=True)
        assert grad is not None, f"no gradient over the {name}"
        compare(grad, pair[i],
                what=f"the gradient over the {name} where the {other} wants none")
