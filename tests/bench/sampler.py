"""The KV-cached sampler beside Hugging Face's generate and beside no cache at all.

    python tests/bench/sampler.py            # sizes 0.9M, 12M, 124M; batches 1, 16, 64
    python tests/bench/sampler.py --quick

The same weights (our layout is Qwen2's: see to_hugging_face), prompts of 17 to 32
tokens, responses that never end. Greedy tokens of all three are compared first: a
sampler that is fast and wrong is not timed. Then each draws at temperature 1. Times are
for one token of each row, the prompts' share included. The roof is the slower of two
things that no cached sampler can avoid: to multiply the prompts and each token by each
weight, and to read each weight and the cache for each token. How time and memory are
taken: measure.py.
"""

import argparse
import json
import sys

import measure
import torch
from measure import DEVICE, ROOT

sys.path.insert(0, str(ROOT))
from data import make_rng, pad_right  # noqa: E402
from model import GPT, GPTConfig, generate, sample_token  # noqa: E402

NEVER = -1  # no token ends a response
SIZES = {
    "0.9M": dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_inner=344,
                 vocab_size=512),
    "12M": dict(n_layer=6, n_head=6, n_kv_head=6, n_embd=384, n_inner=1024,
                vocab_size=4096),
    "124M": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_inner=2048,
                 vocab_size=50304),
}  # fmt: skip
NAMES = {
    "wte.": "model.embed_tokens.", "h.": "model.layers.", "ln_f.": "model.norm.",
    ".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm.",
    ".attn.": ".self_attn.",
}  # fmt: skip


def to_hugging_face(model):
    """The same weights as a Qwen2ForCausalLM: other names, and a matrix for each of
    q, k, v, gate and up."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = model.config
    config = Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_weights,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = Qwen2ForCausalLM(config).to(DEVICE).eval()
    q, kv = c.n_embd, c.n_kv_head * c.n_embd // c.n_head
    apart = {
        "qkv": (("q", "k", "v"), (q, kv, kv)),
        "gate_up": (("gate", "up"), (c.n_inner, c.n_inner)),
    }
    state, weights = {}, {}
    for name, tensor in model.state_dict().items():
        fused = name.split("_proj.")[0].split(".")[-1]
        names, sizes = apart.get(fused, ((fused,), (len(tensor),)))
        for part, rows in zip(names, tensor.split(sizes), strict=True):
            state[name.replace(fused, part)] = rows
    for name, tensor in state.items():
        for ours, other in NAMES.items():
            start = not ours.startswith(".") and name.startswith(ours)
            if start or (ours.startswith(".") and ours in name):
                name = name.replace(ours, other, 1)
        weights[name] = tensor
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and not [n for n in missing if "rotary" not in n], missing
    theirs.generation_config.pad_token_id = 0
    return theirs


@torch.no_grad()
def no_cache(model, prompts, lengths, n, u):
    """Every token from a forward pass over everything before it."""
    idx = torch.nn.functional.pad(prompts, (0, n))
    row = torch.arange(len(idx), device=idx.device)
    for t in range(n):
        at = lengths + t
        hidden = model.hidden(idx[:, : prompts.size(1) + t])  # (B, T, C)
        logits = model.logits(hidden[row, at - 1])  # (B, V)
        numbers = None if u is None else u[:, t]
        idx[row, at] = sample_token(logits, numbers, 0 if u is None else 1.0)
    return idx.gather(1, lengths[:, None] + torch.arange(n, device=idx.device))


def ours(model, prompts, lengths, n, u):
    temperature = 0 if u is None else 1.0
    return generate(model, prompts, lengths, n, NEVER, u, temperature)[0]


@torch.no_grad()
def hugging_face(theirs, prompts, lengths, n, u):
    """Padding on the left, as theirs wants it."""
    place = torch.arange(prompts.size(1), device=prompts.device)
    shift = prompts.size(1) - lengths[:, None]
    left = prompts.gather(1, (place - shift).clamp(min=0))
    options = {"do_sample": False} if u is None else {"do_sample": True, "top_k": 0}
    out = theirs.generate(
        left, attention_mask=(place >= shift).long(), min_new_tokens=n,
        max_new_tokens=n, **options,
    )  # fmt: skip
    return out[:, prompts.size(1) :]


def make(size, batch, n):
    """A model of random weights, prompts with their lengths, and uniform numbers."""
    config = GPTConfig(block_size=128, **SIZES[size])
    model = GPT(config, make_rng(0, "weights")).to(DEVICE).eval()
    with torch.no_grad():  # small weights would repeat the last token, whatever else
        for p in model.h.parameters():  # a sampler did wrong
            if p.dim() == 2:
                p.mul_(4)
    rng = make_rng(0, "prompts")
    rows = [
        torch.randint(config.vocab_size, (17 + i % 16,), generator=rng).tolist()
        for i in range(batch)
    ]
    u = torch.rand(batch, n, generator=rng).to(DEVICE)
    return model, pad_right(rows, 0, DEVICE), u


ENTRIES = {
    "ours": (lambda model: model, ours),
    "no cache": (lambda model: model, no_cache),
    "HF generate": (to_hugging_face, hugging_face),
}


def memory_of(name, size, batch, n):
    """Extra MB of one run, in this (measure.fresh) process."""
    prepare, run = ENTRIES[name]
    model, prompts, u = make(size, batch, n)
    model = prepare(model)
    few = prompts[0][:1], prompts[1][:1]
    run(model, *few, 2, u[:1, :2])  # code and thread pools are loaded now
    return measure.extra_memory(lambda: run(model, *prompts, n, u))


def seconds_of_roof(model, lengths, n, copy, flop):
    """Of a run: see the top."""
    config, batch = model.config, len(lengths)
    head = config.vocab_size * config.n_embd
    blocks = model.num_params() - head * (1 if config.tie_weights else 2)
    kv = 2 * config.n_layer * config.n_kv_head * config.n_embd // config.n_head
    cache = kv * (lengths.sum().item() + batch * n / 2)  # at the middle of the run
    products = blocks * lengths.sum().item() + n * batch * (blocks + head)
    return max(2 * products / flop, n * 4 * (blocks + head + cache) / copy)


def measure_cell(size, batch, n, turns, memory, copy, flop):
    model, prompts, u = make(size, batch, n)
    runs, greedy = {}, {}
    for name, (prepare, run) in ENTRIES.items():
        slow = size == "124M" or (size, batch) == ("12M", 64)
        if DEVICE == "cpu" and name == "no cache" and slow:
            continue  # minutes a run
        try:
            prepared = prepare(model)
        except ImportError as error:
            print(f"  {name}: not installed ({error.name})")
            continue
        greedy[name] = run(prepared, *prompts, n, None)
        runs[name] = lambda run=run, m=prepared: run(m, *prompts, n, u)
    equal = {k: (x == greedy["ours"]).float().mean().item() for k, x in greedy.items()}
    wrong = {k: share for k, share in equal.items() if share < 0.999}
    if wrong:
        raise ValueError(f"{size}, batch {batch}: other greedy tokens: {wrong}")
    times = measure.in_turns(runs, turns)
    roof = seconds_of_roof(model, prompts[1], n, copy, flop)
    record = {"size": size, "batch": batch, "new_tokens": n, "rows": {}}
    for name, seconds in times.items():
        job = ("--memory-of", name, size, batch, n)
        record["rows"][name] = {
            **measure.min_and_median(seconds, per=n),
            "tokens_per_second": batch * n / min(seconds),
            "time_over_ours": min(seconds) / min(times["ours"]),
            "of_roof": roof / min(seconds),
            "extra_mb": measure.fresh(*job) if memory else None,
            "greedy_tokens_equal": equal[name],
        }
        r = record["rows"][name]
        shown = "-" if r["extra_mb"] is None else f"{r['extra_mb']:.1f}"
        print(f"{size:>6}{batch:6}  {name:14}{r['min_ms']:10.2f}{r['median_ms']:10.2f}"
              f"{r['tokens_per_second']:10.0f}{r['time_over_ours']:8.2f}x"
              f"{r['of_roof']:8.0%}{shown:>10}", flush=True)
    return record


def main():
    if sys.argv[1:2] == ["--memory-of"]:
        name, size, batch, n = sys.argv[2:]
        print(json.dumps(memory_of(name, size, int(batch), int(n))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.add_arguments(parser, turns=5)
    args = parser.parse_args()
    measure.begin(args)
    tokens = {"0.9M": 64, "12M": 32, "124M": 16}
    cells = [(size, b, tokens[size]) for size in SIZES for b in (1, 16, 64)]
    if args.quick:
        cells = [("0.9M", 4, 8)]
    copy, flop, result = measure.roofs()
    result["cells"] = []
    print(f"{'size':>6}{'batch':>6}  {'':14}{'min ms':>10}{'median':>10}"
          f"{'tokens/s':>10}{'/ ours':>9}{'of roof':>8}{'extra MB':>10}"
          "   (ms for one token of each row)", flush=True)
    for cell in cells:
        done = measure_cell(*cell, args.turns, not args.quick, copy, flop)
        result["cells"].append(done)
        measure.write("sampler", result, args.quick, args.out)


if __name__ == "__main__":
    main()
