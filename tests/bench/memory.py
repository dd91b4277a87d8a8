"""What a real model needs of memory: a plan for some sizes, and a measurement.

    python tests/bench/memory.py                  # the plan, from 135M to 7B
    python tests/bench/memory.py --measure        # three updates of each method
    torchrun --standalone --nproc_per_node=2 tests/bench/memory.py --measure  # --shard

The plan counts weights, gradients, optimizer, teacher and base, and estimates
activations. The measurement is of random weights in a process of its own: the peak of
the third update (AdamW makes its memory in the first), less what was there before.
With torchrun it is a CPU's: CUDA_VISIBLE_DEVICES= hides a GPU.
"""

import argparse
import os

import measure
import step
import torch
import torch.distributed as dist

from model import GPT, GPTConfig, chunk_rows, shard


def shape(*sizes, **others):
    return GPTConfig(4096, *sizes, rope_theta=1e6, **others)


SHAPES = {  # vocab_size, n_tokens (0: all), n_layer, n_head, n_kv_head, n_embd, n_inner
    "SmolLM2-135M": shape(49152, 0, 30, 9, 3, 576, 1536, qkv_bias=False),
    "SmolLM2-360M": shape(49152, 0, 32, 15, 5, 960, 2560, qkv_bias=False),
    "Qwen2.5-0.5B": shape(151936, 0, 24, 14, 2, 896, 4864),
    "Qwen2.5-1.5B": shape(151936, 0, 28, 12, 2, 1536, 8960),
    "Qwen2.5-3B": shape(151936, 0, 36, 16, 2, 2048, 11008),
    "Qwen2.5-7B": shape(152064, 0, 28, 28, 4, 3584, 18944, tie_weights=False),
}
SHAPE, ROWS, PROMPT, RESPONSE = "SmolLM2-135M", 4, 300, 100  # of what is measured


def memory_of(name, method="sdft", tokens=4096, wide=2, checkpointing=True, shards=1):
    """GB (10^9 bytes) that training needs at its peak, for micro-batches of so many
    tokens, whose activations are `wide` bytes: the fixed parts by count, the others by
    what a block keeps for its backward pass. With --shard: one of `shards` processes.
    """
    c = SHAPES[name]
    with torch.device("meta"):  # counts, and takes no memory
        n = GPT(c).num_params()
    D, V = c.head_dim, c.n_tokens or c.vocab_size
    # weights, gradients, AdamW's two, the base for KL(student || base), the teacher
    fixed = 4 * n * {"sft": 5, "sdft": 6}[method]
    # of a token in a block: inputs and outputs of its norms, products and attention;
    # the norms compute in float32
    qkv = (c.n_head + 2 * c.n_kv_head) * D
    block = wide * (4 * c.n_embd + 2 * qkv + 3 * c.n_head * D + 4 * c.n_inner)
    block += 8 * c.n_embd
    layers = c.n_layer * 4 * c.n_embd + block if checkpointing else c.n_layer * block
    chunk = min(tokens, chunk_rows(torch.empty(V, 0)))
    # activations; logits and the head's own gradient; the cache of a rollout
    train = tokens * layers + 4 * V * (3 * chunk + c.n_embd)
    cache = tokens * 2 * c.n_layer * c.n_kv_head * D * wide
    if shards == 1:  # in bfloat16 also the weights, cast
        return (fixed + train + cache + (2 * n if wide == 2 else 0)) / 1e9
    ends = c.vocab_size * c.n_embd * (1 if c.tie_weights else 2)  # embedding and head
    # to sample, all is gathered; to train, the ends, their gradient, a head for the
    # loss, and two blocks: the next one is fetched early
    sample = 4 * ends + wide * (n - ends) + cache
    train += 4 * (2 * ends + V * c.n_embd) + wide * 2 * (n - ends) / c.n_layer
    return (fixed / shards + max(sample, train)) / 1e9


def train_shape(name, method, checkpointing=0, rows=ROWS, turns=1, dtype=None):
    """See step.timed_training; more updates of a shape with random weights, and the GB
    of its peak. In a process group each process has `rows` of its own, and a shard."""
    before, device = measure.mark_memory(), torch.device(measure.DEVICE)
    with device:
        student = GPT(SHAPES[name])
    student.checkpointing, student.dtype = bool(checkpointing), dtype or torch.float32
    if dist.is_initialized():
        shard(student, device)
        rows *= dist.get_world_size()
    examples = step.make_examples(rows, RESPONSE, PROMPT)
    of = method, student, examples, turns
    run = step.timed_training(*of, max_new_tokens=RESPONSE)
    return {**run, "peak_gb": (run["peak_mb"] - before) * 2**20 / 1e9}


def show(method, checkpointing, used, shards=1):
    n = PROMPT + RESPONSE
    plan = memory_of(SHAPE, method, ROWS * n, 4, checkpointing, shards)
    more = ", --checkpointing" * checkpointing
    more += f", --shard, each of {shards}" * (shards > 1)
    print(f"| {SHAPE}, {method}, {ROWS} x {n} tokens{more} | {plan:.2f} | {used:.2f} |")


def plan(title, cells):
    """A table of the plan; cells: arguments of memory_of, for each column."""
    print(f"| {title} |\n|---|" + "---|" * len(cells))
    for name in SHAPES:
        row = [f"{memory_of(name, **cell):.0f}" for cell in cells]
        print(f"| {name} | {' | '.join(row)} |")


def main():
    measure.serve(train_shape)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    if not parser.parse_args().measure:
        whole = {"checkpointing": False}
        plan("GB of memory, micro-batches of 4 x 1,024 tokens | SFT | SDFT | SDFT, "
             "--checkpointing", [{"method": "sft", **whole}, whole, {}])  # fmt: skip
        print()
        plan("SDFT, --checkpointing, --shard: each of n processes | 2 | 4 | 8",
             [{"shards": n} for n in (2, 4, 8)])  # fmt: skip
        return
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
        used = train_shape(SHAPE, "sdft")["peak_gb"]
        if dist.get_rank() == 0:
            show("sdft", False, used, dist.get_world_size())
        return dist.destroy_process_group()
    print("| an update, float32 | planned, GB | measured, GB |\n|---|---|---|")
    for method, checkpointing in (("sft", False), ("sdft", False), ("sdft", True)):
        used = measure.fresh(SHAPE, method, int(checkpointing))
        if used:  # (else it has said why not)
            show(method, checkpointing, used["peak_gb"])


if __name__ == "__main__":
    main()
