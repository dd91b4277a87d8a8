"""The model, the shift and the sampler, beside what plain loops say of them (oracles).

The models are small, in float64, and have weights large enough for the logits to
depend on every token: with nanoGPT's small ones all tokens are nearly as likely.
"""

import bisect
import cmath
import copy
import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, close, draw, gradients, make_model, pad
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
from model import GPT, GPTConfig, KVCache, generate, response_hidden, sample_token

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


def response_logits(model, prompts, lengths, response):
    """(B, R, V): what predicts each token of the responses."""
    hidden = response_hidden(model, prompts, lengths, response, response > -1)
    return model.logits(hidden).view(*response.shape, -1)


def record(monkeypatch, owner, name):
    """A list that gets what the function is called with, each time."""
    function, calls = getattr(owner, name), []

    def spy(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


def norm_by_hand(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate_by_hand(x, position, theta):
    """Channels i and i + D/2 as a complex number, turned by position * frequency."""
    half = len(x) // 2
    turns = [cmath.rect(1, position * theta ** (-i / half)) for i in range(half)]
    z = [complex(*x[i::half].tolist()) * turn for i, turn in enumerate(turns)]
    return torch.tensor([a.real for a in z] + [a.imag for a in z], dtype=x.dtype)


def attention_by_hand(x, w, config):
    """One head at a time."""
    H, G, D = config.n_head, config.n_kv_head, config.head_dim
    projected = x @ w["qkv_proj.weight"].T + w["qkv_proj.bias"]
    heads, ys = projected.split(D, -1), []  # (T, D) of queries, keys, values

    def turned(x, norm):
        x = norm_by_hand(x, w[norm], config.norm_eps) if config.qk_norm else x
        return torch.stack(
            [rotate_by_hand(row, i, config.rope_theta) for i, row in enumerate(x)]
        )

    for h in range(H):
        kv = H + h // (H // G)
        q, k = turned(heads[h], "q_norm.weight"), turned(heads[kv], "k_norm.weight")
        scores = (q @ k.T / math.sqrt(D)).exp().tril()  # (T, T)
        ys.append(scores @ heads[kv + G] / scores.sum(-1, keepdim=True))
    return torch.cat(ys, -1) @ w["o_proj.weight"].T


def mlp_by_hand(x, w):
    gate, up = (x @ W.T for W in w["gate_up_proj.weight"].chunk(2))
    return gate / (1 + (-gate).exp()) * up @ w["down_proj.weight"].T


@pytest.mark.parametrize("other", ({}, {"head_dim": 6}, {"qk_norm": True}))
@every_grouping
def test_logits_equal_the_formulas_written_out(n_kv_head, other):
    """Norms, rotation, groups, scale, SwiGLU and residuals."""
    model = make_model(n_kv_head=n_kv_head, norm_eps=0.1, tie_weights=False, **other)
    tokens, eps = draw_tokens(6), 0.1
    assert model.config.head_dim == other.get("head_dim", 16 / 4)
    x = model.wte.weight[tokens]  # (T, C)
    for block in model.h:
        attn, mlp = block.attn.state_dict(), block.mlp.state_dict()
        normed = norm_by_hand(x, block.ln_1.weight, eps)
        x = x + attention_by_hand(normed, attn, model.config)
        x = x + mlp_by_hand(norm_by_hand(x, block.ln_2.weight, eps), mlp)
    logits = norm_by_hand(x, model.ln_f.weight, eps) @ model.lm_head.weight.T
    close(model(tokens[None])[0], logits, 1e-5)  # the model's cos is float32


def test_a_tied_head_is_one_parameter_also_when_copied_or_loaded():
    """It collects both gradients."""
    idx, slopes = draw_tokens(2, 9), []
    for tie_weights in (True, False):
        one, other = (make_model(seed, tie_weights=tie_weights) for seed in (0, 1))
        one.load_state_dict(make_model().state_dict())
        assert not torch.equal(one(idx), other(idx))
        other.load_state_dict(one.state_dict())
        assert not {"cos", "sin"} & set(one.state_dict())
        for model in (one, other, copied := copy.deepcopy(one)):
            assert torch.equal(model(idx), one(idx))
            assert (model.lm_head.weight is model.wte.weight) == tie_weights
        assert copied.wte.weight is not one.wte.weight
        slopes.append(gradients(one, one(idx).log_softmax(-1)[..., 3].sum()))
    assert one.num_params() == make_model().num_params() + V * 16
    close(slopes[0][0], slopes[1][0] + slopes[1][-1])


def test_first_weights_have_their_sizes_and_come_from_the_generator_alone():
    """0.02; 0.02 / sqrt(2 layers) at the ends of the residual branches."""
    config = GPTConfig(n_layer=8, n_head=2, n_kv_head=1, n_embd=32, n_inner=48)
    first = GPT(config, make_rng(5)).state_dict()
    torch.rand(3)
    again, other = (GPT(config, make_rng(seed)).state_dict() for seed in (5, 6))
    for name, w in first.items():
        assert torch.equal(w, again[name])
        if w.dim() == 1:
            assert (w == (0 if name.endswith("bias") else 1)).all(), name
        else:
            end = name.endswith(("attn.o_proj.weight", "mlp.down_proj.weight"))
            assert w.std().item() == pytest.approx(0.02 / (4 if end else 1), rel=0.1)
            assert not torch.equal(w, other[name])


def test_activations_are_bfloat16_but_norms_rotation_and_logits_float32():
    """Rounded once, at the end; logits are not rounded."""
    model, idx = make_model().float(), draw_tokens(2, 9)
    exact = model(idx)
    model.dtype = torch.bfloat16
    hidden, logits = model.hidden(idx), model(idx)
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    close(logits, hidden.float() @ model.lm_head.weight.T, 1e-6)
    assert 0 < (logits - exact).norm() < 0.05 * exact.norm()
    right = norm_by_hand(hidden[0, 0].double(), model.ln_f.weight.double(), 1e-6)
    assert torch.equal(model.ln_f(hidden)[0, 0], right.bfloat16())
    args = hidden[:, None, :, :4], model.cos[:9], model.sin[:9]
    right = model_py.rotate(*(x.double() for x in args)).bfloat16()
    assert torch.equal(model_py.rotate(*args), right)


def test_dropout_drops_its_share_of_each_branch_and_only_in_train_mode(monkeypatch):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48))
    shares = record(monkeypatch, F, "dropout")

    def hidden(seed, training, dropout):
        model.dropout = dropout
        torch.manual_seed(seed)
        return model.train(training).hidden(torch.arange(8)[None])

    assert torch.equal(hidden(1, True, 0.5), hidden(1, True, 0.5))
    assert [p for _, p in shares] == [0.5] * 8  # two passes, blocks, branches
    assert not torch.equal(hidden(1, True, 0.5), hidden(2, True, 0.5))
    assert torch.equal(hidden(1, True, 0.0), hidden(1, False, 0.5))
    # a branch that is always 1: after it, an entry has grown by 0 or by 1 / (1 - p)
    block, x = model.h[0], torch.zeros(50, 8, 32)
    for branch, other in itertools.permutations((block.attn, block.mlp)):
        branch.forward = lambda x, *_: torch.ones_like(x)
        other.forward = lambda x, *_: torch.zeros_like(x)
        grown = block(x, 0.1, None, None)
        close(grown, (grown != 0) / 0.9, 1e-6)
        assert ((grown == 0).float().mean() - 0.1).abs() < 5 * (0.09 / x.numel()) ** 0.5


def test_recomputed_activations_give_the_same_gradients_and_are_for_training(
    monkeypatch
):
    """Equal to the bit, dropout included: the second pass drops what the first did. A
    cache must not be written twice, and without gradients nothing is kept."""
    model, ids = make_model(seed=1).train(), draw_tokens(3, 9)
    model.dropout = 0.1
    kept, results = [], []
    for model.checkpointing in (False, True):
        torch.manual_seed(3)
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            losses = model(ids).logsumexp(-1).sum(), model(ids[:, :5]).square().sum()
        results.append([*losses, *gradients(model, sum(losses))])
    assert all(map(torch.equal, *results))
    assert kept[1] < kept[0] / 3, kept
    calls, prompts = record(monkeypatch, model_py, "checkpoint"), pad([[3], [1, 2]])
    cache = KVCache(model.config, *prompts, 2, model.dtype)
    assert model.hidden(prompts[0], cache=cache).requires_grad
    with torch.no_grad():
        model.hidden(prompts[0])
    generate(model, *prompts, 3, NEVER, temperature=0)
    assert not calls
    model.hidden(prompts[0])
    assert len(calls) == model.config.n_layer


@every_grouping
def test_no_layout_of_the_result_of_attention_changes_anything(n_kv_head, monkeypatch):
    """Kernels differ in the strides of what they return, with the mask of a cache above
    all: `view` of a result fails on one device and not on another."""
    model, prompts = make_model(n_kv_head=n_kv_head), pad(draw_prompts((5, 2, 7)))
    u, response = draw_uniform(3, 6), draw_tokens(3, 6, seed=9)
    sampled, _ = generate(model, *prompts, 6, NEVER, u)
    logits = response_logits(model, *prompts, response)
    attention, layouts = F.scaled_dot_product_attention, set()
    for order in ((0, 2, 1, 3), (2, 0, 1, 3), (3, 1, 0, 2)):

        def permuted(*args, order=order, **kwargs):
            y = attention(*args, **kwargs).permute(order).contiguous()
            y = y.permute([order.index(i) for i in range(4)])  # as it was, but strides
            layouts.add(("is_causal" in kwargs, y.is_contiguous()))
            return y

        monkeypatch.setattr(F, "scaled_dot_product_attention", permuted)
        assert torch.equal(generate(model, *prompts, 6, NEVER, u)[0], sampled)
        close(response_logits(model, *prompts, response), logits)
    assert {(True, False), (False, False)} <= layouts, "else this shows nothing"


@pytest.mark.parametrize("n_kv_head, temperature", ((4, 1), (2, 0.6), (1, 1), (2, 0)))
def test_sampling_equals_a_full_forward_of_each_row_alone(n_kv_head, temperature):
    """Up to and including its end, whatever its batch, its order and the pads. An end
    inside a prompt is a token like any other; who never ends keeps all tokens."""
    numbers, end = draw_uniform(12, 10, seed=7), END if n_kv_head == 1 else None
    model = make_model(n_kv_head=n_kv_head, end=end)
    prompts = [*draw_prompts((1, 6, 3, 1, 9, 2, 4, 5, 3)), [3, END, 5], [END], [2, END]]
    pairs = zip(prompts, numbers.tolist(), strict=True)
    alone = [oracles.sample(model, *pair, END, temperature) for pair in pairs]
    order = sorted(range(12), key=lambda i: len(alone[i]))
    assert len({len(row) for row in alone}) > 3 and any(END not in x for x in alone)
    for batch, R, fill, more in (
        (order, 10, 0, 0), (order[::-1], 10, END, 5), (order[:3], 10, 4, 1),
        (order[1:2], 10, END, 2), (order, 1, 0, 0),
    ):  # fmt: skip
        right, lengths = pad([alone[i][:R] for i in batch], END)  # as wide as needed
        u = numbers[batch, :R] if temperature else None
        rows = pad([prompts[i] for i in batch], fill, more)
        response, mask = generate(model, *rows, R, END, u, temperature)
        assert torch.equal(response, right)
        assert torch.equal(mask, torch.arange(right.size(1)) < lengths[:, None])


@pytest.mark.parametrize("dtype, n_kv_head, temperature, tolerance", (
    *((torch.float64, n_kv_head, 0.8, 1e-10) for n_kv_head in (4, 2, 1)),
    *((torch.bfloat16, 2, temperature, 0.05) for temperature in (0.7, 1.0, 1.3)),
    (torch.float32, 2, 0.8, 1e-4),
))  # fmt: skip
def test_what_is_sampled_is_what_is_trained(
    dtype, n_kv_head, temperature, tolerance, monkeypatch
):
    """Hidden states are the same up to rounding, whatever the pads look like, also when
    some rows have ended; from there on all is float32 and equal to the bit: what is
    divided by the temperature are float32 logits, not bfloat16 numbers."""
    wide = torch.promote_types(dtype, torch.float32)
    seed = 5 if n_kv_head == 1 else 0  # of a model whose responses all end
    model = make_model(seed, n_kv_head=n_kv_head).to(wide).requires_grad_(False)
    model.dtype = dtype
    hiddens = record(monkeypatch, model, "logits")
    divided = record(monkeypatch, torch, "softmax")
    own = [2, END, END], [END], [4]
    prompts = pad([*draw_prompts((1, 6, 3, 1, 9, 1, 6)), *own], END)
    u = draw_uniform(10, 50, seed=4)
    response, mask = generate(model, *prompts, 50, END, u, temperature)
    trainer = torch.zeros(*mask.shape, 16, dtype=dtype)
    trainer[mask] = response_hidden(model, *prompts, response, mask)
    shown = oracles.record_tokens(model)
    for limit in (9, 0):  # some tokens, and none; no column behind the last of them
        some = mask & (draw_uniform(*mask.shape) < 0.3)
        some[:, limit:] = False
        row, t = some.nonzero(as_tuple=True)
        hidden = response_hidden(model, *prompts, response, some)
        close(hidden, trainer[some], tolerance)
        assert shown.pop().size(1) == max((prompts[1][row] + t).tolist(), default=1)
    assert len(hiddens) == mask.size(1) < 50, "it stops when all have ended"
    for t, ((hidden,), (x, *_)) in enumerate(zip(hiddens, divided, strict=True)):
        assert torch.equal(x, model_py.make_logits(hidden, model.head(), temperature))
        close(x, hidden.to(wide) @ model.lm_head.weight.T / temperature, 1e-5)
        close(hidden, trainer[mask[:, t], t], tolerance)


@pytest.mark.parametrize("training", (True, False))
def test_generating_leaves_the_model_as_it_was(training, monkeypatch):
    """Its mode, its weights, and no cache that a next call sees; no graph, and no
    tensors of inference_mode leave the sampler: responses can be trained on."""
    model, prompts, u = make_model(), draw_prompts((4, 2)), draw_uniform(2, 6)
    model.train(training).dropout = 0.5  # not in a sample
    before = copy.deepcopy(model.state_dict())
    calls = record(monkeypatch, model_py, "sample_token")
    first, mask = generate(model, *pad(prompts), 6, NEVER, u)
    generate(model, *pad(draw_prompts((7, 3), seed=8)), 6, END, u)
    assert torch.equal(generate(model, *pad(prompts), 6, NEVER, u)[0], first)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(logits.requires_grad for logits, *_ in calls)
    assert torch.is_grad_enabled() and not first.is_inference() | mask.is_inference()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_matrix_is_cast_once_for_a_response_and_not_for_each_token(dtype):
    """And it is let go after it, also where a response fails."""
    model = make_model(**SMALL).float()
    model.dtype, casts = dtype, []
    sizes = {p.shape for p in model.h.parameters() if p.dim() == 2}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out, x = func(*args, **(kwargs or {})), args[0] if args else None
            if getattr(x, "shape", None) in sizes and out.dtype != x.dtype:
                casts.append(x)
            return out

    matrices = sum(p.dim() == 2 for p in model.h.parameters())
    for R in 2, 9:
        casts.clear()
        with Count():
            generate(model, *pad([[1, 2, 3]]), R, NEVER, draw_uniform(1, R))
        assert len(casts) == (matrices if dtype == torch.bfloat16 else 0), R
    with pytest.raises(RuntimeError), model.sampling():
        raise RuntimeError
    assert all(getattr(part, "ready", None) is None for part in model.modules())


def test_numbers_at_the_edge_and_cold_temperatures_draw_possible_tokens():
    """0 and the float32 below 1: a token without probability is never drawn. Of NaN
    comes some token, and no error: the loss will tell. The last 1e-4 of the mass of
    150,000 tokens is shared out token by token: a sum in float32 cannot."""
    logits = torch.tensor([[-math.inf, 0.3, -math.inf, 0.1, -math.inf, -200.0]] * 2)
    u = torch.tensor([0.0, 1 - 2**-24])
    found = [sample_token(logits, u, x).tolist() for x in (1.0, 0, 1e-4)]
    assert found == [[1, 3], [1, 1], [1, 1]]
    assert sample_token(logits * math.nan, u).max() < 6
    rows = draw(200, 50, scale=1, dtype=torch.float32)
    rows[:, 30:] = -math.inf
    assert sample_token(rows, u[1:].expand(200)).max() < 30
    logits = torch.full((1, 150_001), math.log(1e-4 / 150_000))
    logits[0, 0] = 0
    cdf = list(itertools.accumulate(torch.softmax(logits, -1)[0].tolist()))
    u = 1 - torch.arange(1, 1600, 50) * 2**-24  # (32,), in float32 without rounding
    token = sample_token(logits.expand(32, -1), u).tolist()
    right = [bisect.bisect_right(cdf, x * cdf[-1]) for x in u.tolist()]
    assert len(set(right)) == 32
    assert all(abs(a - b) < 2 for a, b in zip(token, right, strict=True))


def make_padded(tie_weights, seed=0):
    """The same model with 11 rows, and with 5 more that are no tokens and would be by
    far the most likely, were they taken for tokens."""
    padded = make_model(seed, vocab_size=V + 5, n_tokens=V, tie_weights=tie_weights)
    padded.lm_head.weight.data[V:] *= 30
    cut = make_model(tie_weights=tie_weights)
    tables, weights = ("wte.weight", "lm_head.weight"), padded.state_dict()
    cut.load_state_dict({k: w[:V] if k in tables else w for k, w in weights.items()})
    return padded, cut


@pytest.mark.parametrize("tie_weights", (True, False))
def test_rows_that_are_no_tokens_are_never_sampled_and_in_no_loss(tie_weights):
    """Whatever their weights, the numbers u and the temperature, all is that of the
    model without them; and they get no gradient."""
    padded, cut = make_padded(tie_weights)
    prompts, results = pad(draw_prompts((1, 6, 3, 9))), []  # of padded, and of cut
    all_rows = padded.hidden(prompts[0]) @ padded.lm_head.weight.T
    assert (all_rows.argmax(-1) >= V).double().mean() > 0.5, "else this shows nothing"
    assert padded(prompts[0]).shape == (4, 9, V)
    edges = (0.0, 0.5, 1 - 1e-7, 1 - 2**-24)
    numbers = draw_uniform(4, 8), *(torch.full((4, 8), edge) for edge in edges)
    for temperature, u in itertools.product((0, 0.3, 1.0, 4.0), numbers):
        response, mask = generate(padded, *prompts, 8, NEVER, u, temperature)
        assert mask.all() and response.max() < V
        alone, _ = generate(cut, *prompts, 8, NEVER, u, temperature)
        assert torch.equal(response, alone)
    for pair in zip((padded, cut), make_padded(tie_weights, 1), strict=True):
        results.append([])
        for kl in (None, *model_py.KLS):
            hiddens = [response_hidden(each, *prompts, response, mask) for each in pair]
            heads, weight = [each.head() for each in pair], draw(32).abs()
            if kl is None:
                args = hiddens[0], heads[0], response[mask], weight
                loss = model_py.chunked_nll(*args)
            else:
                loss, _ = model_py.chunked_kl(*hiddens, *heads, weight, kl, 0.7)
            results[-1] += [loss[None], *gradients(pair[0], loss)]
    for ours, right in zip(*results, strict=True):
        close(ours[: len(right)], right)
        assert not ours[len(right) :].any()


def refused(message, do, *args, error=AssertionError):
    with pytest.raises(error, match=message):
        do(*args)


def test_what_does_not_fit_or_would_be_misread_is_refused():
    """An empty prompt would be read at column -1, and a mask of whole numbers as row
    numbers; at a number of 1 the last token would be taken, however unlikely; a token
    without its cache would not see the past, or would stand at position 0. Nothing is
    cut; block_size itself still fits."""
    model, (prompts, lengths) = make_model(block_size=12), pad(draw_prompts((4, 9)))
    response, u = draw_tokens(2, 4), draw_uniform(2, 4)
    args = model, prompts, lengths
    wrong = dict.fromkeys(((4, 0), (4, -1), (10, 2)), "2 prompts in 9 col")
    wrong[4, 9] = " 9 tokens .* 13 tokens > block_size 12"
    for n, message in wrong.items():
        both = model, prompts, torch.tensor(n)
        refused(message, response_logits, *both, response, error=ValueError)
        refused(message, generate, *both, 4, NEVER, u, error=ValueError)
    three = model, prompts, torch.tensor([4, 2, 1])
    refused("3", response_logits, *three, response)
    refused("4, 2, 1", generate, *three, 4, NEVER, u, error=ValueError)
    response, one, u = response[:, :3], response[:, :1], u[:, :3]
    assert response_logits(*args, response).shape[:2] == (2, 3)
    assert generate(*args, 3, NEVER, u)[0].shape == (2, 3)
    for mask, message in ((response, "int64"), (response[:, 1:] > -1, "2, 2")):
        refused(message, response_hidden, *args, response, mask)
    refused("one number for each row", generate, *args, 2, END, u)
    for u[1, 2] in (1.0, -0.1, math.nan):
        refused(r"not uniform in \[0", generate, *args, 3, END, u, error=ValueError)
    empty, used = (
        KVCache(model.config, prompts, lengths, 3, torch.float64) for _ in range(2)
    )
    model(prompts, cache=used)
    refused("13 > 12", model, draw_tokens(1, 13))
    refused("1 tokens, 0 columns in use", model, one, lengths, empty)
    refused("2 tokens, 9 columns in use", model, response[:, :2], lengths, used)
    refused("positions[?] the cache is in use", model, one, None, used)
    for name, size, message in (
        ("n_embd", 18, "n_embd % n_head"), ("n_kv_head", 3, "n_head % n_kv_head"),
        ("n_embd", 12, "head size 3 is odd"), ("n_tokens", 12, "n_tokens > vocab"),
    ):  # fmt: skip
        refused(message, lambda sizes: GPTConfig(**sizes), {**SMALL, name: size})
