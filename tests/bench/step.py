"""A whole SDFT step: beside our SFT step, and beside TRL's SDFT trainer.

    python tests/bench/step.py               # 0.9M parameters, batch 16, 64 new tokens
    python tests/bench/step.py --quick

Same sizes, batch, prompts (16 words) and demonstrations (16 words), random weights, so
that responses hardly ever end before max_new_tokens; AdamW, EMA teacher, KL(teacher ||
student) over the whole vocabulary, no dropout. SFT imitates demonstrations of the
length of the responses. Ours run in turns; TRL's trainer runs in a process of its own,
once, and its time for a step is the median without the first two. Prints the shares of
our step: where the time goes. Peers: tests/bench/requirements.txt.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
from kernel import DEVICE, machine  # noqa: E402
from sampler import SIZES, to_hugging_face  # noqa: E402

import data  # noqa: E402
import sdft  # noqa: E402
import sft  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def make_model():
    return GPT(GPTConfig(**SIZES["0.9M"]), data.make_rng(0, "weights")).to(DEVICE)


def make_examples(batch, n):
    """Prompts and demonstrations of 16 words; for SFT, responses of n - 1 words."""
    rng = random.Random(0)

    def words(k):
        return " ".join(rng.choices(data.NOUNS, k=k))

    both = [(words(16), words(16), words(n - 1)) for _ in range(batch)]
    shown = [data.Example(p, d, "", id=i) for i, (p, d, _) in enumerate(both)]
    long = [data.Example(p, r, "", id=i) for i, (p, _, r) in enumerate(both)]
    return shown, long


def clock():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def our_steps(batch, n, turns):
    """Seconds of SFT steps, of SDFT steps, and of the parts of SDFT steps."""
    tok = data.Tokenizer()
    shown, long = make_examples(batch, n)
    times = {"sft": [], "sdft": [], "rollout": [], "loss": [], "backward": [],
             "update": []}  # fmt: skip
    students = {"sft": make_model().train(), "sdft": make_model().train()}
    teacher = sdft.make_teacher(students["sdft"])
    cfgs = {m.__name__: m.Config(batch_size=batch, max_new_tokens=n, log_every=10**6)
            for m in (sft, sdft)}  # fmt: skip
    optimizers = {m.__name__: m.make_optimizer(students[m.__name__], cfgs[m.__name__])
                  for m in (sft, sdft)}  # fmt: skip
    for step in range(1, turns + 2):
        cfg, student = cfgs["sft"], students["sft"]
        start = clock()
        response, mask = sft.get_responses(long, tok, DEVICE)
        loss, _ = sft.compute_loss(student, long, response, mask, tok, cfg)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        optimizers["sft"].step()
        optimizers["sft"].zero_grad()
        times["sft"].append(clock() - start)

        cfg, student = cfgs["sdft"], students["sdft"]
        start = clock()
        response, mask = sdft.get_responses(student, teacher, shown, tok, cfg, step)
        sampled = clock()
        loss, _ = sdft.compute_loss(
            student, teacher, shown, response, mask, tok, cfg, step
        )
        scored = clock()
        loss.backward()
        backward = clock()
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        optimizers["sdft"].step()
        optimizers["sdft"].zero_grad()
        sdft.update_teacher(teacher, student, cfg)
        end = clock()
        times["sdft"].append(end - start)
        times["rollout"].append(sampled - start)
        times["loss"].append(scored - sampled)
        times["backward"].append(backward - scored)
        times["update"].append(end - backward)
    return {name: seconds[1:] for name, seconds in times.items()}  # the first warms up


def trl_steps(batch, n, turns):
    """Seconds of the steps of TRL's SDFT trainer on the same weights and words."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tok = data.Tokenizer()
    vocab = {f"t{i}": i for i in range(tok.vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{tok.end}", pad_token="t1",
        padding_side="left",
    )  # fmt: skip

    def text(ids):
        return " ".join(f"t{i}" for i in ids)

    shown, _ = make_examples(batch, n)
    rows = {
        "prompt": [text(data.student_prompt(e, tok)) for e in shown] * (turns + 2),
        "privileged_context": [text(tok.encode(e.demo)) for e in shown] * (turns + 2),
    }
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = clock()

        def on_step_end(self, *args, **kwargs):
            seconds.append(clock() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        to_hugging_face(make_model()).save_pretrained(folder)
        args = SDFTConfig(
            output_dir=folder + "/out", per_device_train_batch_size=batch,
            max_steps=turns + 2, learning_rate=6e-5, max_completion_length=n,
            distillation_mode="full_logits", distillation_alpha=0.0,
            distillation_is_clip=None, num_generations=1, num_loss_tokens_to_skip=0,
            teacher_model_kind="ema", teacher_update_rate=0.01, teacher_sync_steps=1,
            teacher_prompt_template="{prompt} {privileged_context}",
            use_cpu=DEVICE == "cpu", bf16=False, gradient_checkpointing=False,
            save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, shuffle_dataset=False, logging_steps=10**6,
            lr_scheduler_type="constant", max_grad_norm=10.0, weight_decay=0.0,
        )  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = SDFTTrainer(
            model=student, args=args, processing_class=theirs,
            train_dataset=Dataset.from_dict(rows), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return seconds[2:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON; default: beside the results")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.new_tokens, args.turns = 4, 8, 2
    torch.set_num_threads(args.threads)
    print(machine())
    print("command: python tests/bench/step.py", *sys.argv[1:])
    times = our_steps(args.batch, args.new_tokens, args.turns)
    try:
        times["TRL sdft"] = trl_steps(args.batch, args.new_tokens, args.turns)
    except ImportError as error:
        print(f"TRL: not installed ({error.name})")
    sdft_ms = 1e3 * min(times["sdft"])
    rows = {}
    print(f"{'':12}{'min ms':>10}{'median':>10}{'/ our sdft':>12}")
    for name, seconds in times.items():
        rows[name] = {"min_ms": 1e3 * min(seconds), "median_ms": 1e3 * median(seconds)}
        print(f"{name:12}{rows[name]['min_ms']:10.1f}{rows[name]['median_ms']:10.1f}"
              f"{rows[name]['min_ms'] / sdft_ms:11.2f}x")
    result = {"machine": machine(), "command": sys.argv, "batch": args.batch,
              "new_tokens": args.new_tokens, "rows": rows}  # fmt: skip
    default = ROOT / "tests" / "bench" / "results" / f"step_{DEVICE}.json"
    if args.out or not args.quick:
        (args.out or default).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
