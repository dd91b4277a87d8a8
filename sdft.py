"""Self-distillation fine-tuning (SDFT): learn from the same model, shown the demo.

    response  ~ student(. | prompt)                        # on-policy
    p_S, p_T  = student(. | prompt, response_<t), teacher(. | prompt, demo, response_<t)
    loss      = mean_t  KL(p_T || p_S)                     # KL(teacher || student)
    student  <- AdamW(student, loss)            # no gradient through response or p_T
    teacher  <- ema_rate * student + (1 - ema_rate) * teacher

mean_t is over the tokens of a response, its end included, then over the batch.
The paper's Eq. 1 is KL(student || teacher); its results were made with
KL(teacher || student), its author says. --kl chooses.

Shapes:  B batch   P prompt   R response   C channels   V vocabulary
         N response tokens of a micro-batch that carry loss

Read sft.py and sdft.py side by side: `diff sft.py sdft.py` is the method (arXiv
2601.19897). sft.py also makes the base model, on a training set of its own.
"""

import copy
import math
from dataclasses import dataclass

import torch

import data
from model import chunked_kl, generate, response_hidden


@dataclass
class Config:
    seed: int = 0  # decides everything random

    # optimization
    steps: int = 120  # updates for each stage (skill)
    batch_size: int = 64  # examples in an update, all processes together
    micro_batches: int = 1  # gradient accumulation: micro-batches per update and
    # process; more of them need less memory and change nothing but the dropout's noise
    lr: float = 9e-5  # highest learning rate, reached after the warm-up. Tune it first:
    # lower if old skills suffer, higher if new ones are not learnt
    warmup_steps: int = 40  # updates, at most half of the stage; then a cosine to 0
    beta2: float = 0.999  # of AdamW; .95 forgets more here: Adam takes larger steps
    weight_decay: float = 0.0  # of AdamW, on matrices; it also pulls old knowledge to 0
    grad_clip: float = 10.0  # largest gradient norm; only the first updates exceed it
    dropout: float = 0.1  # on the residual branches; with it, skills take longer to
    # learn, and a later stage disturbs them less

    # responses and records
    max_new_tokens: int = 16  # longest sampled response, in tokens, its end included
    log_every: int = 10  # updates between records
    eval_every: int = 0  # updates between evaluations; 0: only after each stage
    save_every: int = 50  # updates between checkpoints

    # self-distillation
    kl: str = "forward"  # KL(teacher || student); reverse: KL(student || teacher); jsd
    ema_rate: float = 0.001  # teacher <- ema_rate * student + (1 - ema_rate) * teacher;
    # 0: the teacher stays the base, 1: it is the student
    temperature: float = 1.0  # of the sampler and of both distributions in the loss
    skip_first_tokens: int = 0  # of each response, left out of the loss (official: 3)


# ---- 1. Where the response comes from ------------------------------------------------


@torch.no_grad()
def get_responses(student, batch, tok, cfg, step):
    """One sample per prompt, int64 (B, R), from the student as it is now; and its mask,
    bool (B, R). On-policy: the student is shown no demonstration, only its prompt."""
    device = next(student.parameters()).device
    bare = data.pad_batch(data.student_prompt, batch, tok, device)  # (B, P), (B,)
    u = data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, step, device)  # (B, R)
    return generate(student, *bare, cfg.max_new_tokens, tok.end, u, cfg.temperature)


# ---- 2. What the student is pulled towards -------------------------------------------


def compute_loss(student, teacher, batch, response, mask, tok, cfg, step):
    """The loss of this micro-batch (its share of the batch's mean, in nats per token),
    and a dict of further numbers for the record."""
    bare = data.pad_batch(data.student_prompt, batch, tok, mask.device)  # (B, P), (B,)
    shown = data.pad_batch(data.teacher_prompt, batch, tok, mask.device)
    mask = mask & (mask.cumsum(1) > cfg.skip_first_tokens)  # no loss, but still seen
    hidden = response_hidden(student, *bare, response, mask)  # (N, C)
    # another context, the same response: row n of both predicts the same token
    with torch.no_grad():
        teacher_hidden = response_hidden(teacher, *shown, response, mask)  # (N, C)
    # the mean, per response and then over the batch: each response weighs the same,
    # at any length, however the batch is split
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size  # (B, R)
    weight = weight[mask]  # (N,)

    # loss = (weight * kl_reference(student_logits, teacher_logits, cfg.kl)).sum()
    heads = student.head(), teacher.head()
    watch = step % cfg.log_every == 0  # a step that is recorded
    return chunked_kl(
        hidden, teacher_hidden, *heads, weight, cfg.kl, cfg.temperature, watch
    )


# ---- 3. What happens to the teacher --------------------------------------------------


def make_teacher(student):
    """A copy of the student as it is now; it never gets a gradient."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher, student, cfg):
    """teacher <- ema_rate * student + (1 - ema_rate) * teacher, in float32 (critical!):
    in bfloat16 so small a step rounds to nothing."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)


# ---- 4. What does not depend on the method -------------------------------------------


def make_optimizer(student, cfg):
    """AdamW over all parameters, with weight decay on matrices only."""
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


def get_lr(t, cfg):
    """Learning rate of update t of a stage: linear warm-up, then a cosine to 0."""
    warmup = min(cfg.warmup_steps, cfg.steps // 2)  # a short stage decays as well
    if t < warmup:
        return cfg.lr * (t + 1) / warmup
    done = (t - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def accumulate(sums, loss, response, mask, extra, tok, cfg):
    """Add what a micro-batch contributes to the record: all of it sums or shares of a
    mean, so that micro-batches and processes simply add up."""
    share = {
        "loss": loss,
        "tokens": mask.sum().float(),
        "response_length": mask.sum() / cfg.batch_size,
        "eos_rate": ((response == tok.end) & mask).sum() / cfg.batch_size,
        **extra,
    }
    for key, value in share.items():
        sums[key] = sums.get(key, 0) + value


def check_finite(loss, norm, step, batch):
    """Raise FloatingPointError rather than update with NaN or infinity."""
    if not math.isfinite(loss + norm):  # (one sum: a GPU is waited for once)
        raise FloatingPointError(
            f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; the step "
            f"was not made; its examples: {sorted(e.id for e in batch)}"
        )


# ---- 5. The training loop ------------------------------------------------------------


def train(student, stages, tasks, tok, cfg, run):
    """Fine-tune the student, in place, on one stage (skill) after the other.

    Args:
        student: GPT, on its device, with the weights of the base model.
        stages: name -> list of Example; each stage gets an optimizer of its own.
        tasks: what to evaluate, see data.make_tasks; {} for nothing.
        run: where records and checkpoints go: train.Run("a folder").
    Returns: the evaluations, a list of dicts: the base's, one after each stage, and in
        between those of eval_every; [] without tasks.
    Raises: FloatingPointError before a step whose loss or gradient is not finite;
        KeyboardInterrupt after the step in which the run was asked to stop, with
        everything saved.
    """
    device, names = next(student.parameters()).device, list(stages)
    base = copy.deepcopy(student).eval()  # never trained: KL(student || base) needs it
    student.dropout = cfg.dropout
    teacher = make_teacher(student)
    models = {"student": student, "teacher": teacher}
    optimizer = make_optimizer(student, cfg)  # a resume loads its state into it
    start = run.load(models, optimizer, cfg, (stages, tasks))  # 0 if it is new
    total = cfg.steps * len(names)
    for step in run.progress(start, total + 1):  # the last iteration only evaluates
        stage, t = divmod(step, cfg.steps)  # t updates were made in this stage

        # evaluate the base, each finished stage, and every eval_every updates
        if tasks and (t == 0 or (cfg.eval_every and t % cfg.eval_every == 0)):
            skill = names[max(0, step - 1) // cfg.steps]  # the last one trained
            record = {"step": step, "skill": skill, "stage_end": t == 0 and step > 0}
            record.update(data.evaluate(models, base, skill, tasks, tok, cfg))
            run.log(record)
        if step == total:
            return run.evaluations

        # each skill starts with a fresh optimizer and its own warm-up
        if t == 0:
            optimizer = make_optimizer(student, cfg)
        for group in optimizer.param_groups:
            group["lr"] = get_lr(t, cfg)

        # responses and loss, with gradient accumulation: the losses of the
        # micro-batches sum to the batch's mean, and backward() sums their gradients
        batch = data.get_batch(stages[names[stage]], cfg.batch_size, cfg.seed, step)
        sums = {"stop": torch.tensor(run.stop_wanted(), device=device)}  # 0 or 1
        for micro in data.my_micro_batches(batch, cfg.micro_batches):
            student.train()
            torch.manual_seed(data.derive_seed(cfg.seed, step, micro[0].id))  # dropout
            response, mask = get_responses(student, micro, tok, cfg, step)
            loss, extra = compute_loss(
                student, teacher, micro, response, mask, tok, cfg, step
            )
            loss.backward()
            accumulate(sums, loss, response, mask, extra, tok, cfg)

        # gradients and records of all processes; also "stop", so that all stop together
        run.all_reduce(student, sums)

        # one update
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        check_finite(sums["loss"], norm, step, batch)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, cfg)  # critical: once per update, after it

        # record, and save at the end of a stage, before its evaluation
        stop = sums.pop("stop").item() > 0
        if step % cfg.log_every == 0:
            record = {"step": step, "skill": names[stage], "lr": get_lr(t, cfg)}
            record.update({key: value.item() for key, value in sums.items()})
            run.log({**record, "grad_norm": norm.item()})
        if stop or t == cfg.steps - 1 or (step + 1) % cfg.save_every == 0:
            run.save(step + 1, models, optimizer)
        if stop:
            raise KeyboardInterrupt(f"stopped after step {step}")
