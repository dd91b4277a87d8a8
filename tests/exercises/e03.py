"""e03: attention with a cache. Grader: test_e03_attention.py"""

from kit import Exercise

SHEET = """
A response is sampled token by token; the KV cache keeps the keys and values of what was
read, so that a step costs one token and not the whole row. It is a speed-up and nothing
else: token by token with the cache gives the numbers of one pass over the whole row.

Write CausalSelfAttention.forward(x, cos, sin, cache, layer) of model.py. x is
(B, T, C), the result too. H query heads, G key/value heads (H is a multiple of G), D
channels each; they are self.H, self.G, self.D. (self.qk_norm, for Qwen3, is false.)

1. self.qkv_proj(x) is (B, T, (H + 2 G) D): H queries, then G keys, then G values, each
   D channels. Bring them to (B, heads, T, D).
2. rotate(x, cos, sin) turns queries and keys, (B, heads, T, D), by their positions. The
   values are not turned. Who calls you made cos and sin for these T tokens.
3. With a cache: k, v = cache.write(layer, k, v) stores the new ones, both (B, G, T, D),
   and gives all so far, (B, G, used, D). Keys are stored after their rotation.
4. Query head h goes with key/value head h // (H / G): the first H / G heads share the
   first key head.
5. softmax(q k' / sqrt(D)) v. Two cases, and no others:
   - used == T (or no cache): whole rows. Each token sees itself and those to its left.
     Pads are on the right of a row, so no token that counts sees them.
   - T == 1 with a longer cache: the token sees every column of it, but for the pads of
     the prompts: cache.mask[..., :cache.used], (B, 1, 1, used), is 0 or -inf and is
     added to the scores.
6. Heads side by side again, (B, T, H * D), through self.o_proj: (B, T, C).

What to look at when it runs: time 100 tokens with the cache, and with a whole forward
pass for each. Then print cache.mask for prompts of 2, 5 and 7 tokens.
"""

HINTS = (
    """
Direction. Begin with one token and no cache: the softmax over one place is 1, so the
result is o_proj of the value heads, each repeated H / G times. Then several tokens,
then the cache. The grader goes the same way.
""",
    """
Plan. view(B, T, H + 2 * G, D).transpose(1, 2), then split dimension 1 into H, G, G.
repeat_interleave(H // G, dim=1) gives each query head its key head. Scores are
(B, H, T, used). For whole rows mask what lies above the diagonal with -inf before the
softmax; for one token add the cache's mask. Then transpose(1, 2).reshape(B, T, -1).
""",
    """
Almost the code.
    q, k, v = self.qkv_proj(x).view(B, T, H + 2 * G, D).transpose(1, 2).split(
        (H, G, G), dim=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is not None:
        k, v = cache.write(layer, k, v)
    k, v = (z.repeat_interleave(H // G, dim=1) for z in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)  # (B, H, T, used)
    scores = ...  # -inf where a token may not look: two cases
    y = scores.softmax(-1) @ v  # (B, H, T, D)
    return self.o_proj(...)
""",
)

ROTATE = "q, k = rotate(qk, cos, sin).split((H, G), dim=1)"
CAUSAL = "attention(q, k, v, is_causal=True, enable_gqa=G < H)"
CACHED = "attention(q, k, v, cache.mask[..., : cache.used])"
WRITE = "k, v = cache.write(layer, k, v)"

MUTANTS = (
    ("looks ahead", ((CAUSAL, CAUSAL.replace("True", "False")),), "to its right"),
    ("heads tiled", ((CAUSAL, "attention(q, *(z.repeat(1, H // G, 1, 1) for z in "
     "(k, v)), is_causal=True)"),), "takes turns"),
    ("keys not rotated", ((ROTATE, "q, k = qk.split((H, G), dim=1)\n        "
                           "q = rotate(q, cos, sin)"),), "keys are not rotated"),
    ("queries not rotated", ((ROTATE, "q, k = qk.split((H, G), dim=1)\n        "
                              "k = rotate(k, cos, sin)"),), "queries are not rotated"),
    ("values rotated", ((ROTATE, f"{ROTATE}\n        v = rotate(v, cos, sin)"),),
     "values are rotated"),
    ("nothing rotated", ((ROTATE, "q, k = qk.split((H, G), dim=1)"),),
     "nothing is rotated"),
    ("no scale", ((CAUSAL, CAUSAL.replace("True", "True, scale=1.0")),), "sqrt(D)"),
    ("divided by D", ((CAUSAL, CAUSAL.replace("True", "True, scale=1 / D")),),
     "divided by D"),
    ("pads in the cache", ((CACHED, "attention(q, k, v)"),),
     "pads of the shorter prompts"),
    ("one layer for all", ((WRITE, WRITE.replace("layer", "0")),), "layer"),
    ("cache not used", ((WRITE, WRITE.replace("k, v =", "_ =")),),
     "sees nothing but itself"),
    ("heads not side by side", ((".transpose(1, 2).reshape(B, T, H * D)",
     ".reshape(B, T, H * D)"),), "side by side"),
    ("cached heads tiled", (
        ("q.reshape(B, G, H // G, D)", "q.reshape(B, H // G, G, D).transpose(1, 2)"),
        ("y = y.reshape(B, H, T, D)", "y = (y if k.size(2) == T else "
         "y.transpose(1, 2)).reshape(B, H, T, D)"),
    ), "as one pass over the whole row"),
    ("keys stored before rotation", (
        (ROTATE, "q, k = qk.split((H, G), dim=1)\n        q = rotate(q, cos, sin)"),
        (WRITE, f"{WRITE}\n        k = rotate(k, cos, sin)"),
    ), "as one pass over the whole row"),
    ("queries and keys exchanged", ((CAUSAL, "attention(k.repeat_interleave(H // G, 1)"
     ", q, v, is_causal=True, enable_gqa=G < H)"),),
     "query and key have changed places"),
)  # fmt: skip

RIGHTS = (
    (
        "scores, mask and softmax by hand",
        """
class CausalSelfAttention(nn.Module):
    def forward(self, x, cos, sin, cache=None, layer=0):
        B, T, C = x.shape
        H, G, D = self.H, self.G, self.D
        q, k, v = self.qkv_proj(x).view(B, T, H + 2 * G, D).transpose(1, 2).split(
            (H, G, G), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        k, v = (z.repeat_interleave(H // G, dim=1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(D)
        if k.size(2) == T:
            ahead = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        else:
            scores = scores + cache.mask[..., : cache.used]
        y = scores.softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))
""",
    ),
    (
        "one head after the other, einsum",
        """
class CausalSelfAttention(nn.Module):
    def forward(self, x, cos, sin, cache=None, layer=0):
        B, T, C = x.shape
        D, n = self.D, self.H // self.G
        parts = self.qkv_proj(x).split([self.H * D, self.G * D, self.G * D], dim=-1)

        def heads(z):
            return torch.stack(z.split(D, dim=-1), dim=1)

        q, k, v = map(heads, parts)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        outs = []
        for h in range(self.H):
            scores = torch.einsum("btd,bsd->bts", q[:, h], k[:, h // n]) * D**-0.5
            if T == k.size(2):
                bias = torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
            else:
                bias = cache.mask[:, 0, :, : cache.used]
            p = torch.softmax(scores + bias, -1)
            outs.append(torch.einsum("bts,bsd->btd", p, v[:, h // n]))
        return self.o_proj(torch.cat(outs, dim=-1))
""",
    ),
)

EXERCISE = Exercise(
    id="e03",
    functions=("model.py CausalSelfAttention.forward",),
    title="Attention with a cache",
    goal="See that the KV cache is a speed-up and changes no number.",
    paper="none; grouped queries: arXiv 2305.13245, rotation: arXiv 2104.09864",
    difficulty=4,
    minutes=75,
    points=10,
    run_time="in 2 seconds",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
