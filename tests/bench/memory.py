"""What a real model needs of memory: a plan for some sizes, and a measurement.

    python tests/bench/memory.py                  # the plan, from 135M to 7B
    python tests/bench/memory.py --measure        # two updates of each method, on a CPU
    torchrun --standalone --nproc_per_node=2 tests/bench/memory.py --measure  # --shard

The plan (memory_of) counts weights, gradients, optimizer, teacher and base, and
estimates activations. The measurement makes two updates with random weights in a
process of its own and reads the peak of its memory from the system, less that of a
process that has only loaded torch.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "exercises")]

from extra import Quiet  # noqa: E402

import sdft  # noqa: E402
import sft  # noqa: E402
from data import Example  # noqa: E402
from model import GPT, GPTConfig, chunk_rows, shard  # noqa: E402


def shape(*sizes, **others):
    return GPTConfig(4096, *sizes, norm_eps=1e-6, rope_theta=1e6, **others)


SHAPES = {  # vocab_size, n_tokens (0: all), n_layer, n_head, n_kv_head, n_embd, n_inner
    "SmolLM2-135M": shape(49152, 0, 30, 9, 3, 576, 1536, qkv_bias=False),
    "SmolLM2-360M": shape(49152, 0, 32, 15, 5, 960, 2560, qkv_bias=False),
    "Qwen2.5-0.5B": shape(151936, 0, 24, 14, 2, 896, 4864),
    "Qwen2.5-1.5B": shape(151936, 0, 28, 12, 2, 1536, 8960),
    "Qwen2.5-3B": shape(151936, 0, 36, 16, 2, 2048, 11008),
    "Qwen2.5-7B": shape(152064, 0, 28, 28, 4, 3584, 18944, tie_weights=False),
}


def memory_of(config, method, rows, n_tokens, dtype, checkpointing, shards=1):
    """What training needs at its peak, name -> GB (10^9 bytes), for micro-batches of
    `rows` sequences of n_tokens: the fixed parts by count, the others by what a block
    keeps for its backward pass.

    With --shard, what one of `shards` processes needs. Its float32 shards are the
    master of the bfloat16 weights that it gathers. (On one GPU such a pair would save
    nothing: 2 bytes a weight, 2 its gradient, 4 the master and 8 AdamW are 16, as are
    float32's 4 + 4 + 8.)
    """
    with torch.device("meta"):  # counts, and takes no memory
        n = GPT(config).num_params()
    c, wide = config, 4 if dtype == torch.float32 else 2  # bytes of an activation
    D = c.head_dim
    fixed = {"weights": 4 * n, "gradients": 4 * n, "AdamW": 8 * n}
    fixed["base, for KL(student || base)"] = 4 * n
    if method == "sdft":
        fixed["teacher"] = 4 * n
    # of a token in a block: inputs and outputs of its norms, products and attention
    qkv = (c.n_head + 2 * c.n_kv_head) * D
    block = wide * (4 * c.n_embd + 2 * qkv + 3 * c.n_head * D + 4 * c.n_inner)
    block += 4 * 2 * c.n_embd  # the norms compute in float32
    layers = c.n_layer * 4 * c.n_embd + block if checkpointing else c.n_layer * block
    V = c.n_tokens or c.vocab_size
    chunk = min(rows * n_tokens, chunk_rows(torch.empty(V, 0)))
    moving = {
        "activations": rows * n_tokens * layers,
        "logits": 4 * V * (3 * chunk + c.n_embd),  # and the head's own gradient
        "rollout cache": rows * n_tokens * 2 * c.n_layer * c.n_kv_head * D * wide,
    }
    if shards == 1:
        if wide == 2:
            moving["weights in bfloat16"] = 2 * n
        return {name: size / 1e9 for name, size in {**fixed, **moving}.items()}
    fixed = {name: size / shards for name, size in fixed.items()}
    ends = c.vocab_size * c.n_embd * (1 if c.tie_weights else 2)  # embedding and head
    # to sample, all is gathered; to train, the ends, their gradient, a head for the
    # loss, and two blocks: the next one is fetched early
    sample = {"gathered to sample": 4 * ends + wide * (n - ends)}
    sample["rollout cache"] = moving.pop("rollout cache")
    blocks = wide * 2 * (n - ends) / c.n_layer
    moving["gathered to train"] = 4 * (2 * ends + V * c.n_embd) + blocks
    moving = max(sample, moving, key=lambda parts: sum(parts.values()))
    return {name: size / 1e9 for name, size in {**fixed, **moving}.items()}


class Numbers:
    """A tokenizer for a measurement: a text is a number of tokens."""

    template, end = "", 1

    def __init__(self, prompt, response):
        self.prompt, self.response = prompt, response

    def chat(self, messages):
        return [7] * self.prompt

    def encode(self, text):
        return [7] * (self.response - 1)


def two_updates(shape, method, rows, prompt, response, checkpointing):
    """Two updates (AdamW makes its own memory in the first); the peak of this process's
    memory in GB. In a process group, each has `rows` rows of its own, and a shard."""
    config, tok = SHAPES[shape], Numbers(prompt, response)
    torch.manual_seed(0)
    student = GPT(config)
    student.checkpointing = checkpointing
    if dist.is_initialized():
        shard(student, torch.device("cpu"))
        rows *= dist.get_world_size()
    batch = [Example("p", "d", "", id=i) for i in range(rows)]
    trainer = {"sft": sft, "sdft": sdft}[method]
    cfg = trainer.Config(steps=2, batch_size=rows, dropout=0.0, max_new_tokens=response)
    # (a checkpoint would need memory of its own)
    trainer.train(student, {"a": batch}, {}, tok, cfg, Quiet())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(*args):
    """two_updates in a process of its own; "" for nothing but its imports."""
    code = "import sys; sys.path.insert(0, 'tests/bench'); import memory, resource; "
    if args:
        code += f"print(memory.two_updates{args!r})"
    else:
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout)


def measure_shard(shape):
    """The peak of one process of several, less what it had before."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    n, rows, prompt, response = dist.get_world_size(), 4, 300, 100
    plan = memory_of(
        SHAPES[shape], "sdft", rows, prompt + response, torch.float32, False, n
    )
    peak = two_updates(shape, "sdft", rows, prompt, response, False)
    if dist.get_rank() == 0:
        print(f"| {shape}, sdft, {rows} x {prompt + response} tokens, --shard, each of "
              f"{n} | {sum(plan.values()):.2f} | {peak - empty:.2f} |")  # fmt: skip
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), default="SmolLM2-135M")
    args = parser.parse_args()
    if not args.measure:
        print("| GB of memory, micro-batches of 4 x 1,024 tokens | SFT | SDFT | "
              "SDFT, --checkpointing |\n|---|---|---|---|")  # fmt: skip
        for name, config in SHAPES.items():
            cells = [
                sum(memory_of(config, *rest).values())
                for rest in (
                    ("sft", 4, 1024, torch.bfloat16, False),
                    ("sdft", 4, 1024, torch.bfloat16, False),
                    ("sdft", 4, 1024, torch.bfloat16, True),
                )
            ]
            print(f"| {name} | " + " | ".join(f"{x:.0f}" for x in cells) + " |")
        print("\n| SDFT, --checkpointing, --shard: each of n processes | 2 | 4 | 8 |\n"
              "|---|---|---|---|")  # fmt: skip
        for name, config in SHAPES.items():
            rest = "sdft", 4, 1024, torch.bfloat16, True
            cells = [sum(memory_of(config, *rest, n).values()) for n in (2, 4, 8)]
            print(f"| {name} | " + " | ".join(f"{x:.0f}" for x in cells) + " |")
        return
    if "RANK" in os.environ:  # torchrun
        return measure_shard(args.shape)
    empty = measure()
    print("| two updates, float32 | planned, GB | measured, GB |\n|---|---|---|")
    for method, checkpointing in (("sft", False), ("sdft", False), ("sdft", True)):
        rows, prompt, response = 4, 300, 100
        plan = memory_of(
            SHAPES[args.shape], method, rows, prompt + response, torch.float32,
            checkpointing,
        )  # fmt: skip
        peak = measure(args.shape, method, rows, prompt, response, checkpointing)
        text = f"{args.shape}, {method}, {rows} x {prompt + response} tokens"
        text += ", --checkpointing" if checkpointing else ""
        print(f"| {text} | {sum(plan.values()):.2f} | {peak - empty:.2f} |")


if __name__ == "__main__":
    main()
