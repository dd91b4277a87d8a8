"""What the experiments measure of a model, beside the accuracies of train.py.

Lengths are in tokens, divergences in nats per token: the mean over the tokens of a
response, then over the responses. Everything sampled is sampled at temperature 1, with
numbers that depend on the seed, the purpose and the query alone.
"""

import copy
import math
import time
from dataclasses import replace
from statistics import mean

import torch
from extra import Quiet
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import data
from data import student_prompt, teacher_prompt
from model import generate, kl_models, response_hidden

TERMS = {word for name, (term, _) in data.OPERATIONS.items() for word in (name, term)}


def respond(model, examples, prompt, tok, n, seed=None, when=None):
    """Responses int64 (B, R) and their mask: greedy, or sampled where a seed is given.
    n: the longest response, in tokens."""
    device = next(model.parameters()).device
    both = data.pad_batch(prompt, examples, tok, device)
    if seed is None:
        return generate(model, *both, n, tok.end, temperature=0)
    u = data.get_uniform(examples, n, seed, when, device)
    return generate(model, *both, n, tok.end, u)


def texts_of(response, mask, tok):
    pairs = zip(response.tolist(), mask.sum(1).tolist(), strict=True)
    return [tok.decode(row[:n]) for row, n in pairs]


# ---- Responses ---------------------------------------------------------------------


def greedy(model, benchmark, tok, n, prompt=student_prompt):
    """A benchmark in numbers: accuracy; length, in tokens; ended, the share of
    responses that came to their end; thinks, the share that name an operation, in the
    model's own word or in the expert's."""
    response, mask = respond(model, benchmark.examples, prompt, tok, n)
    texts = texts_of(response, mask, tok)
    pairs = zip(benchmark.examples, texts, strict=True)
    words = [text.replace(":", " ").split() for text in texts]
    return {
        "accuracy": mean(float(benchmark.grade(*pair)) for pair in pairs),
        "length": mask.sum(1).float().mean().item(),
        "ended": ((response == tok.end) & mask).any(1).float().mean().item(),
        "thinks": mean(float(not TERMS.isdisjoint(row)) for row in words),
    }


def pass_at_k(right, n, k):
    """The unbiased estimate of pass@k from n samples, of which `right` are right: one
    minus the share of the choices of k samples that hold none (arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def pass_curve(model, benchmark, tok, n, seed, samples):
    """{k: pass@k}, k = 1, 2, 4, ... samples: the mean over queries at temperature 1."""
    right = [0] * len(benchmark.examples)
    for i in range(samples):
        response, mask = respond(
            model, benchmark.examples, student_prompt, tok, n, seed, ("pass", i)
        )
        for j, text in enumerate(texts_of(response, mask, tok)):
            right[j] += benchmark.grade(benchmark.examples[j], text)
    ks = [2**i for i in range(samples.bit_length())]
    return {str(k): mean(pass_at_k(c, samples, k) for c in right) for k in ks}


# ---- Distances ---------------------------------------------------------------------


def distance(p, q, examples, prompts, tok, n, seed):
    """KL(p || q) on responses that p samples; prompts: what p sees, and what q sees."""
    device = next(p.parameters()).device
    response, mask = respond(p, examples, prompts[0], tok, n, seed, "distance")
    both = [data.pad_batch(prompt, examples, tok, device) for prompt in prompts]
    kl = kl_models(p, both[0], q, both[1], response, mask)  # (B, R)
    return data.mean_per_response(kl, mask)


@torch.no_grad()
def mass(model, base, examples, tok, n):
    """The probability that a model gives to the base's greedy responses, each taken as
    a whole: the mean over examples, in [0, 1]."""
    response, mask = respond(base, examples, student_prompt, tok, n)
    both = data.pad_batch(student_prompt, examples, tok, response.device)
    hidden = response_hidden(model, *both, response, mask)  # (N, C)
    rows = model.logits(hidden).log_softmax(-1)  # (N, V)
    log_p = rows.new_zeros(mask.shape)  # (B, R)
    log_p[mask] = rows.gather(1, response[mask][:, None])[:, 0]
    return log_p.sum(1).exp().mean().item()


# ---- Work --------------------------------------------------------------------------


def addmm_(out, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


def cpu_attention(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


def cpu_attention_backward(_, q, k, v, *__, **___):
    return 5 * sdpa_flop_count(q, k, v) // 2  # q k^T again, and four products


COUNTED = {  # what FlopCounterMode leaves out
    torch.ops.aten.addmm_: addmm_,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        cpu_attention_backward,
}  # fmt: skip


def work_of_update(trainer, student, examples, tok, cfg, *more, timed=4):
    """One update of a trainer (m.sft or m.sdft), as this student makes it:

    flops         floating-point operations of matrix products and attention
    computed      tokens that went through a model, prompts and pads included
    loss          tokens that carry loss (of the first update)
    core_seconds  of this process, not of the clock: others may use the core, too (on a
                  GPU this is only what the CPU does)

    more: what train of a variant needs beside its usual arguments. timed: how many
    updates give the seconds, 0 for none.
    """
    seen, run = [], Quiet()

    def train(steps):
        twin, few = copy.deepcopy(student), replace(cfg, steps=steps, log_every=10**6)
        twin.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
        begin = time.process_time()
        trainer.train(twin, {"A": examples}, {}, tok, few, run, *more)
        return time.process_time() - begin

    # the first update also makes a record: the later ones count
    counts = []
    for steps in (1, 2):
        seen.clear()
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            train(steps)
        counts.append((counter.get_total_flops(), sum(seen)))
    first, both = counts
    return {
        "flops": both[0] - first[0],
        "computed": both[1] - first[1],
        "loss": run.records[0]["tokens"],
        "core_seconds": (train(1 + timed) - train(1)) / timed if timed else math.nan,
    }


# ---- All of it ---------------------------------------------------------------------


def measure(student, base, teacher, tasks, tok, n, seed, quick=False):
    """All numbers of a model after fine-tuning (or of the base: student is base).

    Args:
        student, base: GPT, in eval mode; teacher: GPT, or None.
        tasks: of data.make_tasks. n: the longest response, in tokens.
        quick: fewer samples, to see that it runs.
    Returns: a dict of plain values; "new" and "prior" are {benchmark: numbers}.
        pass@k and the distances on new prompts are of the first new skill.
    """
    queries, each, samples = (8, 4, 4) if quick else (100, 40, 64)
    result = {
        group: {
            name: greedy(student, benchmark, tok, n)
            for name, benchmark in benchmarks.items()
        }
        for group, benchmarks in tasks.items()
    }
    first = next(iter(tasks["new"].values()))
    few = data.Benchmark(first.examples[:queries], first.grade)
    result["pass_at_k"] = pass_curve(student, few, tok, n, seed, samples)
    old = {k: b.examples[:each] for k, b in tasks["prior"].items()}
    old = dict(list(old.items())[:1]) if quick else old
    prompts = {"new": {"new": few.examples}, "prior": old}

    def kl(p, q, *seen):
        return {
            group: mean(distance(p, q, x, seen, tok, n, seed) for x in parts.values())
            for group, parts in prompts.items()
        }

    bare, shown = student_prompt, teacher_prompt
    result["kl_student_base"] = kl(student, base, bare, bare)
    result["kl_base_student"] = kl(base, student, bare, bare)
    result["kl_teacher_base"] = result["gate"] = None
    if teacher is not None:
        result["kl_teacher_base"] = kl(teacher, base, shown, bare)
        result["gate"] = mean(
            greedy(teacher, benchmark, tok, n, shown)["accuracy"]
            for benchmark in tasks["new"].values()
        )
    result["old_mass"] = {k: mass(student, base, x, tok, n) for k, x in old.items()}
    return result
