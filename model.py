"""A GPT language model, its KV-cached sampler and its losses, all in this file.

    hidden   = GPT.hidden(tokens)                           # last block, final norm
    logits   = hidden @ head.T                              # of the next token
    response ~ generate(model, prompts)                     # token by token, cached
    KL       = kl_reference(student_logits, teacher_logits) # the formulas, on paper
    loss     = chunked_nll(hidden, head, tokens, weight)    # SFT's loss
    loss     = chunked_kl(hidden, head, teacher's, weight)  # SDFT's loss
    KL       = fused_kl(student_logits, teacher_logits, w)  # the kernel of chunked_kl

Shapes:  B batch   T sequence   P prompt   R response   C channels   V vocabulary
         H query heads   G key/value heads   D head size   S columns of the cache
         N rows of a loss: the response tokens of a batch that count
Padding is on the right, positions are per row. Masks come from lengths, and that of a
sampled response from its first end. Logits that enter a loss or a sample are float32.

The layout is that of Qwen2.5 (RMSNorm, rotary positions, SwiGLU, grouped queries, bias
on q, k and v only); the style is that of nanoGPT (github.com/karpathy/nanoGPT).
The divergences: SDFT, arXiv 2601.19897, section 3 and appendix A.1.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:  # comes with torch on Linux with a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---- The model ---------------------------------------------------------------------


@dataclass
class GPTConfig:
    block_size: int = 128  # longest sequence, in tokens
    vocab_size: int = 512  # rows of the embedding
    n_tokens: int = 0  # rows that are tokens, 0: all; the others are never sampled
    n_layer: int = 3  # blocks
    n_head: int = 12  # query heads
    n_kv_head: int = 12  # key/value heads; fewer than n_head: grouped queries
    n_embd: int = 192  # channels
    n_inner: int = 512  # channels inside the MLP
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    rope_theta: float = 1000.0  # of the rotary positions; a real model brings its own
    norm_eps: float = 1e-6  # of RMSNorm
    qkv_bias: bool = True  # on q, k and v only
    qk_norm: bool = False  # RMSNorm on each query and key (Qwen3)
    tie_weights: bool = True  # the head is the token embedding

    def __post_init__(self):
        assert self.head_dim or self.n_embd % self.n_head == 0, "n_embd % n_head != 0"
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        assert self.n_head % self.n_kv_head == 0, "n_head % n_kv_head != 0"
        assert self.head_dim % 2 == 0, f"head size {self.head_dim} is odd"
        assert 0 <= self.n_tokens <= self.vocab_size, "n_tokens > vocab_size"


class Linear(nn.Linear):
    """Its weights are float32 and are cast to x.dtype on use. (Weights in bfloat16
    would lose the small steps of AdamW and of the teacher's average.)"""

    ready = None  # while sampling: the weight, cast once and not for each token

    def forward(self, x):
        weight = self.weight.to(x.dtype) if self.ready is None else self.ready
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight, bias)


class RMSNorm(nn.RMSNorm):
    """weight * x / sqrt(mean(x^2) + eps), in float32: bfloat16 has too few digits."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def rotation_tables(config):
    """cos and sin of position * frequency for rotary position embeddings (RoPE):
    float32, each (block_size, D/2). Low channels turn fast, high channels slowly."""
    D = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
    angle = torch.arange(config.block_size).float()[:, None] * frequency  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE: turn each pair of channels (i, i + D/2) of x (B, H, T, D) by the angle of
    its position. Halves, as in Qwen and Llama, not neighbours (i, i + 1)."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of every layer, preallocated: k and v are (L, B, G, S, D).

    Columns 0..P-1 hold the prompts with their pads, column P + t token t of every
    response: a step writes one column, whatever the lengths of the prompts. A column
    index is not a position; that is fine, because keys are rotated before they are
    stored. `mask` (B, 1, 1, S) is added to attention scores: -inf at the pads, else 0.
    `used` columns hold something.
    """

    def __init__(self, config, prompts, lengths, max_new_tokens, dtype):
        (B, P), device = prompts.size(), prompts.device
        G, D, S = config.n_kv_head, config.head_dim, P + max_new_tokens
        self.k = torch.empty(config.n_layer, B, G, S, D, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        column = torch.arange(S, device=device)
        pads = (column >= lengths[:, None]) & (column < P)  # (B, S)
        mask = torch.zeros(B, S, device=device, dtype=dtype)
        self.mask = mask.masked_fill(pads, -math.inf)[:, None, None]  # (B, 1, 1, S)
        self.used = 0  # an int on the host: reading it waits for no GPU

    def write(self, layer, k, v):
        """Store k and v, (B, G, T, D) each, in the last T of the used columns; return
        all so far, (B, G, used, D) each."""
        new = slice(self.used - k.size(2), self.used)
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v
        return self.k[layer, :, :, : self.used], self.v[layer, :, :, : self.used]

    def keep(self, rows):
        """Forget every row but these: rows is a tensor of indices."""
        self.k, self.v, self.mask = self.k[:, rows], self.v[:, rows], self.mask[rows]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H, self.G, self.D = config.n_head, config.n_kv_head, config.head_dim
        heads = self.H + 2 * self.G  # of queries, keys and values, in one matrix
        self.qkv_proj = Linear(config.n_embd, heads * self.D, bias=config.qkv_bias)
        self.o_proj = Linear(self.H * self.D, config.n_embd, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.D, config.norm_eps)
            self.k_norm = RMSNorm(self.D, config.norm_eps)

    def forward(self, x, cos, sin, cache=None, layer=0):
        B, T, _ = x.size()
        H, G, D = self.H, self.G, self.D
        qkv = self.qkv_proj(x).view(B, T, H + 2 * G, D)  # (B, T, H + 2G, D)
        qkv = qkv.transpose(1, 2)  # (B, H + 2G, T, D)
        qk, v = qkv.split((H + G, G), dim=1)  # (B, H + G, T, D), (B, G, T, D)
        if self.qk_norm:
            q, k = qk.split((H, G), dim=1)  # (B, H, T, D), (B, G, T, D)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)  # (B, H + G, T, D)
        # queries and keys get the same rotation, so rotate them together
        q, k = rotate(qk, cos, sin).split((H, G), dim=1)  # (B, H, T, D), (B, G, T, D)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, G, used, D), both

        # Both are softmax(q k^T / sqrt(D)) v, over the columns that q may see. Query
        # head h goes with key head h // (H/G).
        attention = F.scaled_dot_product_attention
        if k.size(2) == T:
            # Nothing came before: whole sequences, or prompts that fill a cache. Each
            # token sees those to its left, so none sees the pads to its right.
            y = attention(q, k, v, is_causal=True, enable_gqa=G < H)  # (B, H, T, D)
        else:
            # One token a row (T = 1) sees its cache. Grouped queries without copying k
            # and v: the H/G query heads of a group take the place of T.
            q = q.reshape(B, G, H // G, D)  # (B, G, H/G, D)
            y = attention(q, k, v, cache.mask[..., : cache.used])  # (B, G, H/G, D)
        y = y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)  # (B, T, H * D)
        return self.o_proj(y)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.n_embd, 2 * config.n_inner, bias=False)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, n_inner) each
        return self.down_proj(F.silu(gate) * up)  # SwiGLU


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, p, cos, sin, cache=None, layer=0):
        x = x + F.dropout(self.attn(self.ln_1(x), cos, sin, cache, layer), p)
        return x + F.dropout(self.mlp(self.ln_2(x)), p)


class GPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V).

    `dtype` is that of the activations; the parameters are float32 always. `dropout` is
    the share of each residual branch that is dropped in train mode; the trainers set
    it. `checkpointing`: keep only the input of each block, and recompute the block in
    the backward pass. That costs a forward pass and saves most of the memory.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config, self.dtype = config, torch.float32
        self.dropout, self.checkpointing = 0.0, False
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

    def hidden(self, idx, positions=None, cache=None):
        """The hidden states after the last norm: (B, T, C), in the activations' dtype.

        Args:
            idx: tokens, int64 (B, T), T <= block_size.
            positions: None for whole sequences that start at position 0; int64 (B,) for
                one more token per row (T = 1), with its cache.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} > {self.config.block_size}"
        if positions is None:
            assert cache is None or not cache.used, "positions? the cache is in use"
            cos, sin = self.cos[:T], self.sin[:T]  # (T, D/2)
        else:  # (B, 1, 1, D/2): each row at a position of its own
            assert cache.used and T == 1, f"{T} tokens, {cache.used} columns in use"
            cos = self.cos[positions][:, None, None]
            sin = self.sin[positions][:, None, None]
        if cache is not None:
            cache.used += T  # each layer writes into these columns
        x = self.wte(idx).to(self.dtype)  # (B, T, C)
        p = self.dropout if self.training else 0.0
        for layer, block in enumerate(self.h):
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, p, cos, sin, use_reentrant=False)
            else:
                x = block(x, p, cos, sin, cache, layer)
        return self.ln_f(x)

    def head(self):
        """The matrix of the head, float32 (V, C): only the rows that are tokens. A
        padded embedding (Qwen2.5 has 271 rows too many) never gets a probability."""
        return self.lm_head.weight[: self.config.n_tokens or None]

    @contextlib.contextmanager
    def sampling(self):
        """Inference mode, in which each matrix of a block is cast to dtype once."""
        layers = [part for part in self.h.modules() if isinstance(part, Linear)]
        with torch.inference_mode():
            for layer in layers:
                layer.ready = layer.weight.detach().to(self.dtype)
            try:
                yield
            finally:
                for layer in layers:
                    layer.ready = None

    def logits(self, hidden):
        """float32 (..., V), whatever the dtype of hidden (..., C)."""
        return make_logits(hidden, self.head())

    def forward(self, idx, positions=None, cache=None):
        return self.logits(self.hidden(idx, positions, cache))


def check_fit(model, prompts, lengths, n_tokens, u=None):
    """Raise ValueError unless each of the prompts has 1 to P tokens (an empty one has
    no column that predicts the first token), n_tokens fit into block_size, and the
    numbers u, if there are any, are in [0, 1)."""
    B, P = prompts.size()
    fits = ((lengths >= 1) & (lengths <= P)).all()
    if u is not None:
        fits = fits & ((u >= 0) & (u < 1)).all()
    if lengths.shape != (B,) or not fits:  # one answer: a GPU is waited for once
        what = f"{B} prompts in {P} columns cannot have lengths {lengths.tolist()}"
        raise ValueError(f"{what}, or u is not uniform in [0, 1)")
    if n_tokens > model.config.block_size:
        raise ValueError(
            f"prompts of up to {P} tokens and their responses need {n_tokens} tokens "
            f"> block_size {model.config.block_size}; nothing is cut"
        )


def response_hidden(model, prompts, lengths, response, mask):
    """The hidden states that predict the response. The shift by one, only here.

    The hidden state *at* a token predicts the *next* one, so token t of the response
    is predicted one column before its own, at column length + t - 1:

        column      0  1  2  3  4  5     p prompt; x, y, E response and its end
        row 0       p  p  p  x  y  E     length 3: predicted at columns 2, 3, 4
        row 1       p  x  y  E  .  .     length 1: predicted at columns 0, 1, 2

    Student and teacher see prompts of different lengths and the same response: row n of
    the one's result and row n of the other's predict the same token.

    Args:
        prompts: int64 (B, P), padded on the right; lengths: int64 (B,), all >= 1.
        response: int64 (B, R), padded on the right with any token.
        mask: bool (B, R), true at the N tokens that are wanted.
    Returns: (N, C), row after row.
    Raises: ValueError, see check_fit.
    """
    B, R = response.size()
    assert mask.shape == (B, R) and mask.dtype == torch.bool, (mask.shape, mask.dtype)
    assert len(prompts) == len(lengths) == B, (prompts.shape, lengths.shape)
    # the host waits for a GPU once: for one copy of all that it has to know
    known = torch.cat((lengths[:, None], mask), dim=1).cpu()  # (B, 1 + R)
    row, t = known[:, 1:].nonzero(as_tuple=True)  # (N,) each: token t of a row
    column = known[row, 0] + t - 1  # (N,) where it is predicted
    T = max(column.tolist(), default=0) + 1  # later columns are not needed
    check_fit(model, prompts, known[:, 0], T + 1)  # + 1: a place for the last token
    place = lengths[:, None] + torch.arange(R, device=response.device)  # (B, R)
    idx = F.pad(prompts, (0, R))  # (B, P + R)
    idx = idx.scatter(1, place, response)  # each response follows its own prompt
    row, column = (x.to(idx.device, non_blocking=True) for x in (row, column))
    return model.hidden(idx[:, :T])[row, column]  # (N, C)


# ---- The sampler -------------------------------------------------------------------


def sample_token(logits, u, temperature=1.0):
    """One token per row: the first whose cumulative probability exceeds u. Neither
    top-k nor top-p: a response that trains must come from the distribution that is
    trained.

    Args:
        logits: float32 (B, V); u: float32 (B,) in [0, 1), unused at temperature 0.
        temperature: logits are divided by it; 0 takes the most likely token.
    Returns: int64 (B,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, dim=-1)  # (B, V)
    # float64: a float32 sum of 150,000 terms never reaches the last 1e-4 of the mass
    cdf = p.cumsum(-1, dtype=torch.float64)  # (B, V)
    # times the total, which is 1 only up to rounding
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.size(-1) - 1)


def generate(model, prompts, lengths, max_new_tokens, end, u=None, temperature=1.0):
    """Sample a response for each prompt, one token per row and step, on a KV cache.

    Right padding and per-row positions: the token after a prompt of 5 is at position 5,
    whatever else is in the batch. All randomness comes in through u, so a row's sample
    depends on its own numbers and not on its neighbours.

    Args:
        prompts: int64 (B, P), padded on the right; lengths: int64 (B,), all >= 1.
        max_new_tokens: R, the longest response, in tokens, its end included.
        end: the token that ends a response.
        u: float32 (B, R), uniform in [0, 1); not needed at temperature 0.
        temperature: see sample_token.
    Returns: response int64 (B, R') and mask bool (B, R'), R' <= R the longest sampled.
        The mask is true up to and *including* the end; after it the response is padded
        with `end`. A response that never ends keeps all R tokens, and its mask is true.
    Raises: ValueError, see check_fit.
    """
    (B, P), R, device = prompts.size(), max_new_tokens, prompts.device
    assert temperature == 0 or u.shape == (B, R), "one number for each row and position"
    check_fit(model, prompts, lengths, P + R, None if temperature == 0 else u)
    training = model.training
    model.eval()
    # Tensors made in inference mode (cheaper than no_grad) cannot take part in autograd
    # later. The response has to, so it is allocated outside.
    response = torch.full((B, R), end, device=device)
    row = torch.arange(B, device=device)  # the rows that have not ended yet
    with model.sampling():
        cache = KVCache(model.config, prompts, lengths, R, model.dtype)
        hidden = model.hidden(prompts, cache=cache)  # (B, P, C)
        last = hidden[row, lengths - 1]  # (B, C): it has not seen the pads
        for t in range(R):
            step_u = None if temperature == 0 else u[row, t]
            token = sample_token(model.logits(last), step_u, temperature)  # (B,)
            response[row, t] = token
            if t == R - 1:
                break
            alive = (token != end).nonzero()[:, 0]  # note: a CPU-GPU sync point
            if not len(alive):
                break
            if len(alive) < len(row):  # finished rows leave the batch
                row, token, lengths = row[alive], token[alive], lengths[alive]
                cache.keep(alive)
            last = model.hidden(token[:, None], lengths + t, cache)[:, 0]  # (B, C)
    model.train(training)
    n_tokens = ((response != end).sum(1) + 1).clamp(max=R)  # (B,), an end counts
    R = t + 1  # the last row to end did so at step t
    mask = torch.arange(R, device=device) < n_tokens[:, None]  # (B, R)
    return response[:, :R], mask


# ---- The losses, on paper ------------------------------------------------------------
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
# The teacher never gets a gradient. Probabilities of student [.5, .5] and teacher
# [.9, .1] give 0.36806 nats forward and 0.51083 reverse. (Not F.kl_div, whose arguments
# are the other way round.) Eq. 2 of the paper is printed without the weight p_s, which
# reverse needs.

KLS = ("forward", "reverse", "jsd")
LOG_ZERO = -1e30  # in place of log 0, where a logit is -inf: 0 * -inf is NaN


def kl_reference(student_logits, teacher_logits, kl="forward"):
    """The divergence at each position, in nats, as one would write it on paper.

    Note the order of the arguments: student first, always. Which of the two is in front
    of the || is what `kl` says.

    Args: student_logits and teacher_logits (..., V); kl, one of KLS.
    Returns: (...), differentiable in student_logits.
    """
    assert kl in KLS and student_logits.shape == teacher_logits.shape, kl
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = torch.log_softmax(student_logits, -1, dtype).clamp(min=LOG_ZERO)
    with torch.no_grad():
        log_t = torch.log_softmax(teacher_logits, -1, dtype).clamp(min=LOG_ZERO)
    if kl == "forward":  # KL(teacher || student)
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if kl == "reverse":  # KL(student || teacher)
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    # jsd: 1/2 KL(teacher || m) + 1/2 KL(student || m)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    teacher_m = (log_t.exp() * (log_t - log_m)).sum(-1)
    student_m = (log_s.exp() * (log_s - log_m)).sum(-1)
    return 0.5 * teacher_m + 0.5 * student_m


# ---- The same losses, in chunks of rows ----------------------------------------------
#
# With a large vocabulary, logits (N, V) do not fit into memory, and autograd would keep
# several such tensors. So the losses start from hidden states (N, C). They make the
# logits of some rows at a time, and at once their gradient.


def chunk_rows(head):
    """How many rows of logits are made at a time: few enough to bound the memory (512
    MB on a GPU, at most 32 MB on a CPU), many enough for an efficient product."""
    V = len(head)
    return max(1, 2**27 // V if head.is_cuda else min(1024, 2**23 // V))


def make_logits(hidden, head, temperature=1.0):
    """float32 (N, V) of hidden states (N, C), in any dtype, and a head (V, C). They are
    divided, in float32, as the sampler divides them: the same distribution."""
    logits = hidden.to(head.dtype) @ head.T
    return logits if temperature == 1 else logits.div_(temperature)


class ChunkedLoss(torch.autograd.Function):
    """sum_n weight_n * loss_n in nats, a scalar, differentiable in hidden and head.

    Args: hidden (N, C), head (V, C), temperature: see make_logits; weight, (N,), of the
        head's dtype; row_loss(s, w, rows), the loss itself: from the logits s (chunk,
        V) of some rows, a slice, it returns their losses (chunk,) and w * the gradient
        of each over its logits, (chunk, V). It may overwrite s.
    """

    @staticmethod
    def forward(ctx, hidden, head, weight, temperature, row_loss):
        assert weight.shape == hidden.shape[:1] and weight.dtype == head.dtype, weight
        h, losses = hidden.to(head.dtype), torch.zeros_like(weight)  # (N, C), (N,)
        dh, dW = torch.empty_like(h), torch.zeros_like(head)  # (N, C), (V, C)
        for i in range(0, len(h), chunk_rows(head)):
            rows = slice(i, i + chunk_rows(head))
            s = make_logits(h[rows], head, temperature)  # (chunk, V)
            losses[rows], ds = row_loss(s, weight[rows] / temperature, rows)
            torch.mm(ds, head, out=dh[rows])
            dW.addmm_(ds.T, h[rows])
        ctx.save_for_backward(dh, dW)
        ctx.dtype = hidden.dtype
        return (losses * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors  # complete, up to the factor from upstream
        return (dh * grad).to(ctx.dtype), dW * grad, None, None, None


def chunked_nll(hidden, head, tokens, weight):
    """SFT's loss, in nats, for tokens int64 (N,); else see ChunkedLoss: the same as

        -(weight * log_softmax(hidden @ head.T)[range(N), tokens]).sum()
    """
    assert tokens.shape == weight.shape, (tokens.shape, weight.shape)

    def row_loss(s, w, rows):
        with torch.enable_grad():
            loss = F.cross_entropy(s.requires_grad_(), tokens[rows], reduction="none")
        return loss.detach(), *torch.autograd.grad(loss, s, w)

    return ChunkedLoss.apply(hidden, head, weight, 1.0, row_loss)


def chunked_kl(
    hidden, teacher_hidden, head, teacher_head, weight, kl="forward", temperature=1.0,
    watch=False,
):  # fmt: skip
    """SDFT's loss, in nats, with make_logits of both; else see ChunkedLoss: the same as

        (weight * kl_reference(student_logits, teacher_logits, kl)).sum()

    Returns: the loss, without a gradient for the teacher; and a dict of what else to
        watch, sums by weight: KL(student || teacher), both entropies; {} if not watch.
    """
    assert len(teacher_hidden) == len(hidden), (len(teacher_hidden), len(hidden))
    names = ("kl_student_teacher", "student_entropy", "teacher_entropy")
    sums = weight.new_zeros(3)

    def row_loss(s, w, rows):
        t = make_logits(teacher_hidden[rows], teacher_head, temperature)  # (chunk, V)
        if watch:
            numbers = kl_reference(s, t, "reverse"), entropy(s), entropy(t)
            sums.add_(torch.stack(numbers) @ weight[rows])  # (3, chunk) @ (chunk,)
        return fused_kl(s, t, w, kl), s

    loss = ChunkedLoss.apply(hidden, head, weight, temperature, row_loss)
    return loss, dict(zip(names, sums, strict=True)) if watch else {}


def entropy(logits):
    """The entropy of softmax(logits) in nats, (...) of logits (..., V)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


# ---- The fused log-softmax KL kernel -------------------------------------------------


def fused_kl(s, t, weight, kl="forward"):
    """Both log-softmaxes, the divergence and its gradient at once: see the table above.

    Args:
        s, t: logits of student and teacher, (N, V), contiguous. s is *overwritten* with
            weight * gradient over s.
        weight: (N,), of the dtype of the logits; kl, one of KLS.
    Returns: the divergences (N,), not weighted.
    """
    assert kl in KLS and s.shape == t.shape, kl  # (a GPU would read beyond a row)
    assert weight.shape == s.shape[:1] and weight.dtype == s.dtype, weight
    if s.is_cuda and s.dtype == torch.float32 and triton is not None and kl != "jsd":
        return kl_rows_triton(s, t, weight, kl)
    # Some rows at a time stay in the processor's cache (2^17 floats are 0.5 MB): main
    # memory gives s and t once and takes the gradient once. On a GPU all at once.
    n = max(1, len(s) if s.is_cuda else 2**17 // s.size(-1))
    parts = zip(s.split(n), t.split(n), weight.split(n), strict=True)
    return torch.cat([kl_rows_torch(*part, kl) for part in parts])


def kl_rows_torch(s, t, weight, kl):
    """fused_kl with torch alone, by softmax: it is faster than torch.exp.

    With lse the log of a sum of exp, diff = s - t and log_ratio = lse_s - lse_t,

        forward = log_ratio - E_t[diff]     E_t, E_s: the means under p_t and p_s
        reverse = E_s[diff] - log_ratio

    where s and t are relative to the largest of their row. The largest probability is
    then exp(-lse), so log_ratio comes from those of both. jsd, which is seldom used, is
    left to autograd.
    """
    if kl == "jsd":
        x = s.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = kl_reference(x, t, kl)
        s.copy_(torch.autograd.grad(value, x, weight)[0])
        return value.detach()
    s.clamp_(min=LOG_ZERO)
    t = t.clamp(min=LOG_ZERO)  # a copy: it is overwritten below
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    log_ratio = (p_t.amax(-1) / p_s.amax(-1)).log()
    largest = s.amax(-1) - t.amax(-1)  # difference of the two row maxima
    diff = torch.sub(s, t, out=t).sub_(largest[:, None])
    if kl == "forward":
        value = log_ratio - torch.linalg.vecdot(p_t, diff)
        torch.sub(p_s, p_t, out=s)
    else:
        mean = torch.linalg.vecdot(p_s, diff)  # E_s[diff]
        value = mean - log_ratio
        torch.mul(p_s, diff.sub_(mean[:, None]), out=s)
    s.mul_(weight[:, None])
    return value


if triton is not None:

    @triton.jit
    def load_logits(s_ptr, t_ptr, cols, V: tl.constexpr):
        """Logits of both, float32; log 0 beyond the vocabulary and in place of -inf."""
        s = tl.load(s_ptr + cols, mask=cols < V, other=-1e30).to(tl.float32)
        t = tl.load(t_ptr + cols, mask=cols < V, other=-1e30).to(tl.float32)
        return tl.where(s < -1e30, -1e30, s), tl.where(t < -1e30, -1e30, t)

    @triton.jit
    def kl_kernel(
        s_ptr, t_ptr, weight_ptr, value_ptr, V: tl.constexpr, KL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program is one row; diff and log_ratio are those of kl_rows_torch.

        Bytes moved, for rows of V floats: the first pass reads s and t, the last reads
        them again and writes the gradient over s, 5 * 4 V (a row that fits into one
        block stays in the L1 cache: 3 * 4 V).
        """
        row = tl.program_id(0).to(tl.int64)  # row * V can be more than 2^31
        s_ptr, t_ptr = s_ptr + row * V, t_ptr + row * V
        w = tl.load(weight_ptr + row)
        # pass 1: log-sum-exp of both rows and E[diff], online: sums are relative to the
        # largest logit so far and shrink when a larger one comes
        max_s, max_t = -float("inf"), -float("inf")
        sum_s, sum_t, sum_diff = 0.0, 0.0, 0.0
        for i in range(0, V, BLOCK):
            s, t = load_logits(s_ptr, t_ptr, i + tl.arange(0, BLOCK), V)
            new_s = tl.maximum(max_s, tl.max(s, 0))
            new_t = tl.maximum(max_t, tl.max(t, 0))
            p_s, p_t = tl.exp(s - new_s), tl.exp(t - new_t)  # not yet normalized
            shrink_s, shrink_t = tl.exp(max_s - new_s), tl.exp(max_t - new_t)
            sum_s = sum_s * shrink_s + tl.sum(p_s, 0)
            sum_t = sum_t * shrink_t + tl.sum(p_t, 0)
            if KL == "forward":
                sum_diff = sum_diff * shrink_t + tl.sum(p_t * (s - t), 0)
            else:
                sum_diff = sum_diff * shrink_s + tl.sum(p_s * (s - t), 0)
            max_s, max_t = new_s, new_t
        lse_s, lse_t = max_s + tl.log(sum_s), max_t + tl.log(sum_t)
        # not lse_s - lse_t, the difference of two rounded numbers
        log_ratio = (max_s - max_t) + tl.log(sum_s / sum_t)
        mean = sum_diff / (sum_t if KL == "forward" else sum_s)  # E_t or E_s[diff]
        value = log_ratio - mean if KL == "forward" else mean - log_ratio
        tl.store(value_ptr + row, value)
        for i in range(0, V, BLOCK):  # pass 2: the gradient
            cols = i + tl.arange(0, BLOCK)
            s, t = load_logits(s_ptr, t_ptr, cols, V)
            p_s, p_t = tl.exp(s - lse_s), tl.exp(t - lse_t)
            if KL == "forward":  # p_s - p_t; where near, p_t (p_s/p_t - 1)
                x = s - t - log_ratio  # log p_s - log p_t
                g = tl.where(tl.abs(x) < 1, p_t * (tl.exp(x) - 1), p_s - p_t)
            else:
                g = p_s * (s - t - mean)
            tl.store(s_ptr + cols, w * g, mask=cols < V)


def kl_rows_triton(s, t, weight, kl):
    """fused_kl in one kernel, for a GPU: forward or reverse; logits float32."""
    assert all(x.is_contiguous() for x in (s, t, weight)), "a row is found at row * V"
    value, V = torch.empty_like(weight), s.size(-1)
    # columns that a program takes at a time, and its warps (32 threads each): a large
    # row in one block would not fit into the registers, and would spill to memory
    block = min(4096, triton.next_power_of_2(V))
    warps = 8 if block >= 2048 else 4
    if len(s):
        with torch.cuda.device_of(s):  # Triton would take the current one
            kl_kernel[(len(s),)](s, t, weight, value, V, kl, block, num_warps=warps)
    return value


# ---- A model in shards ---------------------------------------------------------------
#
# What outgrows one GPU (--shard): each process holds a part of every tensor, float32,
# with its gradient, AdamW's state and the teacher's average. torch's FSDP2 gathers the
# tensors of a block when it computes, and sums their gradients.


def whole(x):
    """A tensor; of a shard, all of it, gathered by all processes together. Its gradient
    is summed over them, since the loss of each is a share of the batch's mean."""
    if not hasattr(x, "full_tensor"):
        return x
    return x.full_tensor(grad_placements=[torch.distributed.tensor.Partial()])


def shard(gpt, device):
    """Cut a GPT into shards over all processes, in place and block by block: a CPU
    holds it whole before, no GPU does. gpt.dtype is to be set already: matrices are
    gathered in it; norms and embedding are float32, as ever."""
    from torch.distributed import device_mesh, fsdp

    n, f32 = torch.distributed.get_world_size(), torch.float32
    mesh = device_mesh.init_device_mesh(device.type, (n,))
    policy = fsdp.MixedPrecisionPolicy(gpt.dtype, f32, cast_forward_inputs=False)
    parts = [part for block in gpt.h for part in (block.attn, block.mlp)]
    for part in parts:
        fsdp.fully_shard(part, mesh=mesh, mp_policy=policy)
    parts.append(fsdp.fully_shard(gpt, mesh=mesh, reshard_after_forward=True))
    for part in parts:
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean: see whole
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    fsdp.register_fsdp_forward_method(gpt, "hidden")

    @contextlib.contextmanager
    def sampling():
        """All weights are gathered once, and not for every token, and each process may
        end when its own responses have ended."""
        gpt.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        try:
            with torch.inference_mode():
                yield
        finally:
            gpt.set_reshard_after_forward(True)
            for part in parts:
                part.reshard()

    def deepcopy(memo):
        """Another GPT in shards, with the same weights: torch leaves this to us."""
        with torch.device("meta"):  # takes no memory
            twin = GPT(gpt.config)
        twin.dtype, twin.checkpointing = gpt.dtype, gpt.checkpointing
        twin = shard(twin, device).to_empty(device=device)
        twin.cos, twin.sin = gpt.cos, gpt.sin
        twin.load_state_dict(gpt.state_dict())
        return twin.train(gpt.training)

    # what a GPT in shards does in another way
    gpt.head = lambda: whole(gpt.lm_head.weight)[: gpt.config.n_tokens or None]
    gpt.sampling, gpt.__deepcopy__ = sampling, deepcopy
    return gpt


# ---- Real models, through transformers -----------------------------------------------


def pairs(gpt, hf):
    """(ours, theirs): our tensor, or some rows of it, and the same one of a Hugging
    Face model. We keep q, k and v in one matrix, and gate and up in another."""
    table = [(gpt.wte, [hf.model.embed_tokens]), (gpt.ln_f, [hf.model.norm])]
    table += [] if gpt.config.tie_weights else [(gpt.lm_head, [hf.lm_head])]
    for block, layer in zip(gpt.h, hf.model.layers, strict=True):
        a, b, mlp = block.attn, layer.self_attn, layer.mlp
        table += [
            (block.ln_1, [layer.input_layernorm]),
            (a.qkv_proj, [b.q_proj, b.k_proj, b.v_proj]),
            (a.o_proj, [b.o_proj]),
            (block.ln_2, [layer.post_attention_layernorm]),
            (block.mlp.gate_up_proj, [mlp.gate_proj, mlp.up_proj]),
            (block.mlp.down_proj, [mlp.down_proj]),
        ]
        table += [(a.q_norm, [b.q_norm]), (a.k_norm, [b.k_norm])] if a.qk_norm else []
    for ours, theirs in table:
        for name, tensor in ours.named_parameters():  # weight, perhaps bias
            parts = [getattr(module, name) for module in theirs]
            yield from zip(tensor.split([len(p) for p in parts]), parts, strict=True)


@torch.no_grad()
def from_pretrained(name, n_tokens=0):
    """A Hugging Face model, a folder or a name on the Hub, as our GPT: float32, on the
    CPU. Any model will do whose tensors all have a place in our GPT, if both compute
    the same logits from random tokens.

    Raises: ValueError that says what differs; what transformers raises.
    """
    from transformers import AutoModelForCausalLM as Auto

    hf, info = Auto.from_pretrained(name, dtype="auto", output_loading_info=True)
    c, attn, rotary = hf.config, hf.model.layers[0].self_attn, hf.model.rotary_emb
    T, D = c.max_position_embeddings, attn.head_dim
    with torch.device("meta"):  # takes no memory
        gpt = GPT(GPTConfig(
            T, c.vocab_size, n_tokens, c.num_hidden_layers, c.num_attention_heads,
            c.num_key_value_heads, c.hidden_size, c.intermediate_size, D,
            norm_eps=c.rms_norm_eps, qkv_bias=attn.q_proj.bias is not None,
            qk_norm=hasattr(attn, "q_norm"), tie_weights=c.tie_word_embeddings,
        ))  # fmt: skip
    gpt.to_empty(device="cpu")
    if c.tie_word_embeddings:  # to_empty has untied them
        gpt.lm_head.weight = gpt.wte.weight
    alone = {theirs: key for key, theirs in hf.named_parameters()}
    for ours, theirs in pairs(gpt, hf):
        ours.copy_(theirs.view_as(ours))
        theirs.data = ours  # so that memory holds only one of the two
        del alone[theirs]
    cos, sin = rotary(gpt.wte.weight, torch.arange(T)[None])  # (1, T, D) each
    gpt.cos, gpt.sin = (x[0, :, : D // 2].clone() for x in (cos, sin))  # (T, D/2)

    # transformers invents tensors that a file lacks and drops those it has too many,
    # and 64 tokens show neither a longer window nor angles that change with the length
    odd = [*info["missing_keys"], *info["unexpected_keys"], *alone.values()]
    probe = torch.arange(2 * min(T, 64)).view(2, -1) * 97 % (n_tokens or c.vocab_size)
    logits, wanted = gpt.eval()(probe), hf.eval()(probe).logits[..., : n_tokens or None]
    error = ((logits - wanted).abs().max() / wanted.std()).item()
    window, kind = getattr(c, "sliding_window", None) or T, rotary.rope_type
    if odd or not error < 1e-3 or window < T or kind in ("dynamic", "longrope"):
        raise ValueError(
            f"it computes what our GPT does not: logits differ by {error:.1g} of their "
            f"standard deviation; tensors without a partner: {odd[:3]}; sliding "
            f"window: {window} of {T} tokens; rotary positions: {kind}"
        )
    return gpt.train()


@torch.no_grad()
def save_pretrained(gpt, name, folder):
    """Write a GPT as a folder that transformers loads: float32, with all else from
    `name`, the model it came from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    for ours, theirs in pairs(gpt, hf):
        theirs.data = ours.cpu()
    hf.save_pretrained(folder)
    AutoTokenizer.from_pretrained(name).save_pretrained(folder)
