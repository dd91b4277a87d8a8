"""e07: reverse KL over the whole vocabulary. Grader: test_e07_reverse_kl.py"""

from kit import Exercise
from variants import DENSE, own_loss

SHEET = """
How far is the student from the teacher at one token? Eq. 1 of the paper answers with
the reverse KL, KL(student || teacher): a sum over all V tokens that could come next,
and not only over the one that was sampled. With p of the student and q of the teacher,

    KL(student || teacher) = sum_v p(v) (log p(v) - log q(v))      in nats

Write reverse_kl(student_logits, teacher_logits, mask) of extra.py. The logits are
(B, R, V): B responses of up to R tokens. The mask, bool (B, R), says which count.

1. Probabilities come from the logits by a softmax over V, their logarithms by
   log_softmax: log(softmax(x)) is -inf where a probability rounds to 0.
2. The KL of each token that counts; then the mean over the tokens of a response; then
   the mean over the B responses. Each response weighs the same, whatever its length. A
   response of which nothing counts adds 0 and is one of the B.
3. The gradient of the KL goes into the student's logits. (It goes through p; what goes
   through log p adds up to 0 over the vocabulary, so you may leave it out.) It never
   goes into the teacher's, even if they would take one.
4. Where the mask is false the logits may be anything, NaN too: neither the result nor
   the gradient may notice. Nothing that you are given may be changed.
5. Keep the dtype that you are given (no .float()): the grader works in float64, where a
   right result is right to nine digits.

Write it with softmax, logarithms and sums: kl_reference and fused_kl of model.py are
what you build, and are not there while it is graded. torch.distributions will not do:
it computes probabilities first, and they round to 0.

By hand: student [.5, .5] and teacher [.9, .1] give 0.51083. KL(teacher || student) of
the same two is 0.36806.

What to look at when it runs: the gradient over the logits of one token, which is
p (log p - log q - KL). Where is it large? Then give the teacher a token of probability
1e-6 that the student likes, and compare with p - q, the gradient of the other
direction. python tests/exercises/run.py mine --method sdft trains with your function:
the results of the paper were made with the other direction, e08 has both.
"""

HINTS = (
    """
Direction. One token first: two rows of log-probabilities, one product, one sum. Whose
probabilities are the weight? The name in front of the || says it. Then ask which parts
of your formula may have a gradient.
""",
    """
Plan. Take the rows under the mask before anything else: logits[mask] is (N, V), row
after row, and what the mask leaves out is gone. log_softmax of both, the teacher's
detached; exp gives p; multiply, sum over V: (N,). The weight of a token is 1 / (tokens
of its row) / B; indexing a weight (B, R) with the mask gives (N,), too. Clamp the
number of tokens, or an empty row divides by 0.
""",
    """
Almost the code.
    log_s = torch.log_softmax(student_logits[mask], -1)  # (N, V)
    log_t = ...  # the same of the teacher, detached
    values = (... * (log_s - log_t)).sum(-1)  # (N,)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)  # (B, R)
    return (weight[mask] * values).sum()
""",
)

VALUES = "(log_s.exp() * (log_s - log_t)).sum(-1)"
WEIGHT = "mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)"
LOG_S = "torch.log_softmax(student_logits[mask], -1)"
LOG_T = "torch.log_softmax(teacher_logits.detach()[mask], -1)"

MUTANTS = (
    ("swapped", ((VALUES, "(log_t.exp() * (log_t - log_s)).sum(-1)"),),
     "KL(teacher || student): are the arguments swapped"),
    ("the trap of F.kl_div", ((VALUES, "torch.nn.functional.kl_div(log_s, log_t, "
     "log_target=True, reduction='none').sum(-1)"),),
     "KL(teacher || student): are the arguments swapped"),
    ("no weight p", ((VALUES, "(log_s - log_t).sum(-1)"),), "lacks the weight p"),
    ("weight of the teacher", ((VALUES, "(log_t.exp() * (log_s - log_t)).sum(-1)"),),
     "by the teacher's probabilities"),
    ("sign", ((VALUES, "(log_s.exp() * (log_t - log_s)).sum(-1)"),),
     "is the negative"),
    ("p detached", ((VALUES, "(log_s.detach().exp() * (log_s - log_t)).sum(-1)"),),
     "with p detached"),
    ("student detached", ((LOG_S, f"{LOG_S}.detach()"),), "no gradient reaches"),
    ("teacher not detached", ((LOG_T, LOG_T.replace(".detach()", "")),),
     "the teacher gets a gradient"),
    ("student and teacher in one no_grad", """
def reverse_kl(student_logits, teacher_logits, mask):
    with torch.no_grad():
        p = student_logits[mask].softmax(-1)
        log_t = teacher_logits[mask].log_softmax(-1)
    log_s = student_logits[mask].log_softmax(-1)
    values = (p * (log_s - log_t)).sum(-1)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return (weight[mask] * values).sum()
""", "with p detached"),
    ("mask ignored", (("-1)  # (N, V)\n    log_t", "-1)\n    mask = torch.ones_like("
     "mask)\n    log_s = torch.log_softmax(student_logits[mask], -1)\n    log_t"),),
     "pads behind the response"),
    ("mean over all tokens", ((WEIGHT, "mask / mask.sum()"),),
     "mean over all tokens of the batch"),
    ("batchmean", ((WEIGHT, "mask / len(mask)"),), "sum over the tokens of a response"),
    ("divides by R", ((WEIGHT, "mask / mask.numel()"),), "divided by R"),
    ("sum over responses", ((WEIGHT, WEIGHT.replace(" / len(mask)", "")),),
     "sum over the responses"),
    ("mean over the vocabulary", ((VALUES, VALUES.replace("sum", "mean")),),
     "mean over the vocabulary"),
    ("cross entropy", ((VALUES, "-(log_s.exp() * log_t).sum(-1)"),), "cross entropy"),
    ("logits for log-probabilities", ((VALUES, "(log_s.exp() * (student_logits[mask] - "
     "teacher_logits[mask])).sum(-1)"),), "takes logits for log-probabilities"),
    ("wrong axis", ((LOG_S, "torch.log_softmax(student_logits, 1)[mask]"),
     (LOG_T, "torch.log_softmax(teacher_logits.detach(), 1)[mask]")),
     "over the tokens, not over the vocabulary"),
    ("log of a softmax", ((LOG_S, "torch.softmax(student_logits[mask], -1).log()"),
     (LOG_T, "torch.softmax(teacher_logits.detach()[mask], -1).log()")),
     "log_softmax(x) is not"),
    ("a small number against log 0", (
     (LOG_S, "(torch.softmax(student_logits[mask], -1) + 1e-12).log()"),
     (LOG_T, "(torch.softmax(teacher_logits.detach()[mask], -1) + 1e-12).log()")),
     "is something added to the probabilities"),
    ("absolute values", ((VALUES, VALUES.replace(".sum", ".abs().sum")),),
     "adds up absolute values"),
    ("torch.distributions, which calls a rounded 0 a real one", """
from torch.distributions import Categorical, kl_divergence

def reverse_kl(student_logits, teacher_logits, mask):
    total = 0.0 * student_logits[mask].sum()
    for b in range(len(mask)):
        if n := int(mask[b].sum()):
            p = Categorical(logits=student_logits[b][mask[b]].double())
            q = Categorical(logits=teacher_logits[b][mask[b]].double().detach())
            total = total + kl_divergence(p, q).sum() / n
    return total / len(mask)
""", "the result is inf for logits of 1e4"),
    ("masked by a product", """
def reverse_kl(student_logits, teacher_logits, mask):
    log_s = student_logits.log_softmax(-1)
    log_t = teacher_logits.detach().log_softmax(-1)
    values = (log_s.exp() * (log_s - log_t)).sum(-1)
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
""", "a product is no mask"),
    ("masked too late", """
def reverse_kl(student_logits, teacher_logits, mask):
    log_s = student_logits.log_softmax(-1)
    log_t = teacher_logits.detach().log_softmax(-1)
    values = (log_s.exp() * (log_s - log_t)).sum(-1)
    values = torch.where(mask, values, 0)
    return (values.sum(1) / mask.sum(1).clamp(min=1)).mean()
""", "masking the values is too late"),
    ("empty response", ((WEIGHT, WEIGHT.replace(".clamp(min=1)", "")),
     ("weight[mask] * values).sum()", "weight[mask] * values).sum() + "
      "0 * weight.sum()")), "no token of a row counts"),
    ("empty responses left out", ((WEIGHT, WEIGHT.replace(
     "len(mask)", "mask.any(1).sum()")),), "leaves the empty responses out"),
    ("terms below 0 dropped", ((VALUES, VALUES.replace(
     ".sum", ".clamp(min=0).sum")),), "drops the terms that are below 0"),
    ("bits", ((VALUES, f"{VALUES} / 0.6931471805599453"),), "in bits"),
    ("in float32", ((LOG_S, LOG_S.replace("[mask]", "[mask].float()")),
     (LOG_T, LOG_T.replace("[mask]", "[mask].float()"))),
     "right up to float32 rounding"),
    ("a small number that is not so small", (
     (LOG_S, "(torch.softmax(student_logits[mask], -1) + 1e-8).log()"),
     (LOG_T, "(torch.softmax(teacher_logits.detach()[mask], -1) + 1e-8).log()")),
     "Or is a small number added"),
    ("a number", (("values).sum()", "values).sum().item()"),),
     "a Python number, which has no gradient"),
    ("an empty row gets a token", (("    log_s = ", "    mask[:, 0] |= ~mask.any(1)\n"
     "    log_s = "),), "reverse_kl changes mask"),
    ("the project's own", """
from model import kl_reference

def reverse_kl(student_logits, teacher_logits, mask):
    kl = kl_reference(student_logits[mask], teacher_logits[mask], "reverse")
    return kl.sum()
""", "model.kl_reference is what you build in e07"),
    ("changes the teacher", ((LOG_T, "torch.log_softmax(teacher_logits.detach()"
     ".masked_fill_(~mask[..., None], 0)[mask], -1)"),), "changes teacher_logits"),
)  # fmt: skip

RIGHTS = (
    (
        "F.kl_div with its arguments in place, row after row",
        '''
import torch.nn.functional as F

def reverse_kl(student_logits, teacher_logits, mask):
    total = student_logits.new_zeros(())
    for s, t, counts in zip(student_logits, teacher_logits, mask):
        if counts.any():
            log_s = F.log_softmax(s[counts], -1)
            log_t = F.log_softmax(t[counts].detach(), -1)
            kl = F.kl_div(log_t, log_s, reduction="sum", log_target=True)
            total = total + kl / counts.sum()
    return total / len(mask)
''',
    ),
    (
        "E_p[s - t] minus the difference of the logsumexps",
        '''
def reverse_kl(student_logits, teacher_logits, mask):
    anything = ~mask[..., None]
    s = student_logits.masked_fill(anything, 0)
    t = teacher_logits.detach().masked_fill(anything, 0)
    kl = (s.softmax(-1) * (s - t)).sum(-1) - s.logsumexp(-1) + t.logsumexp(-1)
    return ((kl * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
''',
    ),
    (
        "the log-ratio detached: p * grad log p sums to 0, so p alone carries it",
        '''
def reverse_kl(student_logits, teacher_logits, mask):
    log_s = student_logits[mask].log_softmax(-1)
    log_t = teacher_logits[mask].log_softmax(-1)
    kl = (log_s.exp() * (log_s - log_t).detach()).sum(-1)
    kl = torch.zeros(mask.shape, dtype=kl.dtype).masked_scatter(mask, kl)
    return (kl.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(mask)
''',
    ),
    (
        "sum of q - p - p log(q / p), which is never below 0, in float64",
        '''
def reverse_kl(student_logits, teacher_logits, mask):
    """The terms q - p sum to 0 over the vocabulary."""
    with torch.no_grad():
        log_q = teacher_logits[mask].double().log_softmax(-1)
    log_p = student_logits[mask].double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl = (q - p - p * (log_q - log_p)).sum(-1)
    means = [x.mean() for x in kl.split(mask.sum(1).tolist()) if len(x)]
    return sum(means, 0 * kl.sum()) / len(mask)
''',
    ),
)

EXERCISE = Exercise(
    id="e07",
    functions=("extra.py reverse_kl",),
    title="Reverse KL over the whole vocabulary",
    goal="Measure how far the student is from the teacher, with the right gradient.",
    paper="arXiv 2601.19897, section 3, Eq. 1; appendix A.1: all of the vocabulary",
    difficulty=2,
    minutes=30,
    points=5,
    run_time="in 1 second; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    not_with=("model.kl_reference", "model.fused_kl", "model.kl_rows_torch",
              "model.chunked_kl", "extra.kl_surrogate", "sdft.compute_loss"),
    wire=(
        own_loss(f"""\
    from extra import reverse_kl
{DENSE}\
    loss = reverse_kl(*dense, mask) * len(batch) / cfg.batch_size
"""),
    ),
)
