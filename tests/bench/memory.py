"""What a real model needs of memory: train.py's plan for some sizes, and a measurement.

    python tests/bench/memory.py                  # the plan, from 135M to 7B
    python tests/bench/memory.py --measure        # two updates of each method, on a CPU
    torchrun --standalone --nproc_per_node=2 tests/bench/memory.py --measure  # --shard

The plan (train.memory_of) counts weights, gradients, optimizer, teacher and base, and
estimates activations. The measurement makes two updates with random weights in a
process of its own and reads the peak of its memory from the system, less that of a
process that has only loaded torch.
"""

import argparse
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sdft  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from data import Example  # noqa: E402
from model import GPT, GPTConfig, shard  # noqa: E402

BASE = GPTConfig(block_size=4096, vocab_size=151936, norm_eps=1e-6, rope_theta=1e6)
SHAPES = {  # as in their config.json
    "SmolLM2-135M": replace(
        BASE, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
        n_inner=1536, qkv_bias=False,
    ),
    "SmolLM2-360M": replace(
        BASE, vocab_size=49152, n_layer=32, n_head=15, n_kv_head=5, n_embd=960,
        n_inner=2560, qkv_bias=False,
    ),
    "Qwen2.5-0.5B": replace(
        BASE, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864
    ),
    "Qwen2.5-1.5B": replace(
        BASE, n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, n_inner=8960
    ),
    "Qwen2.5-3B": replace(
        BASE, n_layer=36, n_head=16, n_kv_head=2, n_embd=2048, n_inner=11008
    ),
    "Qwen2.5-7B": replace(
        BASE, vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4, n_embd=3584,
        n_inner=18944, tie_weights=False,
    ),
}  # fmt: skip


class Numbers:
    """A tokenizer for a measurement: a text is a number of tokens."""

    template, digest, end = "", "numbers", 1

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

    class Run:
        """No files: a checkpoint would need memory of its own."""

        def load(self, *args):
            return 0, []

        def progress(self, start, end):
            return range(start, end)

        def stop_wanted(self):
            return 0.0

        def log(self, record):
            pass

        def save(self, *args):
            pass

    trainer.train(student, {"a": batch}, {}, tok, cfg, Run())
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
    plan = train.memory_of(
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
                sum(train.memory_of(config, *rest).values())
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
            cells = [
                sum(train.memory_of(config, *rest, n).values()) for n in (2, 4, 8)
            ]
            print(f"| {name} | " + " | ".join(f"{x:.0f}" for x in cells) + " |")
        return
    if "RANK" in os.environ:  # torchrun
        return measure_shard(args.shape)
    empty = measure()
    print("| two updates, float32 | planned, GB | measured, GB |\n|---|---|---|")
    for method, checkpointing in (("sft", False), ("sdft", False), ("sdft", True)):
        rows, prompt, response = 4, 300, 100
        plan = train.memory_of(
            SHAPES[args.shape], method, rows, prompt + response, torch.float32,
            checkpointing,
        )  # fmt: skip
        peak = measure(args.shape, method, rows, prompt, response, checkpointing)
        text = f"{args.shape}, {method}, {rows} x {prompt + response} tokens"
        text += ", --checkpointing" if checkpointing else ""
        print(f"| {text} | {sum(plan.values()):.2f} | {peak - empty:.2f} |")


if __name__ == "__main__":
    main()
