"""e01: log-softmax that survives large logits. Grader: test_e01_log_softmax.py"""

from kit import Exercise

SHEET = """
Every loss of this project is made of log-probabilities: log p_i = x_i - log sum_j
exp(x_j), over the last dimension of the logits x (..., V). Write log_softmax(x) with
exp, log, sum and max alone: torch's log_softmax, logsumexp and softmax are what you
build.

1. exp(1000) is infinite in any dtype of a computer, and log(exp(-1000)) is log(0).
   Adding one number to all logits of a row changes no probability: choose it well.
2. A logit of -inf is a token of probability 0: its result is -inf, its neighbours are
   as if it were not there, and nothing is NaN. No row is -inf throughout.
3. The result has the dtype and shape of x. x stays as it is. A gradient flows.

What to look at when it runs: torch.log(torch.softmax(x, -1)) with x = [0, 200] in
float32 and your own beside it. The one says -inf, and so would the loss.
"""

HINTS = (
    """
Direction. Which of the numbers in a row makes exp overflow? What happens to the
probabilities if you subtract it from the whole row?
""",
    """
Plan. Subtract the largest logit of each row (keepdim=True, so that it is broadcast).
All exponents are then at most 0 and one of them is 0: the sum is at least 1, and its
logarithm is finite. Never take the logarithm of a single probability.
""",
    """
Almost the code.
    x = x - x.amax(-1, keepdim=True)
    return x - ...  # the logarithm of the sum of exp(x) over the last dimension
""",
)

SHIFT = "x - x.amax(-1, keepdim=True).detach()"
SUM = "x - x.exp().sum(-1, keepdim=True).log()"

MUTANTS = (
    ("no shift", ((SHIFT, "x * 1"),), "overflows"),
    (
        "log of softmax",
        ((f"return {SUM}", "return (x.exp() / x.exp().sum(-1, keepdim=True)).log()"),),
        "logarithm of a probability that has rounded to 0",
    ),
    ("first dimension", ((SUM, "x - x.exp().sum(0, keepdim=True).log()"),),
     "over another dimension"),
    ("all dimensions", ((SUM, "x - x.exp().sum().log()"),), "another dimension"),
    ("largest of all rows", ((SHIFT, "x - x.max()"),), "largest logit of all rows"),
    ("sign", ((f"return {SUM}", f"return -({SUM})"),), "minus sign"),
    ("probabilities", ((f"return {SUM}", "return x.exp() / x.exp().sum(-1, keepdim="
                        "True)"),), "probabilities, not their logarithms"),
    ("mean", ((SUM, "x - x.exp().mean(-1, keepdim=True).log()"),), "the mean of exp"),
    ("in place", ((f"x = {SHIFT}", "x.data -= x.data.amax(-1, keepdim=True)"),),
     "log_softmax changes x"),
    ("always float32", ((f"return {SUM}", f"return ({SUM}).float()"),), "dtype"),
    ("epsilon", ((".sum(-1, keepdim=True)", ".sum(-1, keepdim=True).add(1e-6)"),),
     "a small number added"),
    ("clamped", ((f"x = {SHIFT}", f"x = ({SHIFT}).clamp(min=-50)"),),
     "should be -inf"),
    ("detached", ((f"return {SUM}", f"return ({SUM}).detach()"),), "no gradient"),
    ("half a gradient", ((SUM, "x - x.exp().sum(-1, keepdim=True).log().detach()"),),
     "gradient"),
)  # fmt: skip

RIGHTS = (
    (
        "logaddexp, one column after the other",
        """
import functools

def log_softmax(x):
    total = functools.reduce(torch.logaddexp, x.unbind(-1))
    return x - total[..., None]
""",
    ),
    (
        "through float64, and back",
        """
def log_softmax(x):
    y = x.double()
    top, _ = y.max(dim=-1, keepdim=True)
    total = torch.log(torch.sum(torch.exp(y - top), dim=-1, keepdim=True))
    return (y - top - total).to(x.dtype)
""",
    ),
    (
        "a loop over rows",
        """
def log_softmax(x):
    rows = []
    for row in x.reshape(-1, x.size(-1)):
        big = max(row.tolist())
        rows.append(row - big - (row - big).exp().sum().log())
    return torch.stack(rows).view(x.shape)
""",
    ),
)

EXERCISE = Exercise(
    id="e01",
    functions=("extra.py log_softmax",),
    title="Log-softmax",
    goal="See why a loss takes the logarithm of a softmax in one go, never in two.",
    paper="none: it is in every equation of arXiv 2601.19897 that has a log",
    difficulty=1,
    minutes=15,
    points=3,
    run_time="in a second",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    not_with=("torch._softmax", "torch._log_softmax", "torch.logsumexp"),
    wire=(
        ("model.py",
         'loss = F.cross_entropy(s.requires_grad_(), tokens[rows], reduction="none")',
         "import extra\n\n"
         "            log_p = extra.log_softmax(s.requires_grad_())\n"
         "            loss = -log_p.gather(1, tokens[rows, None])[:, 0]"),
    ),
)  # fmt: skip
