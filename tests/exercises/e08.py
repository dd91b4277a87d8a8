"""e08: the direction of the KL matters. Grader: test_e08_direction.py"""

from kit import Exercise
from variants import own_loss

SHEET = """
The KL divergence is not a distance: KL(student || teacher) and KL(teacher || student)
are two numbers with two gradients. The paper writes the first (Eq. 1); its results were
made with the second, its author says. So the project has both, and what lies between.
Write kl_reference(student_logits, teacher_logits, kl) of model.py, from logits (..., V)
to (...): for each row of logits one number, in nats. The string kl says which:

    forward   KL(teacher || student) = sum_v t (log t - log s)          (the default)
    reverse   KL(student || teacher) = sum_v s (log s - log t)
    jsd       1/2 KL(teacher || m) + 1/2 KL(student || m),  m = (s + t) / 2

s and t are the probabilities: softmax of the logits over V. The arguments are always
student first, teacher second; which of them weighs the sum depends on kl alone.

1. The gradient goes into the student's logits, never into the teacher's.
2. Use log_softmax: logits of 1e4 give finite numbers. So must log m.
3. A logit may be -inf in both (a token that nobody can say): it adds 0 to the value and
   gets 0 as its gradient, not nan. The constant LOG_ZERO is there for it.
4. bfloat16 logits are turned into float32 before anything else; float64 stays float64.
5. Shapes that differ and an unknown kl (the known ones are in KLS) are refused, by an
   assert. Nothing that you are given may be changed.
6. fused_kl and chunked_kl are what you build: they are not there while it is graded.

By hand: student [.5, .5] and teacher [.9, .1] give 0.36806 forward, 0.51083 reverse.
(The pair [.7, .2, .1] and [.1, .2, .7] gives the same number for both: no test of it.)

What to look at when it runs: a teacher with two peaks, a student that can have only
one. Let the last test of the grader print where the nearest student is: one
direction picks a peak, the other covers both with a wide hill, most of it where the
teacher never is. Then python tests/exercises/run.py mine --method sdft --kl reverse,
and forward: at p = q both have the same curvature, so with a teacher that is near there
is little to see in the table.
"""

HINTS = (
    """
Direction. Write the three formulas with the names log_s and log_t, and say each aloud:
the one in front of the || is the one whose probabilities are the weights. Then ask
where a logarithm can be -inf, and where a gradient must not go.
""",
    """
Plan. The assert; log_softmax of both over the last dimension, in float32 at least
(torch.promote_types), the teacher's under no_grad; clamp(min=LOG_ZERO), so that
0 * -inf is never computed. exp gives the weights back. log m without leaving the
logarithms: torch.logaddexp(log_s, log_t) - log 2. Sum over the last dimension.
""",
    """
Almost the code.
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = torch.log_softmax(student_logits, -1, dtype).clamp(min=LOG_ZERO)
    with torch.no_grad():
        log_t = ...
    if kl == "forward":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if kl == "reverse":
        return ...
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    return 0.5 * ... + 0.5 * ...
""",
)

FORWARD = "(log_t.exp() * (log_t - log_s)).sum(-1)"
REVERSE = "(log_s.exp() * (log_s - log_t)).sum(-1)"
LOG_M = "torch.logaddexp(log_s, log_t) - math.log(2)"
BOTH = "0.5 * teacher_m + 0.5 * student_m"
LOG_S = "torch.log_softmax(student_logits, -1, dtype)"
LOG_T = "torch.log_softmax(teacher_logits, -1, dtype)"
CLAMP = ".clamp(min=LOG_ZERO)"
OF_TEACHER = f"    with torch.no_grad():\n        log_t = {LOG_T}{CLAMP}\n"

MUTANTS = (
    ("directions exchanged", ((f"return {FORWARD}", f"return {REVERSE}  # x"),
     (f"return {REVERSE}\n", f"return {FORWARD}\n")), "which of the two is in front"),
    ("always forward", ((f"return {REVERSE}", f"return {FORWARD}"),),
     "kl 'reverse': yours equals KL(teacher || student)"),
    ("the trap of F.kl_div", ((f"return {FORWARD}", "return F.kl_div(log_t, log_s, "
     "log_target=True, reduction='none').sum(-1)"),),
     "kl 'forward': yours equals KL(student || teacher)"),
    ("cross entropy", ((f"return {FORWARD}", "return -(log_t.exp() * log_s).sum(-1)"),),
     "yours is a cross entropy"),
    ("reverse without weights", ((f"return {REVERSE}",
     "return (log_s - log_t).sum(-1)"),), "lacks the probabilities as weights"),
    ("reverse, p detached", ((f"return {REVERSE}",
     "return (log_s.detach().exp() * (log_s - log_t)).sum(-1)"),),
     "the gradient of yours is 0"),
    ("sign", ((f"return {FORWARD}", f"return -{FORWARD}"),), "yours is the negative"),
    ("jsd is the mean of the KLs", ((LOG_M, "0"), (BOTH, f"0.5 * {FORWARD} + 0.5 * "
     f"{REVERSE}")), "yours is the mean of the two KLs"),
    ("jsd without 1/2", ((BOTH, "teacher_m + student_m"),), "the sum of both halves"),
    ("m without 1/2", ((LOG_M, "torch.logaddexp(log_s, log_t)"),), "it lacks the 1/2"),
    ("m of logarithms", ((LOG_M, "(log_s + log_t) / 2"),), "mean of the logarithms"),
    ("half a jsd", ((BOTH, "0.5 * teacher_m"),), "no KL(student || m)"),
    ("m of logits", ((LOG_M, "torch.log_softmax((student_logits + teacher_logits) / 2, "
     "-1)"),), "softmax of the mean of the logits"),
    ("m in front", (
        ("teacher_m = (log_t.exp() * (log_t - log_m)).sum(-1)",
         "teacher_m = (log_m.exp() * (log_m - log_t)).sum(-1)"),
        ("student_m = (log_s.exp() * (log_s - log_m)).sum(-1)",
         "student_m = (log_m.exp() * (log_m - log_s)).sum(-1)"),
     ), "mixture in front"),
    ("log of the mean", ((LOG_M, "(0.5 * log_s.exp() + 0.5 * log_t.exp()).log()"),),
     "added by logaddexp"),
    ("log of a softmax", ((LOG_S, "torch.softmax(student_logits, -1, dtype).log()"),
     (LOG_T, "torch.softmax(teacher_logits, -1, dtype).log()"),
     (f"{CLAMP}\n    with", "\n    with"), (f"{CLAMP}\n    if", "\n    if")),
     "log_softmax(x) is not"),
    ("a small number against log 0", (
     (LOG_S, "(torch.softmax(student_logits, -1, dtype) + 1e-12).log()"),
     (LOG_T, "(torch.softmax(teacher_logits, -1, dtype) + 1e-12).log()")),
     "is something added to the probabilities"),
    ("float64 cut to float32", (("torch.promote_types(student_logits.dtype, "
     "torch.float32)", "torch.float32"),), "they should stay float64"),
    ("no softmax", ((LOG_S, "student_logits.to(dtype)"),
     (LOG_T, "teacher_logits.to(dtype)")), "it should be"),
    ("teacher not detached", ((OF_TEACHER, f"    log_t = {LOG_T}{CLAMP}\n"),),
     "the teacher gets a gradient"),
    ("student detached", ((f"{LOG_S}{CLAMP}", f"{LOG_S}{CLAMP}.detach()"),),
     "no gradient reaches student_logits"),
    ("-inf forgotten", ((f"{LOG_S}{CLAMP}", LOG_S), (f"{LOG_T}{CLAMP}", LOG_T)),
     "0 * (-inf - -inf) is nan"),
    ("nan out of the values, not out of the gradient", (
     (f"{LOG_S}{CLAMP}", LOG_S), (f"{LOG_T}{CLAMP}", LOG_T),
     (f"return {FORWARD}",
      "return (log_t.exp() * (log_t - log_s)).nan_to_num(0).sum(-1)"),
     (f"return {REVERSE}",
      "return (log_s.exp() * (log_s - log_t)).nan_to_num(0).sum(-1)"),
     ), "the gradient is nan"),
    ("in bfloat16", ((f"{LOG_S}{CLAMP}", f"{LOG_S}{CLAMP}".replace(", dtype", "")),
     (f"{LOG_T}{CLAMP}", f"{LOG_T}{CLAMP}".replace(", dtype", ""))),
     "two or three digits"),
    ("float32 too late", ((LOG_S, f"{LOG_S[:-len(', dtype)')]}).to(dtype)"),
     (LOG_T, f"{LOG_T[:-len(', dtype)')]}).to(dtype)")),
     "has two or three digits only"),
    ("shapes not checked", (("    assert kl in KLS and student_logits.shape == "
     "teacher_logits.shape, kl\n", ""),), "an assert should refuse it"),
    ("mean over the vocabulary", ((f"return {REVERSE}",
     f"return {REVERSE.replace('sum', 'mean')}"),), "mean over the vocabulary"),
)  # fmt: skip

RIGHTS = (
    (
        "F.kl_div with its arguments in place",
        '''
def kl_reference(student_logits, teacher_logits, kl="forward"):
    if student_logits.shape != teacher_logits.shape or kl not in KLS:
        raise ValueError("shapes, or kl")
    if student_logits.dtype != torch.float64:
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    s = F.log_softmax(student_logits.clamp(min=-1e30), -1)
    t = F.log_softmax(teacher_logits.clamp(min=-1e30).detach(), -1)

    def divergence(p, q):
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if kl == "jsd":
        m = torch.logsumexp(torch.stack((s, t)), 0) - math.log(2)
        return (divergence(s, m) + divergence(t, m)) / 2
    return divergence(t, s) if kl == "forward" else divergence(s, t)
''',
    ),
    (
        "means of the difference of the logits, and softplus for the mixture",
        '''
def kl_reference(student_logits, teacher_logits, kl="forward"):
    assert kl in KLS and student_logits.shape == teacher_logits.shape
    s, t = student_logits.double(), teacher_logits.detach().double()
    nobody = (s == -math.inf) & (t == -math.inf)
    diff = (s - t).masked_fill(nobody, 0)
    ratio = s.logsumexp(-1) - t.logsumexp(-1)
    p, q = s.softmax(-1), t.softmax(-1)
    if kl == "forward":
        values = ratio - (q * diff).sum(-1)
    elif kl == "reverse":
        values = (p * diff).sum(-1) - ratio
    else:
        x = diff - ratio[..., None]  # log s - log t
        values = math.log(2) - (q * F.softplus(x) + p * F.softplus(-x)).sum(-1) / 2
    keep = torch.promote_types(student_logits.dtype, torch.float32)
    return values.to(keep)
''',
    ),
    (
        "row after row without the tokens that nobody can say; m detached: its own "
        "gradient sums to 0",
        '''
def kl_reference(student_logits, teacher_logits, kl="forward"):
    assert kl in KLS and student_logits.shape == teacher_logits.shape
    V, values = student_logits.size(-1), []
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    teacher_rows = teacher_logits.detach().reshape(-1, V)
    for s, t in zip(student_logits.reshape(-1, V), teacher_rows):
        said = (s > -math.inf) | (t > -math.inf)
        log_s = s[said].to(wide).log_softmax(0)
        log_t = t[said].to(wide).log_softmax(0)
        if kl == "forward":
            values.append(log_t.exp() @ (log_t - log_s))
        elif kl == "reverse":
            values.append(log_s.exp() @ (log_s - log_t))
        else:
            log_m = torch.logaddexp(log_s, log_t).detach() - math.log(2)
            values.append((log_t.exp() @ (log_t - log_m)) / 2
                          + (log_s.exp() @ (log_s - log_m)) / 2)
    return torch.stack(values).view(student_logits.shape[:-1])
''',
    ),
)

EXERCISE = Exercise(
    id="e08",
    functions=("model.py kl_reference",),
    title="The direction of the KL matters",
    goal="Write forward KL, reverse KL and the divergence between them.",
    paper="arXiv 2601.19897, section 3, Eq. 1 (reverse; its results were made forward)",
    difficulty=3,
    minutes=40,
    points=6,
    run_time="in 2 seconds; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    not_with=("model.fused_kl", "model.kl_rows_torch", "model.chunked_kl",
              "extra.reverse_kl", "extra.kl_surrogate", "sdft.compute_loss"),
    wire=(
        own_loss("""\
    from model import kl_reference, make_logits

    pairs = zip((hidden, teacher_hidden), heads, strict=True)
    dense = [make_logits(*pair, cfg.temperature) for pair in pairs]  # (N, V) each
    loss = (weight * kl_reference(*dense, cfg.kl)).sum()
"""),
    ),
)
