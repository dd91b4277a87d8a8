"""e13, measuring forgetting: best and first, the last row, NaN. Difficulty 2, 30
minutes and 10 of running, 5 points.

The truth is a loop over columns of plain numbers, and a matrix worked out by hand.
"""

import functools
import math

import torch
from kit import compare, unchanged

FLOAT64 = True
NAN = math.nan
SHEET = [[NAN, NAN, NAN, 1.0], [1.0, NAN, NAN, 0.9], [0.7, 1.0, NAN, 0.5],
         [0.8, 0.4, 1.0, 0.6]]  # fmt: skip


def columns(acc):
    """(the numbers before the last row, the number in it or NaN) of each column."""
    for column in zip(*acc.tolist(), strict=True):
        yield [x for x in column[:-1] if not math.isnan(x)], column[-1]


def each(acc, value):
    """value(numbers before, last), NaN where one of the two is missing: (K,)."""
    values = [value(a, b) if a and b == b else NAN for a, b in columns(acc)]
    return torch.tensor(values)


def mean(values):
    values = [x for x in values.tolist() if x == x]
    return torch.tensor(sum(values) / len(values) if values else NAN)


def forgetting(acc):
    return each(acc, lambda before, last: max(before) - last)


def transfer(acc):
    return mean(each(acc, lambda before, last: last - before[0]))


def wrong_forgetting(acc):
    zero, truth = acc.nan_to_num(0), forgetting(acc)
    fresh = torch.tensor([not a and b == b for a, b in columns(acc)])
    lowest = [min([*a, b]) for a, b in columns(acc)]
    plain = acc[:-1].amax(0) if len(acc) > 1 else acc[-1] + NAN
    return {
        "yours is the last row minus the best: forgetting is what was lost, a loss "
        "is above 0": -truth,
        "yours is never below 0: a skill that got better has a forgetting below 0":
            truth.clamp(min=0),
        "yours has no sign: a skill that got better has a forgetting below 0":
            truth.abs(),
        "yours ends at the last number of a column: where the last row is NaN, nobody "
        "knows what is left, NaN": torch.tensor(
            [max(a[: len(a) - (b != b)], default=NAN) - (a[-1] if a and b != b else b)
             for a, b in columns(acc)]),
        "yours includes the last row in the best: a skill that got better is then 0, "
        "and so is one that has just been learnt":
            torch.tensor([max([*a, b]) - b for a, b in columns(acc)]),
        "yours gives 0 for a skill that has just been learnt: nobody knows yet, NaN":
            truth.masked_fill(fresh, 0),
        "yours starts at the first number of a column, not at the best of the earlier "
        "rows": each(acc, lambda a, b: a[0] - b),
        "yours starts at the base, minus the last row: row 0 is NaN for what is "
        "trained later": acc[0] - acc[-1],
        "yours sees only the row before the last: a skill may have been lost before":
            acc[-2:-1].sum(0) - acc[-1],
        "yours takes NaN as an accuracy of 0: not measured is not 0":
            zero[:-1].amax(0) - zero[-1] if len(acc) > 1 else -zero[-1],
        "yours takes NaN as an accuracy of 0 in the last row: not measured is not 0":
            torch.tensor([max(a, default=NAN) for a, _ in columns(acc)]) - zero[-1],
        "yours is NaN for a skill that is NaN before it was trained: max of a column "
        "with a NaN is NaN": plain - acc[-1],
        "yours has rows and columns exchanged: a row is a stage, a column is a skill":
            forgetting(acc.T),
        "yours is divided by the best: it is a difference of accuracies":
            each(acc, lambda a, b: (max(a) - b) / max(a)),
        "yours goes down to the lowest that the skill ever was, not to the last row":
            each(acc, lambda a, b: max(a) - min([*a, b])),
        "yours goes from the best to the lowest that the skill ever was":
            torch.tensor([max(a, default=NAN) for a, _ in columns(acc)])
            - torch.tensor(lowest),
    }  # fmt: skip


def wrong_transfer(acc):
    truth = transfer(acc)
    n = sum(bool(a) and b == b for a, b in columns(acc))
    changes = each(acc, lambda before, last: last - before[0])
    zero = acc.nan_to_num(0)
    all_first = [next((x for x in [*a, b] if x == x), NAN) for a, b in columns(acc)]
    K = min(acc.shape)
    diagonal = acc[-1, :K] - acc.diagonal()
    return {
        "yours has the wrong sign: it is the last row minus what was just learnt, "
        "below 0 if it was forgotten": -truth,
        "yours starts at the best, as forgetting does: backward transfer starts at "
        "the skill as it was just learnt, the first number of its column":
            -mean(forgetting(acc)),
        "yours starts at the last number before the last row, not at the first of the "
        "column": mean(each(acc, lambda a, b: b - a[-1])),
        "yours starts at row 0, the base: there a skill that is trained later is NaN":
            zero.sum() if acc[-1].isnan().any() else (acc[-1] - acc[0]).mean(),
        "yours starts at row 0, the base, and leaves out what is trained later":
            mean(acc[-1] - acc[0]),
        "yours is divided by the number of all columns, not of those that count":
            truth * n / acc.size(1) if acc[-1].isnan().any() else zero.sum(),
        "yours counts a skill that has just been learnt as a change of 0: it is left "
        "out of the mean": mean(acc[-1] - torch.tensor(all_first)),
        "yours is NaN because one column is not measured in the last row, or not "
        "before: the column is left out": changes.mean(),
        "yours is NaN because the last row has a NaN: the column is left out":
            torch.tensor(NAN) if acc[-1].isnan().any() else truth,
        "yours takes NaN as an accuracy of 0: not measured is not 0":
            (zero[-1] - zero[0]).mean(),
        "yours takes NaN as an accuracy of 0 in row 0: not measured is not 0":
            mean(acc[-1] - zero[0]),
        "yours takes NaN as an accuracy of 0 in the last row: not measured is not 0":
            mean(torch.tensor([b - a[0] if a else NAN for a, b in
                               ((a, 0.0 if b != b else b) for a, b in columns(acc))])),
        "yours starts at the diagonal of the matrix: a skill need not be learnt in "
        "the row of its own number": diagonal.mean(),
        "yours starts at the diagonal of the matrix: a skill need not be learnt in "
        "the row of its own number (without NaN)": mean(diagonal),
        "yours starts one below the diagonal of the matrix: a skill need not be "
        "learnt in the row of its own number":
            mean(acc[-1, : len(acc.diagonal(-1))] - acc.diagonal(-1)),
        "yours is the sum, not the mean, over the columns": truth * n,
        "yours ends at the last number of a column: where the last row is NaN, the "
        "column is left out": mean(torch.tensor(
            [(a[-1] if a and b != b else b) - (a[0] if a else NAN)
             for a, b in columns(acc)])),
        "yours is the mean forgetting: the sign, and first for best": mean(
            forgetting(acc)),
    }  # fmt: skip


def check(impl, name, acc, what):
    truth, wrong = {
        "forgetting": (forgetting, wrong_forgetting),
        "backward_transfer": (transfer, wrong_transfer),
    }[name]
    yours = getattr(impl.extra, name)(acc.clone())
    if name == "forgetting" and torch.is_tensor(yours) and yours.shape == ():
        raise AssertionError(
            "forgetting gives one number for each skill, (K,): a mean over skills "
            "hides which of them is gone"
        )
    compare(yours, truth(acc), functools.partial(wrong, acc),
            f"{name} of {what}", 1e-5)  # fmt: skip


def draw(rng, *shape):
    """Accuracies, no two of them equal, all between .1 and .95."""
    n = math.prod(shape)
    order = torch.randperm(n, generator=rng).view(shape)
    return 0.1 + 0.85 * order / n


def staircase(rng):
    """A base, four stages; five skills that are trained in another order than that of
    the columns, two at once; and a prior one, measured from the start."""
    acc = draw(rng, 5, 6)
    for skill, stage in enumerate((2, 1, 4, 3, 1)):
        acc[:stage, skill] = NAN
    return acc


def gaps(rng):
    """NaN between two numbers, and in the last row."""
    acc = draw(rng, 5, 4)
    acc[2, 0] = acc[1, 1] = acc[2, 1] = acc[-1, 2] = acc[0, 3] = acc[-2, 3] = NAN
    return acc


def plans(rng):
    """Two skills that are not trained yet, one that has just been learnt."""
    acc = draw(rng, 3, 5)
    acc[:, 1] = acc[:, 4] = acc[:-1, 2] = NAN
    return acc


def test_forgetting_of_skills_that_were_always_measured(impl, rng):
    acc = torch.tensor([[0.2, 0.9], [0.9, 0.6], [0.5, 0.7]])
    check(impl, "forgetting", acc, "[[.2, .9], [.9, .6], [.5, .7]]")
    check(impl, "forgetting", draw(rng, 4, 4), "a matrix without NaN")
    check(impl, "forgetting", draw(rng, 2, 3), "two rows without NaN")


def test_forgetting_is_below_zero_for_a_skill_that_got_better(impl, rng):
    acc = draw(rng, 4, 3)
    acc[-1, 1] = 0.98
    check(impl, "forgetting", acc, "a matrix with a skill that got better")


def test_forgetting_of_the_matrix_of_the_sheet(impl):
    acc = torch.tensor(SHEET)
    hand = torch.tensor([0.2, 0.6, NAN, 0.4])
    compare(forgetting(acc), hand, what="the grader's own loop", tolerance=1e-12)
    check(impl, "forgetting", acc, "the sheet's matrix")


def test_forgetting_with_skills_that_are_trained_in_any_order(impl, rng):
    check(impl, "forgetting", staircase(rng), "skills trained in any order")


def test_forgetting_with_gaps(impl, rng):
    check(impl, "forgetting", gaps(rng), "a matrix with gaps")


def test_backward_transfer_of_skills_that_were_always_measured(impl, rng):
    acc = torch.tensor([[0.2, 0.9], [0.9, 0.6], [0.5, 0.7]])
    check(impl, "backward_transfer", acc, "[[.2, .9], [.9, .6], [.5, .7]]")
    check(impl, "backward_transfer", draw(rng, 4, 3), "a matrix without NaN")


def test_backward_transfer_of_the_matrix_of_the_sheet(impl):
    acc = torch.tensor(SHEET)
    compare(transfer(acc), torch.tensor(-0.4), what="the grader's own loop",
            tolerance=1e-12)  # fmt: skip
    check(impl, "backward_transfer", acc, "the sheet's matrix")


def test_backward_transfer_with_skills_that_are_trained_in_any_order(impl, rng):
    check(impl, "backward_transfer", staircase(rng), "skills trained in any order")


def test_backward_transfer_with_gaps(impl, rng):
    check(impl, "backward_transfer", gaps(rng), "a matrix with gaps")


def test_a_skill_that_was_never_measured_is_left_out(impl, rng):
    check(impl, "forgetting", plans(rng), "a matrix with columns of NaN")
    check(impl, "backward_transfer", plans(rng), "a matrix with columns of NaN")


def test_one_row_has_nothing_that_could_be_forgotten(impl, rng):
    acc = draw(rng, 1, 3)
    for name, shape in (("forgetting", (3,)), ("backward_transfer", ())):
        try:
            yours = getattr(impl.extra, name)(acc.clone())
        except NotImplementedError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise AssertionError(
                f"{name} of a matrix of one row, the base alone, ends with {error!r}; "
                "it is NaN"
            ) from None
        compare(yours, torch.full(shape, NAN), {
            f"{name} of a matrix of one row is 0 in yours: no column counts, so "
            "nothing is known, which is NaN": torch.zeros(shape)},
            f"{name} of a matrix of one row")  # fmt: skip


def test_float32_is_good_enough(impl, rng):
    acc = staircase(rng).float()
    check(impl, "forgetting", acc, "a float32 matrix")
    check(impl, "backward_transfer", acc, "a float32 matrix")


def test_what_it_is_given_stays_as_it_is(impl, rng):
    acc = gaps(rng)
    for name in ("forgetting", "backward_transfer"):
        with unchanged(name, acc=acc):
            getattr(impl.extra, name)(acc)
