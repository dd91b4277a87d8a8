"""The picture of each experiment, from the complete rows of its table."""

import math
import re
from statistics import mean

import style
from experiments import READ, summary
from notes import by_base


def values(runs, title):
    """A number of each run; those of train.py have a summary of their own."""
    return [
        summary(run)[title] if "stages" in run else READ[title](run) for run in runs
    ]


def curve(runs, of):
    """x and one list of y for each run; of: a record of an evaluation -> y."""
    x = [row["step"] for row in runs[0]["evaluations"]]
    return x, [[of(row) for row in run["evaluations"]] for run in runs]


def new_of(row):
    return mean(row["new"].values())


def prior_of(row):
    return mean(row["prior"].values())


# ---- One for each experiment -------------------------------------------------------


def together(points, near):
    """Rates whose points are one to the eye share their word: ("3e-5 to 9e-5", at)."""
    groups = []
    for _, rate, at in points:
        last = groups[-1][1] if groups else (math.inf, math.inf)
        if max(abs(a - b) for a, b in zip(at, last, strict=True)) < near:
            groups[-1][0].append(rate)
        else:
            groups.append(([rate], at))
    return [(" to ".join(dict.fromkeys((r[0], r[-1]))), at) for r, at in groups]


def by_rate(axis, rows, families, titles, near=0.04):
    """One number against another, a point for each rate, joined in their order.
    families: {(first word of the label, its end): what to write}. Returns words."""
    words = []
    for (method, end), text in families.items():
        color, marker = style.COLORS[method], style.MARKERS[method]
        points = []
        for label, runs in rows.items():
            if match := re.fullmatch(rf"{method} (\d\S*?){end}", label):
                both = [values(runs, title) for title in titles]
                at = style.cross(axis, *both, color, marker)
                points.append((float(match[1]), match[1], at))
        points.sort()
        if points:
            axis.plot(*zip(*[at for *_, at in points], strict=True), color=color, lw=1)
        for i, (rates, at) in enumerate(together(points, near)):
            words.append((*at, rates if i else f"{text}  {rates}", color, 7))
    return words


NAMES = {"sdft": "SDFT", "reinvoke": "SFT + re-invoke", "dft": "DFT", "sft": "SFT"}
ALL = {(name, ""): text for name, text in NAMES.items()}


def frontier(axis, rows, families):
    """Prior against new."""
    axis.set(xlim=(-0.03, 1.08), ylim=(-0.03, 1.1))
    words = []
    if "base" in rows:
        both = values(rows["base"], "new"), values(rows["base"], "prior")
        at = style.cross(axis, *both, style.GREY, "X")
        words.append((*at, "base", style.GREY, 7))
    style.write(axis, words + by_rate(axis, rows, families, ("new", "prior")))


def skills(rows):
    figure, axes = style.panels(
        "SFT and DFT 300 updates, SDFT 120", "120 updates each", width=4.2, height=3.6
    )
    frontier(axes[0], rows, ALL)
    frontier(axes[1], rows, {("sdft", ""): "SDFT", ("sft", ", 120"): "SFT"})
    axes[0].set_ylabel("prior skills, mean of five")
    for axis in axes:
        axis.set_xlabel("new skill")
    return figure


def onpolicy(rows):
    figure, axes = style.panels(
        "new skill", "prior skills", "updates to .9, by who writes", width=3.5
    )
    names = {"sdft": "on-policy", "offpolicy": "teacher writes, KL",
             "imitate": "teacher writes, imitate"}  # fmt: skip
    colors = dict(zip(names, style.OTHERS, strict=False))
    for axis, of in zip(axes, (new_of, prior_of), strict=False):
        labels, lowest = [], 0.9
        for name, text in names.items():
            if runs := rows.get(f"{name} 9e-5"):
                x, ys = curve(runs, of)
                style.band(axis, x, ys, colors[name])
                labels.append((mean(y[-1] for y in ys), text, colors[name]))
                lowest = min(lowest, *map(min, ys))
        axis.set(xlabel="updates at 9e-5", ylim=(lowest - 0.01, 1.01))
        style.label_lines(axis, labels)
    # who writes: from the teacher alone, over a mix, to the student alone
    taus = [label for label in rows if label.startswith("tau")]
    order = {"offpolicy 9e-5": "teacher", **dict(zip(taus, taus, strict=True)),
             "sdft 9e-5": "student"}  # fmt: skip
    reached = {
        text: [x for x in values(rows[label], "updates to .9") if x < math.inf]
        for label, text in order.items() if label in rows
    }  # fmt: skip
    ends = {"teacher": colors["offpolicy"], "student": colors["sdft"]}
    style.dots(axes[2], {k: v for k, v in reached.items() if v}, ends)
    axes[2].set_xlim(left=0)
    return figure


def teacher(rows):
    """What happens over updates: each run a thin line."""
    kinds = [label for label in rows if label != "base"]
    figure, axes = style.panels(
        "KL(student || teacher), nats a token", "entropy of the student, nats a token",
        "prior skills", "the teacher's gate", width=3.3,
    )  # fmt: skip
    colors = dict(zip(kinds, style.OTHERS, strict=False))
    ends = [[], [], [], []]
    for label in kinds:
        runs = rows[label]
        x, series = [row["step"] for row in runs[0]["records"]], []
        for key in ("kl_student_teacher", "student_entropy"):
            series.append((x, [[row[key] for row in run["records"]] for run in runs]))
        series.append(curve(runs, prior_of))
        series.append(curve(runs, lambda row: row["teacher_gate"]))
        for i, (x, ys) in enumerate(series):
            for y in ys:
                axes[i].plot(x, y, color=colors[label], lw=0.5, alpha=0.5)
            line = [mean(at) for at in zip(*ys, strict=True)]
            axes[i].plot(x, line, color=colors[label], lw=1.8)
            ends[i].append((line[-1], label, colors[label]))
    for axis in axes[:2]:
        axis.set_yscale("log")
    for axis in axes[2:]:
        axis.set_ylim(-0.03, 1.05)
    for axis, labels in zip(axes, ends, strict=True):
        style.label_lines(axis, labels)
        axis.set_xlabel("updates, three skills")
    return figure


def stages(axis, runs):
    """Each skill and the prior mean over the updates of three skills."""
    x, _ = curve(runs, prior_of)
    stage = runs[0]["config"]["steps"]
    x, labels = [step / stage for step in x], []
    for i, skill in enumerate("ABC"):
        color = style.OTHERS[i]
        ys = curve(runs, lambda row, skill=skill: row["new"][skill])[1]
        style.band(axis, x, ys, color)
        labels.append((mean(y[-1] for y in ys), f"skill {skill}", color))
    ys = curve(runs, prior_of)[1]
    style.band(axis, x, ys, style.GREY, ls="--")
    labels.append((mean(y[-1] for y in ys), "prior", style.GREY))
    axis.set(ylim=(-0.03, 1.03), xticks=(0, 1, 2, 3), xlabel="skills trained")
    style.label_lines(axis, labels)


CURVES = {
    "sdft curve": "SDFT", "sft curve": "SFT", "sdft 9e-5": "SDFT, 9e-5",
    "sft 6e-4": "SFT, 6e-4", "sft 1e-4": "SFT, 1e-4", "dft 6e-4": "DFT, 6e-4",
}  # fmt: skip


def curves(rows):
    shown = {
        label: text for label, text in CURVES.items()
        if label in rows and len(rows[label][0]["evaluations"]) > 4
    }  # fmt: skip
    if not shown:
        return {}
    figure, axes = style.panels(*shown.values(), width=2.9, share=True)
    for axis, label in zip(axes, shown, strict=True):
        stages(axis, rows[label])
    axes[0].set_ylabel("accuracy, held-out queries")
    return {"_curves": figure}


def tradeoff(rows):
    figure, (axis,) = style.panels("after three skills", width=5.4, height=3.8)
    frontier(axis, rows, ALL)
    axis.set(xlabel="new skills, mean of three", ylabel="prior skills, mean of five")
    return {"_tradeoff": figure}


def distance(rows):
    """What each method keeps, by the distance of the demonstrations."""
    figure, axes = style.panels("new", "prior", width=3.3, share=True)
    axes[0].set_ylim(-0.03, 1.05)
    for axis, title in zip(axes, ("new", "prior"), strict=True):
        labels = []
        for method, far in {"sdft": "9e-5", "sft": "1e-4", "dft": "1e-4"}.items():
            names = ("own", "known", "terms" if f"{method} terms" in rows else far)
            runs = [rows.get(f"{method} {name}") for name in names]
            if all(runs):
                ys = [values(each, title) for each in runs]
                color, lows = style.COLORS[method], [min(y) for y in ys]
                means = [mean(y) for y in ys]
                axis.plot(means, marker=style.MARKERS[method], color=color)
                axis.vlines(range(3), lows, [max(y) for y in ys], color=color, lw=0.8)
                labels.append((means[-1], method.upper(), color))
        axis.set_xticks(range(3), ["own", "known", "terms"])
        style.label_lines(axis, labels)
    return figure


def forgetting(rows):
    return {**curves(rows), **tradeoff(rows)}


def earlier(rows):
    return {**forgetting(rows), "_distance": distance(rows)}


def columns(rows, *titles, names=None, width=2.9):
    """A panel of dots for each number, a line for each row."""
    names = names or {label: label for label in rows}
    rows = {names[label]: runs for label, runs in rows.items() if label in names}
    colors = {label: color_of(label) for label in rows}
    height = 0.8 + 0.24 * len(rows)
    figure, axes = style.panels(*titles, width=width, height=height, share=True)
    for axis, title in zip(axes, titles, strict=True):
        parts = {label: values(runs, title) for label, runs in rows.items()}
        style.dots(axis, parts, colors)
    return figure, axes


def color_of(label):
    word = label.lower().replace("sft + re-invoke", "reinvoke").split()[0]
    return style.COLORS.get(word.strip(","), style.GREY)


def from_0_to_1(axes):
    """Axes of shares: all of what there is, so that small differences look small."""
    for axis in axes:
        axis.set_xlim(-0.06, 1.06)


def answers_only(rows):
    figure, axes = columns(rows, "new", "prior", "thinks", "length")
    from_0_to_1(axes[:3])
    axes[3].set_xlabel("tokens")
    return figure


PAPER = {  # Table 1 and Fig. 7: strict, lenient, OOD
    "base": (0, 0, 0), "base + text": (0.91, 1, 1), "cpt": (0.09, 0.37, 0.07),
    "sft": (0.80, 0.95, 0.80), "sdft answer + text": (0.89, 1, 0.98),
    "sdft text": (0.75,),
}  # fmt: skip


def knowledge(rows):
    """A dot for each seed, a bar at the mean, a ring where the paper stands."""
    titles = "strict", "lenient", "OOD", "prior"
    figure, axes = columns(rows, *titles, width=2.3)
    for i, label in enumerate(rows):
        paper = PAPER.get(re.sub(r" \d\S*$", "", label), ())
        for axis, value in zip(axes, paper, strict=False):
            axis.plot(value, -i, "o", ms=9, mfc="none", mec=style.GREY, mew=0.8)
            if axis is axes[0] and label.startswith("sft 3e-4"):  # (free on its left)
                axis.annotate("ring: the paper", (value, -i), (-9, -3), ha="right",
                              color=style.GREY, textcoords="offset points", fontsize=7)
    from_0_to_1(axes)
    return figure


def audit(rows):
    figure, axes = columns(rows, "strict", "OOD", "prior")
    from_0_to_1(axes)
    return figure


def size(rows):
    figure, axes = style.panels("new: SDFT less SFT", "prior: SDFT less SFT", width=3.6)
    for axis, title in zip(axes, ("new", "prior"), strict=True):
        names = {}  # where a base stands: its name; equal ones share a word
        for name, *both in by_base(rows):
            gates = values(both[0], "gate at the start")
            pairs = zip(*(values(runs, title) for runs in both), strict=True)
            gains = [sdft - sft for sdft, sft in pairs]
            x, y = style.cross(axis, gates, gains, style.COLORS["sdft"])
            names.setdefault((round(x, 2), round(y, 2)), []).append(name)
        axis.axhline(0, color=style.GREY, lw=0.8, ls=":")
        axis.margins(0.12, 0.15)
        style.write(axis, [(*at, " and ".join(each), style.GREY, 7)
                           for at, each in names.items()])  # fmt: skip
        axis.set(xlabel="gate: the base, shown the demonstration")
    return figure


def passk(rows):
    figure, (axis,) = style.panels("pass@k at temperature 1", width=4.6)
    labels = []
    for label, runs in rows.items():
        ks = [int(k) for k in runs[0]["pass_at_k"]]
        ys = [list(run["pass_at_k"].values()) for run in runs]
        dashed = {"ls": "--"} if label.endswith("1e-4") else {}
        style.band(axis, ks, ys, color_of(label), **dashed)
        labels.append((mean(y[0] for y in ys), mean(y[-1] for y in ys), label))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, ks)
    axis.set(xlabel="k", ylim=(-0.03, 1.05))
    style.label_lines(axis, [(y, text, color_of(text)) for _, y, text in labels])
    return figure


ENDS = ("", ", prior")  # of the numbers on new and on prior prompts


def distance_kl(rows):
    figure, axes = style.panels(
        "KL(student || base), nats a token", "two numbers of forgetting, prior prompts",
        width=4.4, height=3.6,
    )  # fmt: skip
    titles = [f"KL(student || base){end}" for end in ENDS]
    families = ALL
    if "base" in rows:  # where SDFT goes: to its teacher
        families = {**ALL, ("sdft", ""): "SDFT (star: the base, shown the demo)"}
    words = by_rate(axes[0], rows, families, titles, near=0.08)
    if "base" in rows:
        both = [values(rows["base"], f"KL(teacher || base){end}") for end in ENDS]
        style.cross(axes[0], *both, style.COLORS["teacher"], "*")
    axes[0].margins(0.12, 0.25)
    axes[1].margins(0.05, 0.2)
    style.write(axes[0], words)
    titles = "KL(base || student), prior", "mass on old answers"
    style.write(axes[1], by_rate(axes[1], rows, ALL, titles, near=0.06))
    axes[0].set(xlabel="new prompts", ylabel="prior prompts")
    axes[1].set(xlabel="drift: KL(base || student)", ylabel="mass on old answers")
    return figure


def estimators(rows):
    figure, axes = style.panels("new skill", "loss, nats a token", width=3.7)
    colors = dict(zip(rows, style.OTHERS, strict=False))
    ends = [[], []]
    for label, runs in rows.items():
        if label == "360 updates":  # another schedule
            continue
        steps = [row["step"] for row in runs[0]["records"]]
        losses = [[row["kl_student_teacher"] for row in r["records"]] for r in runs]
        for i, (x, ys) in enumerate((curve(runs, new_of), (steps, losses))):
            line = [mean(at) for at in zip(*ys, strict=True)]
            axes[i].plot(x, line, color=colors[label], lw=1.5)
            ends[i].append((line[-1], label, colors[label]))
    axes[1].set_yscale("log")
    axes[1].set_title("KL(student || teacher), nats a token", loc="left")
    for axis, labels in zip(axes, ends, strict=True):
        style.label_lines(axis, labels)
        axis.set_xlabel("updates")
    return figure


def cost(rows):
    """New skill against what was spent, up to the first 120 updates."""
    titles = "matrix products, TFLOP", "core-seconds", "tokens written"
    keys = ("flops", 1e-12), ("core_seconds", 1), ("written", 1)
    figure, axes = style.panels(*titles, width=3.3, share=True)
    for axis, (key, unit) in zip(axes, keys, strict=True):
        labels = []
        for label in ("sdft 9e-5", "sft 6e-4, 120", "sft 1e-4, 120"):
            if runs := rows.get(label):
                steps, ys = curve(runs, new_of)
                one = mean(run["work"][key] / run["config"]["steps"] for run in runs)
                x = [step * one * unit for step in steps]
                dashed = {"ls": "--"} if "1e-4" in label else {}
                style.band(axis, x, ys, color_of(label), **dashed)
                text = label.removesuffix(", 120").upper().replace("E-", "e-")
                labels.append((mean(y[-1] for y in ys), text, color_of(label)))
        style.label_lines(axis, labels)
        axis.set(ylim=(-0.03, 1.05))
    axes[0].set_ylabel("new skill")
    return figure


PICTURES = {
    "skills": skills, "onpolicy": onpolicy, "teacher": teacher,
    "default": curves, "earlier": earlier, "forgetting": forgetting,
    "distance": distance,
    "answers-only": answers_only, "size": size,
    "knowledge": knowledge, "audit": audit,
    "passk": passk, "distance-kl": distance_kl, "estimators": estimators, "cost": cost,
}  # fmt: skip


def draw(name, rows, where):
    """<where>/<name>.png, and of some experiments several: <name>_curves.png, ..."""
    drawn = PICTURES[name](rows) if rows else {}
    for end, figure in (drawn if isinstance(drawn, dict) else {"": drawn}).items():
        style.save(figure, where / f"{name}{end}.png")
