"""Supervised fine-tuning (SFT): imitate the demonstrations. The baseline.

    response  = demo                                       # off-policy
    loss      = mean_t  -log student(response_t | prompt, response_<t)
    student  <- AdamW(student, loss)                       # SFT has no teacher.

mean_t is over the tokens of a response, its end included, then over the batch.

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
from model import chunked_nll, response_hidden


@dataclass
class Config:
    seed: int = 0  # decides everything random

    # optimization
    steps: int = 300  # updates for each stage (skill)
    batch_size: int = 64  # examples in an update, all processes together
    micro_batches: int = 1  # gradient accumulation: micro-batches per update and
    # process; more of them need less memory and change nothing but the dropout's noise
    lr: float = 6e-4  # highest learning rate, reached after the warm-up. Tune it first:
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


# ---- 1. Where the response comes from ------------------------------------------------


def get_responses(batch, tok, device):
    """The demonstrations themselves: int64 (B, R), and their mask, bool (B, R)."""
    response, lengths = data.pad_batch(data.demo_response, batch, tok, device)
    return response, data.loss_mask(batch, lengths)


# ---- 2. What the student is pulled towards -------------------------------------------


def compute_loss(student, batch, response, mask, tok, cfg):
    """The loss of this micro-batch (its share of the batch's mean, in nats per token),
    and a dict of further numbers for the record."""
    bare = data.pad_batch(data.student_prompt, batch, tok, mask.device)  # (B, P), (B,)
    hidden = response_hidden(student, *bare, response, mask)  # (N, C)
    # the mean, per response and then over the batch: each response weighs the same,
    # at any length, however the batch is split
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size  # (B, R)
    weight = weight[mask]  # (N,)

    # loss = -(weight * log_softmax(student_logits)[response token]).sum()
    loss = chunked_nll(hidden, student.head(), response[mask], weight)
    return loss, {}


# ---- 3. What happens to the teacher --------------------------------------------------
# SFT has no teacher.


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
    models = {"student": student}
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
            response, mask = get_responses(micro, tok, device)
            loss, extra = compute_loss(student, micro, response, mask, tok, cfg)
            loss.backward()
            accumulate(sums, loss, response, mask, extra, tok, cfg)

        # gradients and records of all processes; also "stop", so that all stop together
        run.all_reduce(student, sums)

        # one update
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
        check_finite(sums["loss"], norm, step, batch)
        optimizer.step()
        optimizer.zero_grad()

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
