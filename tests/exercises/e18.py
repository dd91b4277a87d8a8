"""e18: DFT, SFT whose tokens are weighed by their own probability. Grader:
test_e18_dft.py"""

from kit import Exercise

SHEET = """
(When you are done.) Is it the loss or the data that makes SFT forget? DFT keeps
SFT's data and changes one factor of its loss: a token weighs as much as the student
believes in it, so that a demonstration which the student would never write pulls at it
no more than a bit. See the whole of it as a diff of sft.py:

    python tests/exercises/variants.py dft

Write dft_loss(logits, tokens, weight) of extra.py. logits are float (N, V), one row for
each token that carries loss; tokens int64 (N,); weight float (N,), which already holds
the mean over tokens and responses. The result is a scalar,

    loss = sum_n weight_n * stopgrad(p_n) * -log p_n    p_n = softmax(logits_n)[token]

in nats. stopgrad: p_n is a number by which SFT's gradient is multiplied; no gradient
flows through it. Logits may be 1e4 apart, so p_n may round to 0: the loss is finite
then, and no term of it is NaN. N may be 0. Nothing that you are given is changed.

A question for paper and pencil: what is the gradient over the logits? Which simpler
loss has the very same one, and why is it not written that way?

What to look at when it runs: python tests/exercises/run.py mine --method sft; without a
line of yours, python tests/exercises/variants.py dft --run --method sft. Beside SFT,
how much is left of the old skills, and how much is learnt of the new ones? DFT follows
only what it half believes: where the demonstrations are in a style that the base never
writes, it learns little (public reports say the same of new formats). Then --distance
own, where the expert writes as the model does.
"""

HINTS = (
    """
Direction. Write SFT's loss on (N, V) first: log-softmax, the column of each token,
times the weight. Which factor is new, and is it a function of the parameters for
autograd, or a number?
""",
    """
Plan. log_p = log_softmax over V, gathered at tokens: (N,). The factor is exp(log_p),
detached. Multiply, sum, change the sign. With the factor taken from log_p, an
underflow gives 0 * a finite number; with log(softmax) it gives 0 * -inf.
""",
    """
Almost the code.
    log_p = logits.log_softmax(-1).gather(1, ...)[:, 0]  # (N,)
    p = ...  # (N,), without gradient
    return -(...).sum()
""",
)

P = "log_p.detach().exp()"
LOG_P = "logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]"
ALL = "-(weight * log_p.detach().exp() * log_p).sum()"

MUTANTS = (
    ("gradient through p", ((P, "log_p.exp()"),), "flows through p, too"),
    ("SFT", ((P, "1"),), "SFT's loss"),
    ("minus p", ((ALL, "-(weight * log_p.exp()).sum()"),), "yours is -p"),
    ("sign", ((ALL, ALL[1:]),), "minus sign"),
    ("focal", ((P, "(1 - log_p.detach().exp())"),), "1 - p"),
    ("divided by p", ((P, "(-log_p.detach()).exp()"),), "divided by p"),
    ("p squared", ((P, "(2 * log_p.detach()).exp()"),), "p squared"),
    ("log p as weight", ((P, "(-log_p.detach())"),), "weighed by -log p"),
    ("weights sum to one", ((P, f"({P} / {P}.mean())"),), "divided by its mean"),
    ("weight normalized", ((ALL, f"{ALL} / (weight * {P}).sum().clamp(min=1e-9)"),),
     "divided by the sum of the weights"),
    ("weight missing", ((ALL, "-(log_p.detach().exp() * log_p).sum()"),),
     "without weight"),
    ("mean", ((ALL, ALL.replace("sum()", "mean()")),), "divided by N"),
    ("largest p", ((P, "logits.softmax(-1).amax(-1).detach()"),),
     "the most likely token"),
    ("whole sequence", ((P, "log_p.detach().sum().exp()"),), "product of all p"),
    ("average token", ((P, "log_p.detach().mean().exp()"),), "the same for each row"),
    ("no gradient", ((LOG_P, f"{LOG_P}.detach()"),), "no gradient"),
    ("log of a softmax", ((LOG_P, "logits.softmax(-1).gather(1, tokens[:, None])"
                           "[:, 0].log()"),), "log(softmax"),
    ("all classes", ((ALL, "-(weight[:, None] * logits.softmax(-1).detach() * "
                      "logits.log_softmax(-1)).sum()"),), "entropy"),
    ("over the rows", ((LOG_P, LOG_P.replace("(-1)", "(0)")),), "over the rows"),
    ("clamped from below", ((P, f"{P}.clamp(min=0.1)"),), "that is not believed"),
    ("columns times rows", ((LOG_P, LOG_P.replace("[:, 0]", "")),),
     "(N, 1) times (N,)"),
    ("a small number", ((ALL, "-(weight * log_p.detach().exp() * (log_p.exp() + 1e-6)"
                         ".log()).sum()"),), "inside of the logarithm"),
    ("mean of the batch", ((ALL, "-log_p.mean() * log_p.mean().detach().exp()"),),
     "exp(-mean)"),
    ("in place", ((ALL, f"-(weight.mul_({P}) * log_p).sum()"),), "changes weight"),
)  # fmt: skip

RIGHTS = (
    (
        "cross entropy without reduction, times softmax",
        """
import torch.nn.functional as F

def dft_loss(logits, tokens, weight):
    with torch.no_grad():
        p = F.softmax(logits, dim=-1)[torch.arange(len(tokens)), tokens]
    return (F.cross_entropy(logits, tokens, reduction="none") * (p * weight)).sum()
""",
    ),
    (
        "row after row",
        """
def dft_loss(logits, tokens, weight):
    total = logits.sum() * 0
    for row, token, w in zip(logits, tokens.tolist(), weight):
        nll = torch.logsumexp(row, 0) - row[token]
        total = total + w * torch.exp(-nll).item() * nll
    return total
""",
    ),
    (
        "the gradient of -p, the value of DFT",
        """
def dft_loss(logits, tokens, weight):
    rows = torch.arange(len(tokens))
    p = logits.softmax(-1)[rows, tokens]
    with torch.no_grad():
        value = -p * logits.log_softmax(-1)[rows, tokens]
    return (weight * (value - p + p.detach())).sum()
""",
    ),
)

EXERCISE = Exercise(
    id="e18",
    functions=("extra.py dft_loss",),
    title="DFT: weigh tokens by belief",
    goal="Change one factor of SFT's loss, and see what it keeps and what it costs.",
    paper="arXiv 2508.05629 (DFT), its loss per token; a baseline to arXiv 2601.19897",
    difficulty=2,
    minutes=25,
    points=4,
    run_time="in a second; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    wire=(
        ("sft.py", "import data\nfrom model", "import data\nimport extra as exercises\n"
         "from model"),
        ("sft.py",
         "    loss = chunked_nll(hidden, student.head(), response[mask], weight)\n",
         "    rows = student.logits(hidden)\n"
         "    loss = exercises.dft_loss(rows, response[mask], weight)\n"),
    ),
    extra=True,
)  # fmt: skip
