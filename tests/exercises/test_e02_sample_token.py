"""e02, one token from a distribution. Difficulty 2, 20 minutes, 4 points.

The truth is oracles.softmax, and counting: a fine and even grid of numbers u instead of
random ones meets each token as often as its probability says, within one or two.
"""

import math

import oracles
import torch
from kit import unchanged

GRID = 4000


def draw(rng, *shape, scale=1.5):
    return scale * torch.randn(*shape, generator=rng)


def shares(sample_token, row, temperature):
    """How often each token comes, by a grid of u, for one row of logits."""
    u = (torch.arange(GRID) + 0.5) / GRID
    tokens = sample_token(row.expand(GRID, -1).clone(), u, temperature)
    check_kind(tokens, GRID, len(row))
    return torch.bincount(tokens, minlength=len(row)) / GRID


def check_kind(tokens, B, V):
    assert torch.is_tensor(tokens), f"the result is a {type(tokens).__name__}"
    assert tokens.shape == (B,), (
        f"the result has shape {tuple(tokens.shape)}, it should be ({B},)"
    )
    assert tokens.dtype == torch.int64, f"tokens are int64, yours {tokens.dtype}"
    assert (tokens >= 0).all() and (tokens < V).all(), (
        f"{tokens.max().item()} is no token of a vocabulary of {V}"
    )


def is_near(a, b):
    return (a - torch.tensor(b)).abs().max() < 4 / GRID


def test_each_token_comes_as_often_as_its_probability_says(impl, rng):
    row = torch.tensor([1.0, -0.5, 0.3, 2.0]) + draw(rng, 4, scale=0.1)
    for temperature in (1.0, 0.37, 3.0):
        yours = shares(impl.model.sample_token, row, temperature)
        right = oracles.softmax(row.tolist(), temperature)
        if is_near(yours, right):
            continue
        assert not is_near(yours, oracles.softmax(row.tolist(), 1 / temperature)), (
            "yours is multiplied by the temperature; logits are divided by it"
        )
        assert not is_near(yours, oracles.softmax(row.tolist())), (
            "temperature has no effect on yours: logits are divided by it before the "
            "softmax"
        )
        assert yours.max() < 1, (
            "yours is the most likely token, whatever u is; only temperature 0 is that"
        )
        for token, p in enumerate(right):
            assert yours[token] > 0, (
                f"token {token} has probability {p:.3f} and never comes: nothing may "
                "be left out of a response that trains"
            )
        raise AssertionError(
            f"at temperature {temperature} yours draws with {yours.tolist()}; of the "
            f"distribution it should be {[round(p, 4) for p in right]}"
        )


def test_the_token_is_the_first_whose_cumulative_probability_exceeds_u(impl, rng):
    logits = draw(rng, 200, 6)
    u = torch.rand(200, generator=rng)
    state = torch.get_rng_state()
    tokens = impl.model.sample_token(logits.clone(), u.clone())
    assert torch.equal(state, torch.get_rng_state()), (
        "yours uses torch's own generator: all randomness comes in as u"
    )
    check_kind(tokens, 200, 6)

    def right(rows, numbers):
        pairs = zip(rows.tolist(), numbers.tolist(), strict=True)
        return torch.tensor([oracles.sample_token(row, x) for row, x in pairs])

    def agrees(other):
        return (tokens == other).sum() >= 198  # u may fall on a rounded border

    if agrees(right(logits, u)):
        return
    assert not agrees(right(logits, u[:1].expand(200))), "a row takes another row's u"
    other = 5 - right(logits.flip(1), u)
    assert not (agrees(right(logits, 1 - u)) or agrees(other)), (
        "yours counts from the other end: the first token whose cumulative probability "
        "exceeds u is wanted, from token 0 on"
    )
    raise AssertionError(
        "for the same u yours gives other tokens: the first whose cumulative "
        "probability p_0 + ... + p_i exceeds u is wanted"
    )


def test_a_token_of_probability_zero_never_comes(impl, rng):
    logits = draw(rng, 4, 5)
    logits[:, 0], logits[:, 2] = -math.inf, -math.inf
    for u in (0.0, 0.25, 0.5, 0.999):
        tokens = impl.model.sample_token(logits.clone(), torch.full((4,), u))
        check_kind(tokens, 4, 5)
        for token in (0, 2):
            assert not (tokens == token).any(), (
                f"u = {u}: token {token} comes and has probability 0; its cumulative "
                "probability must exceed u, not equal it"
            )


def test_the_largest_u_still_gives_a_token(impl, rng):
    logits = draw(rng, 64, 3000, scale=0.5)
    u = torch.full((64,), 1 - 2**-24)  # the largest float32 below 1
    check_kind(impl.model.sample_token(logits, u), 64, 3000)


def test_temperature_zero_takes_the_most_likely_token(impl, rng):
    logits = draw(rng, 30, 8)
    for u in (None, torch.rand(30, generator=rng)):
        try:
            tokens = impl.model.sample_token(logits.clone(), u, 0)
        except NotImplementedError:
            raise
        except Exception as error:
            given = "None" if u is None else "given"
            raise AssertionError(
                f"temperature 0 with u {given} raises {type(error).__name__}: {error}"
            ) from error
        check_kind(tokens, 30, 8)
        best = [max(range(8), key=row.__getitem__) for row in logits.tolist()]
        assert tokens.tolist() == best, (
            "temperature 0 is to give the most likely token of each row; yours gives "
            "another"
        )


def test_what_it_is_given_stays_as_it_is(impl, rng):
    logits, u = draw(rng, 3, 5), torch.rand(3, generator=rng)
    with unchanged("sample_token", logits=logits, u=u):
        impl.model.sample_token(logits, u, 0.7)
