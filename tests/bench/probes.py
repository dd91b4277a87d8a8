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
from model import generate, kl_reference, response_hidden

TERMS = {word for name, (term, _) in data.OPERATIONS.items() for word in (name, term)}


def padded(prompt, examples, tok, model):
    """The examples' prompts as the model gets them: int64 (B, P), and lengths (B,)."""
    return data.pad_batch(prompt, examples, tok, next(model.parameters()).device)


def respond(model, examples, prompt, tok, n, seed=None, when=None):
    """Responses int64 (B, R) and their mask: greedy, or sampled where a seed is given.
    n: the longest response, in tokens."""
    both, u = padded(prompt, examples, tok, model), None
    if seed is not None:
        u = data.get_uniform(examples, n, seed, when, both[0].device)
    return generate(model, *both, n, tok.end, u, 0.0 if u is None else 1.0)


def texts_of(response, mask, tok):
    pairs = zip(response.tolist(), mask.sum(1).tolist(), strict=True)
    return [tok.decode(row[:n]) for row, n in pairs]


def greedy(model, benchmark, tok, n, prompt=student_prompt):
    """A benchmark in numbers: accuracy; length, in tokens; ended, the share that came
    to their end; thinks, the share that name an operation, in anyone's word."""
    response, mask = respond(model, benchmark.examples, prompt, tok, n)
    texts = texts_of(response, mask, tok)
    right = map(benchmark.grade, benchmark.examples, texts)
    words = [text.replace(":", " ").split() for text in texts]
    ended = ((response == tok.end) & mask).any(1)  # (B,)
    length, ended = (x.float().mean().item() for x in (mask.sum(1), ended))
    return {"accuracy": mean(map(float, right)), "length": length, "ended": ended,
            "thinks": mean(float(not TERMS.isdisjoint(w)) for w in words)}  # fmt: skip


def pass_at_k(right, n, k):
    """The unbiased estimate of pass@k from n samples, of which `right` are right: one
    minus the share of the choices of k samples that hold none (arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def pass_curve(model, benchmark, tok, n, seed, samples):
    """{k: pass@k}, k = 1, 2, 4, ... samples: the mean over queries at temperature 1."""
    examples, right = benchmark.examples, [0] * len(benchmark.examples)
    for i in range(samples):
        both = respond(model, examples, student_prompt, tok, n, seed, ("pass", i))
        for j, text in enumerate(texts_of(*both, tok)):
            right[j] += benchmark.grade(examples[j], text)
    ks = [2**i for i in range(samples.bit_length())]
    return {str(k): mean(pass_at_k(c, samples, k) for c in right) for k in ks}


@torch.no_grad()
def kl_models(p, p_prompts, q, q_prompts, response, mask):
    """KL(p || q) in nats at each token of the response, (B, R), for two models p and q,
    each after (prompts, lengths) of its own; 0 where the mask is false."""
    p_logits = p.logits(response_hidden(p, *p_prompts, response, mask))  # (N, V)
    q_logits = q.logits(response_hidden(q, *q_prompts, response, mask))  # (N, V)
    values = p_logits.new_zeros(mask.shape)
    values[mask] = kl_reference(q_logits, p_logits)  # q is in the student's place
    return values


def distance(p, q, examples, prompts, tok, n, seed):
    """KL(p || q) on responses that p samples; prompts: what p sees, and what q sees."""
    response, mask = respond(p, examples, prompts[0], tok, n, seed, "distance")
    seen = [padded(prompt, examples, tok, p) for prompt in prompts]
    kl = kl_models(p, seen[0], q, seen[1], response, mask)  # (B, R)
    return (kl.sum(1) / mask.sum(1)).mean().item()


def by_position(teacher, student, examples, tok, n, seed):
    """KL(teacher || student) by the place of a token, a list: the mean over the
    responses that the student samples and that are as long."""
    prompts = teacher_prompt, student_prompt
    response, mask = respond(student, examples, prompts[1], tok, n, seed, "evaluate")
    shown, bare = (padded(prompt, examples, tok, student) for prompt in prompts)
    kl = kl_models(teacher, shown, student, bare, response, mask)  # (B, R)
    return (kl.sum(0) / mask.sum(0)).tolist()


@torch.no_grad()
def mass(model, base, examples, tok, n):
    """The probability that a model gives to the base's greedy responses, each taken as
    a whole: the mean over examples, in [0, 1]."""
    response, mask = respond(base, examples, student_prompt, tok, n)
    bare = padded(student_prompt, examples, tok, model)
    hidden = response_hidden(model, *bare, response, mask)  # (N, C)
    rows = model.logits(hidden).log_softmax(-1)  # (N, V)
    log_p = rows.new_zeros(mask.shape)  # (B, R)
    log_p[mask] = rows[range(len(rows)), response[mask]]
    return log_p.sum(1).exp().mean().item()


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTED = {  # what FlopCounterMode leaves out, from shapes
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    # q k^T again, and four products
    BACKWARD: lambda _, q, k, v, *__, **___: 5 * sdpa_flop_count(q, k, v) // 2,
}


def work_of_update(trainer, student, examples, tok, cfg, *more, timed=4):
    """One update of a trainer (m.sft or m.sdft), as this student makes it:

    flops         of matrix products and attention
    computed      tokens that went through a model, prompts and pads included
    loss          tokens that carry loss (of the first update)
    core_seconds  of this process, not of the clock: others may use the core, too

    more: arguments of a variant's train. timed: updates that give the seconds, or 0.
    """
    seen, run = [], Quiet()

    def train(steps):
        twin, few = copy.deepcopy(student), replace(cfg, steps=steps, log_every=10**6)
        twin.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
        begin = time.process_time()
        trainer.train(twin, {"A": examples}, {}, tok, few, run, *more)
        return time.process_time() - begin

    def counted(steps):
        seen.clear()
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            train(steps)
        return counter.get_total_flops(), sum(seen)

    # the first update also makes a record: the second one counts
    flops, computed = (b - a for a, b in zip(counted(1), counted(2), strict=True))
    seconds = (train(1 + timed) - train(1)) / timed if timed else math.nan
    return {"flops": flops, "computed": computed, "loss": run.records[0]["tokens"],
            "core_seconds": seconds}  # fmt: skip


def each_greedy(model, tasks, tok, n):
    """{group: {benchmark: numbers}} of a model, see greedy."""
    return {group: {k: greedy(model, benchmark, tok, n) for k, benchmark in of.items()}
            for group, of in tasks.items()}  # fmt: skip


def measure(student, base, teacher, tasks, tok, n, seed, quick=False):
    """All numbers of a model after fine-tuning (or of the base: student is base), plain
    values. teacher: GPT, or None; tasks: of data.make_tasks; n: the longest response;
    quick: fewer samples. pass@k and distances on new prompts are of the first skill."""
    queries, each, samples = (8, 4, 4) if quick else (100, 40, 64)
    result = each_greedy(student, tasks, tok, n)
    first = next(iter(tasks["new"].values()))
    few = data.Benchmark(first.examples[:queries], first.grade)
    result["pass_at_k"] = pass_curve(student, few, tok, n, seed, samples)
    old = {k: b.examples[:each] for k, b in tasks["prior"].items()}
    old = dict(list(old.items())[:1]) if quick else old
    prompts = {"new": [few.examples], "prior": old.values()}

    def kl(p, q, *seen):
        return {group: mean(distance(p, q, x, seen, tok, n, seed) for x in parts)
                for group, parts in prompts.items()}  # fmt: skip

    bare, shown = student_prompt, teacher_prompt
    result["kl_student_base"] = kl(student, base, bare, bare)
    result["kl_base_student"] = kl(base, student, bare, bare)
    result["kl_teacher_base"] = result["gate"] = None
    if teacher is not None:
        result["kl_teacher_base"] = kl(teacher, base, shown, bare)
        result["gate"] = mean(data.accuracy(teacher, benchmark, tok, n, shown)
                              for benchmark in tasks["new"].values())  # fmt: skip
    result["old_mass"] = {k: mass(student, base, x, tok, n) for k, x in old.items()}
    return result
