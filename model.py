"""A GPT language model, its KV-cached sampler and the KL divergence, all in this file.

    logits   = GPT(tokens)                                  # what comes next
    response ~ generate(model, prompts)                     # token by token, cached
    KL       = kl_reference(student_logits, teacher_logits) # three formulas, on paper
             = fused_kl(student_logits, teacher_logits)     # the same, less memory
             = fused_linear_kl(states, head, ...)           # the same, before the head

Shapes:  B batch   T sequence   P prompt   R response   C channels   V vocabulary
         H query heads   G key/value heads   D head size   N rows (tokens) of a loss
Padding is on the right, positions are per row, masks come from lengths and never from
comparing a token with a pad id. Logits that enter a loss or a sample are float32.

The layout is that of Qwen2.5 (RMSNorm, rotary positions, SwiGLU, grouped queries, bias
on q, k and v only); the style is that of nanoGPT (github.com/karpathy/nanoGPT).
The divergences: SDFT, arXiv 2601.19897, section 3 and appendix A.1.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

try:  # comes with torch on Linux with a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---- The model ---------------------------------------------------------------------


@dataclass
class GPTConfig:
    block_size: int = 128  # longest sequence, in tokens
    vocab_size: int = 512  # tokens
    n_layer: int = 3  # blocks
    n_head: int = 12  # query heads
    n_kv_head: int = 12  # key/value heads; fewer than n_head: grouped queries
    n_embd: int = 192  # channels
    n_inner: int = 1024  # channels inside the MLP
    rope_theta: float = 1000.0  # of the rotary positions; Qwen2.5 has 1,000,000
    norm_eps: float = 1e-6  # of RMSNorm
    qkv_bias: bool = True  # on q, k and v only
    tie_weights: bool = True  # the head is the token embedding

    def __post_init__(self):
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, "
                f"and that of n_kv_head {self.n_kv_head}"
            )
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"head size {self.n_embd // self.n_head} must be even")


class Linear(nn.Linear):
    """Float32 weights, used in the dtype of the activations: see the cast."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        w = self.weight
        y = x.to(w.dtype)  # float32: bfloat16 has too few digits for a mean
        y = F.rms_norm(y, w.shape, w, self.eps)  # w * y / sqrt(mean(y^2) + eps)
        return y.to(x.dtype)


def rotation_tables(config):
    """cos and signed sin of position * frequency, as rotate wants them: float32, each
    (block_size, D), the same frequencies for both halves of the channels."""
    D = config.n_embd // config.n_head
    frequency = config.rope_theta ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
    angle = torch.arange(config.block_size).float()[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn channels a = i and b = i + D/2 (halves, not pairs) of x (B, H, T, D) by the
    angle of their place: (a cos - b sin, b cos + a sin)."""
    y = x.to(cos.dtype)
    return (y * cos + y.roll(y.size(-1) // 2, dims=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of every layer, preallocated: k and v are (L, B, G, S, D).

    Columns 0..P-1 hold the prompts with their pads, column P + t token t of every
    response: a step writes one column, whatever the lengths of the prompts. That a
    column is not a position does no harm: keys are stored after their rotation.
    `mask` (B, 1, 1, S) is added to attention scores: -inf at the pads, else 0. `span`
    is how many columns are in use, an int on the host: reading it waits for no GPU.
    """

    def __init__(self, config, prompts, lengths, max_new_tokens, dtype):
        (B, P), device = prompts.size(), prompts.device
        G, D = config.n_kv_head, config.n_embd // config.n_head
        S = P + max_new_tokens
        self.k = torch.empty(config.n_layer, B, G, S, D, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        column = torch.arange(S, device=device)
        pads = (column >= lengths[:, None]) & (column < P)  # (B, S)
        self.mask = torch.zeros(B, S, device=device, dtype=dtype)
        self.mask = self.mask.masked_fill(pads, -math.inf)[:, None, None]
        self.span = 0

    def grow(self, T):
        """Make room for T more columns, before the layers write them."""
        self.span += T
        assert self.span <= self.k.size(3), f"{self.span} > a cache of {self.k.size(3)}"

    def write(self, layer, k, v):
        """Store k and v (B, G, T, D) at the end; all so far, both (B, G, span, D)."""
        new = slice(self.span - k.size(2), self.span)
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v
        return self.k[layer, :, :, : self.span], self.v[layer, :, :, : self.span]

    def keep(self, rows):
        """Forget every row but these: rows is a tensor of indices."""
        self.k, self.v, self.mask = self.k[:, rows], self.v[:, rows], self.mask[rows]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H, self.G = config.n_head, config.n_kv_head
        self.D = config.n_embd // config.n_head
        heads = self.H + 2 * self.G  # of queries, keys and values, in one matrix
        self.qkv_proj = Linear(config.n_embd, heads * self.D, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, layer=0):
        B, T, C = x.size()
        H, G, D = self.H, self.G, self.D
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, D).transpose(1, 2)
        qk, v = qkv.split((H + G, G), dim=1)  # (B, H + G, T, D), (B, G, T, D)
        q, k = rotate(qk, cos, sin).split((H, G), dim=1)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        # Both branches are softmax(q k' / sqrt(D), over the allowed places) v.
        if k.size(2) == T:  # whole sequences: each token sees those to its left, and
            # so no real token sees the pads to its right
            k = k[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, H, T, D)
            v = v[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, H, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # one token a row: the query heads of a group stand where T would
            q = q.view(B, G, H // G, D)  # query head h: key head h // (H/G)
            seen = cache.mask[..., : cache.span]  # (B, 1, 1, span)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        y = y.view(B, H, T, D).transpose(1, 2).reshape(B, T, C)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.n_embd, 2 * config.n_inner, bias=False)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # SwiGLU


def make_dropout(p, seed, device):
    """A function x -> x that drops a share p of the entries, as the seed decides."""
    if p == 0:
        return lambda x: x
    rng = torch.Generator(device).manual_seed(seed)
    cut = round(256 * p)  # random bytes are the cheapest noise on a CPU

    def drop(x):
        noise = torch.empty(x.numel() // 4 + 1, dtype=torch.int32, device=x.device)
        noise.random_(-(2**31), 2**31, generator=rng)  # four bytes from each draw
        keep = noise.view(torch.uint8)[: x.numel()].view(x.shape) >= cut
        return x * (keep.to(x.dtype) / (1 - cut / 256))

    return drop


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, drop, *where):
        x = x + drop(self.attn(self.ln_1(x), *where))
        return x + drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V).

    `dtype` is that of the activations; the parameters are float32 always. `dropout` is
    the share of each residual branch that is dropped in train mode, decided by
    `dropout_seed`. What is learnt with it is far harder to disturb later.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.dropout, self.dropout_seed = 0.0, 0
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        cos, sin = rotation_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # the ends of the residual branches: their sum keeps its size with depth
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * config.n_layer), generator)
            elif p.dim() == 2:
                nn.init.normal_(p, 0, 0.02, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied head counts once

    def states(self, idx, positions=None, cache=None):
        """The final states, before the head: (B, T, C) in the activations' dtype.

        Args:
            idx: tokens, int64 (B, T).
            positions: None for whole sequences that start at position 0; int64 (B,) for
                one more token per row (T = 1), with its cache.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens > block_size {self.config.block_size}")
        if positions is None:
            cos, sin = self.cos[:T], self.sin[:T]  # (T, D)
        else:  # (B, 1, 1, D): each row at a position of its own
            cos = self.cos[positions][:, None, None]
            sin = self.sin[positions][:, None, None]
        if cache is not None:
            cache.grow(T)
        x = self.wte(idx).to(self.dtype)  # (B, T, C)
        p = self.dropout if self.training else 0.0
        drop = make_dropout(p, self.dropout_seed, idx.device)
        for layer, block in enumerate(self.h):
            x = block(x, drop, cos, sin, cache, layer)
        return self.ln_f(x)

    def head(self, states):
        """Logits (..., V) of hidden states (..., C), in float32 whatever the dtype."""
        return F.linear(states.to(self.lm_head.weight.dtype), self.lm_head.weight)

    def forward(self, idx, positions=None, cache=None):
        return self.head(self.states(idx, positions, cache))


def response_states(model, prompts, lengths, response, mask):
    """The states that predict tokens of the response. The shift by one, only here.

    The state *at* a token predicts the *next* one, so token t of the response (it
    stands at position length + t) is predicted at position length + t - 1: token 0 at
    the last token of the prompt, whatever the length of the row's prompt. Student and
    teacher see prompts of different lengths and the same response; token by token,
    their results of this function stand side by side.

    Args:
        prompts: int64 (B, P), padded on the right; lengths: int64 (B,), all >= 1.
        response: int64 (B, R), padded on the right with any token.
        mask: bool (B, R), the N tokens that are wanted.
    Returns: (N, C), row after row.
    Raises: ValueError if the longest row has more than block_size tokens.
    """
    B, R = response.size()
    row, t = mask.nonzero(as_tuple=True)  # (N,) each: which token of which response
    at = lengths[row] + t - 1  # (N,)
    T = max(at.tolist(), default=0) + 1  # nothing behind is wanted: less than P + R
    if T >= model.config.block_size:
        raise ValueError(
            f"a prompt of up to {prompts.size(1)} tokens and its response need {T + 1} "
            f"> block_size {model.config.block_size}; nothing is cut"
        )
    place = lengths[:, None] + torch.arange(R, device=response.device)  # (B, R)
    idx = F.pad(prompts, (0, R))  # (B, P + R)
    idx = idx.scatter(1, place, response)  # each response right behind its own prompt
    return model.states(idx[:, :T])[row, at]


def response_logits(model, prompts, lengths, response):
    """Logits that predict each token of the response, float32 (B, R, V)."""
    mask = torch.ones_like(response, dtype=torch.bool)  # (B, R)
    logits = model.head(response_states(model, prompts, lengths, response, mask))
    return logits.view(*response.shape, -1)


@torch.no_grad()
def kl_models(p, p_prompts, q, q_prompts, response):
    """KL(p || q) in nats at each token of the response, (B, R), for two models p and q,
    each after (prompts, lengths) of its own."""
    p_logits = response_logits(p, *p_prompts, response)  # (B, R, V)
    return kl_reference(response_logits(q, *q_prompts, response), p_logits, "forward")


# ---- The sampler -------------------------------------------------------------------


def sample_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """One token per row: the first whose cumulative probability exceeds u.

    Args:
        logits: float32 (B, V); u: float32 (B,) in [0, 1), unused at temperature 0.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k, top_p: keep the k most likely tokens, or the fewest that hold p of the
            probability. For reading samples; a rollout that trains uses neither, since
            the response must come from the distribution that is trained.
    Returns: int64 (B,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, dim=-1)  # (B, V)
    if top_k is not None:
        kth = p.topk(min(top_k, p.size(-1)), dim=-1).values[:, -1:]  # (B, 1)
        p = torch.where(p >= kth, p, 0)
    if top_p is not None:
        most, order = p.sort(dim=-1, descending=True)
        before = most.cumsum(-1) - most  # the probability of all that are more likely
        most = torch.where(before < top_p * p.sum(-1, keepdim=True), most, 0)
        p = torch.zeros_like(p).scatter(1, order, most)
    cdf = p.cumsum(-1)
    # times the total, which is 1 only up to rounding (and less after a cut)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.size(-1) - 1)


def generate(
    model, prompts, lengths, max_new_tokens, end, u=None, temperature=1.0, top_k=None,
    top_p=None,
):
    """Sample a response for each prompt, one token per row and step, on a KV cache.

    Right padding and per-row positions: the token after a prompt of 5 is at position 5,
    whatever stands in the batch beside it. All randomness comes in through u, so a
    row's sample depends on its own numbers and not on its neighbours.

    Args:
        prompts: int64 (B, P), padded on the right; lengths: int64 (B,), all >= 1.
        max_new_tokens: R, the longest response, in tokens, its end included.
        end: the token that ends a response.
        u: float32 (B, R), uniform in [0, 1); not needed at temperature 0.
        temperature, top_k, top_p: see sample_token.
    Returns: response int64 (B, R') and mask bool (B, R'), R' <= R the longest sampled.
        The mask is true up to and *including* the end; behind it the response holds
        `end`. A response that never ends keeps all its R tokens: its mask has no false.
    Raises: ValueError if prompt and response do not fit into block_size.
    """
    B, P = prompts.size()
    R = max_new_tokens
    if P + R > model.config.block_size:
        raise ValueError(
            f"a prompt of {P} tokens and a response of {R} need {P + R} "
            f"> block_size {model.config.block_size}; nothing is cut"
        )
    assert temperature == 0 or u.shape == (B, R), "one number for each row and position"
    training = model.training
    model.eval()
    response = torch.full((B, R), end, device=prompts.device)
    row = torch.arange(B, device=prompts.device)  # whose response a row of the batch is
    with torch.inference_mode():  # cheaper than no_grad; what is made in here may never
        # enter a loss, and so response was made before
        cache = KVCache(model.config, prompts, lengths, R, model.dtype)
        states = model.states(prompts, cache=cache)  # (B, P, C)
        state = states[row, lengths - 1]  # (B, C): pads behind it were not seen
        for t in range(R):
            step_u = None if temperature == 0 else u[row, t]
            logits = model.head(state)  # (B, V)
            token = sample_token(logits, step_u, temperature, top_k, top_p)  # (B,)
            response[row, t] = token
            alive = (token != end).nonzero()[:, 0]  # note: a CPU-GPU sync point
            if t == R - 1 or not len(alive):
                break
            if len(alive) < len(row):  # finished rows leave the batch
                row, token, lengths = row[alive], token[alive], lengths[alive]
                cache.keep(alive)
            state = model.states(token[:, None], lengths + t, cache)[:, 0]  # (B, C)
    model.train(training)
    n_tokens = ((response != end).sum(1) + 1).clamp(max=R)  # (B,), an end counts
    R = int(n_tokens.max())
    mask = torch.arange(R, device=prompts.device) < n_tokens[:, None]  # (B, R)
    return response[:, :R], mask


# ---- KL(teacher || student) and its kin --------------------------------------------
#
# s and t are the logits of student and teacher at one token, p_s and p_t their softmax;
# m = 1/2 p_t + 1/2 p_s.
#
#   --kl      value, in nats                     gradient over s
#   forward   KL(teacher || student)             p_s - p_t
#   reverse   KL(student || teacher)             p_s (log p_s - log p_t - value)
#   jsd       1/2 KL(teacher || m)               1/2 p_s (log p_s - log m
#             + 1/2 KL(student || m)                      - KL(student || m))
#
# The teacher never gets a gradient. student [.5, .5] and teacher [.9, .1] give 0.36806
# nats forward and 0.51083 reverse. (Not F.kl_div, whose arguments are the other way
# round.) Eq. 2 of the paper is printed without the weight p_s, which reverse needs.

KLS = ("forward", "reverse", "jsd")
LOG_ZERO = -1e30  # for log 0, where logits are -inf (padding): 0 * -inf would be NaN


def kl_reference(student_logits, teacher_logits, kl="forward"):
    """The divergence at each position, in nats, as one would write it on paper.

    Args: student_logits and teacher_logits (..., V); kl, one of KLS.
    Returns: (...), differentiable in student_logits.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = torch.log_softmax(student_logits, -1, dtype).clamp(min=LOG_ZERO)
    with torch.no_grad():
        log_t = torch.log_softmax(teacher_logits, -1, dtype).clamp(min=LOG_ZERO)
    if kl == "forward":  # KL(teacher || student)
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if kl == "reverse":  # KL(student || teacher)
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    if kl == "jsd":  # 1/2 KL(teacher || m) + 1/2 KL(student || m)
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        teacher_m = (log_t.exp() * (log_t - log_m)).sum(-1)
        student_m = (log_s.exp() * (log_s - log_m)).sum(-1)
        return 0.5 * teacher_m + 0.5 * student_m
    raise ValueError(f"kl {kl!r} is not one of {KLS}")


def kl_rows_torch(s, t, weight, kl, grad):
    """kl_rows with torch alone, for a CPU: the whole formula is run on one block of
    rows, in place, before the next is read. Blocks stay in the processor's cache, so
    main memory gives s and t once and takes the gradient once.

    With d = s - t and D = lse_s - lse_t (lse: log of the sum of exp), both of logits
    that are relative to the largest of their row,

        forward = D - E_t[d]    reverse = E_s[d] - D    (E: mean under p_t or p_s)

    so that a block costs two softmaxes; one torch.exp takes longer than a softmax. The
    largest probability of a row is exp(0 - lse), which gives lse.
    """
    N, V = s.size()
    value = torch.zeros_like(weight)
    block = max(1, 2**17 // V)  # rows; 2^17 floats are 0.5 MB, which stay in the cache
    scratch = [torch.empty(block, V, dtype=s.dtype, device=s.device) for _ in range(3)]
    for i in range(0, N, block):
        x, w = s[i : i + block].clamp_(min=LOG_ZERO), weight[i : i + block]
        p_s, p_t, d = (buffer[: len(x)] for buffer in scratch)
        torch.clamp(t[i : i + block], min=LOG_ZERO, out=d)  # t is the caller's: stays
        torch.softmax(x, dim=-1, out=p_s)
        torch.softmax(d, dim=-1, out=p_t)
        D = (p_t.amax(-1) / p_s.amax(-1)).log()
        largest = x.amax(-1) - d.amax(-1)  # of s and of t, so far apart
        torch.sub(x, d, out=d).sub_(largest[:, None])
        if kl == "forward":
            v = D - torch.linalg.vecdot(p_t, d)
            if grad:
                torch.sub(p_s, p_t, out=x)
        elif kl == "reverse":
            mean = torch.linalg.vecdot(p_s, d)  # E_s[d]
            v = mean - D
            if grad:
                torch.mul(p_s, d.sub_(mean[:, None]), out=x)
        else:
            d.sub_(D[:, None])  # log p_s - log p_t; from it, to the mixture m:
            ratio = math.log(2) - F.softplus(d)  # log p_t - log m
            teacher_m = torch.linalg.vecdot(p_t, ratio)
            ratio = math.log(2) - F.softplus(d.neg_())  # log p_s - log m
            student_m = torch.linalg.vecdot(p_s, ratio)
            v = 0.5 * teacher_m + 0.5 * student_m
            if grad:
                torch.mul(p_s, ratio.sub_(student_m[:, None]), out=x).mul_(0.5)
        value[i : i + block] = torch.where(w == 0, 0, v)
        if grad:
            x.mul_(w[:, None])
            if not w.all():
                x[w == 0] = 0  # not by the product: 0 * inf is not 0
    return value


if triton is not None:

    @triton.jit
    def load_logits(S, T, cols, V: tl.constexpr):
        """Logits of both, float32; the log of 0 behind the vocabulary and for -inf."""
        s = tl.load(S + cols, mask=cols < V, other=-1e30).to(tl.float32)
        t = tl.load(T + cols, mask=cols < V, other=-1e30).to(tl.float32)
        return tl.where(s < -1e30, -1e30, s), tl.where(t < -1e30, -1e30, t)

    @triton.jit
    def log_over_mixture(x):
        """log p_s - log m from x = log p_s - log p_t; of -x it is log p_t - log m."""
        far = 0.6931471805599453 - tl.maximum(-x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))
        near = x * (0.5 - x * (0.125 - x * x / 192))  # the series: far loses digits
        return tl.where(tl.abs(x) < 0.1, near, far)

    @triton.jit
    def kl_kernel(
        S, T, WEIGHT, VALUE, V: tl.constexpr, KL: tl.constexpr, GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program is one row; see kl_rows. With d = s - t, D = lse_s - lse_t:

        forward = D - E_t[d]    reverse = E_s[d] - D    (E: mean under p_t or p_s)
        log p_s - log p_t = d - D, which loses no digits where the two are near (but
        some where all logits of a row stand far from the teacher's)

        Bytes moved, for rows of V floats: the first pass reads s and t, the last reads
        them again and writes the gradient over s, 5 * 4 V (jsd: one pass more, 7 * 4 V;
        a row that fits into one block stays in the L1 cache: 3 * 4 V).
        """
        row = tl.program_id(0).to(tl.int64)  # row * V can be more than 2^31
        S, T = S + row * V, T + row * V
        w = tl.load(WEIGHT + row)
        if w == 0:  # nothing is read: the row may hold anything
            tl.store(VALUE + row, 0.0)
            for i in range(0, V, BLOCK):
                cols = i + tl.arange(0, BLOCK)
                tl.store(S + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)
        else:
            # pass 1: log-sum-exp of both rows and E[d], online: sums are relative to
            # the largest logit so far and shrink when a larger one comes
            max_s, max_t = -float("inf"), -float("inf")
            sum_s, sum_t, sum_d = 0.0, 0.0, 0.0
            for i in range(0, V, BLOCK):
                s, t = load_logits(S, T, i + tl.arange(0, BLOCK), V)
                new_s = tl.maximum(max_s, tl.max(s, 0))
                new_t = tl.maximum(max_t, tl.max(t, 0))
                p_s, p_t = tl.exp(s - new_s), tl.exp(t - new_t)  # not yet normalized
                shrink_s, shrink_t = tl.exp(max_s - new_s), tl.exp(max_t - new_t)
                sum_s = sum_s * shrink_s + tl.sum(p_s, 0)
                sum_t = sum_t * shrink_t + tl.sum(p_t, 0)
                if KL == "forward":
                    sum_d = sum_d * shrink_t + tl.sum(p_t * (s - t), 0)
                else:
                    sum_d = sum_d * shrink_s + tl.sum(p_s * (s - t), 0)
                max_s, max_t = new_s, new_t
            lse_s, lse_t = max_s + tl.log(sum_s), max_t + tl.log(sum_t)
            D = (max_s - max_t) + tl.log(sum_s / sum_t)  # not of two rounded numbers
            mean = sum_d / (sum_t if KL == "forward" else sum_s)  # E_t[d] or E_s[d]
            if KL == "forward":
                value = D - mean
            elif KL == "reverse":
                value = mean - D
            else:  # pass 2 of jsd: both divergences from the mixture
                teacher_m, mean = 0.0, 0.0
                for i in range(0, V, BLOCK):
                    s, t = load_logits(S, T, i + tl.arange(0, BLOCK), V)
                    x = s - t - D  # log p_s - log p_t
                    teacher_m += tl.sum(tl.exp(t - lse_t) * log_over_mixture(-x), 0)
                    mean += tl.sum(tl.exp(s - lse_s) * log_over_mixture(x), 0)
                value = 0.5 * teacher_m + 0.5 * mean
            tl.store(VALUE + row, value)
            if GRAD:  # the last pass
                for i in range(0, V, BLOCK):
                    cols = i + tl.arange(0, BLOCK)
                    s, t = load_logits(S, T, cols, V)
                    x, p_s = s - t - D, tl.exp(s - lse_s)
                    if KL == "forward":  # p_s - p_t; where near, p_t (p_s/p_t - 1)
                        p_t = tl.exp(t - lse_t)
                        g = tl.where(tl.abs(x) < 1, p_t * (tl.exp(x) - 1), p_s - p_t)
                    elif KL == "reverse":
                        g = p_s * (s - t - mean)
                    else:
                        g = 0.5 * p_s * (log_over_mixture(x) - mean)
                    tl.store(S + cols, w * g, mask=cols < V)


def launch_options(V):
    """Columns that a program takes at a time, and its warps (32 threads each). A large
    row in one block would not fit into the registers, and would spill to memory."""
    block = min(4096, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


def kl_rows_triton(s, t, weight, kl, grad):
    """kl_rows in one kernel, for a GPU; logits float32."""
    assert all(x.is_contiguous() for x in (s, t, weight)), "a row is found at row * V"
    value = torch.empty_like(weight)
    if len(s):
        options = launch_options(s.size(-1))
        with torch.cuda.device_of(s):  # Triton would take the current one
            kl_kernel[(len(s),)](s, t, weight, value, s.size(-1), kl, grad, **options)
    return value


def kl_rows(s, t, weight, kl, grad=True):
    """The row kernel: the divergence of each row, and its gradient over s.

    Args:
        s, t: logits of student and teacher, (N, V), contiguous; s is *overwritten* with
            weight * gradient (or left in no useful state if not grad).
        weight: (N,); a row of weight 0 gets value 0 and gradient 0, whatever it holds.
    Returns: the values (N,), not weighted.
    """
    on_gpu = s.is_cuda and s.dtype == torch.float32 and triton is not None
    return (kl_rows_triton if on_gpu else kl_rows_torch)(s, t, weight, kl, grad)


class FusedKL(torch.autograd.Function):
    """Value and gradient in one pass over a private copy of the student's logits."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, kl):
        V = student_logits.size(-1)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        layout = torch.contiguous_format  # rows of V, whatever the caller's are
        s = student_logits.reshape(-1, V).to(dtype, copy=True, memory_format=layout)
        t = teacher_logits.expand_as(student_logits).reshape(-1, V).to(dtype)
        t = t.contiguous()
        value = kl_rows(s, t, s.new_ones(len(s)), kl, ctx.needs_input_grad[0])
        ctx.save_for_backward(s)
        ctx.dtype = student_logits.dtype
        return value.view(student_logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        ds = s.view(*grad.shape, s.size(-1)) * grad[..., None]
        return ds.to(ctx.dtype), None, None


def fused_kl(student_logits, teacher_logits, kl="forward"):
    """The same values and gradients as kl_reference (where a logit is -inf in both or
    in neither); keeps one tensor, not five."""
    if kl not in KLS:
        raise ValueError(f"kl {kl!r} is not one of {KLS}")
    return FusedKL.apply(student_logits, teacher_logits, kl)


def chunk_rows(head):
    """Rows that go through a head (V, C) at a time: few enough to bound the memory,
    many enough for an efficient product."""
    if head.is_cuda:
        return max(1, 2**27 // len(head))  # 512 MB of logits for each model
    return max(1, min(1024, 2**23 // len(head)))  # at most 32 MB


class FusedLinearKL(torch.autograd.Function):
    """Head and divergence together, a chunk of rows at a time: see fused_linear_kl."""

    @staticmethod
    def forward(ctx, states, W, teacher_states, teacher_W, weight, kl, chunk, grad):
        h, h_t = states.to(W.dtype), teacher_states.to(teacher_W.dtype)  # (N, C)
        # logits of a chunk, private, so they may be overwritten, and used again
        S, T = (h.new_empty(min(chunk, len(h)), len(W)) for _ in range(2))
        values = torch.zeros_like(weight)
        dh = torch.zeros_like(h) if grad else None
        dW = torch.zeros_like(W) if grad else None
        for i in range(0, len(h), chunk):
            w = weight[i : i + chunk]
            s = torch.mm(h[i : i + chunk], W.T, out=S[: len(w)])  # (chunk, V)
            t = torch.mm(h_t[i : i + chunk], teacher_W.T, out=T[: len(w)])
            values[i : i + chunk] = kl_rows(s, t, w, kl, grad)
            if grad:  # s now holds weight * dKL/ds
                torch.mm(s, W, out=dh[i : i + chunk])
                dW.addmm_(s.T, h[i : i + chunk])
        loss = (values * weight).sum()
        ctx.save_for_backward(dh, dW)
        ctx.states_dtype = states.dtype
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        dh, dW = ctx.saved_tensors  # final but for the factor from upstream
        return (dh * grad).to(ctx.states_dtype), dW * grad, *[None] * 6


def fused_linear_kl(states, head, teacher_states, teacher_head, weight, kl):
    """sum_n weight_n * divergence_n from the states before the heads.

    The logits [tokens, vocabulary] of student and teacher never exist whole: rows go
    through the heads in chunks, and the gradient of a chunk overwrites its logits.
    Memory: two chunks of logits, for any number of rows, and the gradients of states
    and head, which backward multiplies into new ones.

    Args:
        states (N, C), teacher_states (N, C'): the rows that carry loss, no others.
        head (V, C), teacher_head (V, C'): float32 weights.
        weight: float32 (N,), what each row counts in the loss.
        kl: one of KLS.
    Returns: the loss, a scalar, differentiable in states and head; and the divergence
        of each row (N,) in nats, without gradient.
    """
    if kl not in KLS:
        raise ValueError(f"kl {kl!r} is not one of {KLS}")
    chunk = chunk_rows(head)
    grad = torch.is_grad_enabled()  # it is off inside forward, so ask here
    return FusedLinearKL.apply(
        states, head, teacher_states, teacher_head, weight, kl, chunk, grad
    )


@torch.no_grad()
def kl_stats(states, head, teacher_states, teacher_head, weight):
    """What to watch beside the loss, in nats, from the arguments of fused_linear_kl:
    KL(student || teacher), and the entropies of both; sums over rows, by weight."""
    both = states, head, teacher_states, teacher_head
    return {
        "kl_student_teacher": fused_linear_kl(*both, weight, "reverse")[0],
        "student_entropy": entropy(states, head, weight),
        "teacher_entropy": entropy(teacher_states, teacher_head, weight),
    }


@torch.no_grad()
def entropy(states, head, weight):
    """sum_n weight_n * entropy_n of the distributions behind states (N, C), in nats."""
    total = weight.new_zeros(())
    chunk = chunk_rows(head)
    for i in range(0, len(states), chunk):
        log_p = torch.log_softmax(states[i : i + chunk].to(head.dtype) @ head.T, dim=-1)
        total -= ((log_p.exp() * log_p).sum(-1) * weight[i : i + chunk]).sum()
    return total
