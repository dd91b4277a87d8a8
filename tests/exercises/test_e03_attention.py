"""e03, attention with a cache: fundamentals first. Difficulty 4, 75 min, 10 points.

The truth is a loop over rows, heads and tokens in float64, with complex numbers for the
rotation; for the cache it is one pass over each row by itself, without padding.
"""

import functools
import math

import torch
from kit import compare, small_model, unchanged

FLOAT64 = True


def make_model(impl, rng, **changes):
    seed = int(torch.randint(1000, (), generator=rng))
    return small_model(impl, seed=seed, n_embd=24, **changes)  # H 4, G 2, D 6


def attend(attn, x, theta, *, rotated="qk", ahead=False, scale=None, tiled=False,
           exchanged=False, crossed=False):  # fmt: skip
    """What attn(x) is, (B, T, C), for rows at positions 0, 1, ...; the keywords make a
    mistake of it."""
    H, G, D, (B, T, C) = attn.H, attn.G, attn.D, x.shape
    flat = x @ attn.qkv_proj.weight.T + attn.qkv_proj.bias
    frequency = theta ** (-torch.arange(0, D, 2) / D)

    def head(b, place, n, turn):
        z = flat[b, place, n * D : (n + 1) * D]
        if not turn:
            return z
        pair = torch.complex(z[: D // 2], z[D // 2 :])
        pair = pair * torch.exp(1j * place * frequency)
        return torch.cat((pair.real, pair.imag))

    rows = []
    for b in range(B):
        heads = []
        for h in range(H):
            g = h % G if tiled else h // (H // G)
            q = [head(b, t, h, "q" in rotated) for t in range(T)]
            k = [head(b, t, H + g, "k" in rotated) for t in range(T)]
            v = [head(b, t, H + G + g, "v" in rotated) for t in range(T)]
            q, k = (k, q) if exchanged else (q, k)
            for t in range(T):
                seen = range(T if ahead else t + 1)
                scores = torch.stack([q[t] @ k[s] for s in seen])
                p = (scores * (scale or 1 / math.sqrt(D))).exp()
                heads.append(sum(p[s] * v[s] for s in seen) / p.sum())
        y = torch.stack(heads).view(H, T, D)
        y = y.reshape(T, C) if crossed else y.transpose(0, 1).reshape(T, C)
        rows.append(y @ attn.o_proj.weight.T)
    return torch.stack(rows)


def tables(T, D, theta):
    """cos and sin (T, D/2) in float64; the model's own are rounded to float32."""
    frequency = theta ** (-torch.arange(0, D, 2) / D)
    angle = torch.arange(T)[:, None] * frequency
    return angle.cos(), angle.sin()


def mistakes(attn, x, theta):
    wrong = functools.partial(attend, attn, x, theta)
    return {
        "query heads do not go with the right key heads: yours takes turns (head h "
        "with key head h % G); it is h // (H / G)": wrong(tiled=True),
        "a token of yours sees those to its right, too": wrong(ahead=True),
        "nothing is rotated in yours": wrong(rotated=""),
        "keys are not rotated in yours": wrong(rotated="q"),
        "queries are not rotated in yours": wrong(rotated="k"),
        "values are rotated in yours: only queries and keys are":
            wrong(rotated="qkv"),
        "scores are not divided by sqrt(D) in yours": wrong(scale=1.0),
        "scores are divided by D in yours, not by sqrt(D)": wrong(scale=1 / attn.D),
        "query and key have changed places in yours": wrong(exchanged=True),
        "heads are not side by side in yours: (B, H, T, D) was made (B, T, C) without "
        "bringing T to the front": wrong(crossed=True),
    }  # fmt: skip


@torch.no_grad()
def check(impl, rng, T, what):
    model = make_model(impl, rng)
    attn, theta = model.h[0].attn, model.config.rope_theta
    x = torch.randn(2, T, 24, generator=rng)
    with unchanged("forward", x=x):
        yours = attn(x, *tables(T, attn.D, theta))
    compare(yours, attend(attn, x, theta), lambda: mistakes(attn, x, theta), what)


def test_one_token_is_its_own_value(impl, rng):
    """No query, no key, no mask and no rotation has a part in it."""
    check(impl, rng, 1, "attention over one token")


def test_two_tokens(impl, rng):
    check(impl, rng, 2, "attention over two tokens")


def test_a_longer_row(impl, rng):
    check(impl, rng, 5, "attention over five tokens")


def test_the_dtype_of_the_activations_stays(impl, rng):
    model = make_model(impl, rng).float()
    x = torch.randn(1, 3, 24, generator=rng).bfloat16()
    y = model.h[0].attn(x, model.cos[:3], model.sin[:3])
    assert y.dtype == torch.bfloat16, f"x is bfloat16 and the result {y.dtype}"


def test_a_gradient_reaches_queries_keys_and_values(impl, rng):
    model = make_model(impl, rng)
    attn = model.h[0].attn
    x = torch.randn(1, 4, 24, generator=rng, requires_grad=True)
    weight = torch.randn(1, 4, 24, generator=rng)
    y = attn(x, *tables(4, attn.D, model.config.rope_theta))
    right = attend(attn, x, model.config.rope_theta)
    assert y.requires_grad, "no gradient flows: is something detached?"
    wanted = (x, attn.qkv_proj.weight)
    pairs = [torch.autograd.grad((z * weight).sum(), wanted) for z in (y, right)]
    for name, yours, truth in zip(("x", "qkv_proj"), *pairs, strict=True):
        compare(yours, truth, what=f"the gradient over {name}")


@torch.no_grad()
def by_cache(impl, model, rows, steps):
    """The hidden states of the last `steps` tokens of each row, (B, steps + 1, C): the
    prompts in one pass, padded, then token after token."""
    lengths = torch.tensor([len(row) - steps for row in rows])
    P = int(lengths.max())
    prompts = torch.zeros(len(rows), P, dtype=torch.int64)
    for row, n, to in zip(rows, lengths, prompts, strict=True):
        to[:n] = torch.tensor(row[:n])
    cache = impl.model.KVCache(model.config, prompts, lengths, steps, model.dtype)
    hidden = model.hidden(prompts, cache=cache)
    states = [hidden[range(len(rows)), lengths - 1]]
    for t in range(steps):
        token = torch.tensor([[row[int(n) + t]] for row, n in
                              zip(rows, lengths, strict=True)])  # fmt: skip
        states.append(model.hidden(token, lengths + t, cache)[:, 0])
    return torch.stack(states, 1)


@torch.no_grad()
def whole(model, rows, steps):
    states = [model.hidden(torch.tensor([row]))[0, -steps - 1 :] for row in rows]
    return torch.stack(states)


def draw_rows(rng, lengths):
    return [torch.randint(11, (n,), generator=rng).tolist() for n in lengths]


def test_one_layer_token_by_token_is_as_one_pass_over_the_whole_row(impl, rng):
    model = make_model(impl, rng, n_layer=1)
    rows = draw_rows(rng, [6])
    alone = [model.hidden(torch.tensor([[token]])) for token in rows[0][-2:]]
    yours, right = by_cache(impl, model, rows, 2), whole(model, rows, 2)
    blind = torch.cat((right[:, :1], torch.cat(alone, 1).detach()), 1)
    compare(yours, right, {
        "a new token sees nothing but itself in yours: cache.write gives back all "
        "keys and values so far": blind,
    }, "token by token, as one pass over the whole row", 1e-9)  # fmt: skip


def test_each_layer_has_a_place_of_its_own_in_the_cache(impl, rng):
    model = make_model(impl, rng, n_layer=3)
    rows = draw_rows(rng, [7])
    yours, right = by_cache(impl, model, rows, 3), whole(model, rows, 3)
    compare(yours, right, what="with three layers (does each write at its own layer?) "
            "token by token, as one pass over the whole row", tolerance=1e-9)


def test_prompts_of_several_lengths_do_not_see_pads(impl, rng):
    model = make_model(impl, rng)
    rows = draw_rows(rng, [3 + 2, 1 + 2, 8 + 2])
    yours, right = by_cache(impl, model, rows, 2), whole(model, rows, 2)
    compare(yours[2], right[2], what="the row of the longest prompt, as one pass over "
            "the whole row", tolerance=1e-9)  # fmt: skip
    compare(yours[:2, :1], right[:2, :1], what="the last token of a shorter prompt",
            tolerance=1e-9)  # fmt: skip
    near = (yours[:2] - right[:2]).abs().max().item()
    assert near < 1e-9, (
        f"rows of shorter prompts differ by {near:.2g} from one pass over the row by "
        "itself: the new token sees the pads of the shorter prompts. Is cache.mask "
        "added to the scores?"
    )


def test_many_tokens_from_a_prompt_of_one(impl, rng):
    model = make_model(impl, rng)
    rows = draw_rows(rng, [13])
    yours, right = by_cache(impl, model, rows, 12), whole(model, rows, 12)
    compare(yours, right, what="twelve tokens behind a prompt of one", tolerance=1e-9)
