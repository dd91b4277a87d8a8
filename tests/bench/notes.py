"""What the table of an experiment does not show: differences seed by seed, first signs.

Functions of rows take the complete ones, {label: runs}, and return lines to print.
"""

import math
import statistics
from statistics import mean

from experiments import READ


def number(x):
    if math.isinf(x):  # updates to an accuracy that was not reached
        return "never"
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def spread(values):
    """mean (lowest to highest)"""
    low, high = number(min(values)), number(max(values))
    return f"{number(mean(values))} ({low} to {high})"


def gaps(rows, ours="sdft 9e-5"):
    """How far each row stays below ours, in new and prior: mean (lowest to highest)."""
    lines = []
    for label, runs in rows.items() if ours in rows else ():
        parts = []
        for title in ("new", "prior"):
            pairs = zip(rows[ours], runs, strict=False)
            x = [READ[title](a) - READ[title](b) for a, b in pairs]
            parts.append(f"{title} {mean(x):+.2f} ({min(x):+.2f} to {max(x):+.2f})")
        if label not in (ours, "base"):
            lines.append(f"{ours} less {label}: {', '.join(parts)}")
    return lines


def benchmarks(rows):
    """Of runs of train.py: the prior skills one by one after the last stage, means over
    seeds; and the mean of all at each evaluation on the way."""
    lines = []
    for label, runs in rows.items():
        final = [run["stages"][-1]["prior"] for run in runs]
        columns = [f"{b} {mean(row[b] for row in final):.2f}" for b in final[0]]
        curves = zip(*[run["evaluations"] for run in runs], strict=True)
        way = " ".join(f"{mean(mean(row['prior'].values()) for row in at):.2f}"
                       for at in curves)  # fmt: skip
        lines.append(f"{label}: {', '.join(columns)}; on the way: {way}")
    return lines


def ranks(values):
    return [sum(v < x for v in values) + (values.count(x) - 1) / 2 for x in values]


def correlation(xs, ys):
    """Pearson's; of ranks it is Spearman's. NaN if one of them is constant."""
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:
        return math.nan


def by_base(rows):
    """(name of a base, the runs of SDFT on it, those of SFT), where both are there."""
    for label in rows:
        name = label.removeprefix("base ")
        runs = [rows.get(f"{method} {name}") for method in ("sdft", "sft")]
        if name != label and all(runs):
            yield (name, *runs)


def gains(rows):
    """The gain of SDFT over SFT in the skill that they learn, by the gate of the base
    for this skill; means over seeds."""
    lines, pairs = [], []
    for name, *both in by_base(rows):
        gate = mean(READ["gate at the start"](run) for run in both[0])
        sdft, sft = (mean(READ["new"](run) for run in each) for each in both)
        pairs.append((gate, sdft - sft))
        lines.append(f"{name}: gate {gate:.2f}, SDFT less SFT in new {sdft - sft:+.2f}")
    if len(pairs) > 2:
        rho = correlation(*(ranks(list(v)) for v in zip(*pairs, strict=True)))
        lines.append(f"rank correlation of gate and gain: {rho:.2f}")
    return lines


def gates(rows):
    """What the base knows by what it is shown, and what it can do with old commands."""
    lines, runs = [], rows.get("base", [])
    for manner in runs and runs[0]["gate"]:
        gate = [run["gate"][manner] for run in runs]
        words = [f"{shown} {spread([g[shown] for g in gate])}" for shown in gate[0]]
        lines.append(f"gate, answers in {manner} style: {', '.join(words)}")
    for kind in runs and runs[0]["known"]:
        right = [run["known"][kind]["accuracy"] for run in runs]
        lines.append(f"premise, the base on old commands, {kind}: {spread(right)}")
    return lines


def suspects(rows):
    """What a wrong measurement would show, of the runs as they are, of both methods."""
    lines = []
    for label in ("sdft, as it is", "sft, as it is"):
        for run in rows.get(label, ()):
            found, words = run["suspects"], []
            for who, (behind, at, before) in found["alignment"].items():
                words.append(f"rows of the {who} predict the token before {before:.2f},"
                             f" their own {at:.2f}, the one behind {behind:.2f}")
            words.append("judge: accepts {:.2f} of right answers, {:.2f} of answers of "
                         "other facts".format(*found["judge"]))
            words += [f"cap {cap}: strict {right:.2f}, ended {ended:.2f}"
                      for cap, (right, ended) in found["cap"].items()]
            words += [f"{n} items in common with a trained question: {right:.2f} of {m}"
                      for n, (right, m) in found["duplicates"].items()]
            lines.append(f"{label}, seed {run['seed']}: {'; '.join(words)}")
    return lines


def by_place(rows, label="sdft 9e-5"):
    """What there is to learn, token by token, before the first update."""
    lines = []
    for run in rows.get(label, ()):
        at = run["evaluations"][0]["kl_teacher_student_by_position"]
        words, rest = " ".join(map(number, at[:6])), number(max(at[6:], default=0.0))
        lines.append(f"seed {run['seed']}: KL(teacher || student) at the first tokens "
                     f"that the base writes: {words}; the highest behind: {rest}")
    return lines


RECORDS = ("loss", "kl_student_teacher", "student_entropy", "teacher_entropy",
           "response_length", "eos_rate", "grad_norm")  # fmt: skip
EVALUATIONS = ("teacher_gate", "kl_teacher_base", "kl_student_base")
SOUND = ("frozen", "ema .001")  # rows whose runs show what is usual


def series(run):
    """{signal: {update: value}} of all that the log of a run shows."""
    def of(rows, names):
        return {name: {row["step"]: row[name] for row in rows} for name in names}

    prior = {row["step"]: mean(row["prior"].values()) for row in run["evaluations"]}
    found = of(run["records"], RECORDS) | of(run["evaluations"], EVALUATIONS)
    return {**found, "prior": prior}


def first_sign(values, usual):
    """The first update at which a value stands outside of what is usual there by more
    than the width of that, and the next value, too; None if there is none.
    values: {update: value}; usual: {update: (lowest, highest)}."""
    before = None
    for step in (step for step in values if step in usual):
        low, high = usual[step]
        margin = max(high - low, 0.01)
        outside = not low - margin <= values[step] <= high + margin
        if outside and before is not None:
            return before
        before = step if outside else None
    return None


def first_signs(rows):
    """Of each run that went astray, what its log showed first: (update, signal)."""
    sound = [series(run) for label in SOUND for run in rows.get(label, ())]
    others = [(label, run) for label, runs in rows.items() for run in runs
              if sound and label not in (*SOUND, "base")]  # fmt: skip
    lines = []
    for label, run in others:
        new, prior = READ["new"](run), READ["prior"](run)
        if min(READ["worst skill"](run), prior) >= 0.9:
            continue
        found = []
        for name, values in series(run).items():
            all_of = {x: [each[name][x] for each in sound] for x in sound[0][name]}
            usual = {x: (min(of), max(of)) for x, of in all_of.items()}
            if (step := first_sign(values, usual)) is not None:
                found.append((step, name))
        words = ", ".join(f"{name} {step}" for step, name in sorted(found))
        lines.append(f"{label}, seed {run['seed']}, new {new:.2f}, prior {prior:.2f}, "
                     f"first outside of the usual: {words}")
    return lines
