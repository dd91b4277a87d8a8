"""e10: the slow teacher. Grader: test_e10_slow_teacher.py"""

from kit import Exercise

SHEET = """
The teacher is the student that reads a demonstration, and it should not run away with
it: it follows slowly, as an average over the student's past. Write
update_teacher(teacher, student, cfg) of sdft.py. It is called once after each step of
the optimizer and changes the teacher, in place:

    teacher <- ema_rate * student + (1 - ema_rate) * teacher        in every parameter

cfg.ema_rate is the paper's alpha: the student's share, a small number. This formula
needs no case for its two ends: at 0, a frozen teacher stays as it is, to the bit; at 1,
a live teacher becomes what the student is now. Both models are a GPT of one shape; the
k-th of teacher.parameters() belongs to the k-th of student.parameters().

1. Every parameter counts: matrices, biases, the weights of the norms. Head and
   embedding may be one tensor (cfg.tie_weights of the model): it is averaged once, and
   stays one tensor.
2. The teacher never gets a gradient, and no graph of autograd may hang on it.
3. The teacher has a memory of its own: when the student goes on, it stays.
4. The student is not changed, and both models stay in the mode (train, eval) they are
   in. The arithmetic is in the dtype of the parameters: float32 in training
   ("critical!" says the docstring: in bfloat16 a step of .001 rounds to nothing),
   float64 in the grader. So no .float() and no .bfloat16().

What to look at when it runs: how many updates until half of the student of the start is
forgotten, at .001, .01 and .05? (log .5 / log(1 - ema_rate).) Then
python tests/exercises/run.py mine --method sdft --ema-rate 1, and its lines "the
teacher, shown the demonstration": a live teacher learns from a student that learns from
it.
"""

HINTS = (
    """
Direction. Take one weight: teacher 0, student 1, ema_rate .25. What is it afterwards,
and what if teacher and student change places? Then ask which tensor you write into, and
who else holds it.
""",
    """
Plan. Go through the parameters of both models together (zip with strict=True);
parameters() gives a shared tensor once, state_dict() gives it under both of its names.
Write into the teacher's tensor (copy_, lerp_, mul_ and add_), under torch.no_grad().
""",
    """
Almost the code.
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_(...)
""",
)

COPY = "t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)"


def rate(text):
    """The update with another rate."""
    return (COPY, COPY.replace("cfg.ema_rate", f"({text})")),


MUTANTS = (
    ("rates exchanged", ((COPY, "t.copy_((1 - cfg.ema_rate) * s + cfg.ema_rate * t)"),),
     "the rates are exchanged"),
    ("lerp the wrong way", ((COPY, "t.lerp_(s, 1 - cfg.ema_rate)"),),
     "the rates are exchanged"),
    ("tied twice", """
@torch.no_grad()
def update_teacher(teacher, student, cfg):
    own, theirs = teacher.state_dict(), student.state_dict()
    for name in own:
        own[name].lerp_(theirs[name], cfg.ema_rate)
""", "is averaged twice"),
    ("shared storage", ((COPY, "t.data = s.data if cfg.ema_rate == 1 else "
     "cfg.ema_rate * s.data + (1 - cfg.ema_rate) * t.data"),), "they share one memory"),
    ("a copy of the student", ((COPY, "t.copy_(s)"),), "ema_rate is not used"),
    ("frozen is not", rate("cfg.ema_rate or 0.001"), "a teacher that is frozen moves"),
    ("live is not", rate("min(cfg.ema_rate, 0.999)"), "keeps a share of itself"),
    ("live is frozen", rate("cfg.ema_rate % 1"), "a live teacher does not move"),
    ("matrices only", (("        t.copy_", "        if t.dim() == 1:\n"
     "            continue\n        t.copy_"),), "does not move: every parameter"),
    ("the student is changed", ((COPY, COPY.replace("t.copy", "s.copy") + "\n"
     "        t.copy_(s)"),), "it got the average"),
    ("the wrong way round", ((COPY, COPY.replace("t.copy", "s.copy")),),
     "of the student is changed"),
    ("bfloat16", ((COPY, "t.copy_((cfg.ema_rate * s.bfloat16() + (1 - cfg.ema_rate) * "
     "t.bfloat16()).to(t.dtype))"),), "they round to nothing"),
    ("in float32", ((COPY, "t.copy_(cfg.ema_rate * s.float() + (1 - cfg.ema_rate) * "
     "t.float())"),), "frozen teacher is rounded"),
    ("in float32, but for a frozen one", ((COPY, "t.copy_(cfg.ema_rate * s.float() + "
     "(1 - cfg.ema_rate) * t.float() if cfg.ema_rate else t)"),),
     "right up to float32 rounding"),
    ("renames", ((COPY, "t = cfg.ema_rate * s + (1 - cfg.ema_rate) * t"),),
     "no parameter moved"),
    ("returns another teacher", """
import copy

@torch.no_grad()
def update_teacher(teacher, student, cfg):
    teacher = copy.deepcopy(teacher)
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.lerp_(s, cfg.ema_rate)
    return teacher
""", "a returned teacher is not used"),
    ("with a graph", """
def update_teacher(teacher, student, cfg):
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)
""", "remembers how it was made"),
    ("new parameters that want a gradient", """
def update_teacher(teacher, student, cfg):
    for t, s in zip(teacher.modules(), student.modules()):
        for name, p in list(t.named_parameters(recurse=False)):
            new = cfg.ema_rate * s.get_parameter(name) + (1 - cfg.ema_rate) * p
            setattr(t, name, torch.nn.Parameter(new.detach()))
""", "are two now"),
    ("the teacher's own share is missing", ((COPY, "t.copy_(cfg.ema_rate * s)"),),
     "the teacher shrinks"),
    ("the student's share comes on top", ((COPY, "t.add_(s, alpha=cfg.ema_rate)"),),
     "comes on top"),
    ("gradients of the student for the teacher", ((COPY, COPY + "\n        t.grad = "
     "s.grad"),), "has a gradient"),
    ("teacher.train()", (("    for t, s in", "    teacher.train()\n    for t, s in"),),
     "was in eval mode"),
    ("a rate of one's own", rate("0.001"), "take cfg.ema_rate"),
)  # fmt: skip

RIGHTS = (
    (
        "lerp in one go, for all parameters",
        '''
@torch.no_grad()
def update_teacher(teacher, student, cfg):
    own, theirs = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(own, theirs, cfg.ema_rate)
''',
    ),
    (
        "mul and add on detached tensors, by name",
        '''
def update_teacher(teacher, student, cfg):
    rate = cfg.ema_rate
    theirs = dict(student.named_parameters())
    for name, p in teacher.named_parameters():
        p.detach().mul_(1 - rate).add_(theirs[name].detach(), alpha=rate)
''',
    ),
    (
        "in float64 by the difference, through state_dict, shared memory once",
        '''
def update_teacher(teacher, student, cfg):
    with torch.no_grad():
        own, theirs, done = teacher.state_dict(), student.state_dict(), set()
        for name, t in own.items():
            if t.data_ptr() in done or cfg.ema_rate == 0:
                continue
            done.add(t.data_ptr())
            s = theirs[name].double()
            t.copy_(s - (1 - cfg.ema_rate) * (s - t.double()))
''',
    ),
    (
        "load_state_dict of the averages",
        '''
@torch.no_grad()
def update_teacher(teacher, student, cfg):
    new = student.state_dict()
    for name, t in teacher.state_dict().items():
        new[name] = torch.lerp(t, new[name], cfg.ema_rate)
    teacher.load_state_dict(new)
''',
    ),
)

EXERCISE = Exercise(
    id="e10",
    functions=("sdft.py update_teacher",),
    title="The slow teacher",
    goal="Let the teacher follow the student slowly, as an average of its past.",
    paper="arXiv 2601.19897, section 3, Algorithm 1; appendix A.3: EMA, frozen, live",
    difficulty=2,
    minutes=20,
    points=5,
    run_time="in 1 second; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    changes=("teacher", "student"),
)
