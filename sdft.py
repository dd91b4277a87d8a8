"""Self-distillation fine-tuning (SDFT): learn on-policy from the model shown the demo.

    response  ~ student(. | prompt)                        # on-policy
    p_S, p_T  = student(. | prompt, response_<t), teacher(. | prompt, demo, response_<t)
    loss      = mean_t  KL(p_T || p_S)                     # KL(teacher || student)
    student  <- AdamW(student, loss)                       # no gradient through response, p_T
    teacher  <- ema_rate * student + (1 - ema_rate) * teacher

mean_t is over the tokens of a response, its end included, then over the batch.

Shapes:  B batch   P prompt   R response   C channels   V vocabulary
         N response tokens of the batch that carry loss

Read beside sft.py: `diff sft.py sdft.py` is the method (arXiv 2601.19897, Algorithm 1).
The paper writes KL(student || teacher) in Eq. 1, but its results were made with
KL(teacher || student), says its author; --kl chooses.
"""

import copy
import json
import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import accuracy, derive_seed, describe, get_batch, get_uniform
from data import is_first, my_parts, pad_right, read_checkpoint, sample_answers
from data import student_prompt, teacher_prompt, write_atomically, write_checkpoint
from model import entropy, fused_linear_kl, generate, kl_reference, response_logits
from model import response_states


@dataclass
class Config:
    seed: int = 0  # decides everything random

    # optimization
    steps: int = 80  # updates for each stage (skill)
    batch_size: int = 64  # examples in an update, all processes together
    micro_batches: int = 1  # each process does its share of a batch in so many parts
    sort: int = 1  # so many batches are cut by length together: less padding
    lr: float = 1e-4  # the highest learning rate, reached after the warm-up
    warmup_steps: int = 10  # updates; then a cosine down to 0 at the end of the stage
    beta2: float = 0.999  # of AdamW; a long memory disturbs old knowledge least
    weight_decay: float = 0.0  # of AdamW, on matrices
    grad_clip: float = 1.0  # largest norm of the gradient
    dropout: float = 0.0  # share of each residual branch

    # responses and records
    max_new_tokens: int = 16  # longest sampled response, in tokens, its end included
    log_every: int = 10  # updates
    eval_every: int = 0  # updates; 0: at the end of each stage only
    save_every: int = 40  # updates between checkpoints

    # self-distillation
    kl: str = "forward"  # KL(teacher || student); reverse: KL(student || teacher); jsd
    teacher: str = "ema"  # average of the student; frozen: the base; live: the student
    ema_rate: float = 0.02  # teacher <- ema_rate * student + (1 - ema_rate) * teacher
    temperature: float = 1.0  # of rollouts and of both distributions in the loss
    skip_first_tokens: int = 0  # of each response, left out of the loss (official code: 3)
    generate_from: str = "student"  # whose responses; teacher: the off-policy ablation


# ---- 1. Where the response comes from ----------------------------------------------


def get_responses(student, teacher, batch, tok, cfg, step):
    """One sample per prompt from the current student: int64 (B, R), and its mask, bool."""
    device = next(student.parameters()).device
    model, context = student, student_prompt
    if cfg.generate_from == "teacher":
        model, context = teacher, teacher_prompt
    prompts = pad_right([context(e, tok) for e in batch], tok.end, device)
    u = get_uniform(batch, cfg.max_new_tokens, cfg.seed, step, device)
    return generate(model, *prompts, cfg.max_new_tokens, tok.end, u, cfg.temperature)


# ---- 2. What the student is pulled towards -----------------------------------------


def compute_loss(student, teacher, batch, response, mask, tok, cfg, step):
    """This part's share of the batch's loss, in nats per token; what else to record."""
    bare = pad_right([student_prompt(e, tok) for e in batch], tok.end, mask.device)
    shown = pad_right([teacher_prompt(e, tok) for e in batch], tok.end, mask.device)
    place = torch.arange(mask.size(1), device=mask.device)  # (R,)
    mask = mask & (place >= cfg.skip_first_tokens)
    states = response_states(student, *bare, response)[mask]  # (N, C)
    with torch.no_grad():  # two contexts of different lengths, one response: same rows
        teacher_states = response_states(teacher, *shown, response)[mask]  # (N, C)
    # every response weighs the same, whatever its length and however the batch is split
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size  # (B, R)

    student_logits = (states / cfg.temperature, student.lm_head.weight)  # states, head
    teacher_logits = (teacher_states / cfg.temperature, teacher.lm_head.weight)
    loss, _ = fused_linear_kl(*student_logits, *teacher_logits, weight[mask], cfg.kl)
    if step % cfg.log_every:
        return loss, {}
    with torch.no_grad():  # KL(student || teacher), whatever cfg.kl is
        reverse, _ = fused_linear_kl(
            *student_logits, *teacher_logits, weight[mask], "reverse"
        )
        return loss, {
            "kl_student_teacher": reverse,
            "student_entropy": entropy(*student_logits, weight[mask]),
            "teacher_entropy": entropy(*teacher_logits, weight[mask]),
        }


# ---- 3. What happens to the teacher ------------------------------------------------


def make_teacher(student):
    """A copy of the student as it is now; no gradient ever reaches it."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher, student, cfg):
    """teacher <- ema_rate * student + (1 - ema_rate) * teacher, in float32 (critical! in
    bfloat16 so small a step rounds to nothing). 0: frozen, the base; 1: live, a copy."""
    ema_rate = {"ema": cfg.ema_rate, "frozen": 0.0, "live": 1.0}[cfg.teacher]
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_(ema_rate * s + (1 - ema_rate) * t)


# ---- 4. What does not depend on the method -----------------------------------------


def make_optimizer(student, cfg):
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


def get_lr(t, cfg):
    """Learning rate of update t of a stage: linear warm-up, then a cosine to 0."""
    if t < cfg.warmup_steps:
        return cfg.lr * (t + 1) / cfg.warmup_steps
    done = (t - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def add_up(student, sums):
    """Sum the gradients and the numbers to record over all processes, in place."""
    if dist.is_initialized():
        for p in student.parameters():
            dist.all_reduce(p.grad)
        values = torch.stack([sums[key] for key in sorted(sums)])
        dist.all_reduce(values)
        sums.update(zip(sorted(sums), values, strict=True))


@torch.no_grad()
def tally(sums, loss, response, mask, extra, tok, cfg):
    """Add this part's share of what is recorded; all are sums, so any split will do."""
    share = {
        "loss": loss,
        "tokens": mask.sum().float(),
        "response_length": mask.sum() / cfg.batch_size,
        "eos_rate": ((response == tok.end) & mask).sum() / cfg.batch_size,
        **extra,
    }
    for key, value in share.items():
        sums[key] = sums.get(key, 0) + value


def stop_unless_finite(loss, norm, step, batch, out_dir):
    """Raise FloatingPointError, before the step, rather than train on NaN or infinity."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        saved = out_dir / "checkpoint.pt"
        raise FloatingPointError(
            f"loss {float(loss)} and gradient norm {float(norm)} at step {step}, examples "
            f"{sorted(e.id for e in batch)}; the step was not made; last good checkpoint: "
            f"{saved if saved.exists() else 'none yet'}"
        )


@torch.no_grad()
def evaluate(models, base, skill, tasks, tok, cfg):
    """Accuracies (greedy) on all tasks; divergences on queries of the skill, in nats per
    token: KL(student || base) and KL(teacher || base), each on its own responses, and
    KL(teacher || student) at each position of the student's responses."""
    student, teacher, record = models["student"], models.get("teacher"), {}
    for group, benchmarks in tasks.items():
        record[group] = {
            name: accuracy(student, name, examples, tok, cfg.max_new_tokens)
            for name, examples in benchmarks.items()
        }
    queries = tasks["new"][skill][:128]
    device = next(student.parameters()).device
    u = get_uniform(queries, cfg.max_new_tokens, cfg.seed, "evaluate", device)
    bare = pad_right([student_prompt(e, tok) for e in queries], tok.end, device)
    shown = pad_right([teacher_prompt(e, tok) for e in queries], tok.end, device)
    record["kl_teacher_base"] = None
    for name, model, context in (("student", student, bare), ("teacher", teacher, shown)):
        if model is None:
            continue
        response, mask = generate(model, *context, cfg.max_new_tokens, tok.end, u)
        logits = response_logits(model, *context, response)  # (B, R, V)
        kl = kl_reference(response_logits(base, *bare, response), logits)  # (model || base)
        record[f"kl_{name}_base"] = ((kl * mask).sum(1) / mask.sum(1)).mean().item()
        if name == "student" and teacher is not None:
            kl = kl_reference(logits, response_logits(teacher, *shown, response))
            by_position = (kl * mask).sum(0) / mask.sum(0)  # (R,)
            record["kl_teacher_student_by_position"] = by_position.tolist()
    record["samples"] = sample_answers(student, skill, tasks, tok, cfg.max_new_tokens)
    return record


def save_progress(out_dir, step, models, optimizer, evaluations, cfg):
    """All that a resume needs; everything random is derived from (seed, step)."""
    write_checkpoint(
        out_dir / "checkpoint.pt",
        {
            "step": step,
            "config": asdict(cfg),
            "models": {name: model.state_dict() for name, model in models.items()},
            "optimizer": optimizer.state_dict(),
            "evaluations": evaluations,
        },
    )


def load_progress(out_dir, models, optimizer, cfg):
    """Continue a run: returns its next step and its evaluations. Raises ValueError if it
    was made with another configuration."""
    saved = read_checkpoint(out_dir / "checkpoint.pt")
    changed = [
        f"{key}: {saved['config'].get(key)} -> {now}"
        for key, now in asdict(cfg).items()
        if saved["config"].get(key) != now
    ]
    if changed:
        raise ValueError(f"{out_dir} was made with another {', '.join(changed)}")
    for name, model in models.items():
        model.load_state_dict(saved["models"][name])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["evaluations"]


class Log:
    """metrics.jsonl, one object a line, and the same on the screen; first process only."""

    def __init__(self, out_dir, start):
        self.path = out_dir / "metrics.jsonl"
        self.seconds = time.perf_counter()
        if is_first():  # a resumed run repeats from `start` on
            old = self.path.read_text().splitlines() if start else []
            kept = [line for line in old if json.loads(line)["step"] < start]
            write_atomically(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, record):
        seconds, self.seconds = time.perf_counter() - self.seconds, time.perf_counter()
        record["seconds"] = round(seconds, 3)  # since the record before
        if is_first():
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            tqdm.write(describe(record))


# ---- 5. The training loop ----------------------------------------------------------


def train(student, stages, tasks, tok, cfg, out_dir, resume=False, stop=None):
    """Fine-tune the student, in place, on one stage (skill) after the other.

    Args:
        student: GPT, on its device; its weights are the base model's.
        stages: name -> list of Example; each stage has an optimizer of its own.
        tasks: what to evaluate, see data.make_tasks; {} for nothing.
        out_dir: folder of metrics.jsonl and checkpoint.pt, from which `resume` goes on.
        stop: an object whose `signal` is 0 until the run shall end after a step.
    Returns: the evaluations, a list of dicts: at the start, and at the end of each stage.
    Raises: FloatingPointError before a step whose loss or gradient is not finite;
        KeyboardInterrupt after a step in which `stop` was set, when all is saved.
    """
    device, names = next(student.parameters()).device, list(stages)
    base = copy.deepcopy(student)  # never trained: how far away is the student now?
    teacher = make_teacher(student)
    models = {"student": student, "teacher": teacher}
    optimizer = make_optimizer(student, cfg)
    start, evaluations = 0, []
    if resume:
        start, evaluations = load_progress(out_dir, models, optimizer, cfg)
    log = Log(out_dir, start)
    total = cfg.steps * len(names)
    for step in tqdm(range(start, total + 1), disable=None if is_first() else True):
        stage, t = divmod(step, cfg.steps)  # t: updates made in this stage
        if tasks and (t == 0 or (cfg.eval_every and t % cfg.eval_every == 0)):
            skill = names[max(0, step - 1) // cfg.steps]  # the one just trained
            record = {"step": step, "skill": skill, "stage_end": t == 0 and step > 0}
            record.update(evaluate(models, base, skill, tasks, tok, cfg))
            evaluations.append(record)
            log.write(record)
        if step == total:
            break
        if t == 0:
            optimizer = make_optimizer(student, cfg)
        for group in optimizer.param_groups:
            group["lr"] = get_lr(t, cfg)
        batch = get_batch(stages[names[stage]], cfg.batch_size, cfg.seed, step, cfg.sort)
        sums = {"stop": torch.tensor(float(stop.signal if stop else 0), device=device)}
        student.train()
        for part in my_parts(batch, cfg.micro_batches):
            response, mask = get_responses(student, teacher, part, tok, cfg, step)
            loss, extra = compute_loss(
                student, teacher, part, response, mask, tok, cfg, step
            )
            loss.backward()
            tally(sums, loss, response, mask, extra, tok, cfg)
        add_up(student, sums)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        stop_unless_finite(sums["loss"], norm, step, batch, out_dir)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, cfg)

        stopped = int(sums.pop("stop"))
        if step % cfg.log_every == 0 or t == cfg.steps - 1:
            record = {"step": step, "skill": names[stage], "lr": get_lr(t, cfg)}
            record.update(grad_norm=norm.item(), **{k: v.item() for k, v in sums.items()})
            log.write(record)
        if stopped or (step + 1) % cfg.save_every == 0 or t == cfg.steps - 1:
            save_progress(out_dir, step + 1, models, optimizer, evaluations, cfg)
        if stopped:
            raise KeyboardInterrupt(f"signal {stopped} after step {step}")
    return evaluations
