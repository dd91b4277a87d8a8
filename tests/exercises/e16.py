"""e16: how robust is a method to its learning rate? Grader: test_e16_learning_rates.py
for the table; the text is read by a person."""

from kit import Exercise

SHEET = """
"SDFT forgets less than SFT": at which learning rate? A comparison at one rate compares
the rate. With three rates, three seeds and two methods you can say what a method does
at its best, and how much it matters to hit the best.

First write summarize(runs) of extra.py: runs is a list of dicts with method, lr, seed,
new and prior; the result is a list of dicts, one for each (method, lr), sorted by
method, then lr: method, lr, seeds (how many), new and prior as (mean, lowest, highest)
over the seeds. ValueError if a (method, lr, seed) comes twice, or if not every (method,
lr) has the same seeds: a mean over other seeds compares nothing.

Then run it (18 runs from one base model, about 30 minutes; it goes on where it was
stopped), and let it check form and ranges of the table with your function:

    python tests/exercises/sweep.py
    python tests/exercises/sweep.py --check --impl mine

What to look at when it runs: new and prior beside each other, rate by rate. At a rate
that learns nothing, nothing is forgotten either. Write one paragraph (at most 150
words) and hand it in with out-sweep/table.csv. It is read for:

    2 points  the claim names method, rate, number and range ("0.55 (0.34 to 0.76)")
    2 points  methods are compared each at a rate at which it learns the new skills
    1 point   a difference that is smaller than the range over seeds is called that
    1 point   what the table cannot say: another world, other sizes, other rates
    1 point   a number that speaks against your claim, if there is one

Public figures to compare with: one replication finds that SFT at a well-chosen rate
keeps 101 % of the first task and at 1e-3 keeps 12 %, SDFT 52 % there.
"""

HINTS = (
    """
Direction. Which runs belong to one line of the table? What has to be true of the seeds
of two lines before you may compare their means?
""",
    """
Plan. A dict from (method, lr) to a dict from seed to run. A seed that is there already:
ValueError. All groups must have the same set of seeds. Then one dict for each group, in
sorted order of the keys. For the paragraph: find for each method the lowest rate at
which `new` is as high as anywhere, and read `prior` there.
""",
    """
Almost the code.
    groups = {}
    for run in runs:
        group = groups.setdefault((run["method"], run["lr"]), {})
        if run["seed"] in group: raise ValueError(...)
        group[run["seed"]] = run
    if len({frozenset(g) for g in groups.values()}) > 1: raise ValueError(...)
    for (method, lr), group in sorted(groups.items()):
        values = [run["new"] for run in group.values()]
        ...  # sum(values) / len(values), min(values), max(values)
""",
)

MUTANTS = (
    ("middle value", (
        ("sum(values) / len(values)", "sorted(values)[len(values) // 2]"),),
     "the middle value"),
    ("best seed", (("sum(values) / len(values)", "max(values)"),), "the best seed"),
    ("highest first", (("min(values), max(values)", "max(values), min(values)"),),
     "highest before the lowest"),
    ("standard deviation", (
        ("min(values), max(values)", "*[sum(values) / len(values) + sign * "
         "torch.tensor(values).std().item() for sign in (-1, 1)]"),),
     "standard deviation"),
    ("twice is fine", (("if run[\"seed\"] in group", "if False"),), "comes twice"),
    ("missing seeds are fine", (
        ("in groups.values()}) > 1", "in groups.values()}) > 9"),),
     "not the same seeds"),
    ("counts seeds only", (("{frozenset(group) for", "{len(group) for"),),
     "as many seeds, but others"),
    ("sorted by rate first", (("sorted(groups.items())", "sorted(groups.items(), "
                               "key=lambda x: x[0][::-1])"),), "sorted by method"),
    ("unsorted", (("sorted(groups.items())", "groups.items()"),), "sorted by method"),
    ("methods mixed", (("(run[\"method\"], run[\"lr\"])", "(\"sft\", run[\"lr\"])"),
                       ("if run[\"seed\"] in group", "if False")),
     "one for each (method, lr)"),
    ("new and prior exchanged", (('("new", "prior"):', '("prior", "new"):'),
                                 ("row[key] =", "row[{'new': 'prior', 'prior': 'new'}"
                                  "[key]] =")), "new and prior are exchanged"),
)  # fmt: skip

RIGHTS = (
    (
        "sort, then group",
        """
from itertools import groupby
from statistics import fmean

def summarize(runs):
    keys = [(r["method"], r["lr"], r["seed"]) for r in runs]
    if len(set(keys)) < len(keys):
        raise ValueError("twice")
    ordered = sorted(runs, key=lambda r: (r["method"], r["lr"], r["seed"]))
    rows, seeds = [], None
    for (method, lr), each in groupby(ordered, lambda r: (r["method"], r["lr"])):
        each = list(each)
        own = [r["seed"] for r in each]
        if seeds not in (None, own):
            raise ValueError("seeds")
        seeds = own
        new, prior = ([r[k] for r in each] for k in ("new", "prior"))
        rows.append(dict(method=method, lr=lr, seeds=len(each),
                         new=(fmean(new), min(new), max(new)),
                         prior=(fmean(prior), min(prior), max(prior))))
    return rows
""",
    ),
    (
        "a loop over all methods and rates",
        """
def summarize(runs):
    methods = sorted({r["method"] for r in runs})
    all_seeds = sorted({r["seed"] for r in runs})
    rows = []
    for method in methods:
        for lr in sorted({r["lr"] for r in runs if r["method"] == method}):
            found = [r for r in runs if r["method"] == method and r["lr"] == lr]
            if sorted(r["seed"] for r in found) != all_seeds:
                raise ValueError(f"{method}, {lr}: seeds missing, or twice")
            row = {"method": method, "lr": lr, "seeds": len(found)}
            for key in ("new", "prior"):
                x = torch.tensor([r[key] for r in found], dtype=torch.float64)
                row[key] = tuple(v.item() for v in (x.mean(), x.min(), x.max()))
            rows.append(row)
    return rows
""",
    ),
)  # fmt: skip

EXERCISE = Exercise(
    id="e16",
    functions=("extra.py summarize",),
    title="Science: the learning rate",
    goal="Compare two methods at their best rates, with ranges; say what is not known.",
    paper="arXiv 2601.19897, section 4; the size of the gap is disputed in public",
    difficulty=3,
    minutes=30,
    points=10,
    run_time="in a second; the sweep for about 30 minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
