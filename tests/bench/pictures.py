"""The picture of each experiment, from the complete rows of its table."""

import math
import re
from operator import itemgetter
from statistics import mean

import style
from experiments import READ, summary
from notes import by_base


def values(runs, title):
    """A number of each run; those of train.py have a summary of their own."""
    return [summary(r)[title] if "stages" in r else READ[title](r) for r in runs]


def curve(runs, of, rows="evaluations"):
    """x and one list of y for each run; of: an evaluation, or a record -> y."""
    x = [row["step"] for row in runs[0][rows]]
    return x, [[of(row) for row in run[rows]] for run in runs]


def new_of(row):
    return mean(row["new"].values())


def prior_of(row):
    return mean(row["prior"].values())


def together(points, near):
    """Rates whose points are one to the eye share their word: ("3e-5 to 9e-5", at)."""
    groups = []
    for _, rate, at in points:
        if groups and math.dist(at, groups[-1][1]) < near:
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
            words.append((*at, rates if i else f"{text}  {rates}", color))
    return words


ALL = {("sdft", ""): "SDFT", ("reinvoke", ""): "SFT + re-invoke", ("dft", ""): "DFT",
       ("sft", ""): "SFT"}  # fmt: skip


def frontier(axis, rows, families):
    """Prior against new."""
    axis.set(xlim=(-0.03, 1.08), ylim=(-0.03, 1.1))
    words = []
    if "base" in rows:
        both = values(rows["base"], "new"), values(rows["base"], "prior")
        at = style.cross(axis, *both, style.GREY, "X")
        words.append((*at, "base", style.GREY))
    style.write(axis, words + by_rate(axis, rows, families, ("new", "prior")))


def skills(rows):
    titles = "SFT and DFT 300 updates, SDFT 120", "120 updates each"
    figure, axes = style.panels(*titles, width=4.2, height=3.6)
    frontier(axes[0], rows, ALL)
    frontier(axes[1], rows, {("sdft", ""): "SDFT", ("sft", ", 120"): "SFT"})
    axes[0].set_ylabel("prior skills, mean of five")
    for axis in axes:
        axis.set_xlabel("new skill")
    return figure


def onpolicy(rows):
    titles = "new skill", "prior skills", "updates to .9, by who writes"
    figure, axes = style.panels(*titles, width=3.5)
    names = {"sdft": "on-policy", "offpolicy": "teacher writes, KL",
             "imitate": "teacher writes, imitate"}  # fmt: skip
    colors = dict(zip(names, style.OTHERS, strict=False))
    for axis, of in zip(axes, (new_of, prior_of), strict=False):
        labels, lowest = [], 0.9
        for name, text in names.items():
            if runs := rows.get(f"{name} 9e-5"):
                x, ys = curve(runs, of)
                labels.append(style.band(axis, x, ys, text, colors[name]))
                lowest = min(lowest, *map(min, ys))
        axis.set(xlabel="updates at 9e-5", ylim=(lowest - 0.01, 1.01))
        style.label_lines(axis, labels)
    # who writes: from the teacher alone, over a mix, to the student alone
    taus = {label: label for label in rows if label.startswith("tau")}
    order = {"offpolicy 9e-5": "teacher", **taus, "sdft 9e-5": "student"}
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
    titles = ("KL(student || teacher), nats a token", "entropy of the student, nats a "
              "token", "prior skills", "the teacher's gate")  # fmt: skip
    figure, axes = style.panels(*titles, width=3.3)
    colors = dict(zip(kinds, style.OTHERS, strict=False))
    ends = [[], [], [], []]
    for label in kinds:
        runs, color = rows[label], colors[label]
        series = (
            curve(runs, itemgetter("kl_student_teacher"), "records"),
            curve(runs, itemgetter("student_entropy"), "records"),
            curve(runs, prior_of), curve(runs, itemgetter("teacher_gate")),
        )  # fmt: skip
        for i, (x, ys) in enumerate(series):
            for y in ys:
                axes[i].plot(x, y, color=color, lw=0.5, alpha=0.5)
            ends[i].append(style.line(axes[i], x, ys, label, color))
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
    x, priors = curve(runs, prior_of)
    x, labels = [step / runs[0]["config"]["steps"] for step in x], []
    for skill, color in zip("ABC", style.OTHERS, strict=False):
        _, ys = curve(runs, lambda row, skill=skill: row["new"][skill])
        labels.append(style.band(axis, x, ys, f"skill {skill}", color))
    labels.append(style.band(axis, x, priors, "prior", style.GREY, ls="--"))
    axis.set(ylim=(-0.03, 1.03), xticks=(0, 1, 2, 3), xlabel="skills trained")
    style.label_lines(axis, labels)


CURVES = {
    "sdft curve": "SDFT", "sft curve": "SFT", "sdft 9e-5": "SDFT, 9e-5",
    "sft 6e-4": "SFT, 6e-4", "sft 1e-4": "SFT, 1e-4", "dft 6e-4": "DFT, 6e-4",
}  # fmt: skip


def curves(rows):
    shown = [k for k in CURVES if k in rows and len(rows[k][0]["evaluations"]) > 4]
    if not shown:
        return {}
    titles = [CURVES[label] for label in shown]
    figure, axes = style.panels(*titles, width=2.9, share=True)
    for axis, label in zip(axes, shown, strict=True):
        stages(axis, rows[label])
    axes[0].set_ylabel("accuracy, held-out queries")
    return {"_curves": figure}


def forgetting(rows):
    figure, (axis,) = style.panels("after three skills", width=5.4, height=3.8)
    frontier(axis, rows, ALL)
    axis.set(xlabel="new skills, mean of three", ylabel="prior skills, mean of five")
    return {**curves(rows), "_tradeoff": figure}


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


def earlier(rows):
    return {**forgetting(rows), "_distance": distance(rows)}


def color_of(label):
    return style.COLORS.get(label.split()[0].strip(","), style.GREY)


def columns(rows, *titles, width=2.9):
    """A panel of dots for each number, a line for each row."""
    colors = {label: color_of(label) for label in rows}
    height = 0.8 + 0.24 * len(rows)
    figure, axes = style.panels(*titles, width=width, height=height, share=True)
    for axis, title in zip(axes, titles, strict=True):
        parts = {label: values(runs, title) for label, runs in rows.items()}
        style.dots(axis, parts, colors)
        if title == "length":
            axis.set_xlabel("tokens")
        else:  # a share: all of what there is, so that small differences look small
            axis.set_xlim(-0.06, 1.06)
    return figure, axes


def answers_only(rows):
    return columns(rows, "new", "prior", "thinks", "length")[0]


def audit(rows):
    return columns(rows, "strict", "OOD", "prior")[0]


PAPER = {  # Table 1 and Fig. 7: strict, lenient, OOD
    "base": (0, 0, 0), "base + text": (0.91, 1, 1), "cpt": (0.09, 0.37, 0.07),
    "sft": (0.80, 0.95, 0.80), "sdft answer + text": (0.89, 1, 0.98),
    "sdft text": (0.75,),
}  # fmt: skip


def knowledge(rows):
    """A dot for each seed, a bar at the mean, a ring where the paper stands."""
    figure, axes = columns(rows, "strict", "lenient", "OOD", "prior", width=2.3)
    for i, label in enumerate(rows):
        paper = PAPER.get(re.sub(r" \d\S*$", "", label), ())
        for axis, value in zip(axes, paper, strict=False):
            axis.plot(value, -i, "o", ms=9, mfc="none", mec=style.GREY, mew=0.8)
            if axis is axes[0] and label.startswith("sft 3e-4"):  # (free on its left)
                axis.annotate("ring: the paper", (value, -i), (-9, -3), ha="right",
                              color=style.GREY, textcoords="offset points", fontsize=7)
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
        words = [(*at, " and ".join(of), style.GREY) for at, of in names.items()]
        style.write(axis, words)
        axis.set(xlabel="gate: the base, shown the demonstration")
    return figure


def passk(rows):
    figure, (axis,) = style.panels("pass@k at temperature 1", width=4.6)
    labels = []
    for label, runs in rows.items():
        ks = [int(k) for k in runs[0]["pass_at_k"]]
        ys = [list(run["pass_at_k"].values()) for run in runs]
        dashed = {"ls": "--"} if label.endswith("1e-4") else {}
        labels.append(style.band(axis, ks, ys, label, color_of(label), **dashed))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, ks)
    axis.set(xlabel="k", ylim=(-0.03, 1.05))
    style.label_lines(axis, labels)
    return figure


def distance_kl(rows):
    titles = ("KL(student || base), nats a token", "two numbers of forgetting, prior "
              "prompts")  # fmt: skip
    figure, axes = style.panels(*titles, width=4.4, height=3.6)
    titles = "KL(student || base)", "KL(student || base), prior"
    families = {**ALL, ("sdft", ""): "SDFT (star: the base, shown the demo)"}
    words = by_rate(axes[0], rows, families, titles, near=0.08)
    if "base" in rows:  # where SDFT goes: to its teacher
        titles = "KL(teacher || base)", "KL(teacher || base), prior"
        both = [values(rows["base"], title) for title in titles]
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
    titles = "new skill", "KL(student || teacher), nats a token"
    figure, axes = style.panels(*titles, width=3.7)
    colors = dict(zip(rows, style.OTHERS, strict=False))
    ends = [[], []]
    for label, runs in rows.items():
        if label != "360 updates":  # another schedule
            both = (new_of,), (itemgetter("kl_student_teacher"), "records")
            for axis, labels, of in zip(axes, ends, both, strict=True):
                xy = curve(runs, *of)
                labels.append(style.line(axis, *xy, label, colors[label], lw=1.5))
    axes[1].set_yscale("log")
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
                text = label.removesuffix(", 120").upper().replace("E-", "e-")
                end = style.band(axis, x, ys, text, color_of(label), **dashed)
                labels.append(end)
        style.label_lines(axis, labels)
        axis.set(ylim=(-0.03, 1.05))
    axes[0].set_ylabel("new skill")
    return figure


def draw(name, rows, where):
    """<where>/<name>.png, and of some experiments several: <name>_curves.png, ... The
    function of an experiment has its name."""
    of = {"default": curves}.get(name) or globals()[name.replace("-", "_")]
    drawn = of(rows) if rows else {}
    for end, figure in (drawn if isinstance(drawn, dict) else {"": drawn}).items():
        style.save(figure, where / f"{name}{end}.png")
