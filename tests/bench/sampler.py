"""The KV-cached sampler beside Hugging Face's generate and beside no cache at all.

    python tests/bench/sampler.py            # sizes 0.9M, 12M, 124M; batches 1, 16, 64
    python tests/bench/sampler.py --quick

The same weights, prompts of 17 to 32 tokens, responses that never end. Greedy tokens
are compared first: a sampler that is fast and wrong is not timed. Then each draws at
temperature 1. Times are for one token of each row, the prompts' share included. The
roof is the slower of two things that no cached sampler can avoid: to multiply prompts
and tokens by each weight, and to read each weight and the cache for each token.
"""

import measure
import torch
from measure import DEVICE

from data import make_rng, pad_right
from model import GPT, GPTConfig, generate, pairs, sample_token

NEVER = -1  # no token ends a response
SIZES = {  # vocab_size, n_tokens (0: all), n_layer, n_head, n_kv_head, n_embd, n_inner
    "0.9M": (512, 0, 4, 4, 4, 128, 344),
    "12M": (4096, 0, 6, 6, 6, 384, 1024),
    "124M": (50304, 0, 12, 12, 12, 768, 2048),
}


@torch.no_grad()
def to_hugging_face(model):
    """The same weights as a Qwen2ForCausalLM."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = model.config
    theirs = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_weights,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )).to(DEVICE).eval()  # fmt: skip
    for ours, part in pairs(model, theirs):
        part.copy_(ours)
    theirs.generation_config.pad_token_id = 0
    return theirs


@torch.no_grad()
def no_cache(model, prompts, lengths, n, u):
    """Every token from a forward pass over everything before it."""
    idx = torch.nn.functional.pad(prompts, (0, n))
    row = torch.arange(len(prompts), device=idx.device)
    for t in range(n):
        at = lengths + t
        hidden = model.hidden(idx[:, : prompts.size(1) + t])  # (B, T, C)
        logits = model.logits(hidden[row, at - 1])  # (B, V)
        numbers = (None, 0) if u is None else (u[:, t], 1.0)
        idx[row, at] = sample_token(logits, *numbers)
    return idx.gather(1, lengths[:, None] + torch.arange(n, device=idx.device))


def ours(model, prompts, lengths, n, u):
    return generate(model, prompts, lengths, n, NEVER, u, 0 if u is None else 1.0)[0]


@torch.no_grad()
def hugging_face(theirs, prompts, lengths, n, u):
    """Padding on the left, as theirs wants it."""
    place = torch.arange(prompts.size(1), device=prompts.device)
    shift = prompts.size(1) - lengths[:, None]
    left = prompts.gather(1, (place - shift).clamp(min=0))
    how = {"do_sample": True, "top_k": 0} if u is not None else {}
    how |= {"attention_mask": (place >= shift).long(), "min_new_tokens": n}
    out = theirs.generate(left, max_new_tokens=n, **how)
    return out[:, prompts.size(1) :]


ENTRIES = {"ours": ours, "no cache": no_cache, "HF generate": hugging_face}


@torch.no_grad()
def make_model(config):
    """Of random weights; small ones would repeat the last token, whatever else a
    sampler did wrong."""
    model = GPT(config, make_rng(0, "weights")).eval()
    for p in model.h.parameters():
        p.mul_(4 if p.dim() == 2 else 1)
    return model


def make(size, batch, n):
    """A model, prompts with their lengths, and uniform numbers."""
    config, rng = GPTConfig(128, *SIZES[size]), make_rng(0, "prompts")
    rows = [torch.randint(config.vocab_size, (17 + i % 16,), generator=rng).tolist()
            for i in range(batch)]  # fmt: skip
    u = torch.rand(batch, n, generator=rng).to(DEVICE)
    return make_model(config).to(DEVICE), pad_right(rows, 0, DEVICE), u


def memory_of(name, size, batch, n):
    """Extra MB of one run, in this (measure.fresh) process."""
    model, prompts, u = make(size, batch, n)
    if (run := ENTRIES[name]) is hugging_face:
        model = to_hugging_face(model)
    run(model, prompts[0][:1], prompts[1][:1], 2, u[:1, :2])  # code, threads: loaded
    return measure.extra_memory(lambda: run(model, *prompts, n, u))


def seconds_of_roof(model, lengths, n, copy, flop):
    """Of a run: see the top."""
    c, batch, read = model.config, len(lengths), lengths.sum().item()
    head = c.vocab_size * c.n_embd
    blocks = model.num_params() - head
    cache = 2 * c.n_layer * c.n_embd * (read + batch * n / 2)  # in the middle of it
    products = blocks * read + n * batch * (blocks + head)
    return max(2 * products / flop, n * 4 * (blocks + head + cache) / copy)


def measure_cell(size, batch, n, copy, flop, args):
    print(f"{size} parameters, batch {batch}: ms for one token of each row")
    model, prompts, u = make(size, batch, n)
    runs, greedy = {}, {}
    for name, run in ENTRIES.items():
        slow = size == "124M" or (size, batch) == ("12M", 64)  # minutes a run
        if DEVICE == "cpu" and name == "no cache" and slow:
            continue
        try:
            prepared = to_hugging_face(model) if run is hugging_face else model
        except ImportError as error:
            print(f"  {name}: not installed ({error.name})")
            continue
        greedy[name] = run(prepared, *prompts, n, None)
        runs[name] = lambda run=run, m=prepared: run(m, *prompts, n, u)
    equal = {k: (x == greedy["ours"]).float().mean().item() for k, x in greedy.items()}
    # (on a GPU a near tie may fall otherwise, and the rest of its row with it)
    if min(equal.values()) < (0.999 if DEVICE == "cpu" else 0.9):
        raise ValueError(f"{size}, batch {batch}: other greedy tokens: {equal}")
    times = measure.in_turns(runs, args.turns)
    roof, rows = seconds_of_roof(model, prompts[1], n, copy, flop), {}
    for name, seconds in times.items():
        rows[name] = measure.row(
            name, seconds, per=n,
            tokens_per_second=batch * n / min(seconds),
            time_over_ours=min(seconds) / min(times["ours"]),
            of_roof=roof / min(seconds),
            extra_mb=None if args.quick else measure.fresh(name, size, batch, n),
            greedy_tokens_equal=equal[name],
        )  # fmt: skip
    return {"size": size, "batch": batch, "new_tokens": n, "rows": rows}


def main():
    args = measure.begin(__doc__, 5, memory_of)
    new = zip(SIZES, (64, 32, 16), strict=True)  # tokens of a response
    cells = [(size, batch, n) for size, n in new for batch in (1, 16, 64)]
    cells = [("0.9M", 4, 8)] if args.quick else cells
    measure.each_cell("sampler", cells, measure_cell, args)


if __name__ == "__main__":
    main()
