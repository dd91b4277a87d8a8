"""Supervised fine-tuning (SFT): imitate the demonstrations. The baseline.

    response  = demo                                       # off-policy
    loss      = mean_t  -log student(response_t | prompt, response_<t)
    student  <- AdamW(student, loss)                       # SFT has no teacher.

mean_t is over the tokens of a response, its end included, then over the batch.

Shapes:  B batch   P prompt   R response   C channels   V vocabulary
         N response tokens of the batch that carry loss

Read beside sdft.py: `diff sft.py sdft.py` is the method (arXiv 2601.19897).
The base model is made by this file, too, on a training set of its own.
"""

import copy
import json
import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import generate, kl_models, response_states


@dataclass
class Config:
    seed: int = 0  # decides everything random

    # optimization
    steps: int = 300  # updates for each stage (skill)
    batch_size: int = 64  # examples in an update, all processes together
    micro_batches: int = 1  # parts in which a process does its share of a batch
    lr: float = 6e-4  # highest learning rate, reached after the warm-up
    warmup_steps: int = 40  # updates; then a cosine to 0 at the end of the stage
    beta2: float = 0.999  # of AdamW; a long memory disturbs old knowledge least
    weight_decay: float = 0.0  # of AdamW, on matrices
    grad_clip: float = 10.0  # largest norm of the gradient
    dropout: float = 0.1  # share of each residual branch: later stages disturb less

    # responses and records
    max_new_tokens: int = 16  # longest sampled response, in tokens, its end included
    log_every: int = 10  # updates
    eval_every: int = 0  # updates between evaluations; 0: only after each stage
    save_every: int = 50  # updates between checkpoints


# ---- 1. Where the response comes from ------------------------------------------------


def get_responses(batch, tok, device):
    """The demonstrations themselves: int64 (B, R), and their mask, bool (B, R)."""
    response, lengths = data.pad_batch(data.demo_response, batch, tok, device)
    mask = torch.arange(response.size(1), device=device) < lengths[:, None]  # (B, R)
    return response, mask


# ---- 2. What the student is pulled towards -------------------------------------------


def compute_loss(student, batch, response, mask, tok, cfg):
    """This part's share of the batch's loss, in nats per token; no more to record."""
    bare = data.pad_batch(data.student_prompt, batch, tok, mask.device)  # (B, P), (B,)
    states = response_states(student, *bare, response, mask)  # (N, C)
    # each response weighs the same, whatever its length, however the batch is split
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size  # (B, R)

    log_s = torch.log_softmax(student.head(states), dim=-1)  # (N, V)
    log_s = log_s.gather(1, response[mask][:, None])[:, 0]  # (N,)
    return -(weight[mask] * log_s).sum(), {}


# ---- 3. What happens to the teacher --------------------------------------------------
#
# SFT has no teacher.


# ---- 4. What does not depend on the method -------------------------------------------


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


@torch.no_grad()
def tally(sums, loss, response, mask, extra, tok, cfg):
    """Add this part's share of what is recorded: sums, so that any split will do."""
    share = {
        "loss": loss,
        "tokens": mask.sum().float(),
        "response_length": mask.sum() / cfg.batch_size,
        "eos_rate": ((response == tok.end) & mask).sum() / cfg.batch_size,
        **extra,
    }
    for key, value in share.items():
        sums[key] = sums.get(key, 0) + value


def add_up(student, sums):
    """Sum gradients and records over all processes, in place; no change if one."""
    if dist.is_initialized():
        for p in student.parameters():
            dist.all_reduce(p.grad)
        values = torch.stack([sums[key] for key in sorted(sums)])
        dist.all_reduce(values)
        sums.update(zip(sorted(sums), values, strict=True))


def stop_unless_finite(loss, norm, step, batch, out_dir):
    """Raise FloatingPointError before the step, not train on NaN or infinity."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        saved = out_dir / "checkpoint.pt"
        raise FloatingPointError(
            f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; the step "
            f"was not made; its examples: {sorted(e.id for e in batch)}; last good "
            f"checkpoint: {saved if saved.exists() else 'none yet'}"
        )


@torch.no_grad()
def evaluate(models, base, skill, tasks, tok, cfg):
    """Greedy accuracies on all tasks; on queries of the skill, in nats per token:
    KL(student || base) and KL(teacher || base), each on responses of its own, and
    KL(teacher || student) at each position of the student's responses."""
    student, teacher, record = models["student"].eval(), models.get("teacher"), {}
    for group, benchmarks in tasks.items():
        record[group] = {
            name: data.accuracy(student, name, examples, tok, cfg.max_new_tokens)
            for name, examples in benchmarks.items()
        }
    queries = tasks["new"][skill][:128]
    device = next(student.parameters()).device
    u = data.get_uniform(queries, cfg.max_new_tokens, cfg.seed, "evaluate", device)
    bare = data.pad_batch(data.student_prompt, queries, tok, device)
    response, mask = generate(student, *bare, cfg.max_new_tokens, tok.end, u)
    kl = kl_models(student, bare, base, bare, response)  # KL(student || base), (B, R)
    record["kl_student_base"] = data.mean_per_response(kl, mask)
    record["kl_teacher_base"] = None
    if teacher is not None:
        shown = data.pad_batch(data.teacher_prompt, queries, tok, device)
        kl = kl_models(teacher, shown, student, bare, response)  # (teacher || student)
        by_position = (kl * mask).sum(0) / mask.sum(0)  # (R,)
        record["kl_teacher_student_by_position"] = by_position.tolist()
        response, mask = generate(teacher, *shown, cfg.max_new_tokens, tok.end, u)
        kl = kl_models(teacher, shown, base, bare, response)  # KL(teacher || base)
        record["kl_teacher_base"] = data.mean_per_response(kl, mask)
    examples = [tasks["new"][skill][0], tasks["prior"]["knowledge"][0]]
    record["samples"] = data.sample(student, examples, tok, cfg.max_new_tokens)
    return record


def save_progress(out_dir, step, models, optimizer, evaluations, settings):
    """All that a resume needs; everything random is derived from (seed, step)."""
    content = {
        "step": step,
        "settings": settings,
        "machine": data.machine_of(models["student"]),
        "models": {name: model.state_dict() for name, model in models.items()},
        "optimizer": optimizer.state_dict(),
        "evaluations": evaluations,
    }
    data.write_checkpoint(out_dir / "checkpoint.pt", content)


def load_progress(out_dir, models, optimizer, settings):
    """Put a saved run into models and optimizer; returns its step and evaluations."""
    saved = data.read_checkpoint(out_dir / "checkpoint.pt")
    if other := data.differences(saved["settings"], settings):
        raise ValueError(f"{out_dir} holds another run (saved -> now): {other}")
    other = data.differences(saved["machine"], data.machine_of(models["student"]))
    if other and data.is_first():
        print(f"resumed, but not to the bit (saved -> now): {other}")
    for name, model in models.items():
        model.load_state_dict(saved["models"][name])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["evaluations"]


class Log:
    """metrics.jsonl, one object a line, and the same on the screen."""

    def __init__(self, out_dir, start):
        self.path, self.clock = out_dir / "metrics.jsonl", time.perf_counter()
        if data.is_first():  # a resumed run makes the lines from `start` on again
            old = self.path.read_text().splitlines(keepends=True) if start else []
            old = [line for line in old if line.endswith("\n")]  # not cut by a kill
            kept = [line for line in old if json.loads(line)["step"] < start]
            data.write_atomically(self.path, "".join(kept).encode())

    def write(self, record):
        before, self.clock = self.clock, time.perf_counter()
        record["seconds"] = round(self.clock - before, 3)  # since the last record
        if data.is_first():
            data.append_line(self.path, json.dumps(record))
            tqdm.write(data.describe(record))


# ---- 5. The training loop ------------------------------------------------------------


def train(student, stages, tasks, tok, cfg, out_dir, resume=False, stop=None):
    """Fine-tune the student, in place, on one stage (skill) after the other.

    Args:
        student: GPT, on its device, with the weights of the base model.
        stages: name -> list of Example; each stage gets an optimizer of its own.
        tasks: what to evaluate, see data.make_tasks; {} for nothing.
        out_dir: folder of metrics.jsonl and of checkpoint.pt, where `resume` goes on.
        stop: an object whose `signal` is 0 until the run is to stop after its step.
    Returns: the evaluations, a list of dicts: the base's, then one after each stage.
    Raises: FloatingPointError before a step whose loss or gradient is not finite;
        KeyboardInterrupt after a step in which `stop` was set, with everything saved.
    """
    device, names = next(student.parameters()).device, list(stages)
    base = copy.deepcopy(student).eval()  # never trained: distances are from here
    student.dropout = cfg.dropout
    models = {"student": student}
    optimizer = make_optimizer(student, cfg)
    settings = data.settings_of(cfg, student, (stages, tasks))
    run = out_dir, models, optimizer, settings
    start, evaluations = load_progress(*run) if resume else (0, [])
    log, total = Log(out_dir, start), cfg.steps * len(names)
    hidden = None if data.is_first() else True  # None: a bar on a terminal only
    for step in tqdm(range(start, total + 1), f"{total} steps", disable=hidden):
        stage, t = divmod(step, cfg.steps)  # t updates were made in this stage
        if tasks and (t == 0 or (cfg.eval_every and t % cfg.eval_every == 0)):
            skill = names[max(0, step - 1) // cfg.steps]  # the last one trained
            record = {"step": step, "skill": skill, "stage_end": t == 0 and step > 0}
            record.update(evaluate(models, base, skill, tasks, tok, cfg))
            evaluations.append(record)
            log.write(record)
        if step == total:
            return evaluations
        if t == 0:
            optimizer = make_optimizer(student, cfg)
        for group in optimizer.param_groups:
            group["lr"] = get_lr(t, cfg)
        examples = stages[names[stage]]
        batch = data.get_batch(examples, cfg.batch_size, cfg.seed, step)
        sums = {"stop": torch.tensor(float(stop.signal if stop else 0), device=device)}
        for part in data.my_parts(batch, cfg.micro_batches):
            student.train().dropout_seed = data.derive_seed(cfg.seed, step, part[0].id)
            response, mask = get_responses(part, tok, device)
            loss, extra = compute_loss(student, part, response, mask, tok, cfg)
            loss.backward()
            tally(sums, loss, response, mask, extra, tok, cfg)
        add_up(student, sums)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        stop_unless_finite(sums["loss"], norm, step, batch, out_dir)
        optimizer.step()
        optimizer.zero_grad()

        stopped = int(sums.pop("stop"))
        if step % cfg.log_every == 0:
            record = {"step": step, "skill": names[stage], "lr": get_lr(t, cfg)}
            record.update({key: value.item() for key, value in sums.items()})
            log.write({**record, "grad_norm": norm.item()})
        if stopped or t == cfg.steps - 1 or (step + 1) % cfg.save_every == 0:
            save_progress(out_dir, step + 1, models, optimizer, evaluations, settings)
        if stopped:
            raise KeyboardInterrupt(f"signal {stopped}, after step {step}")
