"""e12, memory: the fused kernel. Difficulty 5, 90 minutes, 12 points.

The truth is a loop over rows and over the vocabulary, in plain Python floats. How much
memory is asked for is counted by oracles.LargestTensor, which sees every tensor.
"""

import contextlib
import functools

import oracles
import torch
from kit import compare
from torch.utils._pytree import tree_leaves

FLOAT64 = True
KLS = ("forward", "reverse", "jsd")


def pair(impl, rng, N=7, V=9, temperature=1.0, dtype=torch.float64):
    """LazyLogits of a student, whose hidden states and head want gradients, and of a
    teacher with wider hidden states; and weights."""

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    lazy = impl.model.LazyLogits
    student = lazy(draw(N, 3).to(dtype).requires_grad_(), draw(V, 3), temperature)
    student.head.requires_grad_()
    teacher = lazy(draw(N, 4).to(dtype), draw(V, 4), temperature)
    weight = torch.rand(N, generator=rng) + 0.1
    return student, teacher, weight


@contextlib.contextmanager
def chunks_of(impl, size):
    """LazyLogits.chunks gives chunks of this many rows inside."""
    kept = impl.model.LazyLogits.chunks

    def chunks(self):
        N = len(self.hidden)
        return [(i, min(N, i + size)) for i in range(0, N, size)]

    impl.model.LazyLogits.chunks = chunks
    try:
        yield
    finally:
        impl.model.LazyLogits.chunks = kept


def dense(logits, temperature=None):
    """All rows, float64 (N, V)."""
    temperature = temperature or logits.temperature
    hidden, head = logits.hidden.detach().double(), logits.head.detach().double()
    return hidden @ head.T / temperature


def true_values(student, teacher, kl, temperature=None):
    rows = zip(dense(student, temperature).tolist(),
               dense(teacher, temperature).tolist(), strict=True)  # fmt: skip
    return torch.tensor([oracles.divergence(s, t, kl) for s, t in rows])


def true_gradients(student, teacher, weight, kl):
    """Of the loss over hidden states (N, C) and head (V, C)."""
    rows = zip(dense(student).tolist(), dense(teacher).tolist(), strict=True)
    slopes = [oracles.divergence_gradient(s, t, kl) for s, t in rows]
    slopes = torch.tensor(slopes) * weight[:, None] / student.temperature  # (N, V)
    hidden, head = student.hidden.detach().double(), student.head.detach().double()
    return slopes @ head, slopes.T @ hidden


def loss_of(impl, student, teacher, weight, kl):
    loss = impl.model.fused_linear_kl(student, teacher, weight, kl)
    assert torch.is_tensor(loss) and loss.shape == (), (
        "forward returns (loss, values), the loss a tensor of shape (); yours is "
        f"{loss!r}"
    )
    return loss


def check_value(loss, student, teacher, weight, kl, what):
    truth = true_values(student, teacher, kl)

    def mistakes():
        return {
            **{
                f"kl {kl!r}: the loss of yours is that of {other!r}: are student and "
                "teacher exchanged, or is kl not used?":
                    (true_values(student, teacher, other) * weight).sum()
                for other in KLS if other != kl
            },
            f"kl {kl!r}: the weights are not in the loss of yours": truth.sum(),
            f"kl {kl!r}: the loss of yours is a mean, it should be the sum of weight * "
            "value": (truth * weight).mean(),
            f"kl {kl!r}: the weights are in the loss of yours twice":
                (truth * weight**2).sum(),
            f"kl {kl!r}: the temperature is not in yours": (
                true_values(student, teacher, kl, 1.0) * weight).sum(),
            f"kl {kl!r}: the temperature is in the logits of yours twice: rows() has "
            "divided by it": (true_values(
                student, teacher, kl, student.temperature**2) * weight).sum(),
            f"kl {kl!r}: the loss of yours is 0: do student and teacher share one "
            "buffer?": torch.tensor(0.0),
            f"kl {kl!r}: the last chunk of rows is missing":
                (truth * weight)[: len(weight) // 2 * 2 - 2 * (len(weight) % 2 == 0)]
                .sum(),
            f"kl {kl!r}: the loss of yours is divided by the temperature: that is for "
            "the gradient": (truth * weight).sum() / student.temperature,
        }  # fmt: skip

    compare(loss, (truth * weight).sum(), mistakes, what)


def check_gradients(grads, student, teacher, weight, kl, factor=1.0):
    truths = true_gradients(student, teacher, weight, kl)
    T = student.temperature
    plain = true_gradients(student, teacher, torch.ones_like(weight), kl)
    for i, name in enumerate(("hidden states", "head")):
        truth = factor * truths[i]

        def mistakes(i=i, truth=truth, name=name):
            found = {
                f"kl {kl!r}: the gradient over the {name} is not multiplied by what "
                "comes from upstream, the argument of backward": truths[i],
                f"kl {kl!r}: the gradient over the {name} lacks 1 / temperature":
                    truth * T,
                f"kl {kl!r}: the gradient over the {name} has 1 / temperature twice":
                    truth / T,
                f"kl {kl!r}: the weights are not in the gradient over the {name}":
                    factor * plain[i],
                f"kl {kl!r}: the gradient over the {name} is 0": 0 * truth,
                f"kl {kl!r}: the gradient over the {name} has the opposite sign":
                    -truth,
            }  # fmt: skip
            if i == 1:
                last = (len(weight) - 1) // 2 * 2
                tail = torch.where(torch.arange(len(weight)) >= last, weight, 0)
                found[
                    f"kl {kl!r}: the gradient over the head is that of the last chunk: "
                    "add up the chunks"
                ] = factor * true_gradients(student, teacher, tail, kl)[1]
            return found

        assert grads[i] is not None, f"kl {kl!r}: no gradient over the {name}"
        compare(grads[i].double(), truth, mistakes,
                f"the gradient of kl {kl!r} over the {name}")  # fmt: skip


def slopes(loss, student, **options):
    return torch.autograd.grad(loss, (student.hidden, student.head), allow_unused=True,
                               **options)  # fmt: skip


def test_the_value_of_one_row(impl, rng):
    student, teacher, weight = pair(impl, rng, N=1)
    for kl in KLS:
        loss = loss_of(impl, student, teacher, weight, kl)
        check_value(loss, student, teacher, weight, kl, f"kl {kl!r} of one row")


def test_the_loss_is_the_weighted_sum_and_the_values_are_not_weighted(impl, rng):
    student, teacher, weight = pair(impl, rng)
    for kl in KLS:
        with chunks_of(impl, 2):
            loss = loss_of(impl, student, teacher, weight, kl)
            values = impl.model.kl_of_rows(student, teacher, kl)
        check_value(loss, student, teacher, weight, kl, f"kl {kl!r} of seven rows")
        compare(values, true_values(student, teacher, kl),
                what=f"the values of kl {kl!r} of each row")  # fmt: skip
        weighted = impl.model.FusedLinearKL.apply(
            *student, teacher, weight, kl, False
        )[1]
        truth = true_values(student, teacher, kl)
        compare(weighted, truth, {
            "the second result of forward is weighted: it should be the divergence of "
            "each row": truth * weight,
        }, f"the values of kl {kl!r} beside weights")  # fmt: skip


def test_the_gradients_over_hidden_states_and_head(impl, rng):
    student, teacher, weight = pair(impl, rng)
    for kl in KLS:
        with chunks_of(impl, 2):
            loss = loss_of(impl, student, teacher, weight, kl)
            assert loss.requires_grad, "no gradient reaches the loss"
            grads = slopes(loss, student)
        check_gradients(grads, student, teacher, weight, kl)


def test_a_factor_from_upstream_multiplies_the_gradients(impl, rng):
    student, teacher, weight = pair(impl, rng)
    for kl in KLS:
        grads = slopes(-3 * loss_of(impl, student, teacher, weight, kl), student)
        check_gradients(grads, student, teacher, weight, kl, factor=-3.0)


def test_the_temperature_divides_logits_and_gradients(impl, rng):
    student, teacher, weight = pair(impl, rng, temperature=0.37)
    for kl in KLS:
        loss = loss_of(impl, student, teacher, weight, kl)
        check_value(loss, student, teacher, weight, kl,
                    f"kl {kl!r} at temperature .37")  # fmt: skip
        check_gradients(slopes(loss, student), student, teacher, weight, kl)


def test_the_size_of_the_chunks_changes_nothing(impl, rng):
    student, teacher, weight = pair(impl, rng, N=8)
    for size in (1, 3, 4, 8, 20):
        with chunks_of(impl, size):
            loss = loss_of(impl, student, teacher, weight, "reverse")
            grads = slopes(loss, student)
        what = f"the loss in chunks of {size} rows, of 8,"
        compare(loss, (true_values(student, teacher, "reverse") * weight).sum(),
                what=what)  # fmt: skip
        check_gradients(grads, student, teacher, weight, "reverse")


def test_nothing_as_large_as_all_logits_is_made_or_kept(impl, rng):
    """600 rows of 512 tokens are 307,200 logits. A chunk of 64 rows has 32,768; the row
    kernel's own buffers have 131,072 for any number of rows."""
    N, V = 600, 512
    student, teacher, weight = pair(impl, rng, N, V)
    with chunks_of(impl, 64):
        with oracles.LargestTensor() as seen:
            loss = loss_of(impl, student, teacher, weight, "forward")
        assert seen.numel <= 2**17, (
            f"the forward pass makes a tensor {seen.shape} ({seen.operation}): all "
            f"{N} x {V} logits at once. Make them a chunk at a time, rows(i, j) for "
            "i, j of chunks()"
        )
        node = loss.grad_fn
        kept = [x for x in tree_leaves((node.saved_tensors, vars(node)))
                if torch.is_tensor(x)]  # fmt: skip
        total = sum(x.numel() for x in kept)
        assert total <= N * V // 8, (
            f"{total:,} numbers are kept for the backward pass, all logits are "
            f"{N * V:,}. Keep the gradients over hidden states and head, or nothing "
            "but the arguments, and make each chunk again"
        )
        with oracles.LargestTensor() as seen:
            slopes(loss, student)
        assert seen.numel <= 2**17, (
            f"the backward pass makes a tensor {seen.shape} ({seen.operation}): all "
            f"{N} x {V} logits at once"
        )


def test_backward_twice_gives_the_same_gradients(impl, rng):
    student, teacher, weight = pair(impl, rng)
    loss = 2 * loss_of(impl, student, teacher, weight, "forward")
    slopes(loss, student, retain_graph=True)
    try:
        again = slopes(loss, student)
    except RuntimeError as error:
        assert "inplace" not in str(error), (
            "the second backward pass fails: the first one has changed what is kept, "
            "in place"
        )
        raise
    check_gradients(again, student, teacher, weight, "forward", factor=2.0)


def test_hidden_states_in_bfloat16_are_computed_in_float32(impl, rng):
    student, teacher, weight = pair(impl, rng, dtype=torch.bfloat16)
    student = student._replace(head=student.head.detach().float().requires_grad_())
    teacher = teacher._replace(head=teacher.head.float())
    weight = weight.float()
    for kl in KLS:
        loss = loss_of(impl, student, teacher, weight, kl)
        truth = (true_values(student, teacher, kl) * weight.double()).sum()
        far = abs(loss.item() - truth.item())
        assert far < 0.05 * truth, (
            f"kl {kl!r} of bfloat16 hidden states is {loss.item():.6g}, it should be "
            f"{truth.item():.6g}"
        )
        assert far < 2e-6 * (1 + truth), (
            f"kl {kl!r} of bfloat16 hidden states is off by {far:.1e}: logits are "
            "float32, the hidden states are cast to the head's dtype before the product"
        )
        over_hidden, over_head = slopes(loss, student)
        assert over_hidden.dtype == torch.bfloat16, (
            f"the gradient over bfloat16 hidden states is {over_hidden.dtype}"
        )
        truth = true_gradients(student, teacher, weight.double(), kl)[1]
        compare(over_head.double(), truth, tolerance=1e-5,
                what=f"the float32 gradient of kl {kl!r} over the head")  # fmt: skip


def test_no_rows_at_all_give_zero(impl, rng):
    student, teacher, weight = pair(impl, rng, N=0)
    loss = loss_of(impl, student, teacher, weight, "forward")
    assert loss == 0, f"the loss of no rows is {loss.item()}, it should be 0"
    for name, grad in zip(("hidden", "head"), slopes(loss, student), strict=True):
        assert grad is not None and not grad.any(), (
            f"no rows give a gradient over {name} that is {grad}, it should be 0"
        )


def test_other_numbers_of_rows_or_tokens_are_refused(impl, rng):
    student, teacher, weight = pair(impl, rng)
    fewer = teacher._replace(hidden=teacher.hidden[:1])
    smaller = teacher._replace(head=teacher.head[:-1])
    for what, wrong in (("one row, for seven", fewer), ("8 tokens, for 9", smaller)):
        try:
            loss_of(impl, student, wrong, weight, "forward")
            found = "nothing is raised"
        except ValueError:
            continue
        except NotImplementedError:
            raise
        except (IndexError, RuntimeError) as error:
            found = f"it ends with {type(error).__name__}"
        raise AssertionError(
            f"a teacher of {what} of the student, is not refused with ValueError: "
            f"{found}. check_kl((N, V) of the one, (N, V) of the other, kl) does it"
        )


def test_what_it_is_given_stays_as_it_is(impl, rng):
    student, teacher, weight = pair(impl, rng, temperature=0.37)
    given = {
        "the student's hidden states": student.hidden,
        "the student's head": student.head,
        "the teacher's hidden states": teacher.hidden,
        "the teacher's head": teacher.head,
        "weight": weight,
    }
    before = {name: x.detach().clone() for name, x in given.items()}
    try:
        slopes(loss_of(impl, student, teacher, weight, "jsd"), student)
    except RuntimeError as error:
        assert "inplace" not in str(error), f"something given is changed: {error}"
        raise
    for name, x in given.items():
        assert torch.equal(x, before[name]), f"{name} changes: work on copies"


def test_a_head_or_hidden_states_that_want_no_gradient(impl, rng):
    student, teacher, weight = pair(impl, rng)
    both = functools.partial(true_gradients, student, teacher, weight, "forward")
    for i, name in enumerate(("hidden", "head")):
        other = "head" if name == "hidden" else "hidden"
        one = student._replace(**{other: getattr(student, other).detach()})
        loss = loss_of(impl, one, teacher, weight, "forward")
        (grad,) = torch.autograd.grad(loss, getattr(one, name), allow_unused=True)
        assert grad is not None, f"no gradient over the {name}"
        compare(grad, both()[i],
                what=f"the gradient over the {name} where the {other} wants none")
