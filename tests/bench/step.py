"""A whole SDFT step: beside our SFT step, and beside TRL's SDFT trainer.

    python tests/bench/step.py               # 0.9M parameters, batch 16, 64 new tokens
    python tests/bench/step.py --quick

Same weights (random, so that responses hardly ever end before max_new_tokens), prompts
(16 words), demonstrations (16 words) and contexts, token for token; AdamW, an EMA
teacher, KL(teacher || student) over the whole vocabulary, no dropout. SFT imitates
demonstrations of the length of the responses. First the losses of one step on the same
responses are compared: ours and TRL's must agree. Then each trainer runs in processes
of its own, in turns; the first two steps of a process warm up. Then come the parts of
our step. The roof is the products of the weights alone: 2 flop for each weight and
token of a forward pass, 4 of a backward pass. Memory is that of the steps after the
warm-up, above what lies there between steps: measure.py.
"""

import argparse
import json
import random
import sys
import tempfile

import measure
import torch
from measure import DEVICE, ROOT
from sampler import SIZES, to_hugging_face

sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import sdft  # noqa: E402
import sft  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

WARM_UP = 2  # steps
SETTINGS = {"lr": 6e-5, "beta2": 0.999, "weight_decay": 0.0, "grad_clip": 10.0,
            "dropout": 0.0}  # fmt: skip


def teacher_prompt(example, tok):
    """The teacher's context as TRL's template puts it."""
    return data.student_prompt(example, tok) + tok.encode(example.demo)


data.teacher_prompt = teacher_prompt  # sdft.py, too, now finds this one


def make_model():
    """Random weights, larger ones than usual: a divergence that is not all rounding."""
    model = GPT(GPTConfig(**SIZES["0.9M"]), data.make_rng(0, "weights")).to(DEVICE)
    with torch.no_grad():
        model.wte.weight.mul_(4)
    return model


def make_examples(batch, n):
    """Prompts and demonstrations of 16 words; the same with demonstrations that, their
    end included, have n tokens."""
    rng = random.Random(0)

    def words(k):
        return " ".join(rng.choices(data.NOUNS, k=k))

    both = [(words(16), words(16), words(n - 1)) for _ in range(batch)]
    shown = [data.Example(p, d, "", id=i) for i, (p, d, _) in enumerate(both)]
    long = [data.Example(p, r, "", id=i) for i, (p, _, r) in enumerate(both)]
    return shown, long


# ---- Ours --------------------------------------------------------------------------


def our_config(module, batch, n):
    return module.Config(
        batch_size=batch, max_new_tokens=n, log_every=10**6, **SETTINGS
    )


def sft_steps(batch, n, steps):
    """A generator of steps, each as the times before and after its parts."""
    tok, student = data.Tokenizer(), make_model().train()
    _, long = make_examples(batch, n)
    cfg = our_config(sft, batch, n)
    optimizer = sft.make_optimizer(student, cfg)
    for _ in range(steps):
        times = [measure.clock()]
        response, mask = sft.get_responses(long, tok, DEVICE)
        times.append(measure.clock())
        loss, _ = sft.compute_loss(student, long, response, mask, tok, cfg)
        times.append(measure.clock())
        loss.backward()
        times.append(measure.clock())
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        times.append(measure.clock())
        yield times


def sdft_steps(batch, n, steps):
    tok, student = data.Tokenizer(), make_model().train()
    shown, _ = make_examples(batch, n)
    cfg = our_config(sdft, batch, n)
    teacher = sdft.make_teacher(student)
    optimizer = sdft.make_optimizer(student, cfg)
    for step in range(1, steps + 1):  # not 0: no statistics beside the loss
        times = [measure.clock()]
        response, mask = sdft.get_responses(student, shown, tok, cfg, step)
        times.append(measure.clock())
        both = student, teacher, shown, response, mask
        loss, _ = sdft.compute_loss(*both, tok, cfg, step)
        times.append(measure.clock())
        loss.backward()
        times.append(measure.clock())
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        sdft.update_teacher(teacher, student, cfg)
        times.append(measure.clock())
        yield times


def run_ours(make_steps, batch, n, turns):
    """Seconds of the steps after the warm-up, of their parts, and extra memory."""
    steps = make_steps(batch, n, WARM_UP + turns)
    for _ in range(WARM_UP):
        next(steps)
    before, rows = measure.mark_memory(), list(steps)
    extra = measure.peak_memory() - before
    parts = {
        name: [times[i + 1] - times[i] for times in rows]
        for i, name in enumerate(("responses", "loss", "backward", "update"))
    }
    seconds = [times[-1] - times[0] for times in rows]
    return {"seconds": seconds, "parts": parts, "extra_mb": extra}


# ---- TRL's -------------------------------------------------------------------------


def trl_trainer(folder, batch, n, steps):
    """Its SDFT trainer on our weights, words and settings; words are our tokens."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
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
        "prompt": [text(data.student_prompt(e, tok)) for e in shown] * steps,
        "privileged_context": [text(tok.encode(e.demo)) for e in shown] * steps,
    }
    to_hugging_face(make_model()).save_pretrained(folder)
    args = SDFTConfig(
        output_dir=folder + "/out", per_device_train_batch_size=batch,
        max_steps=steps, learning_rate=SETTINGS["lr"], max_completion_length=n,
        distillation_mode="full_logits", distillation_alpha=0.0,
        distillation_is_clip=None, num_generations=1, num_loss_tokens_to_skip=0,
        teacher_model_kind="ema", teacher_update_rate=0.01, teacher_sync_steps=1,
        teacher_prompt_template="{prompt} {privileged_context}",
        optim="adamw_torch_fused",
        use_cpu=DEVICE == "cpu", bf16=False, gradient_checkpointing=False,
        save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, shuffle_dataset=False, logging_steps=10**6,
        lr_scheduler_type="constant", adam_beta2=SETTINGS["beta2"],
        max_grad_norm=SETTINGS["grad_clip"], weight_decay=SETTINGS["weight_decay"],
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return SDFTTrainer(
        model=student, args=args, processing_class=theirs,
        train_dataset=Dataset.from_dict(rows),
    )  # fmt: skip


def run_trl(batch, n, turns):
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if len(seconds) == WARM_UP:
                self.before = measure.mark_memory()
            self.start = measure.clock()

        def on_step_end(self, *args, **kwargs):
            seconds.append(measure.clock() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        trainer, timer = trl_trainer(folder, batch, n, WARM_UP + turns), Clock()
        trainer.add_callback(timer)  # the last one: the teacher's update is timed, too
        trainer.train()
    extra = measure.peak_memory() - timer.before
    return {"seconds": seconds[WARM_UP:], "extra_mb": extra}


# ---- The same loss -----------------------------------------------------------------


def fixed_responses(batch, n):
    """Responses of lengths 2 to n, their ends included, as lists of tokens."""
    tok, rng = data.Tokenizer(), random.Random(1)
    lengths = [2 + i * (n - 2) // max(1, batch - 1) for i in range(batch)]
    return [[rng.randrange(256, tok.start) for _ in range(k - 1)] + [tok.end]
            for k in lengths]  # fmt: skip


def our_loss(batch, n):
    tok, student = data.Tokenizer(), make_model().train()
    shown, _ = make_examples(batch, n)
    response, lengths = data.pad_right(fixed_responses(batch, n), tok.end, DEVICE)
    mask = torch.arange(response.size(1), device=DEVICE) < lengths[:, None]
    both = student, sdft.make_teacher(student), shown, response, mask
    return sdft.compute_loss(*both, tok, our_config(sdft, batch, n), 1)[0].item()


def trl_loss(batch, n):
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(folder, batch, n, 1)
        compute_loss = trainer.compute_loss

        def record(*args, **kwargs):
            losses.append(compute_loss(*args, **kwargs))
            return losses[-1]

        trainer.compute_loss = record
        trainer._generate = lambda prompts: (prompts, fixed_responses(batch, n))
        trainer.train()
    return losses[0].item()


def check_losses(batch, n):
    """Both losses, equal to 1 in 1,000; None if TRL is not installed."""
    ours = measure.fresh("--entry", "our loss", batch, n, 0)
    theirs = measure.fresh("--entry", "TRL loss", batch, n, 0)
    if theirs is None:
        return None
    print(f"loss of one step on the same responses: ours {ours:.6f}, TRL {theirs:.6f}")
    if not abs(ours - theirs) <= 1e-3 * ours:  # nan is wrong, too
        raise ValueError("not the same loss: nothing is timed")
    return {"ours": ours, "trl": theirs}


ENTRIES = {
    "sft": lambda *sizes: run_ours(sft_steps, *sizes),
    "sdft": lambda *sizes: run_ours(sdft_steps, *sizes),
    "TRL sdft": run_trl,
    "our loss": lambda batch, n, _: our_loss(batch, n),
    "TRL loss": lambda batch, n, _: trl_loss(batch, n),
}


def flops_of(batch, n):
    """Of the products with the weights: name -> flop of a step."""
    weights = make_model().num_params()
    tok, (shown, _) = data.Tokenizer(), make_examples(batch, n)
    p = len(data.student_prompt(shown[0], tok))
    q = len(data.teacher_prompt(shown[0], tok))
    train, score = 6 * weights * batch * (p + n), 2 * weights * batch * (q + n)
    rollout = 2 * weights * batch * (p + n)
    sdft_step = train + score + rollout
    return {"sft": train, "sdft": sdft_step, "TRL sdft": sdft_step}


def main():
    if sys.argv[1:2] == ["--entry"]:
        print(json.dumps(ENTRIES[sys.argv[2]](*map(int, sys.argv[3:]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each entry")
    measure.add_arguments(parser, turns=9)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.new_tokens, args.turns, args.rounds = 4, 8, 2, 1
    measure.begin(args)
    sizes = args.batch, args.new_tokens
    result = {"batch": args.batch, "new_tokens": args.new_tokens,
              "loss": check_losses(*sizes), "rows": {}}  # fmt: skip
    entries = ["sft", "sdft"] + (["TRL sdft"] if result["loss"] else [])
    runs = {name: [] for name in entries}
    for _ in range(args.rounds):
        for name in entries:
            runs[name].append(measure.fresh("--entry", name, *sizes, args.turns))
    flop, flops = measure.flop_per_second(), flops_of(*sizes)

    # of an entry, and of a part of ours: the seconds of all its processes
    seconds = {name: sum((run["seconds"] for run in runs[name]), [])
               for name in entries}  # fmt: skip
    parts = {part: sum((run["parts"][part] for run in runs["sdft"]), [])
             for part in runs["sdft"][0]["parts"]}  # fmt: skip
    ours = min(seconds["sdft"])
    print(f"{'':12}{'min ms':>10}{'median':>10}{'/ our sdft':>12}{'of roof':>9}"
          f"{'extra MB':>10}")
    for name in entries:
        row = result["rows"][name] = {
            **measure.min_and_median(seconds[name]),
            "time_over_ours": min(seconds[name]) / ours,
            "of_roof": flops[name] / flop / min(seconds[name]),
            "extra_mb": min(run["extra_mb"] for run in runs[name]),
        }
        print(f"{name:12}{row['min_ms']:10.1f}{row['median_ms']:10.1f}"
              f"{row['time_over_ours']:11.2f}x{row['of_roof']:9.0%}"
              f"{row['extra_mb']:10.0f}")
    result["parts"] = {}
    for part in parts:
        row = result["parts"][part] = measure.min_and_median(parts[part])
        print(f"  {part:10}{row['min_ms']:10.1f}{row['median_ms']:10.1f}"
              f"{row['min_ms'] / 1e3 / ours:11.0%}")
    measure.write("step", result, args.quick, args.out)


if __name__ == "__main__":
    main()
