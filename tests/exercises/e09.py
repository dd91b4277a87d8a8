"""e09: three estimators of one gradient. Grader: test_e09_estimators.py"""

from kit import Exercise
from variants import DENSE, own_loss

SHEET = """
The objective of Eq. 1 is a mean over responses that the student samples, and sampling
has no gradient. So the gradient is estimated from a sampled response y, and the paper
compares three ways to do so. With p of the student and q of the teacher at token t,
both after y_1 ... y_(t-1), and k_t = sum_v p(v) (log p(v) - log q(v)):

    token           sum_t (log p(y_t) - log q(y_t)) grad log p(y_t)
    full            sum_t sum_v p(v) (log p(v) - log q(v)) grad log p(v)
                    = sum_t grad k_t                       the paper's choice
    rao_blackwell   full + sum_i grad log p(y_i) * (sum of k_t over all t > i)

"full" is the mean of "token" at each token; both ignore that y_t changes what comes
after it. The last term of "rao_blackwell" is that effect. (Eq. 2 of the paper, its full
sum, is printed without the weight p(v).)

Write kl_surrogate(student_logits, teacher_logits, tokens, mask, estimator) of extra.py:
for each of B responses one number whose gradient, by autograd, is the estimate. Logits
(B, R, V), tokens int64 (B, R), mask bool (B, R): the first tokens of each row count.
Returns (B,), sums over the tokens. The value is up to you, only the gradient is looked
at: so whatever is a mere factor in the formulas above must have no gradient of its own.
Logits of 1e4 give finite gradients; the teacher never gets one; nothing that you are
given may be changed.

What to look at when it runs: the grader's world of 3 tokens has 27 responses, so means
and variances are exact sums. Print for each estimator the length of its bias and the
square root of its variance: which would you train with? Do the same for Eq. 2 as it is
printed: its mean has another direction and is several times too long, and with a large
vocabulary it is nothing but the tail. And say why the gradient of the sampled
log p - log q itself, which looks like the KL, has the mean 0. run.py mine --method sdft
trains with your "token" (the loss that it prints is only the surrogate's value).
"""

HINTS = (
    """
Direction. Write each estimate as sum of (factor) * grad log p(...). What is a factor is
detached, what follows grad is not. Check with one token and one response: there
rao_blackwell is full.
""",
    """
Plan. log_p and log_q by log_softmax, log_q detached; gather with tokens[..., None]
gives log p(y_t). token: (log p(y) - log q(y)).detach() * log p(y). full: k_t as in e07,
with its gradient through both p and log p. rao_blackwell: full, and log p(y_i) times
the sum of the later k_t, detached: the whole sum minus cumsum. Mask each (B, R) before
you sum, and before the cumsum, too.
""",
    """
Almost the code.
    own = log_p.gather(-1, tokens[..., None])[..., 0] * mask  # (B, R)
    if estimator == "token":
        return (... .detach() * own).sum(1)
    k = (log_p.exp() * (log_p - log_q)).sum(-1) * mask  # (B, R)
    if estimator == "full":
        return k.sum(1)
    later = (k.sum(1, keepdim=True) - k.cumsum(1)).detach()
    return k.sum(1) + ...
""",
)

TOKEN = "((own - other).detach() * own).sum(1)"
K = "(log_p.exp() * (log_p - log_q)).sum(-1) * mask"
LATER = "(k.sum(1, keepdim=True) - k.cumsum(1)).detach()"
LAST = "return k.sum(1) + (own * later).sum(1)"
OWN = "own = log_p.gather(-1, tokens[..., None])[..., 0] * mask"
LOG_P = "torch.log_softmax(student_logits, -1)"
LOG_Q = "torch.log_softmax(teacher_logits.detach(), -1)"
SUM_T = "(k.sum(1, keepdim=True) - k.cumsum(1) + k).detach()"

MUTANTS = (
    ("Eq. 2 as printed", ((K, "((log_p - log_q).detach() * log_p).sum(-1) * mask"),),
     "full: the gradient of yours is Eq. 2 as it is printed"),
    ("full: p detached", ((K, "(log_p.exp().detach() * (log_p - log_q)).sum(-1) * "
     "mask"),), "full: the gradient of yours is 0"),
    ("full: forward KL", ((K, "(log_q.exp() * (log_q - log_p)).sum(-1) * mask"),),
     "full: the gradient of yours is that of KL(teacher || student)"),
    ("full: cross entropy", ((K, "-(log_p.exp() * log_q).sum(-1) * mask"),),
     "full: the gradient of yours is that of the cross entropy"),
    ("full: p twice", ((K, "((log_p.exp() ** 2 * (log_p - log_q)).detach() * log_p)"
     ".sum(-1) * mask"),), "full: the gradient of yours has p(v) twice"),
    ("token: the log-ratio itself", ((TOKEN, "(own - other).sum(1)"),),
     "its mean over y is 0"),
    ("token: factor not detached", ((TOKEN, "((own - other) * own).sum(1)"),),
     "goes through the factor, too"),
    ("token: k3", ((TOKEN, "((other - own).exp() - 1 - (other - own)).sum(1)"),),
     "is that of k3"),
    ("token: weighed by p", ((TOKEN,
     "((own.exp() * (own - other)).detach() * own).sum(1)"),),
     "y was drawn from p already"),
    ("token: a reward", ((TOKEN, f"-{TOKEN}"),),
     "token: the gradient of yours has the opposite sign"),
    ("token: mean", ((TOKEN, f"{TOKEN} / mask.sum(1)"),),
     "divided by the tokens of the response"),
    ("token: later tokens, too", ((TOKEN, "((own - other).flip(1).cumsum(1).flip(1)"
     ".detach() * own).sum(1)"),), "counts the log-ratios of later tokens"),
    ("token: no teacher", ((TOKEN, "(own.detach() * own).sum(1)"),),
     "where is the teacher?"),
    ("rao_blackwell: t >= i", ((LATER, SUM_T),), "adds noise and no bias"),
    ("rao_blackwell: t < i", ((LATER, "(k.cumsum(1) - k).detach()"),),
     "counts the tokens before each token"),
    ("rao_blackwell: not detached", ((LATER, LATER.replace(".detach()", "")),),
     "goes through the k_t of the second term"),
    ("rao_blackwell: second term without gradient",
     ((LAST, LAST.replace("own *", "own.detach() *")),), "the second term is missing"),
    ("rao_blackwell: first term missing", ((LAST, "return (own * later).sum(1)"),),
     "is the second term alone"),
    ("rao_blackwell: wrong sign", ((LAST, LAST.replace("+", "-")),),
     "the second term with the wrong sign"),
    ("rao_blackwell: sampled log-ratios", ((LATER, "(own - log_q.gather(-1, "
     "tokens[..., None])[..., 0] * mask).detach()\n    later = later.sum(1, "
     "keepdim=True) - later.cumsum(1)"),), "has the sampled log-ratios"),
    ("mask forgotten", ((OWN, OWN.replace(" * mask", "")),
     (K, K.replace(" * mask", "")),
     ("[..., 0] * mask  # (B, R)\n        return", "[..., 0]\n        return")),
     "counts the pads behind a response"),
    ("teacher not detached", ((LOG_Q, LOG_Q.replace(".detach()", "")),),
     "the teacher gets a gradient"),
    ("log of a softmax", ((LOG_P, "torch.softmax(student_logits, -1).log()"),
     (LOG_Q, "torch.softmax(teacher_logits.detach(), -1).log()")),
     "log_softmax(x) is not"),
    ("one number for all", ((TOKEN, TOKEN.replace("sum(1)", "sum()")),),
     "one number for each response"),
)  # fmt: skip

RIGHTS = (
    (
        "the square of the log-ratio (k2), and factors with one softmax trick",
        '''
def kl_surrogate(student_logits, teacher_logits, tokens, mask, estimator):
    """The gradient of 1/2 (log p - log q)^2 is (log p - log q) grad log p."""
    p = student_logits.log_softmax(-1)
    q = teacher_logits.log_softmax(-1).detach()
    at = tokens.unsqueeze(-1)
    if estimator == "token":
        ratio = (p - q).gather(-1, at).squeeze(-1)
        return (0.5 * ratio**2).masked_fill(~mask, 0).sum(-1)
    # the log-ratio as a factor: the rest of the gradient of p log p sums to 0
    k = (p.exp() * (p - q).detach()).sum(-1).masked_fill(~mask, 0)
    if estimator == "full":
        return k.sum(-1)
    R = mask.size(1)
    behind = torch.ones(R, R, dtype=k.dtype).tril(-1)  # [t, i]: t > i
    later = k.detach() @ behind
    own = p.gather(-1, at).squeeze(-1).masked_fill(~mask, 0)
    return (k + later * own).sum(-1)
''',
    ),
    (
        "loops over responses and tokens, from the last to the first",
        '''
def kl_surrogate(student_logits, teacher_logits, tokens, mask, estimator):
    results = []
    for s, t, y, counts in zip(student_logits, teacher_logits.detach(), tokens, mask):
        total, later = 0 * s.sum(), 0.0
        for i in reversed(range(int(counts.sum()))):
            p, q = s[i].log_softmax(0), t[i].log_softmax(0)
            k = p.exp() @ (p - q)
            if estimator == "token":
                total = total + (p[y[i]] - q[y[i]]).item() * p[y[i]]
            else:
                total = total + k
            if estimator == "rao_blackwell":
                total = total + later * p[y[i]]
                later += k.item()
        results.append(total)
    return torch.stack(results)
''',
    ),
    (
        "the estimate itself as the gradient: value 0, slope over the logits by hand",
        '''
def kl_surrogate(student_logits, teacher_logits, tokens, mask, estimator):
    with torch.no_grad():
        log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        p, ratio = log_p.exp(), log_p - log_q
        k = (p * ratio).sum(-1, keepdim=True).masked_fill(~mask[..., None], 0)
        hot = torch.nn.functional.one_hot(tokens, p.size(-1)).to(p.dtype)
        slope = torch.zeros_like(p)
        if estimator == "token":
            slope += (hot * ratio).sum(-1, keepdim=True) * (hot - p)
        else:
            slope += p * (ratio - k)
        if estimator == "rao_blackwell":
            later = k.flip(1).cumsum(1).flip(1) - k
            slope += later * (hot - p)
        slope *= mask[..., None]
    # slope * (logits - the same without gradient)
    return (slope * (student_logits - student_logits.detach())).sum((1, 2))
''',
    ),
)

EXERCISE = Exercise(
    id="e09",
    functions=("extra.py kl_surrogate",),
    title="Three estimators of one gradient",
    goal="See what is biased, what is noisy, and what one missing weight does.",
    paper="arXiv 2601.19897, Eq. 2 (printed without its weight); appendix A.1",
    difficulty=4,
    minutes=60,
    points=8,
    run_time="in 1 second; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    wire=(
        own_loss(f"""\
    from extra import kl_surrogate
{DENSE}\
    estimate = kl_surrogate(*dense, response, mask, "token")  # (B,)
    loss = (estimate / mask.sum(1).clamp(min=1)).sum() / cfg.batch_size
"""),
    ),
)
