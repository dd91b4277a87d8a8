"""The model, the shift and the sampler, beside what plain loops say of them (oracles).

The models are small, in float64, and have weights large enough for the logits to
depend on every token: with nanoGPT's small ones all tokens are nearly as likely.
"""

import copy
import functools
import math
from types import SimpleNamespace

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, close, draw, gradients, make_model, pad, rows_of

import model as model_py
from model import (
    GPT,
    GPTConfig,
    KVCache,
    chunked_kl,
    chunked_nll,
    generate,
    kl_models,
    make_logits,
    response_hidden,
    rotate,
    rotation_tables,
    sample_token,
)

V, END, NEVER = 11, 7, 11  # NEVER is no token: with it as the end, no response ends
every_grouping = pytest.mark.parametrize("n_kv_head", (4, 2, 1))


def make_rng(seed):
    return torch.Generator().manual_seed(seed)


def draw_tokens(*shape, seed=0):
    return torch.randint(0, V, shape, generator=make_rng(seed))


def draw_prompts(lengths, seed=0):
    return [draw_tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


def draw_uniform(*shape, seed=0):
    return torch.rand(shape, generator=make_rng(seed))


def full_logits(model, tokens):
    """(T, V) of one list of tokens, no cache, no batch, no padding."""
    return model(torch.tensor([tokens]))[0]


def response_logits(model, prompts, lengths, response):
    """(B, R, V): what predicts each token of the responses."""
    every = torch.ones_like(response, dtype=torch.bool)
    hidden = response_hidden(model, prompts, lengths, response, every)
    return model.logits(hidden).view(*response.shape, -1)


def record(monkeypatch, owner, name):
    """A list that gets what the function is called with, each time."""
    function, calls = getattr(owner, name), []

    def spy(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


def chi_squared(counts, probabilities):
    n = sum(counts)
    return sum(
        (count - n * p) ** 2 / (n * p)
        for count, p in zip(counts, probabilities, strict=True)
    )


# ---- The model ---------------------------------------------------------------------


def norm_by_hand(x, weight, eps):
    return weight * x / (x.pow(2).sum() / len(x) + eps).sqrt()


def rotate_by_hand(x, position, theta):
    """Channels i and i + D/2 as a complex number, turned by position * frequency."""
    half = len(x) // 2
    angles = [position * theta ** (-i / half) for i in range(half)]
    turned = [
        complex(x[i], x[i + half]) * complex(math.cos(a), math.sin(a))
        for i, a in enumerate(angles)
    ]
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned]).double()


def attention_by_hand(xs, w, layer, config):
    """One query, one head at a time."""
    D, size = config.head_dim, config.n_head // config.n_kv_head
    start = f"h.{layer}.attn."
    sizes = [n * D for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    weights = w[f"{start}qkv_proj.weight"].split(sizes)
    biases = w[f"{start}qkv_proj.bias"].split(sizes)
    q, k, v = ([W @ x + b for x in xs] for W, b in zip(weights, biases, strict=True))
    def normed(x, part):
        weight = w.get(f"{start}{part}_norm.weight")
        return x if weight is None else norm_by_hand(x, weight, config.norm_eps)

    ys = []
    for i in range(len(xs)):
        heads = []
        for h in range(config.n_head):
            mine, group = slice(h * D, h * D + D), h // size
            kv = slice(group * D, group * D + D)
            query = normed(q[i][mine], "q").tolist()
            query = rotate_by_hand(query, i, config.rope_theta)
            scores = []
            for j in range(i + 1):
                key = normed(k[j][kv], "k").tolist()
                key = rotate_by_hand(key, j, config.rope_theta)
                scores.append(math.exp(float(query @ key) / math.sqrt(D)))
            seen = range(i + 1)
            heads.append(sum(scores[j] / sum(scores) * v[j][kv] for j in seen))
        ys.append(w[f"{start}o_proj.weight"] @ torch.cat(heads))
    return ys


def mlp_by_hand(x, w, layer):
    gate, up = (W @ x for W in w[f"h.{layer}.mlp.gate_up_proj.weight"].chunk(2))
    return w[f"h.{layer}.mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("other", ({}, {"head_dim": 6}, {"qk_norm": True}))
@every_grouping
def test_logits_equal_the_formulas_written_out(n_kv_head, other):
    """Norms, rotation, groups, scale, SwiGLU and residuals, token by token."""
    model = make_model(n_kv_head=n_kv_head, **other)
    config, w, tokens = model.config, model.state_dict(), draw_tokens(6).tolist()
    xs = [w["wte.weight"][token] for token in tokens]
    for layer in range(config.n_layer):
        ln_1, ln_2 = w[f"h.{layer}.ln_1.weight"], w[f"h.{layer}.ln_2.weight"]
        normed = [norm_by_hand(x, ln_1, config.norm_eps) for x in xs]
        ys = attention_by_hand(normed, w, layer, config)
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        normed = [norm_by_hand(x, ln_2, config.norm_eps) for x in xs]
        xs = [x + mlp_by_hand(n, w, layer) for x, n in zip(xs, normed, strict=True)]
    last = [norm_by_hand(x, w["ln_f.weight"], config.norm_eps) for x in xs]
    logits = torch.stack([w["lm_head.weight"] @ x for x in last])
    close(full_logits(model, tokens), logits, 1e-5)  # the model's cos is float32


def test_the_future_is_masked():
    model, idx = make_model(), draw_tokens(2, 9)
    for j in range(9):
        other = idx.clone()
        other[:, j] = (idx[:, j] + 1) % V
        change = (model(other) - model(idx)).abs().amax(-1)  # (B, T)
        assert change[:, :j].sum() == 0
        assert change[:, j:].min() > 1e-6


def test_order_of_the_past_matters():
    model = make_model(n_layer=1)
    swapped = full_logits(model, [2, 1, 3])[-1] - full_logits(model, [1, 2, 3])[-1]
    assert swapped.abs().max() > 1e-2


@pytest.mark.parametrize("n_kv_head", (2, 1))
def test_grouped_heads_equal_repeated_heads(n_kv_head):
    grouped, repeated = make_model(n_kv_head=n_kv_head), make_model(n_kv_head=4)
    weights, D = grouped.state_dict(), 4
    for name, p in weights.items():
        if ".qkv_proj." in name:
            q, k, v = p.split([4 * D, n_kv_head * D, n_kv_head * D])
            k, v = (
                x.view(n_kv_head, D, -1).repeat_interleave(4 // n_kv_head, dim=0)
                for x in (k, v)
            )
            parts = [x.reshape(4 * D, *p.shape[1:]) for x in (q, k, v)]
            weights[name] = torch.cat(parts)
    repeated.load_state_dict(weights)
    idx = draw_tokens(3, 8)
    close(grouped(idx), repeated(idx))
    u, lengths = draw_uniform(3, 6), torch.tensor([8, 3, 1])
    response, _ = generate(grouped, idx, lengths, 6, NEVER, u)
    assert torch.equal(response, generate(repeated, idx, lengths, 6, NEVER, u)[0])


def test_rotation_depends_on_distance_only():
    cos, sin = (x.double() for x in rotation_tables(GPTConfig(**SMALL)))
    q, k = torch.randn(2, 1, 1, 1, 4, generator=make_rng(0)).double()

    def score(i, j):
        a, b = rotate(q, cos[[i]], sin[[i]]), rotate(k, cos[[j]], sin[[j]])
        return (a * b).sum()

    assert rotate(q, cos[[9]], sin[[9]]).norm().item() == pytest.approx(q.norm().item())
    close(score(0, 0), (q * k).sum(), 1e-6)
    for distance in (0, 1, 5):
        for shift in (1, 7, 30):
            close(score(distance + shift, shift), score(distance, 0), 1e-5)
    assert (score(3, 0) - score(2, 0)).abs() > 1e-2
    assert (score(3, 0) - score(0, 3)).abs() > 1e-2


def test_attention_depends_on_distance_only():
    model = make_model()
    attention = model.h[0].attn
    x = torch.randn(2, 6, 16, generator=make_rng(0)).double()
    here = attention(x, model.cos[:6], model.sin[:6])
    there = attention(x, model.cos[20:26], model.sin[20:26])
    close(here, there, 1e-5)
    wider = attention(x, model.cos[0:12:2], model.sin[0:12:2])
    assert (here - wider).abs().max() > 1e-2


def test_tied_head_is_one_parameter():
    tied, untied = make_model(), make_model(tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_params() - tied.num_params() == V * 16
    assert sum(p is tied.wte.weight for p in tied.parameters()) == 1
    copied = copy.deepcopy(tied)
    assert copied.lm_head.weight is copied.wte.weight
    assert copied.wte.weight is not tied.wte.weight


def test_tied_head_collects_both_gradients():
    tied, untied = make_model(), make_model(tie_weights=False)
    untied.load_state_dict(tied.state_dict())
    idx = draw_tokens(2, 5)
    for model in (tied, untied):
        model(idx).log_softmax(-1)[..., 3].sum().backward()
    close(tied.wte.weight.grad, untied.wte.weight.grad + untied.lm_head.weight.grad)


@pytest.mark.parametrize("tie_weights", (True, False))
def test_state_dict_round_trip(tie_weights):
    one = make_model(seed=0, tie_weights=tie_weights)
    other = make_model(seed=1, tie_weights=tie_weights)
    idx = draw_tokens(2, 9)
    assert not torch.equal(one(idx), other(idx))
    names = other.load_state_dict(one.state_dict())
    assert not names.missing_keys and not names.unexpected_keys
    assert torch.equal(one(idx), other(idx))
    assert (other.lm_head.weight is other.wte.weight) == tie_weights
    assert not {"cos", "sin"} & set(one.state_dict())


def test_first_weights_come_from_the_generator_alone():
    first = GPT(GPTConfig(**SMALL), make_rng(5)).state_dict()
    torch.rand(3)
    again = GPT(GPTConfig(**SMALL), make_rng(5)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = GPT(GPTConfig(**SMALL), make_rng(6)).state_dict()
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_logits_are_float32_when_activations_are_bfloat16():
    model = make_model().float()
    idx = draw_tokens(2, 9)
    model.dtype = torch.float32
    exact = model(idx)
    model.dtype = torch.bfloat16
    hidden = model.hidden(idx)
    assert hidden.dtype == torch.bfloat16
    assert model(idx).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    close(model.logits(hidden), hidden.float() @ model.lm_head.weight.T, 1e-6)
    assert 0 < (model(idx) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"n_embd": 18}, "n_embd 18 .* n_head 4"),
        ({"n_kv_head": 3}, "n_head 4.* n_kv_head 3"),
        ({"n_embd": 12}, "head size 3 must be even"),
    ),
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


def test_the_models_of_the_tests_are_not_flat_and_favour_an_end():
    """Else tests with responses of several lengths would show nothing."""
    p = make_model(end=END)(draw_tokens(200, 6)).softmax(-1)
    assert 0.1 < p[..., END].mean() < 0.35
    assert p.amax(-1).mean() > 0.4 and p.std(0).mean() > 0.05


# ---- The shift ---------------------------------------------------------------------


def make_oracle():
    """Looks like a model; its logits at j are certain of token j + 1 of the row."""

    def hidden(idx):  # the longest row is cut before its last token, the end
        following = torch.cat([idx[:, 1:], torch.full_like(idx[:, :1], END)], dim=1)
        return 100 * F.one_hot(following, V).double()

    config = SimpleNamespace(block_size=60)
    return SimpleNamespace(config=config, hidden=hidden, logits=lambda hidden: hidden)


def test_oracle_of_the_next_token_is_right_about_every_response_token():
    """Student and teacher, prompts of any length, the end too."""
    response = draw_tokens(4, 5)
    response[:, -1] = END
    for lengths in ((3, 3, 3, 3), (1, 2, 7, 4), (19, 1, 30, 6)):
        prompts = pad(draw_prompts(lengths), fill=2, more=1)
        logits = response_logits(make_oracle(), *prompts, response)
        log_p = logits.log_softmax(-1).gather(-1, response[..., None])
        assert log_p.abs().max() < 1e-10


def test_token_zero_is_predicted_at_the_last_prompt_token():
    """And token t in column length + t - 1; no row is there for what the mask hides."""

    def hidden(idx):
        return torch.arange(idx.size(1)).expand(idx.size(0), -1)[..., None]

    model = SimpleNamespace(config=SimpleNamespace(block_size=60), hidden=hidden)
    prompts, lengths = pad(draw_prompts((1, 2, 7)))
    response = draw_tokens(3, 4)
    every = response_hidden(model, prompts, lengths, response, response >= 0)[:, 0]
    assert every.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 6, 7, 8, 9]
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    some = response_hidden(model, prompts, lengths, response, mask)[:, 0]
    assert some.tolist() == [0, 1, 2, 3]
    none = response_hidden(model, prompts, lengths, response, mask & False)
    assert none.shape == (0, 1)


def test_response_stands_right_behind_its_own_prompt():
    """What the model is shown, read back."""
    shown = []

    def hidden(idx):
        shown.append(idx)
        return torch.zeros(*idx.shape, 1)

    model = SimpleNamespace(config=SimpleNamespace(block_size=60), hidden=hidden)
    prompts, response = draw_prompts((1, 5, 3)), draw_tokens(3, 4, seed=9)
    response_hidden(model, *pad(prompts), response, response >= 0)
    assert shown[0].shape == (3, 8), "no column behind the last that is wanted"
    for row, prompt, tokens in zip(
        shown[0].tolist(), prompts, response.tolist(), strict=True
    ):
        assert row[: len(prompt) + 4] == (prompt + tokens)[:8]


def test_response_logits_equal_one_full_forward_of_each_row():
    model, prompts = make_model(), draw_prompts((1, 6, 3))
    response = draw_tokens(3, 5, seed=9)
    logits = response_logits(model, *pad(prompts), response)
    for i, prompt in enumerate(prompts):
        row = full_logits(model, prompt + response[i].tolist())
        close(logits[i], row[len(prompt) - 1 : -1])


def test_pads_change_no_logits():
    """Neither their number nor the token that they are made of."""
    model, prompt, response = make_model(), draw_prompts((6,)), draw_tokens(1, 5)
    alone = response_logits(model, *pad(prompt), response)
    for more, fill in ((1, 0), (5, 4), (17, END)):
        close(response_logits(model, *pad(prompt, fill, more), response), alone)


def test_loss_of_a_row_does_not_depend_on_the_other_rows():
    model, response = make_model(), draw_tokens(4, 5, seed=9)

    def loss(prompts, response):
        log_p = response_logits(model, *pad(prompts), response).log_softmax(-1)
        return -log_p.gather(-1, response[..., None])[..., 0].sum(1)

    prompts = draw_prompts((4, 1, 8, 3))
    losses = loss(prompts, response)
    others = draw_prompts((9, 2, 5, 7), seed=20)
    for i in range(4):
        mixed, tokens = list(others), draw_tokens(4, 5, seed=30)
        mixed[i], tokens[i] = prompts[i], response[i]
        close(loss(mixed, tokens)[i], losses[i])
        close(loss([prompts[i]], response[[i]])[0], losses[i])


def test_garbage_behind_the_end_leaves_hidden_and_gradient_bit_identical():
    prompts, lengths = draw_prompts((4, 1, 8)), torch.tensor([5, 2, 3])
    mask = torch.arange(5) < lengths[:, None]
    model, results = make_model(), []
    for seed in (50, 51):
        response = torch.where(mask, draw_tokens(3, 5), draw_tokens(3, 5, seed=seed))
        hidden = response_hidden(model, *pad(prompts), response, mask)
        loss = model.logits(hidden).logsumexp(1).sum()
        results.append([hidden, *gradients(model, loss)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(x.abs().max() > 0 for x in results[0])


def test_what_does_not_fit_is_refused_with_its_lengths():
    """Nothing is cut; block_size itself still fits."""
    model, prompts = make_model(block_size=12), draw_prompts((4, 9))
    numbers = "prompt of .*9 tokens and .* need 13 .*> block_size 12"
    with pytest.raises(ValueError, match=numbers):
        response_logits(model, *pad(prompts), draw_tokens(2, 4))
    with pytest.raises(ValueError, match=numbers):
        generate(model, *pad(prompts), 4, END, draw_uniform(2, 4))
    with pytest.raises(ValueError, match="13 tokens > block_size 12"):
        model(draw_tokens(1, 13))
    assert response_logits(model, *pad(prompts), draw_tokens(2, 3)).shape == (2, 3, V)
    response, _ = generate(model, *pad(prompts), 3, NEVER, draw_uniform(2, 3))
    assert response.shape == (2, 3)


def test_kl_models_is_of_the_first_from_the_second_each_after_its_own_prompt(
    monkeypatch,
):
    """Where the mask is true; elsewhere it is 0. In several chunks, but the head is
    asked for once: a head in shards is gathered, by all processes together."""
    monkeypatch.setattr(model_py, "chunk_rows", lambda head: 2)
    p, q = make_model(seed=0), make_model(seed=1)
    p_prompts, q_prompts = draw_prompts((7, 4)), draw_prompts((2, 3), seed=5)
    response = draw_tokens(2, 3, seed=9)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    heads = record(monkeypatch, p, "head"), record(monkeypatch, q, "head")
    kl = kl_models(p, pad(p_prompts), q, pad(q_prompts), response, mask)
    assert [len(calls) for calls in heads] == [1, 1]
    assert not kl.requires_grad and kl[1, 1] == 0
    for i, row in enumerate(response.tolist()):
        # q has the place of the student: forward is KL(teacher || student)
        right = oracles.divergences(q, q_prompts[i], p, p_prompts[i], row, "forward")
        for t in range(3):
            assert not mask[i, t] or kl[i, t].item() == pytest.approx(right[t], 1e-9)


# ---- The cache ---------------------------------------------------------------------


@every_grouping
def test_cached_decoding_equals_full_forward(n_kv_head):
    """Ragged prompts, down to a single token."""
    model, R = make_model(n_kv_head=n_kv_head), 7
    rows = draw_prompts((1, 6, 3, 1))
    prompts, lengths = pad(rows)
    response = draw_tokens(4, R, seed=9)
    cache = KVCache(model.config, prompts, lengths, R, torch.float64)
    logits = model(prompts, cache=cache)
    for i, row in enumerate(rows):
        close(logits[i, : len(row)], full_logits(model, row))
    for t in range(R):
        logits = model(response[:, t : t + 1], lengths + t, cache)
        assert logits.shape == (4, 1, V)
        for i, row in enumerate(rows):
            tokens = row + response[i, : t + 1].tolist()
            close(logits[i, 0], full_logits(model, tokens)[-1])


def test_rows_that_leave_the_cache_change_no_other():
    model, rows = make_model(), draw_prompts((2, 5, 3, 4))
    prompts, lengths = pad(rows)
    cache = KVCache(model.config, prompts, lengths, 2, torch.float64)
    model(prompts, cache=cache)
    model(draw_tokens(4, 1, seed=9), lengths, cache)
    kept = torch.tensor([3, 1])
    cache.keep(kept)
    logits = model(draw_tokens(2, 1, seed=10), lengths[kept] + 1, cache)[:, 0]
    for i, row in enumerate(kept.tolist()):
        tokens = rows[row] + draw_tokens(4, 1, seed=9)[row].tolist()
        tokens += draw_tokens(2, 1, seed=10)[i].tolist()
        close(logits[i], full_logits(model, tokens)[-1])


def test_cache_that_overflows_raises():
    model, prompt, lengths = make_model(), draw_tokens(1, 4), torch.tensor([4])
    cache = KVCache(model.config, prompt[:, :3], lengths - 1, 0, torch.float64)
    with pytest.raises(AssertionError, match="4 > a cache of 3"):
        model(prompt, cache=cache)
    cache = KVCache(model.config, prompt, lengths, 0, torch.float64)
    model(prompt, cache=cache)
    with pytest.raises(AssertionError, match="5 > a cache of 4"):
        model(draw_tokens(1, 1), torch.tensor([4]), cache)


# ---- Responses ---------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head, temperature", ((4, 1.0), (2, 0.6), (1, 1.0)))
def test_sampling_equals_a_full_forward_for_each_token(n_kv_head, temperature):
    """Rows end at different times, and leave the batch."""
    model = make_model(n_kv_head=n_kv_head, end=END)
    prompts, u = draw_prompts((1, 6, 3, 1, 9, 2, 4, 5)), draw_uniform(8, 10, seed=3)
    response, mask = generate(model, *pad(prompts), 10, END, u, temperature)
    by_hand = [
        oracles.sample(model, prompt, row.tolist(), END, temperature)
        for prompt, row in zip(prompts, u, strict=True)
    ]
    assert rows_of(response, mask) == by_hand
    assert len({len(row) for row in by_hand}) > 2


def test_greedy_is_the_argmax_of_the_full_forward():
    """And needs no random numbers."""
    model, prompts = make_model(), draw_prompts((1, 6, 3, 1, 9))
    response, mask = generate(model, *pad(prompts), 8, END, temperature=0)
    for prompt, row in zip(prompts, rows_of(response, mask), strict=True):
        for t, token in enumerate(row):
            assert token == full_logits(model, prompt + row[:t])[-1].argmax()
        assert len(row) == 8 or row[-1] == END


def test_oracle_that_counts_goes_on_from_the_last_token_of_each_prompt():
    """no model, so no cache, takes part."""

    def hidden(idx, positions=None, cache=None):
        return F.one_hot((idx + 1) % V, V).double()

    oracle = SimpleNamespace(
        sampling=torch.inference_mode,
        config=GPTConfig(**SMALL),
        dtype=torch.float64,
        training=False,
        eval=lambda: None,
        train=lambda mode: None,
        hidden=hidden,
        logits=lambda hidden: hidden,
    )
    prompts = pad([[3, 9, 2], [5], [0, 6], [8]])
    response, mask = generate(oracle, *prompts, 5, END, temperature=0)
    expected = [[3, 4, 5, 6, 7], [6, 7], [7], [9, 10, 0, 1, 2]]
    assert rows_of(response, mask) == expected


def test_pads_change_no_response():
    model, prompts = make_model(), draw_prompts((6, 2, 4))
    u = draw_uniform(3, 8, seed=1)
    response, mask = generate(model, *pad(prompts), 8, END, u)
    for more, fill in ((1, 0), (5, 4), (17, END)):
        padded, padded_mask = generate(model, *pad(prompts, fill, more), 8, END, u)
        assert torch.equal(response, padded) and torch.equal(mask, padded_mask)


def test_sample_of_a_row_depends_on_its_own_numbers_only():
    """Other neighbours, other numbers for them, another order, none at all."""
    model, prompts = make_model(), draw_prompts((4, 1, 8, 3))
    u = draw_uniform(4, 9, seed=2)
    rows = rows_of(*generate(model, *pad(prompts), 9, END, u))
    order = [2, 0, 3, 1]
    moved = generate(model, *pad([prompts[i] for i in order]), 9, END, u[order])
    assert rows_of(*moved) == [rows[i] for i in order]
    others, changed = draw_prompts((2, 1, 5, 7), seed=40), 0
    for i in range(4):
        mixed, numbers = list(others), draw_uniform(4, 9, seed=60)
        mixed[i], numbers[i] = prompts[i], u[i]
        mixed_rows = rows_of(*generate(model, *pad(mixed), 9, END, numbers))
        assert mixed_rows[i] == rows[i]
        alone = generate(model, *pad([prompts[i]]), 9, END, u[[i]])
        assert rows_of(*alone) == [rows[i]]
        changed += sum(a != b for a, b in zip(mixed_rows, rows, strict=True))
    assert changed > 6


def test_end_inside_a_prompt_is_a_token_like_any_other():
    """Masks come from lengths; here the pads are made of the end."""
    model = make_model()
    prompts = [[3, END, 5], [END], [2, 8, END, END], [1, 4, 4, 6, 9]]
    u = draw_uniform(4, 9, seed=5)
    rows = rows_of(*generate(model, *pad(prompts, END), 9, END, u))
    for prompt, row, numbers in zip(prompts, rows, u, strict=True):
        assert row == oracles.sample(model, prompt, numbers.tolist(), END)
    cut = [[3], [END], [2, 8]]  # other prompts than those that end in the end
    cut = rows_of(*generate(model, *pad(cut, END), 9, END, u[:3]))
    assert cut[1] == rows[1]
    assert cut[0] != rows[0] and cut[2] != rows[2]
    response = torch.tensor([[END, 3, END, 2]] * 4)
    logits = response_logits(model, *pad(prompts, END), response)
    for i, prompt in enumerate(prompts):
        full = full_logits(model, prompt + response[i].tolist())
        close(logits[i], full[len(prompt) - 1 : -1])


def test_mask_is_true_up_to_and_including_the_first_end():
    """Behind it stands the end; who never ends keeps all tokens."""
    model, prompts = make_model(), draw_prompts([3] * 40)
    u = draw_uniform(40, 12, seed=4)
    endless, full_mask = generate(model, *pad(prompts), 12, NEVER, u)
    assert endless.shape == (40, 12)
    assert full_mask.all()
    response, mask = generate(model, *pad(prompts), 12, END, u)
    for row, tokens, on in zip(
        endless.tolist(), response.tolist(), mask.tolist(), strict=True
    ):
        n = row.index(END) + 1 if END in row else 12
        assert tokens == row[:n] + [END] * (12 - n)
        assert on == [True] * n + [False] * (12 - n)
    assert 0 < mask.all(1).sum() < 40
    assert mask.dtype == torch.bool


def test_responses_are_as_wide_as_the_longest_of_them():
    """Of at most R tokens."""
    model, prompts = make_model(), draw_prompts((3, 3, 3, 3))
    u = draw_uniform(4, 12, seed=4)
    for i in range(4):
        rows = [i, (i + 1) % 4]
        few = pad([prompts[j] for j in rows])
        response, mask = generate(model, *few, 12, END, u[rows])
        longest = max(
            len(oracles.sample(model, prompts[j], u[j].tolist(), END)) for j in rows
        )
        assert response.shape == mask.shape == (2, longest)
    one, mask = generate(model, *pad(prompts), 1, END, u[:, :1])
    assert one.shape == (4, 1)
    assert mask.all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_sampler_and_trainer_agree_on_the_log_probability_of_each_token(
    dtype, monkeypatch
):
    """At a temperature, and when some rows have ended already."""
    model, temperature = make_model().to(dtype), 0.8
    model.dtype = dtype
    calls = record(monkeypatch, model_py, "sample_token")
    prompts, u = pad(draw_prompts((1, 6, 3, 1, 9))), draw_uniform(5, 10, seed=2)
    response, mask = generate(model, *prompts, 10, END, u, temperature)
    hidden = response_hidden(model, *prompts, response, mask)
    logits = make_logits(hidden, model.head(), temperature)
    trainer = torch.zeros(*mask.shape, V, dtype=dtype)
    trainer[mask] = logits.log_softmax(-1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert not mask.all()
    for t, (sampler, *_) in enumerate(calls):
        sampler = (sampler / temperature).log_softmax(-1)
        close(sampler, trainer[mask[:, t], t], tolerance)


@pytest.mark.parametrize("temperature", (0.7, 0.8, 1.0, 1.3))
def test_in_bfloat16_sampler_and_trainer_have_the_same_logits_to_the_bit(
    temperature, monkeypatch
):
    """What is divided by the temperature are float32 logits, not bfloat16 numbers: the
    distribution that was sampled is the one that is trained."""
    model = make_model().float()
    model.dtype = torch.bfloat16
    hiddens = record(monkeypatch, model, "logits")
    divided = record(monkeypatch, torch, "softmax")
    prompts, u = pad(draw_prompts([5] * 64)), draw_uniform(64, 4)
    response, mask = generate(model, *prompts, 4, NEVER, u, temperature)
    assert len(hiddens) == len(divided) == 4
    for (hidden,), (sampler, *_) in zip(hiddens, divided, strict=True):
        assert hidden.dtype == torch.bfloat16
        trainer = make_logits(hidden, model.head(), temperature)
        assert trainer.dtype == torch.float32
        assert torch.equal(trainer, sampler)
    # and the hidden states of the trainer are those of the sampler, up to rounding
    hidden = response_hidden(model, *prompts, response, mask)  # (64 * 4, C)
    assert hidden.dtype == torch.bfloat16
    first, last = hiddens[0][0], hiddens[-1][0]
    close(hidden[::4].float(), first.float(), 0.05)
    close(hidden[3::4].float(), last.float(), 0.05)


@pytest.mark.parametrize("training", (True, False))
def test_generating_leaves_the_model_as_it_was(training):
    """Its mode, its weights, and no cache that a next call sees."""
    model = make_model().train(training)
    before = copy.deepcopy(model.state_dict())
    prompts, u = pad(draw_prompts((4, 2))), draw_uniform(2, 6)
    first, _ = generate(model, *prompts, 6, NEVER, u)
    generate(model, *pad(draw_prompts((7, 3), seed=8)), 6, END, u)
    assert torch.equal(generate(model, *prompts, 6, NEVER, u)[0], first)
    assert model.training == training
    assert all(block.training == training for block in model.h)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_responses_carry_no_gradient_and_can_be_trained_on(monkeypatch):
    """No graph, and no tensors of inference_mode leave the sampler."""
    model, prompts = make_model(), pad(draw_prompts((4, 2)))
    calls = record(monkeypatch, model_py, "sample_token")
    response, mask = generate(model, *prompts, 6, END, draw_uniform(2, 6))
    assert calls and not any(logits.requires_grad for logits, *_ in calls)
    assert not response.requires_grad
    assert not response.is_inference() and not mask.is_inference()
    assert torch.is_grad_enabled()
    hidden = response_hidden(model, *prompts, response, mask)
    model.logits(hidden).logsumexp(-1).sum().backward()
    assert model.wte.weight.grad.abs().max() > 0


def test_responses_come_from_the_weights_as_they_are_now():
    """Same numbers, other weights, other responses."""
    model, prompts, u = make_model(), draw_prompts((4, 2)), draw_uniform(2, 9)
    before, _ = generate(model, *pad(prompts), 9, NEVER, u)
    with torch.no_grad():
        model.wte.weight.mul_(-1)
    after, _ = generate(model, *pad(prompts), 9, NEVER, u)
    assert not torch.equal(before, after)
    for prompt, row, numbers in zip(prompts, after.tolist(), u, strict=True):
        assert row == oracles.sample(model, prompt, numbers.tolist(), NEVER)


# ---- Grouped queries: where strides and shapes go wrong -----------------------------


@every_grouping
def test_no_layout_of_the_result_of_attention_changes_anything(n_kv_head, monkeypatch):
    """Kernels differ in the strides of what they return, with the mask of a cache above
    all: `view` of a result fails on one device and not on another."""
    model, prompts = make_model(n_kv_head=n_kv_head), pad(draw_prompts((5, 2, 7)))
    u, response = draw_uniform(3, 6), draw_tokens(3, 6, seed=9)
    sampled, _ = generate(model, *prompts, 6, NEVER, u)
    logits = response_logits(model, *prompts, response)
    attention, layouts = F.scaled_dot_product_attention, set()

    def permuted(order, *args, **kwargs):
        y = attention(*args, **kwargs).permute(order).contiguous()
        y = y.permute([order.index(i) for i in range(4)])  # as it was, but for strides
        layouts.add(("attn_mask" in kwargs, y.is_contiguous()))
        return y

    for order in ((0, 2, 1, 3), (2, 0, 1, 3), (3, 1, 0, 2)):
        attend = functools.partial(permuted, order)
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        assert torch.equal(generate(model, *prompts, 6, NEVER, u)[0], sampled)
        close(response_logits(model, *prompts, response), logits)
    assert {(True, False), (False, False)} <= layouts, "else this shows nothing"


# ---- Rows of the embedding that are no tokens --------------------------------------


def make_padded(tie_weights, seed=0):
    """The same model with 11 rows, and with 5 more that are no tokens and would be by
    far the most likely, were they taken for tokens."""
    changes = {"tie_weights": tie_weights, "seed": seed}
    padded = make_model(vocab_size=V + 5, n_tokens=V, **changes)
    with torch.no_grad():
        padded.lm_head.weight[V:] *= 30
    cut = make_model(vocab_size=V, **changes)
    cut.load_state_dict(
        {
            name: w[:V] if name in ("wte.weight", "lm_head.weight") else w
            for name, w in padded.state_dict().items()
        }
    )
    return padded, cut


@pytest.mark.parametrize("tie_weights", (True, False))
def test_rows_that_are_no_tokens_are_never_sampled(tie_weights):
    """Whatever their weights, the numbers u and the temperature: responses are those of
    the model without them."""
    padded, cut = make_padded(tie_weights)
    prompts = pad(draw_prompts((1, 6, 3, 9)))
    all_rows = padded.hidden(prompts[0]) @ padded.lm_head.weight.T
    assert (all_rows.argmax(-1) >= V).double().mean() > 0.5, "else this shows nothing"
    assert padded(prompts[0]).shape == (4, 9, V)
    assert torch.equal(
        generate(padded, *prompts, 8, NEVER, temperature=0)[0],
        generate(cut, *prompts, 8, NEVER, temperature=0)[0],
    )
    edges = (0.0, 0.5, 1 - 1e-7, 1 - 2**-24)
    for temperature in (0.3, 1.0, 4.0):
        for u in (draw_uniform(4, 8), *(torch.full((4, 8), edge) for edge in edges)):
            response, mask = generate(padded, *prompts, 8, NEVER, u, temperature)
            assert mask.all() and response.max() < V
            alone, _ = generate(cut, *prompts, 8, NEVER, u, temperature)
            assert torch.equal(response, alone)


@pytest.mark.parametrize("tie_weights", (True, False))
def test_rows_that_are_no_tokens_are_in_no_loss_and_get_no_gradient(tie_weights):
    padded, cut = make_padded(tie_weights)
    teacher, cut_teacher = make_padded(tie_weights, seed=1)
    prompts, response = pad(draw_prompts((4, 1))), draw_tokens(2, 5, seed=9)
    mask, weight = response >= 0, draw(10).abs()
    for kl in (None, "forward", "reverse", "jsd"):
        losses, slopes = [], []
        for model, other in ((padded, teacher), (cut, cut_teacher)):
            hidden = response_hidden(model, *prompts, response, mask)
            if kl is None:
                loss = chunked_nll(hidden, model.head(), response[mask], weight)
            else:
                with torch.no_grad():
                    shown = response_hidden(other, *prompts, response, mask)
                heads = model.head(), other.head()
                loss, _ = chunked_kl(hidden, shown, *heads, weight, kl, 0.7)
            losses.append(loss.detach())
            slopes.append(gradients(model, loss))
        close(*losses)
        for ours, right in zip(*slopes, strict=True):
            close(ours[: len(right)], right)
            assert not ours[len(right) :].any()


# ---- What would be silently wrong is refused ----------------------------------------


@pytest.mark.parametrize("lengths", ([4, 0], [4, -1], [5, 2], [4], [4, 2, 1]))
def test_lengths_that_no_prompt_can_have_are_refused(lengths):
    """An empty prompt would be read at column -1, the last one."""
    model, (prompts, _) = make_model(), pad(draw_prompts((4, 2)))
    lengths, response = torch.tensor(lengths), draw_tokens(2, 3)
    with pytest.raises(ValueError, match="2 prompts in 4 columns have lengths"):
        response_hidden(model, prompts, lengths, response, response >= 0)
    with pytest.raises(ValueError, match="2 prompts in 4 columns have lengths"):
        generate(model, prompts, lengths, 3, END, draw_uniform(2, 3))
    with pytest.raises(ValueError, match="2 prompts in 4 columns have lengths"):
        some = pad(draw_prompts((3, 3)))
        kl_models(model, some, model, (prompts, lengths), response, response >= 0)


def test_a_mask_of_whole_numbers_is_refused():
    """It would be taken for row numbers."""
    model, prompts = make_model(), pad(draw_prompts((4, 2)))
    response = draw_tokens(2, 3)
    with pytest.raises(AssertionError, match="int64"):
        response_hidden(model, *prompts, response, torch.ones_like(response))
    with pytest.raises(AssertionError, match="int64"):
        mask = torch.ones_like(response)
        kl_models(model, prompts, model, prompts, response, mask)


def test_one_random_number_below_one_for_each_row_and_position():
    """With a number of 1 the last token would be taken, however unlikely."""
    model, prompts = make_model(), pad(draw_prompts((4, 2)))
    with pytest.raises(AssertionError, match="one number for each row"):
        generate(model, *prompts, 6, END, draw_uniform(2, 5))
    for wrong in (1.0, -0.1, math.nan):
        u = draw_uniform(2, 6)
        u[1, 3] = wrong
        with pytest.raises(AssertionError, match=r"uniform in \[0, 1\)"):
            generate(model, *prompts, 6, END, u)
    with pytest.raises(AssertionError, match="temperature -1 < 0"):
        generate(model, *prompts, 6, END, draw_uniform(2, 6), -1)


def test_positions_come_with_a_cache_that_holds_something_and_one_token_a_row():
    """Else a token would not see the past, or would stand at position 0."""
    model, (prompts, lengths) = make_model(), pad(draw_prompts((4, 2)))
    cache = KVCache(model.config, prompts, lengths, 3, torch.float64)
    token = draw_tokens(2, 1)
    with pytest.raises(AssertionError, match="0 columns in use"):
        model(token, lengths)
    with pytest.raises(AssertionError, match="0 columns in use"):
        model(token, lengths, cache)
    model(prompts, cache=cache)
    with pytest.raises(AssertionError, match="2 tokens a row"):
        model(draw_tokens(2, 2), lengths, cache)
    with pytest.raises(AssertionError, match="4 columns of the cache are in use"):
        model(token, cache=cache)
    model(token, lengths, cache)


# ---- Drawing a token ---------------------------------------------------------------

TOY = (1.0, -0.5, 0.3, 2.0, -1.5)  # logits


def count(logits, u, **options):
    """How often each token is drawn from one distribution with the numbers u."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(u), -1)
    token = sample_token(rows, u, **options)
    return torch.bincount(token, minlength=len(logits)).tolist()


def spread(n):
    """n numbers in [0, 1), evenly spaced."""
    return (torch.arange(n) + 0.5) / n


@pytest.mark.parametrize("temperature", (1.0, 0.5, 2.0))
def test_samples_follow_the_softmax(temperature):
    """Chi-squared with 4 degrees exceeds 18.5 once in 1000."""
    counts = count(TOY, draw_uniform(20_000), temperature=temperature)
    assert chi_squared(counts, oracles.softmax(TOY, temperature)) < 18.5
    assert chi_squared(counts, oracles.softmax(TOY, 0.9 * temperature)) > 18.5


def test_generated_tokens_follow_the_softmax_at_the_temperature():
    """Chi-squared with 10 degrees exceeds 29.6 once in 1000."""
    model, prompt, n = make_model(scale=1.0), [3, 1, 4], 4000
    logits = full_logits(model, prompt)[-1].tolist()
    for temperature in (0.7, 1.5):
        rows = pad([prompt] * n)
        token, _ = generate(model, *rows, 1, END, draw_uniform(n, 1), temperature)
        counts = torch.bincount(token[:, 0], minlength=V).tolist()
        p = oracles.softmax(logits, temperature)
        assert chi_squared(counts, p) < 29.6
        assert chi_squared(counts, oracles.softmax(logits)) > 29.6


@pytest.mark.parametrize("temperature", (1.0, 0.5, 2.0))
def test_evenly_spaced_numbers_give_each_token_its_share(temperature):
    """Sharper than any chi-squared, within one of n * p."""
    counts = count(TOY, spread(10_000), temperature=temperature)
    shares = oracles.softmax(TOY, temperature)
    for times, p in zip(counts, shares, strict=True):
        assert abs(times - 10_000 * p) < 1.5


@pytest.mark.parametrize("temperature", (0, 1e-4))
def test_at_temperature_zero_the_most_likely_token_is_taken(temperature):
    u = draw_uniform(50)
    assert count(TOY, u, temperature=temperature) == [0, 0, 0, 50, 0]
    assert sample_token(torch.tensor([TOY]), None, temperature=0).tolist() == [3]


def test_largest_and_smallest_numbers_draw_possible_tokens():
    """0 and the float32 below 1: a token without probability is never drawn."""
    logits = (-math.inf, 0.3, -math.inf, 0.1, -math.inf, -200.0)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert count(logits, edges) == [0, 1, 0, 1, 0, 0]
    for seed in range(200):
        row = torch.randn(1, 50, generator=make_rng(seed))
        row[0, 30:] = -math.inf
        assert sample_token(row, edges[1:]).item() < 30


def test_dropout_drops_its_share_of_each_branch_and_only_in_train_mode():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48))
    ids = torch.arange(8)[None]

    def hidden(seed, training, dropout):
        model.dropout = dropout
        torch.manual_seed(seed)
        return model.train(training).hidden(ids)

    assert torch.equal(hidden(1, True, 0.5), hidden(1, True, 0.5))
    assert not torch.equal(hidden(1, True, 0.5), hidden(2, True, 0.5))
    assert torch.equal(hidden(1, True, 0.0), hidden(1, False, 0.5))
    # a branch that is always 1: after it, an entry has grown by 0 or by 1 / (1 - p)
    block, x = model.h[0], torch.zeros(50, 8, 32)
    block.attn.forward = lambda x, *_: torch.ones_like(x)
    block.mlp.forward = torch.zeros_like
    grown = block(x, 0.1, None, None)
    dropped = grown == 0
    assert torch.allclose(grown[~dropped], torch.tensor(1 / 0.9))
    assert (dropped.float().mean() - 0.1).abs() < 5 * (0.09 / x.numel()) ** 0.5
    block.attn.forward, block.mlp.forward = block.mlp.forward, block.attn.forward
    block.mlp.forward = lambda x: torch.ones_like(x)
    block.attn.forward = lambda x, *_: torch.zeros_like(x)
    assert 0 < (block(x, 0.1, None, None) == 0).float().mean() < 0.2


@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_recomputed_activations_give_the_same_gradients(dropout):
    """Equal to the bit, dropout included: the second pass drops what the first did."""
    model = make_model(seed=1).train()
    model.dropout = dropout
    ids = draw_tokens(3, 9)
    kept, results = [], []
    for model.checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        sizes = []

        def count(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            losses = model(ids).logsumexp(-1).sum(), model(ids[:, :5]).square().sum()
        kept.append(sum(sizes))
        sum(losses).backward()  # two forward passes, then both backward
        results.append([*losses, *(p.grad.clone() for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert kept[1] < kept[0] / 3, kept


def test_recomputation_is_for_training_alone(monkeypatch):
    """A cache must not be written twice, and without gradients nothing is kept."""
    calls = []
    monkeypatch.setattr(
        model_py, "checkpoint", lambda block, *x, **_: calls.append(1) or block(*x)
    )
    model = make_model(seed=1)
    model.checkpointing = True
    prompts, lengths = pad(draw_prompts([3, 5]))
    cache = KVCache(model.config, prompts, lengths, 2, model.dtype)
    hidden = model.hidden(prompts, cache=cache)  # gradients are on
    assert hidden.requires_grad and not calls
    with torch.no_grad():
        model.hidden(prompts)
    generate(model, prompts, lengths, 3, NEVER, temperature=0)
    assert not calls
    model.hidden(prompts)
    assert len(calls) == model.config.n_layer
