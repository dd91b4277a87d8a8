"""A whole SDFT step: beside our SFT step, and beside TRL's SDFT trainer.

    python tests/bench/step.py               # 0.9M parameters, batch 16, 64 new tokens
    python tests/bench/step.py --quick

Same weights (random, so that responses hardly ever end before max_new_tokens), prompts
(16 words), demonstrations (16 words) and contexts, token for token; AdamW, an EMA
teacher, KL(teacher || student), no dropout. SFT imitates demonstrations of the length
of the responses. First the losses of one step on the same responses are compared: ours
and TRL's must agree. Then each trainer, as it is, runs in processes of its own, in
turns; two steps warm up. Then come the parts of our step. The roof is the products of
the weights alone: 2 flop for each weight and token of a forward pass, 4 of a backward
pass. Memory is that of the steps after the warm-up, above what lies there between them.
"""

import contextlib
import random
import tempfile
from itertools import pairwise
from unittest import mock

import measure
import torch
from extra import Quiet
from measure import DEVICE
from sampler import SIZES, to_hugging_face

import data
import sdft
import sft
from model import GPT, GPTConfig

WARM_UP, PARTS = 2, ("responses", "loss", "backward", "update")  # steps; of a step
SETTINGS = {"lr": 6e-5, "beta2": 0.999, "weight_decay": 0.0, "grad_clip": 10.0}
TOK = data.Tokenizer()


def teacher_prompt(example, tok):
    """The teacher's context as TRL's template puts it."""
    return data.student_prompt(example, tok) + tok.encode(example.demo)


def make_model():
    """Random weights, larger ones than usual: a divergence that is not all rounding."""
    model = GPT(GPTConfig(128, *SIZES["0.9M"]), data.make_rng(0, "weights")).to(DEVICE)
    with torch.no_grad():
        model.wte.weight.mul_(4)
    return model.train()


def make_examples(batch, n, prompt=16):
    """Prompts and demonstrations of 16 words, or of others; the same with
    demonstrations that, their end included, have n tokens."""
    rng, shown, long = random.Random(0), [], []
    for i in range(batch):
        p, d, r = (" ".join(rng.choices(data.NOUNS, k=k)) for k in (prompt, 16, n - 1))
        shown.append(data.Example(p, d, "", id=i))
        long.append(data.Example(p, r, "", id=i))
    return shown, long


class Clock(Quiet):
    """A run of a trainer that notes when each part of a step ends. After the warm-up,
    memory is marked."""

    def __init__(self):
        self.times = []  # of each step: its begin, and the ends of parts

    def progress(self, start, end):
        for step in range(start, end):
            if step == WARM_UP:
                self.before = measure.mark_memory()
            self.times.append([measure.clock()])
            yield step

    def all_reduce(self, student, sums):  # between backward pass and update
        self.times[-1].append(measure.clock())

    def noting(self, function):
        def call(*args):
            result = function(*args)
            self.times[-1].append(measure.clock())
            return result

        return call


def timed_training(method, student, examples, turns, **settings):
    """Let sft or sdft train on one batch of make_examples. Seconds of the steps after
    the warm-up and of their parts; MB at their peak, and above what they began with."""
    (shown, long), run = examples, Clock()
    module, batch = {"sft": (sft, long), "sdft": (sdft, shown)}[method]
    few = {"steps": WARM_UP + turns, "batch_size": len(batch), "log_every": 10**6}
    cfg = module.Config(dropout=0.0, **few, **settings)
    with contextlib.ExitStack() as changes:
        for name in ("get_responses", "compute_loss"):
            noting = run.noting(getattr(module, name))
            changes.enter_context(mock.patch.object(module, name, noting))
        module.train(student, {"A": batch}, {}, TOK, cfg, run)
    peak = measure.peak_memory()
    rows = [[*times, after[0]] for times, after in pairwise(run.times[WARM_UP:])]
    parts = {part: [times[i + 1] - times[i] for times in rows]
             for i, part in enumerate(PARTS)}
    seconds = [times[-1] - times[0] for times in rows]
    return {"seconds": seconds, "parts": parts, "peak_mb": peak,
            "extra_mb": peak - run.before}  # fmt: skip


def trl_trainer(folder, batch, n, steps):
    """Its SDFT trainer on our weights, words and settings; words are our tokens."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    vocab = {f"t{i}": i for i in range(TOK.vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": f"t{TOK.end}", "pad_token": "t1", "padding_side": "left"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    shown, _ = make_examples(batch, n)
    ids = {"prompt": [data.student_prompt(e, TOK) for e in shown] * steps,
           "privileged_context": [TOK.encode(e.demo) for e in shown] * steps}
    rows = {k: [" ".join(f"t{i}" for i in x) for x in of] for k, of in ids.items()}
    to_hugging_face(make_model()).save_pretrained(folder)
    args = SDFTConfig(
        output_dir=folder + "/out", per_device_train_batch_size=batch,
        max_steps=steps, learning_rate=SETTINGS["lr"], max_completion_length=n,
        distillation_mode="full_logits", distillation_alpha=0.0,
        distillation_is_clip=None, num_generations=1, num_loss_tokens_to_skip=0,
        teacher_model_kind="ema", teacher_update_rate=0.01, teacher_sync_steps=1,
        teacher_prompt_template="{prompt} {privileged_context}",
        optim="adamw_torch_fused", use_cpu=DEVICE == "cpu", bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, shuffle_dataset=False,
        logging_steps=10**6, lr_scheduler_type="constant",
        adam_beta2=SETTINGS["beta2"], max_grad_norm=SETTINGS["grad_clip"],
        weight_decay=SETTINGS["weight_decay"],
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = Dataset.from_dict(rows)
    of = {"model": student, "args": args, "processing_class": theirs}
    return SDFTTrainer(train_dataset=rows, **of)


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
    more = measure.peak_memory() - timer.before
    return {"seconds": seconds[WARM_UP:], "extra_mb": more}


def fixed_responses(batch, n):
    """Responses of lengths 2 to n, their ends included, as lists of tokens."""
    rng = random.Random(1)
    lengths = [2 + i * (n - 2) // max(1, batch - 1) for i in range(batch)]
    return [[rng.randrange(256, TOK.start) for _ in range(k - 1)] + [TOK.end]
            for k in lengths]  # fmt: skip


def our_loss(batch, n, _):
    student, (shown, _) = make_model(), make_examples(batch, n)
    response, lengths = data.pad_right(fixed_responses(batch, n), TOK.end, DEVICE)
    mask = torch.arange(response.size(1), device=DEVICE) < lengths[:, None]
    both = student, sdft.make_teacher(student), shown, response, mask
    cfg = sdft.Config(batch_size=batch)
    return sdft.compute_loss(*both, TOK, cfg, 1)[0].item()


def trl_loss(batch, n, _):
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
    ours, theirs = (measure.fresh(f"{who} loss", batch, n, 0) for who in ("our", "TRL"))
    if theirs is None:
        return None
    print(f"loss of one step on the same responses: ours {ours:.6f}, TRL {theirs:.6f}")
    if not abs(ours - theirs) <= 1e-3 * ours:  # nan is wrong, too
        raise ValueError("not the same loss: nothing is timed")
    return {"ours": ours, "trl": theirs}


def entry(name, batch, n, *more):
    data.teacher_prompt = teacher_prompt  # sdft.py now finds this one, too
    if name in ("sft", "sdft"):
        of = name, make_model(), make_examples(batch, n), *more
        return timed_training(*of, max_new_tokens=n, **SETTINGS)
    others = {"TRL sdft": run_trl, "our loss": our_loss, "TRL loss": trl_loss}
    return others[name](batch, n, *more)


def flops_of(batch, n):
    """Of the products with the weights: name -> flop of a step."""
    weights, (shown, _) = make_model().num_params(), make_examples(batch, n)
    p = len(data.student_prompt(shown[0], TOK))
    q = len(teacher_prompt(shown[0], TOK))
    train, score = 6 * weights * batch * (p + n), 2 * weights * batch * (q + n)
    whole = train + score + 2 * weights * batch * (p + n)  # the last: the rollout
    return {"sft": train, "sdft": whole, "TRL sdft": whole}


def main():
    args = measure.begin(__doc__, 9, entry)
    batch, n, turns, rounds = (4, 8, 2, 1) if args.quick else (16, 64, args.turns, 3)
    result = {"batch": batch, "new_tokens": n, "loss": check_losses(batch, n),
              "rows": {}, "parts": {}}  # fmt: skip
    runs = {name: [] for name in ["sft", "sdft"] + ["TRL sdft"] * bool(result["loss"])}
    for _ in range(rounds):
        for name in runs:
            runs[name].append(measure.fresh(name, batch, n, turns))
    (_, flop, _), flops = measure.roofs(), flops_of(batch, n)
    ours = min(x for run in runs["sdft"] for x in run["seconds"])
    for name, of in runs.items():
        seconds = [x for run in of for x in run["seconds"]]
        result["rows"][name] = measure.row(
            name, seconds, time_over_ours=min(seconds) / ours,
            of_roof=flops[name] / flop / min(seconds),
            extra_mb=min(run["extra_mb"] for run in of),
        )  # fmt: skip
    for part in PARTS:
        seconds = [x for run in runs["sdft"] for x in run["parts"][part]]
        share = min(seconds) / ours
        result["parts"][part] = measure.row(f"  {part}", seconds, of_step=share)
    measure.write("step", result, args)


if __name__ == "__main__":
    main()
