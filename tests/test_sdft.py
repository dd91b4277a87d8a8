"""The teacher, and the training of both methods by hand, which test_pair.py uses."""

import collections
import copy
import json
from dataclasses import replace

import oracles
import pytest
import torch
from oracles import equal_weights

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


def contexts_of(example):
    """The student's and the teacher's, written out."""
    bare = TOK.encode(example.prompt) + [TOK.start]
    shown = TOK.encode(f"{example.prompt} example {example.demo}") + [TOK.start]
    return bare, shown


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
    """It is a constant, and keeps no graph. A step without a record measures nothing
    else; and where all tokens are skipped, the loss is 0, not NaN."""
    student, teacher, graph = small_model(), sdft.make_teacher(small_model(1)), []
    args = BATCH, *sdft.get_responses(student, BATCH, TOK, CFG, 1), TOK
    teacher.ln_f.register_forward_hook(lambda *args: graph.append(args[2].grad_fn))
    for asks, skip in (False, 0), (True, 0), (True, 100):
        student.zero_grad()
        teacher.requires_grad_(asks)
        cfg = replace(CFG, kl=kl, skip_first_tokens=skip)
        loss, extra = sdft.compute_loss(student, teacher, *args, cfg, 1)
        loss.backward()
        assert extra == {} and all(p.grad is None for p in teacher.parameters())
        learnt = [p.grad.abs().max() > 0 for p in student.parameters()]
        assert all(learnt) if skip == 0 else loss == 0 and not any(learnt)
    assert graph == [None] * 3


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


def by_token(student, teacher, example, cfg, step):
    """What each token of a response adds to the loss of an example, and to what is
    recorded: each model behind a context of its own."""
    bare, shown = contexts_of(example)
    if not hasattr(cfg, "kl"):  # SFT
        tokens = TOK.encode(example.demo) + [TOK.end]
        return {"loss": -log_p(student, bare, tokens)[range(len(tokens)), tokens]}
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
    terms["loss"], terms["kl_student_teacher"] = terms[cfg.kl], terms["reverse"]
    terms["student_entropy"], terms["teacher_entropy"] = -s.exp() * s, -t.exp() * t
    # tokens that are skipped are still seen by those behind
    return {key: x.sum(1)[cfg.skip_first_tokens :] for key, x in terms.items()}


def train_by_hand(student, stages, cfg, rates):
    """The loops in plain torch, one example after the other: the mean of a response,
    then of the batch. Returns the teacher, and the record of each step."""
    teacher, params, found = copy.deepcopy(student), [*student.parameters()], []
    for examples in stages:
        m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        for n, rate in enumerate(rates, 1):
            step, sums = len(found), collections.defaultdict(float)
            for example in data.get_batch(examples, cfg.batch_size, cfg.seed, step):
                for key, x in by_token(student, teacher, example, cfg, step).items():
                    sums[key] += x.sum() / max(1, len(x)) / cfg.batch_size
            grads = torch.autograd.grad(sums["loss"], params)
            norm = sum(g.square().sum() for g in grads).sqrt()
            sums = {key: x.item() for key, x in sums.items()}
            found.append({**sums, "lr": rate, "grad_norm": norm.item()})
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
