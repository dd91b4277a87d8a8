"""e14: find the silent bug. Grader: test_e14_silent_bug.py"""

from kit import Exercise

SHEET = """
The bugs that cost weeks raise no error: the loss falls, a table is printed, and the
method is another one than you think. Public implementations of self-distillation have
had each of the bugs below. Write the test that would have found them.

check_sdft(m) of extra.py gets a set of modules: m.sdft, m.data and m.model. In m.sdft
at most one thing is broken; m.data and m.model are right. It raises AssertionError,
with a reason, if m.sdft is broken, and returns nothing if it is right. There are ten
broken copies, a point for each that it finds. They are about

    who sees the demonstration        which tokens count in the loss
    which way round the KL is         who writes the responses, and with what weights
    the teacher's average             the order of things in the training loop
    what is left over from before     who has dropout

and right ones, which are not all written as ours is: a bug counts as found only if
check_sdft raises on no right copy. So compare what functions *do* with what you work
out by yourself, to a small tolerance (torch's default dtype is float64 here), and do
not look at their source, or at which of the functions of m.model they call. (There is
no right sdft.py to compare with: import sdft gives you the copy itself.)

The parts that every copy has, with the arguments of sdft.py: get_responses,
compute_loss, make_teacher, update_teacher, train, Config. Two helpers are in extra.py:
small_world(m) -> student, teacher, batch, tok, cfg: small float64 models whose
responses do end, two examples, a configuration to change as you like; and Quiet(),
what m.sdft.train(student, {"A": batch}, {}, tok, cfg, run) needs as its run: no files,
the models of the last save in run.models, what was logged in run.records. You may
patch functions of m, such as m.sdft.get_responses: each call gets m as new.

What to look at when it runs: which bug is found by which line of yours? Then let a
broken copy train (one of them: python tests/exercises/variants.py offpolicy --run) and
look at its loss: could you have told?
"""

HINTS = (
    """
Direction. Take the functions of sdft.py one by one, and write down what each promises.
For the loss, work out the right number for one example after the other, without padding
and without the project's compute_loss. For the loop, find out what the student's and
the teacher's weights are at the moment that matters.
""",
    """
Plan. (1) get_responses = m.model.generate after the bare prompts, with the numbers of
m.data.get_uniform. (2) compute_loss = the mean over examples of the mean over tokens of
m.model.kl_reference, each model after its own context, on a response that ends; the
teacher made by make_teacher from a model with dropout. (3) update_teacher with ema_rate
0.25: why not 0.5? (4) train two steps: with cfg.ema_rate = 1 the teacher equals the
student at the end, if it moves after the step; put a function of yours in the place of
m.sdft.get_responses that looks at the model it is given, and at what p.grad holds then.
""",
    """
Almost the code, of (2) and (4).
    for example, row, counts in zip(batch, response, mask):
        tokens, logits = row[counts].tolist(), []
        for model, prompt in (..., m.data.student_prompt), (..., m.data.teacher_prompt):
            context = prompt(example, tok)
            logits.append(model(torch.tensor([context + tokens]))[0, ... : -1])
        total += m.model.kl_reference(*logits, "forward").mean() / len(batch)

    get_responses = m.sdft.get_responses
    def watch(model, *args):
        assert ...  # the weights of model are those of student
        assert ...  # no gradient is left
        return get_responses(model, *args)
    m.sdft.get_responses = watch
    cfg.ema_rate, run = 1.0, Quiet()
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, run)
    assert ...  # run.models["teacher"] has the weights of student
""",
)

START = "    student, teacher, batch, tok, cfg = small_world(m)\n"

MUTANTS = (
    ("never raises", "def check_sdft(m):\n    return None\n",
     "not found: your check passes on a copy in which the teacher sees no demo"),
    ("always raises", "def check_sdft(m):\n    assert False, 'broken'\n",
     "false alarm: your check raises on the project's own sdft.py"),
    ("returns False", """
def check_sdft(m):
    student, teacher, batch, tok, cfg = small_world(m)
    before = [p.clone() for p in teacher.parameters()]
    m.sdft.update_teacher(teacher, student, cfg)
    pairs = zip(before, teacher.parameters(), student.parameters())
    return all(torch.allclose(t, 0.25 * s + 0.75 * b) for b, t, s in pairs)
""", "your check returns True"),
    ("the loss falls", """
def check_sdft(m):
    student, teacher, batch, tok, cfg = small_world(m)
    cfg.steps, run = 4, Quiet()
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, run)
    losses = [record["loss"] for record in run.records]
    assert all(math.isfinite(x) for x in losses), losses
""", "a copy in which the teacher sees no demonstration"),
    ("crashes", ((START, f"{START}    batch[9]\n"),), "IndexError"),
    ("no demo in the loss", (("    # the loss: KL", """
    batch = [m.data.Example(e.prompt, "example", "", id=e.id) for e in batch]
    m.data.with_demo = lambda prompt, demo: prompt
    # the loss: KL"""),), "in which the teacher sees no demonstration"),
    ("responses unseen", (("assert torch.equal(response, own)", "assert True"),
                          ("assert ends.any() and not mask.all()", "assert True")),
     "the student sees the demonstration when it responds"),
    ("the loss is symmetric", (
        ('*logits, "forward"', '*logits, "jsd"'),
        ("    loss, _ = ", '    cfg.kl = "jsd"\n    loss, _ = ')),
     "forward and reverse KL are exchanged"),
    ("wide tolerance", (("abs(loss - total) < 1e-4", "abs(loss - total) < 0.5"),),
     "the last token of the prompt counts"),
    ("responses without an end", (
        ("    ends = (response == tok.end) & mask\n",
         "    response[mask & (response == tok.end)] = 300\n"),
        ("assert ends.any() and not mask.all()", "assert True")),
     "the end of a response does not count"),
    ("one step", (("cfg.ema_rate, run", "cfg.steps = 1\n    cfg.ema_rate, run"),),
     "the responses are stale"),
    ("half and half", ((START, f"{START}    cfg.ema_rate = 0.5\n"),
                       ("cfg.ema_rate, run = 1.0, Quiet()", "run = Quiet()"),
                       ("all(torch.allclose(x, y) for x, y in pairs), \"the teacher",
                        "pairs, \"the teacher")),
     "the average is inverted"),
    ("a frozen teacher", (("cfg.ema_rate, run = 1.0, Quiet()",
                           "cfg.ema_rate, run = 0.0, Quiet()"),
                          ('run.models["teacher"].parameters(), student.parameters()',
                           'run.models["teacher"].parameters(), '
                           'run.models["teacher"].parameters()')),
     "the teacher is updated before the step"),
    ("eval by hand", (("m.sdft.make_teacher(teacher.train())",
                       "m.sdft.make_teacher(teacher.train()).eval()"),),
     "the teacher has dropout"),
    ("gradients are not looked at", (("p.grad.any()]", "p.grad.isnan().any()]"),),
     "the gradients are never set to zero"),
    ("to the last bit", (("torch.allclose(new, right)", "torch.equal(new, right)"),),
     "false alarm: your check raises on a right sdft.py"),
    ("gradients are None at the end", (
        ("    pairs = zip(run", "    assert all(p.grad is None for p in "
         "student.parameters()), 'left'\n    pairs = zip(run"),),
     "false alarm: your check raises on a right sdft.py"),
    ("counts calls of the kernel", (
        ("    loss, _ = ", """
    called, kernel = [], m.sdft.chunked_kl
    m.sdft.chunked_kl = lambda *a: (called.append(1), kernel(*a))[1]
    loss, _ = """),
        ("    total = 0.0\n", "    assert called, 'no KL'\n    total = 0.0\n")),
     "false alarm: your check raises on a right sdft.py"),
    ("compares the text", """
import hashlib
import inspect
from pathlib import Path

def check_sdft(m):
    project = Path(m.model.__file__).with_name("sdft.py").read_text()
    assert inspect.getsource(m.sdft) == project, "changed"
""", "false alarm: your check raises on a right sdft.py"),
    ("compares with the project's", """
import sdft

def check_sdft(m):
    student, teacher, batch, tok, cfg = small_world(m)
    response, mask = sdft.get_responses(student, batch, tok, cfg, 1)
    args = student, teacher, batch, response, mask, tok, cfg, 1
    right, yours = sdft.compute_loss(*args)[0], m.sdft.compute_loss(*args)[0]
    assert abs(right - yours) < 1e-4
""", "the teacher sees no demonstration"),
    ("counts its calls", """
calls = []

def check_sdft(m):
    calls.append(m)
    assert len(calls) <= 2, "the third is broken"
""", "when it is called again"),
)  # fmt: skip

RIGHTS = (
    (
        "three steps of a loop of one's own, then the weights of both models",
        """
import copy

def check_sdft(m):
    student, _, batch, tok, cfg = small_world(m)
    cfg.steps, cfg.ema_rate, cfg.dropout = 3, 0.3, 0.2
    own = copy.deepcopy(student)
    own.dropout = cfg.dropout
    slow = copy.deepcopy(own).requires_grad_(False).eval()
    adam = torch.optim.AdamW(
        own.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0
    )
    for step in range(cfg.steps):
        adam.param_groups[0]["lr"] = m.sdft.get_lr(step, cfg)
        rows = m.data.get_batch(batch, cfg.batch_size, cfg.seed, step)
        bare = m.data.pad_batch(m.data.student_prompt, rows, tok, "cpu")
        shown = m.data.pad_batch(m.data.teacher_prompt, rows, tok, "cpu")
        u = m.data.get_uniform(rows, cfg.max_new_tokens, cfg.seed, step, "cpu")
        response, mask = m.model.generate(
            own, *bare, cfg.max_new_tokens, tok.end, u, cfg.temperature
        )
        own.train()
        torch.manual_seed(m.data.derive_seed(cfg.seed, step, rows[0].id))
        hidden = m.model.response_hidden(own, *bare, response, mask)
        log_s = own.logits(hidden).log_softmax(-1)
        with torch.no_grad():
            hidden = m.model.response_hidden(slow, *shown, response, mask)
            log_t = slow.logits(hidden).log_softmax(-1)
        kl = torch.zeros(mask.shape, dtype=torch.float64)
        kl[mask] = (log_t.exp() * (log_t - log_s)).sum(-1)
        adam.zero_grad()
        (kl.sum(1) / mask.sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), cfg.grad_clip)
        adam.step()
        with torch.no_grad():
            for t, s in zip(slow.parameters(), own.parameters()):
                t += 0.3 * (s - t)
    run = Quiet()
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, run)
    for name, truth in (("student", own), ("teacher", slow)):
        pairs = zip(run.models[name].parameters(), truth.parameters())
        far = max((x - y).abs().max().item() for x, y in pairs)
        assert far < 1e-4, f"after three steps the {name} is off by {far}"
""",
    ),
    (
        "properties: what must change, what must stay, what must be zero",
        """
from dataclasses import replace

def check_sdft(m):
    student, teacher, batch, tok, cfg = small_world(m)
    other = [replace(e, demo="apple river") for e in batch]
    response, mask = m.sdft.get_responses(student, batch, tok, cfg, 0)
    again, _ = m.sdft.get_responses(student, other, tok, cfg, 0)
    assert torch.equal(response, again), "demonstrations change the rollout"

    def loss(teacher, batch, mask, response=response):
        args = student, teacher, batch, response, mask, tok, cfg, 1
        return m.sdft.compute_loss(*args)[0].item()

    everything = loss(teacher, batch, mask)
    assert abs(everything - loss(teacher, other, mask)) > 1e-3, "demo not read"
    assert abs(loss(teacher, batch, mask & False)) < 1e-9, "more than the mask counts"
    only_end = mask & (response == tok.end)
    assert loss(teacher, batch, only_end) > 1e-3, "the end does not count"

    # one token by hand
    one = torch.zeros_like(mask)
    one[0, 0] = True
    log_p = []
    for model, prompt in ((student, m.data.student_prompt),
                          (teacher, m.data.teacher_prompt)):
        ids = torch.tensor([prompt(batch[0], tok)])
        log_p.append(model(ids)[0, -1].log_softmax(-1).tolist())
    hand = sum(math.exp(t) * (t - s) for s, t in zip(*log_p))
    assert abs(loss(teacher, batch, one) - hand / cfg.batch_size) < 1e-5, "another KL"

    student.dropout = 0.5
    noisy = m.sdft.make_teacher(student.train())
    student.dropout, _ = 0.0, student.eval()
    first = loss(noisy, batch, mask)
    assert loss(noisy, batch, mask) == first, "the teacher drops out"

    cfg.ema_rate = 0.0
    kept = [p.clone() for p in teacher.parameters()]
    m.sdft.update_teacher(teacher, student, cfg)
    assert all(torch.equal(x, y) for x, y in zip(kept, teacher.parameters())), "ema"

    # without a step and with the same numbers, each gradient is as large as the first
    models, get_responses = [], m.sdft.get_responses
    m.sdft.get_responses = lambda s, *a: (models.append(s), get_responses(s, *a))[1]
    uniform = m.data.get_uniform
    m.data.get_uniform = lambda e, n, seed, when, device: uniform(e, n, 0, 0, device)
    run, cfg.steps, cfg.lr = Quiet(), 3, 0.0
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, run)
    assert all(s is student for s in models), "who writes the responses?"
    norms = [r["grad_norm"] for r in run.records]
    assert max(norms) - min(norms) < 1e-4 * max(norms), norms

    cfg.lr, cfg.ema_rate, cfg.steps = 0.01, 1.0, 1
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, run)
    last = zip(run.models["teacher"].parameters(), student.parameters())
    assert all(torch.allclose(x, y) for x, y in last), "behind"
""",
    ),
)

EXERCISE = Exercise(
    id="e14",
    functions=("extra.py check_sdft",),
    title="Find the silent bug",
    goal="Write a test that finds ten bugs which raise no error, and no others.",
    paper="arXiv 2601.19897, section 3 and algorithm 1: every line of it is a promise",
    difficulty=4,
    minutes=60,
    points=10,
    run_time="in 3 seconds",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
