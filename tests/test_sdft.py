"""Self-distillation alone: contexts, responses, loss, teacher. test_pair.py uses it."""

import copy
import json
import math
from dataclasses import replace

import oracles
import pytest
import torch
from oracles import equal_weights, gradients, next_logits, rows_of
from torch.overrides import TorchFunctionMode

import data
import sdft
import sft
import train
from data import Benchmark, Example
from model import KLS

pytestmark = pytest.mark.usefixtures("float64")

TOK = data.Tokenizer()
DEMOS = data.make_demos(data.World(0), "A", 16, 0)
BATCH = [  # prompts and demonstrations of several lengths
    *DEMOS[:5],
    Example("garden button: owl", "bag", "", id=5),
    Example("kitchen kettle robot: apple", "copy equals apple beep stop", "", id=6),
    Example("harbour violin: candle spoon tower bag", "bag", "", id=7),
]
CFG = sdft.Config(batch_size=len(BATCH), max_new_tokens=8)
KINDS = pytest.mark.parametrize("kl", KLS)


def small_model(seed=0, **changes):
    """In float64; about a fifth of what it predicts is the end, unless end=None."""
    usual = {"vocab_size": TOK.vocab_size, "n_tokens": TOK.n_tokens, "n_layer": 1}
    return oracles.make_model(seed, **{"end": TOK.end, **usual, **changes})


def make_pair():
    """Student and teacher with different weights, and responses of the student."""
    student, teacher = small_model(0), sdft.make_teacher(small_model(1))
    return student, teacher, *sdft.get_responses(student, BATCH, TOK, CFG, 1)


def loss_of(student, teacher, response, mask, batch=BATCH, step=1, **changes):
    """The loss, and what is recorded beside it."""
    cfg = replace(CFG, **changes)
    return sdft.compute_loss(student, teacher, batch, response, mask, TOK, cfg, step)


def contexts_of(example):
    """The student's and the teacher's, written out."""
    bare = TOK.encode(example.prompt) + [TOK.start]
    shown = TOK.encode(f"{example.prompt} example {example.demo}") + [TOK.start]
    return bare, shown


# ---- The loss ----------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_the_loss_and_its_records_are_what_plain_loops_say(kl, tau):
    """Both models read the response, each behind a context of its own, and only the
    teacher reads the demonstration. Rows, then tokens, each formula typed out anew; the
    mean of a response, then of the batch, of which this is a half. Tokens that are
    skipped are still seen by those behind; a row that has no others adds 0, not NaN."""
    student, teacher, response, mask = make_pair()
    table, rows = [], rows_of(response, mask)
    assert len(set(map(len, rows))) > 2 and min(map(len, rows)) <= 5 < mask.size(1)
    for example, tokens in zip(BATCH, rows, strict=True):
        contexts, values = contexts_of(example), []
        for t in range(len(tokens)):
            bare, shown = (context + tokens[:t] for context in contexts)
            s, q = next_logits(student, bare), next_logits(teacher, shown)
            both = (oracles.divergence(s, q, name, tau) for name in (kl, "reverse"))
            values.append([*both, oracles.entropy(s, tau), oracles.entropy(q, tau)])
        table.append(values)
    names = "loss", "kl_student_teacher", "student_entropy", "teacher_entropy"
    for skip in (0, 1, 5, 100):
        right = dict.fromkeys(names, 0.0)
        for values in table:
            for name, *column in zip(names, *values[skip:], strict=True):
                right[name] += math.fsum(column) / max(1, len(column)) / 16
        settings = {"kl": kl, "temperature": tau, "skip_first_tokens": skip}
        args = student, teacher, response, mask, BATCH
        loss, extra = loss_of(*args, 10, batch_size=16, **settings)
        got = {"loss": loss.item()} | {key: x.item() for key, x in extra.items()}
        assert got == pytest.approx(right, rel=1e-9, abs=1e-15)
        assert loss_of(*args, 11, **settings)[1] == {}, "a step without a record"
    # nothing is left to learn from in the last of these
    assert list(got.values()) == [0, 0, 0, 0]
    assert not any(g.any() for g in gradients(student, loss))


# ---- The teacher -------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_teacher_is_a_copy_in_memory_of_its_own_that_is_not_trained(tie_weights):
    """And making it leaves the student alone. Tied embeddings stay tied."""
    student = small_model(tie_weights=tie_weights)
    before, teacher = copy.deepcopy(student), sdft.make_teacher(student)
    mine, its = (
        {x.untyped_storage().data_ptr() for x in [*m.parameters(), *m.buffers()]}
        for m in (student, teacher)
    )
    assert len(mine) == len(its) and not mine & its, "no storage is shared"
    assert equal_weights(student, teacher) and equal_weights(student, before)
    assert all(map(torch.equal, student.buffers(), teacher.buffers()))
    assert teacher.dtype == student.dtype
    assert (teacher.lm_head.weight is teacher.wte.weight) == tie_weights
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    groups = sdft.make_optimizer(student, CFG).param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}


@KINDS
def test_no_gradient_reaches_the_teacher_even_if_it_asks_for_one(kl):
    """It is a constant, and keeps no graph."""
    (student, teacher, *rows), graph = make_pair(), []
    teacher.ln_f.register_forward_hook(lambda *args: graph.append(args[2].grad_fn))
    for needs_grad in (False, True):
        teacher.requires_grad_(needs_grad)
        loss_of(student, teacher, *rows, kl=kl)[0].backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad is not None for p in student.parameters())
    assert graph == [None, None]


# ---- The loop ----------------------------------------------------------------------


def train_in(folder, module, student=None, stages="A", tasks=None, run=None, **changes):
    """Three updates for each stage. Returns the student and, without times, the
    evaluations and the lines of metrics.jsonl."""
    student, run = student or small_model(), run or train.Run(folder)
    cfg = {"steps": 3, "batch_size": 4, "log_every": 1, "max_new_tokens": 6, **changes}
    stages = {name: DEMOS[8 * i :][:8] for i, name in enumerate(stages)}
    rows = module.train(student, stages, tasks or {}, TOK, module.Config(**cfg), run)
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return student, *([{**x, "seconds": None} for x in each] for each in (rows, lines))


def log_p(model, context, tokens, tau=1.0):
    """Log-probabilities (R, V) of all tokens at the places of a response."""
    logits = model(torch.tensor([context + tokens]))[0, len(context) - 1 : -1]
    return torch.log_softmax(logits / tau, -1)


def nats(student, teacher, example, cfg, step):
    """What the tokens of a response add to the loss of an example."""
    bare, shown = contexts_of(example)
    if not hasattr(cfg, "kl"):  # SFT
        tokens = TOK.encode(example.demo) + [TOK.end]
        return -log_p(student, bare, tokens)[range(len(tokens)), tokens]
    tau, n = cfg.temperature, cfg.max_new_tokens
    u = data.get_uniform([example], n, cfg.seed, step, "cpu")[0].tolist()
    tokens = oracles.sample(student, bare, u, TOK.end, tau)
    s = log_p(student, bare, tokens, tau)
    t = log_p(teacher, shown, tokens, tau).detach()
    m = ((s.exp() + t.exp()) / 2).log()
    terms = {
        "forward": t.exp() * (t - s),
        "reverse": s.exp() * (s - t),
        "jsd": (t.exp() * (t - m) + s.exp() * (s - m)) / 2,
    }
    return terms[cfg.kl].sum(1)[cfg.skip_first_tokens :]


def train_by_hand(student, stages, cfg, rates):
    """The loops in plain torch, one example after the other. Returns the teacher, and
    the loss and norm of each step."""
    teacher, params, found = copy.deepcopy(student), [*student.parameters()], []
    for examples in stages:
        m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        for n, rate in enumerate(rates, 1):
            step, loss = len(found), 0.0
            for example in data.get_batch(examples, cfg.batch_size, cfg.seed, step):
                terms = nats(student, teacher, example, cfg, step)
                loss = loss + terms.sum() / max(1, len(terms)) / cfg.batch_size
            grads = torch.autograd.grad(loss, params)
            norm = sum(g.square().sum() for g in grads).sqrt()
            found.append((loss.item(), norm.item()))
            for i, p in enumerate(params):
                g = grads[i] * min(1, cfg.grad_clip / norm)
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = cfg.beta2 * v[i] + (1 - cfg.beta2) * g * g
                size = (v[i] / (1 - cfg.beta2**n)).sqrt() + 1e-8
                decay = cfg.weight_decay * p.data if p.dim() == 2 else 0
                p.data -= rate * (m[i] / (1 - 0.9**n) / size + decay)
            for t, s in zip(teacher.parameters(), params, strict=True):
                t.data += getattr(cfg, "ema_rate", 0) * (s.data - t.data)
    return teacher, found


def test_all_that_is_random_comes_from_seed_step_and_example(tmp_path, monkeypatch):
    """Both methods see the same examples in the same order, however many numbers the
    responses take; dropout is drawn anew for each micro-batch. The same seed gives the
    same run, and another one another."""
    seeds, found = [], []
    both = seeds.append, torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda x: [each(x) for each in both])
    tasks = {"new": {"A": Benchmark(BATCH[:1], data.grade_items)}, "prior": {}}
    for i, (seed, dropout) in enumerate([(0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)] * 2):
        more = {"seed": seed, "dropout": dropout, "micro_batches": 2, "tasks": tasks}
        found.append(train_in(tmp_path / str(i), (sft, sdft)[i // 4], **more)[1:])
    for a, same, *others in (found[:4], found[4:]):
        assert same == a and a not in others
    for run, seed in enumerate([0, 0, 1, 0] * 2):
        for step in range(3):
            batch = data.get_batch(DEMOS[:8], 4, seed, step)
            right = [data.derive_seed(seed, step, batch[i].id) for i in (0, 2)]
            assert [seeds.pop(0), seeds.pop(0)] == right, (run, step)


class Waits(TorchFunctionMode):
    """Counts how often the host would wait, if every tensor that was made for a device,
    or computed from such a one, were on a GPU. What cpu() returns is on the host."""

    def __init__(self):
        super().__init__()
        self.n, self.on_host = 0, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        given += [x for each in given if isinstance(each, tuple | list) for x in each]
        inputs, name = [x for x in given if torch.is_tensor(x)], function.__name__
        here = not any(isinstance(x, torch.device) for x in given) and all(
            any(x is each for each in self.on_host) for x in inputs
        )
        by_mask = "getitem" in name and any(x.dtype == torch.bool for x in inputs[1:])
        reads = "cpu", "tolist", "item", "nonzero", "__bool__", "__int__", "__float__"
        self.n += not here and (by_mask or name in reads)
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else [result]
        self.on_host += [x for x in made if here or name == "cpu"]
        return result


def test_an_update_waits_for_a_gpu_once_for_each_token_and_five_times_more(tmp_path):
    counts = []

    class Run(train.Run):
        def progress(self, start, end):
            yield start  # the first update is recorded, which waits more often
            for step in range(start + 1, end - 1):
                with Waits() as count:
                    yield step
                counts.append(count.n)
            yield end - 1

    student = small_model(end=None)  # no response ends early
    run, cfg = Run(tmp_path), {"log_every": 100, "max_new_tokens": 7}
    train_in(tmp_path, sdft, student, run=run, **cfg)
    assert counts == [7 + 5] * 2
