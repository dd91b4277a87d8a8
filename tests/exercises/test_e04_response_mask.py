"""e04, which tokens are the response. Difficulty 2, 20 minutes, 4 points.

The truth is a loop over the tokens of one row after the other; results are compared as
exact integers.
"""

import torch
from kit import unchanged

END = 9


def row_mask(row, start, stop):
    """True from start to stop - 1."""
    return [start <= place < stop for place in range(len(row))]


def stop_of(row, n, after=1):
    """The column behind the `after`-th end of the response."""
    ends = [place for place in range(n, len(row)) if row[place] == END]
    return ends[after - 1] + 1 if len(ends) >= after else len(row)


def right_row(row, n):
    return row_mask(row, n, stop_of(row, n))


def last_end(row, n):
    ends = [place for place in range(n, len(row)) if row[place] == END]
    return row_mask(row, n, ends[-1] + 1 if ends else len(row))


def end_left_out(row, n):
    pairs = zip(right_row(row, n), row, strict=True)
    return [on and token != END for on, token in pairs]


def by_comparison(row, n):
    return [i >= n and token != END for i, token in enumerate(row)]


def nothing_without_end(row, n):
    return right_row(row, n) if END in row[n:] else [False] * len(row)


MISTAKES = {  # what a row would be; tried in this order
    "the end itself is missing in yours: who does not learn it never stops":
        end_left_out,
    "the end itself is missing in yours, by a comparison with a token: there is no pad "
    "token": by_comparison,
    "the first token of the response is missing in yours: off by one":
        lambda row, n: row_mask(row, n + 1, stop_of(row, n)),
    "tokens of the prompt count in yours: it begins one too early":
        lambda row, n: row_mask(row, n - 1, stop_of(row, n - 1)),
    "tokens of the prompt count in yours":
        lambda row, n: row_mask(row, 0, stop_of(row, n)),
    "tokens behind the end count in yours": lambda row, n: row_mask(row, n, len(row)),
    "yours goes to the last end, not the first": last_end,
    "yours stops at the second end, not the first":
        lambda row, n: row_mask(row, n, stop_of(row, n, 2)),
    "a response that has no end goes on to the last column; yours is empty":
        nothing_without_end,
    "an end in the prompt ends your response": lambda row, n: row_mask(
        row, n, stop_of(row, 0)
    ),
}  # fmt: skip


def words(rng, n):
    return torch.randint(END, (n,), generator=rng).tolist()  # none of them is END


def check(impl, rows, lengths):
    ids, lengths = torch.tensor(rows), torch.tensor(lengths)
    with unchanged("response_mask", ids=ids, lengths=lengths):
        mask = impl.extra.response_mask(ids, lengths, END)
    assert torch.is_tensor(mask), f"the mask is a {type(mask).__name__}, not a tensor"
    assert mask.dtype == torch.bool, f"the mask is bool, yours is {mask.dtype}"
    assert mask.shape == ids.shape, (
        f"the mask has shape {tuple(mask.shape)}, it should be (B, T) = "
        f"{tuple(ids.shape)}"
    )
    given = list(zip(rows, lengths.tolist(), strict=True))
    right = [right_row(*each) for each in given]
    yours = mask.tolist()
    if yours == right:
        return
    bad = next(i for i, row in enumerate(yours) if row != right[i])
    shown = (
        f"\nrow    {rows[bad]}, prompt {lengths[bad]}, end {END}"
        f"\nyours  {[int(x) for x in yours[bad]]}"
        f"\nright  {[int(x) for x in right[bad]]}"
    )
    for message, rule in MISTAKES.items():
        assert yours != [rule(*each) for each in given], message + shown
    first = [right_row(row, given[0][1]) for row in rows]
    assert yours != first, "every row of yours has the length of another row" + shown
    raise AssertionError("other tokens count in yours" + shown)


def test_a_response_with_its_end(impl, rng):
    check(impl, [words(rng, 3) + words(rng, 2) + [END]], [3])


def test_the_end_counts_and_a_pad_that_looks_like_it_does_not(impl, rng):
    check(impl, [words(rng, 2) + words(rng, 2) + [END, END]], [2])


def test_anything_may_stand_behind_the_end(impl, rng):
    check(impl, [words(rng, 2) + words(rng, 1) + [END] + words(rng, 3)], [2])


def test_the_first_of_several_ends_counts(impl, rng):
    row = words(rng, 1) + words(rng, 1) + [END] + words(rng, 1) + [END, 3, END, 4]
    check(impl, [row], [1])


def test_a_response_that_never_ends_goes_on_to_the_last_column(impl, rng):
    check(impl, [words(rng, 2) + words(rng, 4)], [2])


def test_a_response_that_is_nothing_but_its_end(impl, rng):
    check(impl, [words(rng, 3) + [END] + words(rng, 1)], [3])


def test_an_end_in_the_prompt_is_the_prompts(impl, rng):
    check(impl, [words(rng, 1) + [END] + words(rng, 1) + words(rng, 2) + [END]], [3])


def test_a_prompt_that_fills_its_row_has_no_response(impl, rng):
    check(impl, [words(rng, 5)], [5])


def test_rows_of_a_batch_have_lengths_of_their_own(impl, rng):
    rows = [
        words(rng, 1) + words(rng, 3) + [END] + words(rng, 1),
        words(rng, 3) + words(rng, 1) + [END, END],
        words(rng, 4) + words(rng, 2),
    ]
    check(impl, rows, [1, 3, 4])


def test_many_random_rows(impl, rng):
    ids = torch.randint(6, END + 1, (60, 12), generator=rng)
    lengths = torch.randint(1, 13, (60,), generator=rng)
    check(impl, ids.tolist(), lengths.tolist())
