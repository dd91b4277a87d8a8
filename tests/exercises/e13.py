"""e13: how much was forgotten. Grader: test_e13_forgetting.py"""

from kit import Exercise

SHEET = """
"It did not forget" is a number, and papers mean two different ones by it. Both are made
from a matrix acc, floating point (S, K): row i holds the accuracies after stage i (row
0: the base), column k those of skill k; NaN where a skill was not measured, as before
it was trained. For skills A, B and C, trained one after the other, and one that the
base had:

              A    B    C   prior
    base      -    -    -    1.0
    after A  1.0   -    -    0.9
    after B  0.7  1.0   -    0.5
    after C  0.8  0.4  1.0   0.6

Write two functions in extra.py; neither changes acc:

1. forgetting(acc) -> (K,): of each skill, the best of the earlier rows minus the last
   row. Above: 0.2, 0.6, NaN, 0.4. A skill that got better has a number below 0. NaN
   where the last row is NaN, or every earlier row: what has just been learnt could not
   be forgotten yet, which is not the same as 0.
2. backward_transfer(acc) -> a scalar tensor (): the last row minus the first number of
   each column, the skill as it was just learnt; the mean over the columns that have a
   number in the last row and in an earlier one. Above: (-0.2 - 0.6 - 0.4) / 3 = -0.4.
   NaN if there is no such column.

A NaN may stand anywhere, between two numbers, too.

What to look at when it runs: python tests/exercises/run.py mine --method both prints
your numbers below each table; ten minutes the first time. Fill in, for SFT and SDFT:

    method | new skills after C | forgetting A, B | worst prior | backward transfer

Which prior benchmark loses most, and what does it need that SFT trains away? Why is
KL(student || base) no measure of forgetting? (Compare the rows after A with those after
C.) Then SFT again, with --method sft --lr 1e-4.
"""

HINTS = (
    """
Direction. Make the matrix of the sheet with torch.tensor and float("nan"). What does
max say of a column with a NaN in it? Which numbers of a column does each of the two
measures use, and which columns does it leave out?
""",
    """
Plan. forgetting: replace NaN by -inf in acc[:-1], then the maximum over the rows; where
it is still -inf nothing was measured: NaN. A NaN of the last row comes through the
subtraction by itself. backward_transfer: column after column; the numbers before the
last row without the NaN; the first of them, if there is one; a list, and its mean.
""",
    """
Almost the code.
    best = acc[:-1].nan_to_num(nan=-math.inf) ... maximum over the rows  # (K,)
    lost = best - acc[-1]
    return lost.masked_fill(..., math.nan)

    for column in acc.T:
        earlier = column[:-1]
        earlier = earlier[~earlier.isnan()]
        if ...:
            changes.append(column[-1] - earlier[0])
acc[:-1] may have no row at all, of which there is no maximum: put a row of -inf above.
""",
)

BEST = "best - acc[-1]"
EACH = "column[-1] - measured[0]"
MEASURED = "column[:-1][~column[:-1].isnan()]"
MEAN = "torch.stack(changes).mean()"
DONE = "    lost = best - acc[-1]\n"

MUTANTS = (
    ("sign", ((BEST, "acc[-1] - best"),), "last row minus the best"),
    ("never below 0", ((BEST, "(best - acc[-1]).clamp(min=0)"),),
     "a skill that got better"),
    ("no sign", ((BEST, "(best - acc[-1]).abs()"),), "has no sign"),
    ("ends at the last number", (("earlier = acc[:-1]", """
    acc = torch.stack([torch.cat([c[c.isnan()], c[~c.isnan()]]) for c in acc.T], 1)
    earlier = acc[:-1]"""),), "ends at the last number"),
    ("best of all rows", (("for row in earlier", "for row in acc"),),
     "includes the last row"),
    ("from the first", ((DONE, """
    first = [[x for x in c[:-1] if x == x][:1] for c in acc.T.tolist()]
    lost = acc.new_tensor([f[0] if f else math.nan for f in first]) - acc[-1]
"""),), "starts at the first number"),
    ("from the base", ((BEST, "acc[0] - acc[-1]"),), "minus the last row: row 0"),
    ("the stage before", (("earlier = acc[:-1]", "earlier = acc[-2:-1]"),),
     "only the row before the last"),
    ("NaN is zero", (("earlier = acc[:-1]", "acc = acc.nan_to_num(0); "
                      "earlier = acc[:-1]"),), "NaN as an accuracy of 0"),
    ("NaN spreads", (("torch.fmax", "torch.maximum"),), "NaN before it was trained"),
    ("new skill is 0", (("lost.masked_fill(best == -math.inf, math.nan)",
                         "lost.masked_fill(best == -math.inf, 0)"),),
     "has just been learnt"),
    ("exchanged", (("earlier = acc[:-1]", "acc = acc.T; earlier = acc[:-1]"),
                   ("acc.new_full(acc.shape[1:], -math.inf)  # (K,)",
                    "acc.new_full(acc.T.shape[1:], -math.inf)")),
     "rows and columns"),
    ("relative", ((BEST, "(best - acc[-1]) / best"),), "divided by the best"),
    ("mean of skills", (("return lost.masked_fill(best == -math.inf, math.nan)",
                         "return lost.nanmean()"),), "one number for each skill"),
    ("worst ever", ((BEST, "best - torch.stack([c[~c.isnan()].min() if (c == c).any() "
                     "else c[0] for c in acc.T]) + 0 * acc[-1]"),),
     "the lowest that the skill ever was"),
    ("in place", (("earlier = acc[:-1]", "earlier = acc[:-1].nan_to_num_(-math.inf)"),),
     "changes acc"),
    ("one stage crashes", (("earlier = acc[:-1]", "acc[:-1].amax(0); "
                            "earlier = acc[:-1]"),), "a matrix of one row"),
    ("transfer: sign", ((EACH, "measured[0] - column[-1]"),), "the wrong sign"),
    ("transfer: ends at the last number", (("for column in acc.T", """\
for column in [torch.cat([c[c.isnan()], c[~c.isnan()]]) for c in acc.T]"""),),
     "ends at the last number"),
    ("transfer: from the best", ((EACH, "column[-1] - measured.max()"),),
     "the skill as it was just learnt"),
    ("transfer: from the stage before", ((EACH, "column[-1] - measured[-1]"),),
     "the last number before the last row"),
    ("transfer: from the base", ((EACH, "column[-1] - column[0]"),), "row 0, the base"),
    ("transfer: all columns count", ((MEAN, "torch.stack(changes).sum() / "
                                      "acc.size(1)"),), "number of all columns"),
    ("transfer: new skills count", ((MEASURED, "column[~column.isnan()]"),),
     "as a change of 0"),
    ("transfer: NaN spreads", (("if len(measured) and not column[-1].isnan()",
                                "if len(measured)"),), "the column is left out"),
    ("transfer: NaN is zero", ((MEASURED, "column[:-1].nan_to_num(0)"),),
     "NaN as an accuracy of 0"),
    ("transfer: the diagonal", ((EACH, "column[-1] - acc.diagonal()[len(changes)]"),),
     "diagonal"),
    ("transfer: sum", ((MEAN, "torch.stack(changes).sum()"),), "the sum, not the mean"),
    ("transfer: nothing is 0", (("acc.new_full((), math.nan)", "acc.new_zeros(())"),),
     "no column counts"),
    ("transfer: in place", ((MEASURED, f"{MEASURED} + 0; "
                                "acc[:-1].nan_to_num_(0)"),), "changes acc"),
)  # fmt: skip

RIGHTS = (
    (
        "-inf for NaN, then a maximum; the first number by argmax",
        """
def padded(acc):
    above = torch.full_like(acc[:1], float("nan"))
    return torch.cat([above, acc[:-1]])

def forgetting(acc):
    earlier = padded(acc)
    known = ~earlier.isnan()
    best = torch.where(known, earlier, torch.full_like(earlier, -2.0)).max(0).values
    return torch.where(known.any(0), best - acc[-1], torch.full_like(best, math.nan))

def backward_transfer(acc):
    earlier = padded(acc)
    known = ~earlier.isnan()
    first = earlier.gather(0, known.int().argmax(0, keepdim=True))[0]
    change = acc[-1] - first
    return torch.nanmean(change)
""",
    ),
    (
        "plain loops over lists",
        """
import math

def forgetting(acc):
    *earlier, last = acc.tolist()
    result = []
    for k, now in enumerate(last):
        seen = [row[k] for row in earlier if not math.isnan(row[k])]
        result.append(max(seen) - now if seen else math.nan)
    return torch.tensor(result)

def backward_transfer(acc):
    total, n = 0.0, 0
    for column in zip(*acc.tolist()):
        seen = [x for x in column[:-1] if x == x]
        if seen and column[-1] == column[-1]:
            total, n = total + column[-1] - seen[0], n + 1
    return torch.tensor(total / n if n else math.nan)
""",
    ),
    (
        "numpy",
        """
import numpy as np

def forgetting(acc):
    a = acc.numpy()
    out = np.full(a.shape[1], np.nan)
    for k in range(a.shape[1]):
        seen = a[:-1, k]
        seen = seen[~np.isnan(seen)]
        if seen.size:
            out[k] = seen.max() - a[-1, k]
    return torch.from_numpy(out)

def backward_transfer(acc):
    a, changes = acc.numpy(), []
    for k in range(a.shape[1]):
        seen = np.flatnonzero(~np.isnan(a[:-1, k]))
        if seen.size and not np.isnan(a[-1, k]):
            changes.append(a[-1, k] - a[seen[0], k])
    return torch.tensor(np.mean(changes) if changes else np.nan)
""",
    ),
)

REPORT = '''\
    rows = stage_ends(evaluations)
    known = [  # what was not trained yet is not measured: what it gets right is luck
        [row["new"][skill] if i > k else math.nan
         for k, skill in enumerate(data.SKILLS)] + list(row["prior"].values())
        for i, row in enumerate(rows)
    ]
    known = torch.tensor(known)
    names = [*data.SKILLS, *rows[0]["prior"]]
    lost = exercises.forgetting(known).tolist()
    say("forgetting: " + ", ".join(f"{n} {x:.2f}" for n, x in zip(names, lost)))
    transfer = exercises.backward_transfer(known[:, :len(data.SKILLS)])
    say(f"backward transfer of the skills: {transfer:.2f}")
'''

EXERCISE = Exercise(
    id="e13",
    functions=("extra.py forgetting", "extra.py backward_transfer"),
    title="Measure forgetting",
    goal="Turn a table of accuracies into two numbers, and know what each leaves out.",
    paper="arXiv 2601.19897, section 4.2 (continual learning); backward transfer: "
    "Lopez-Paz & Ranzato 2017, forgetting: Chaudhry et al. 2018",
    difficulty=2,
    minutes=30,
    points=5,
    run_time="in a second; both methods train for about 10 minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    wire=(
        ("train.py", "import data\nimport model\n",
         "import data\nimport extra as exercises\nimport model\n"),
        ("train.py", "    return evaluations[-1]\n",
         f"{REPORT}    return evaluations[-1]\n"),
    ),
)  # fmt: skip
