"""The picture of each experiment, from the complete rows of its table.

One style for all: no background, grey text and colors that read on white paper and on
dark pages alike, and a label at each line in place of a legend.
"""

import math
import re
from functools import partial
from itertools import product
from operator import itemgetter
from statistics import mean

import matplotlib
from experiments import READ, summary
from notes import by_base

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

GREY = "#808080"
COLORS = {"base": "#8a8a8a", "sft": "#e07b1a", "dft": "#c2529a", "sdft": "#3f8fd6",
          "reinvoke": "#a08a1e", "teacher": "#2aa198"}  # fmt: skip
OTHERS = ("#3f8fd6", "#e07b1a", "#2aa198", "#c2529a", "#a08a1e", "#7a6fd0", "#d0504a",
          "#4c9f50", "#8a8a8a")  # fmt: skip
MARKERS = {"sft": "o", "dft": "^", "reinvoke": "D", "sdft": "s"}

plt.rcParams.update({
    "font.size": 9, "axes.titlesize": 9, "savefig.dpi": 150,
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.titlecolor": GREY,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
})  # fmt: skip


def panels(*titles, width=3.4, height=3.0, share=False):
    """A row of axes with a title each."""
    size = (width * len(titles), height)
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=share,
                                squeeze=False, layout="constrained")  # fmt: skip
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, loc="left")
    return figure, list(axes[0])


def save(figure, path, **more):
    figure.savefig(path, bbox_inches="tight", transparent=True, **more)
    plt.close(figure)


def line(axis, x, rows, label, color, **style):
    """The mean of runs (a list of lists) as a line."""
    y = [mean(column) for column in zip(*rows, strict=True)]
    axis.plot(x, y, color=color, label=label, **{"lw": 1.8, **style})


def band(axis, x, rows, label, color, **style):
    """A line, and the range of the runs as a band."""
    low, high = (list(map(of, zip(*rows, strict=True))) for of in (min, max))
    line(axis, x, rows, label, color, **style)
    axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def threads(axis, x, rows, label, color):
    """A line, and each run as a thin one."""
    for y in rows:
        axis.plot(x, y, color=color, lw=0.5, alpha=0.5)
    line(axis, x, rows, label, color)


def cross(axis, xs, ys, color, marker="o"):
    """Runs as their mean, with their range in both directions; returns the mean."""
    x, y = mean(xs), mean(ys)
    axis.plot([min(xs), max(xs)], [y, y], color=color, lw=0.8, alpha=0.6)
    axis.plot([x, x], [min(ys), max(ys)], color=color, lw=0.8, alpha=0.6)
    axis.plot([x], [y], marker, color=color, ms=5)
    return x, y


def write(axis, words):
    """Words beside points, [(x, y, text, color)]: each at the first place inside the
    panel where it covers least of other words and points. Call it when all is drawn."""
    axis.figure.draw_without_rendering()  # places are known only now
    points = [line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 1]
    points = axis.transData.transform([point[0] for point in points])
    frame, taken = axis.get_window_extent(), []

    def put(word, dy, dx):
        *at, text, color = word
        side = "left" if dx > 0 else "right"
        return axis.annotate(text, at, (dx, dy), textcoords="offset points",
                             color=color, fontsize=7, ha=side)  # fmt: skip

    def covered(word, own, place):
        text = put(word, *place)
        box = text.get_window_extent()
        text.remove()
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 20
        if not (inside and frame.y0 <= box.y0 and box.y1 <= frame.y1):
            return math.inf
        others = [point for point in points if abs(point - own).max() > 1]
        hidden = sum(box.padded(7).contains(*point) for point in others)
        return hidden + 9 * sum(box.overlaps(each) for each in taken)

    for word in words:
        own = axis.transData.transform(word[:2])
        sides = (5, -5) if own[0] < (frame.x0 + frame.x1) / 2 else (-5, 5)
        places = product((4, -9, 13, -18, 22, -27, 31, -36, 45), sides)
        place = min(places, key=partial(covered, word, own))
        taken.append(put(word, *place).get_window_extent())


def label_lines(axis):
    """The labels of lines right of the axis, at the height where the lines end, moved
    apart where they would overlap."""
    axis.figure.canvas.draw()  # the limits are known only now
    # 10.5 points, as a share of the axis
    gap, places = 10.5 / (axis.get_window_extent().height * 72 / axis.figure.dpi), []
    lines, _ = axis.get_legend_handles_labels()
    for each in sorted(lines, key=lambda each: each.get_ydata()[-1]):
        end = axis.transData.transform((1, each.get_ydata()[-1]))
        at = min(max(axis.transAxes.inverted().transform(end)[1], 0.0), 1.0)
        at = max(at, places[-1][0] + gap) if places else at
        places.append([at, each.get_label(), each.get_color()])
    top = 1.02  # down again from there
    for place in reversed(places):
        place[0], top = min(place[0], top), min(place[0], top) - gap
    for at, text, color in places:
        axis.annotate(text, (1.01, at), xycoords="axes fraction", color=color,
                      fontsize=8, va="center", annotation_clip=False)  # fmt: skip


def dots(axis, rows, colors):
    """{label: values}: a line for each label, the runs as dots, the mean as a bar."""
    for i, (label, values) in enumerate(rows.items()):
        color = colors.get(label, GREY)
        axis.plot(values, [-i] * len(values), "o", color=color, ms=4, alpha=0.55, mew=0)
        axis.plot([mean(values)] * 2, [-i - 0.28, -i + 0.28], color=color, lw=2)
    axis.set_yticks([-i for i in range(len(rows))], list(rows))
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.tick_params(axis="y", length=0)
    for text in axis.get_yticklabels():  # none, where another panel has them
        text.set_color(colors.get(text.get_text(), GREY))


# ---- One function for each experiment ----------------------------------------------


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


def color_of(label):
    return COLORS.get(label.split()[0].strip(","), GREY)


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
        color, points = COLORS[method], []
        for label, runs in rows.items():
            if match := re.fullmatch(rf"{method} (\d\S*?){end}", label):
                both = [values(runs, title) for title in titles]
                at = cross(axis, *both, color, MARKERS[method])
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
        words.append((*cross(axis, *both, GREY, "X"), "base", GREY))
    write(axis, words + by_rate(axis, rows, families, ("new", "prior")))


def skills(rows):
    titles = "SFT and DFT 300 updates, SDFT 120", "120 updates each"
    figure, axes = panels(*titles, width=4.2, height=3.6)
    equal = {("sdft", ""): "SDFT", ("sft", ", 120"): "SFT"}
    for axis, families in zip(axes, (ALL, equal), strict=True):
        frontier(axis, rows, families)
        axis.set_xlabel("new skill")
    axes[0].set_ylabel("prior skills, mean of five")
    return figure


def onpolicy(rows):
    titles = "new skill", "prior skills", "updates to .9, by who writes"
    figure, axes = panels(*titles, width=3.5)
    names = {"sdft": "on-policy", "offpolicy": "teacher writes, KL",
             "imitate": "teacher writes, imitate"}  # fmt: skip
    colors = dict(zip(names, OTHERS, strict=False))
    for axis, of in zip(axes, (new_of, prior_of), strict=False):
        lowest = 0.9
        for name, text in names.items():
            if runs := rows.get(f"{name} 9e-5"):
                x, ys = curve(runs, of)
                band(axis, x, ys, text, colors[name])
                lowest = min(lowest, *map(min, ys))
        axis.set(xlabel="updates at 9e-5", ylim=(lowest - 0.01, 1.01))
        label_lines(axis)
    # who writes: from the teacher alone, over a mix, to the student alone
    taus = {label: label for label in rows if label.startswith("tau")}
    order = {"offpolicy 9e-5": "teacher", **taus, "sdft 9e-5": "student"}
    reached = {text: [x for x in values(rows[label], "updates to .9") if x < math.inf]
               for label, text in order.items() if label in rows}  # fmt: skip
    ends = {"teacher": colors["offpolicy"], "student": colors["sdft"]}
    dots(axes[2], {k: v for k, v in reached.items() if v}, ends)
    axes[2].set_xlim(left=0)
    return figure


def first_pull(axis, pull):
    """Where SDFT pulls at first: the student's tokens, KL(teacher || student), and what
    both find likeliest; hatched: the token that skip 1 leaves out."""
    axis.text(-1.9, 2.0, f"prompt: {pull['prompt']}\ndemonstration: {pull['demo']}")
    for y, text in enumerate(("teacher", "student", "KL", "student wrote")):
        axis.text(-0.15, y / 2 - 0.1, text, ha="right")
    for x, (token, nats, student, teacher) in enumerate(pull["sdft"]):
        shade = plt.cm.Blues(min(nats, 6) / 6 * 0.8)
        box = (x * 1.9, 1.3), 1.8, 0.42
        axis.add_patch(plt.Rectangle(
            *box, facecolor=shade, edgecolor=GREY, hatch="" if x else "///"
        ))  # fmt: skip
        words = [" ".join(f"{word} {p:.2f}" for word, p in row[:2] if p >= 0.05)
                 for row in (teacher, student)]  # fmt: skip
        for y, text in enumerate((*words, f"{nats:.2f}", token)):
            color = ("white" if nats > 3 else "black") if y == 3 else GREY
            axis.text(x * 1.9 + 0.9, y / 2 - 0.1, text, ha="center", fontsize=6.5,
                      color=color)  # fmt: skip
    axis.set(xlim=(-1.9, len(pull["sdft"]) * 1.9), ylim=(-0.3, 2.6))
    axis.axis("off")


def leak(rows):
    titles = "new", "own words", "asked words", "own_style", "asked_style", "knowledge"
    found = {"": columns(rows, *titles, width=2.0)[0]}
    if "base" in rows:
        figure, (axis,) = panels("", width=9.0, height=1.7)
        first_pull(axis, rows["base"][0]["pull"])
        found["_tokens"] = figure
    return found


def each_row(rows, without, titles, series, draw, xlabel, **size):
    """A panel for each of series (what curve takes), a line for each row but one. Those
    of records span decades."""
    rows = {label: runs for label, runs in rows.items() if label != without}
    figure, axes = panels(*titles, **size)
    for axis, of in zip(axes, series, strict=True):
        for (label, runs), color in zip(rows.items(), OTHERS, strict=False):
            draw(axis, *curve(runs, *of), label, color)
        if of[1:]:
            axis.set_yscale("log")
        elif of != (new_of,):
            axis.set_ylim(-0.03, 1.05)
        label_lines(axis)
        axis.set_xlabel(xlabel)
    return figure


def teacher(rows):
    titles = ("KL(student || teacher), nats a token", "entropy of the student, nats a "
              "token", "prior skills", "the teacher's gate")  # fmt: skip
    series = ((itemgetter("kl_student_teacher"), "records"),
              (itemgetter("student_entropy"), "records"),
              (prior_of,), (itemgetter("teacher_gate"),))  # fmt: skip
    of = "base", titles, series, threads, "updates, three skills"
    return each_row(rows, *of, width=3.3)


def estimators(rows):
    titles = "new skill", "KL(student || teacher), nats a token"
    series = (new_of,), (itemgetter("kl_student_teacher"), "records")
    # (the others have another schedule than the row that is left out)
    of = "360 updates", titles, series, partial(line, lw=1.5), "updates"
    return each_row(rows, *of, width=3.7)


def stages(axis, runs):
    """Each skill and the prior mean over the updates of three skills."""
    x, priors = curve(runs, prior_of)
    x = [step / runs[0]["config"]["steps"] for step in x]
    for skill, color in zip("ABC", OTHERS, strict=False):
        _, ys = curve(runs, lambda row, skill=skill: row["new"][skill])
        band(axis, x, ys, f"skill {skill}", color)
    band(axis, x, priors, "prior", GREY, ls="--")
    axis.set(ylim=(-0.03, 1.03), xticks=(0, 1, 2, 3), xlabel="skills trained")
    label_lines(axis)


CURVES = {"sdft curve": "SDFT", "sft curve": "SFT", "sdft 9e-5": "SDFT, 9e-5",
          "sft 6e-4": "SFT, 6e-4", "sft 1e-4": "SFT, 1e-4", "dft 6e-4": "DFT, 6e-4"}


def curves(rows):
    shown = [k for k in CURVES if k in rows and len(rows[k][0]["evaluations"]) > 4]
    if not shown:
        return {}
    titles = [CURVES[label] for label in shown]
    figure, axes = panels(*titles, width=2.9, share=True)
    for axis, label in zip(axes, shown, strict=True):
        stages(axis, rows[label])
    axes[0].set_ylabel("accuracy, held-out queries")
    return {"_curves": figure}


def tradeoff(rows):
    figure, (axis,) = panels("after three skills", width=5.4, height=3.8)
    frontier(axis, rows, ALL)
    axis.set(xlabel="new skills, mean of three", ylabel="prior skills, mean of five")
    return {"_tradeoff": figure}


def distance(rows):
    """What each method keeps, by the distance of the demonstrations."""
    figure, axes = panels("new", "prior", width=3.3, share=True)
    axes[0].set_ylim(-0.03, 1.05)
    for axis, title in zip(axes, ("new", "prior"), strict=True):
        for method, far in {"sdft": "9e-5", "sft": "1e-4", "dft": "1e-4"}.items():
            names = ("own", "known", "terms" if f"{method} terms" in rows else far)
            runs = [rows.get(f"{method} {name}") for name in names]
            if all(runs):
                ys = [values(each, title) for each in runs]
                style = {"color": COLORS[method], "label": method.upper()}
                axis.plot([mean(y) for y in ys], marker=MARKERS[method], **style)
                ends = [min(y) for y in ys], [max(y) for y in ys]
                axis.vlines(range(3), *ends, color=COLORS[method], lw=0.8)
        axis.set_xticks(range(3), ["own", "known", "terms"])
        label_lines(axis)
    return figure


def columns(rows, *titles, width=2.9):
    """A panel of dots for each number, a line for each row."""
    colors, height = {label: color_of(label) for label in rows}, 0.8 + 0.24 * len(rows)
    figure, axes = panels(*titles, width=width, height=height, share=True)
    for axis, title in zip(axes, titles, strict=True):
        dots(axis, {k: values(runs, title) for k, runs in rows.items()}, colors)
        if title == "length":
            axis.set_xlabel("tokens")
        else:  # a share: all of what there is, so that small differences look small
            axis.set_xlim(-0.06, 1.06)
    return figure, axes


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
            axis.plot(value, -i, "o", ms=9, mfc="none", mec=GREY, mew=0.8)
            if axis is axes[0] and label.startswith("sft 3e-4"):  # (free on its left)
                axis.annotate("ring: the paper", (value, -i), (-9, -3), ha="right",
                              color=GREY, textcoords="offset points", fontsize=7)
    return figure


def size(rows):
    figure, axes = panels("new: SDFT less SFT", "prior: SDFT less SFT", width=3.6)
    for axis, title in zip(axes, ("new", "prior"), strict=True):
        names = {}  # where a base stands: its name; equal ones share a word
        for name, *both in by_base(rows):
            pairs = zip(*(values(runs, title) for runs in both), strict=True)
            gains = [sdft - sft for sdft, sft in pairs]
            gates = values(both[0], "gate at the start")
            x, y = cross(axis, gates, gains, COLORS["sdft"])
            names.setdefault((round(x, 2), round(y, 2)), []).append(name)
        axis.axhline(0, color=GREY, lw=0.8, ls=":")
        axis.margins(0.12, 0.15)
        write(axis, [(*at, " and ".join(of), GREY) for at, of in names.items()])
        axis.set(xlabel="gate: the base, shown the demonstration")
    return figure


def passk(rows):
    figure, (axis,) = panels("pass@k at temperature 1", width=4.6)
    for label, runs in rows.items():
        ks = [int(k) for k in runs[0]["pass_at_k"]]
        ys = [list(run["pass_at_k"].values()) for run in runs]
        dashed = {"ls": "--"} if label.endswith("1e-4") else {}
        band(axis, ks, ys, label, color_of(label), **dashed)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, ks)
    axis.set(xlabel="k", ylim=(-0.03, 1.05))
    label_lines(axis)
    return figure


def distance_kl(rows):
    titles = ("KL(student || base), nats a token", "two numbers of forgetting, prior "
              "prompts")  # fmt: skip
    figure, axes = panels(*titles, width=4.4, height=3.6)
    titles = "KL(student || base)", "KL(student || base), prior"
    families = {**ALL, ("sdft", ""): "SDFT (star: the base, shown the demo)"}
    words = by_rate(axes[0], rows, families, titles, near=0.08)
    if "base" in rows:  # where SDFT goes: to its teacher
        titles = "KL(teacher || base)", "KL(teacher || base), prior"
        both = [values(rows["base"], title) for title in titles]
        cross(axes[0], *both, COLORS["teacher"], "*")
    axes[0].margins(0.12, 0.25)
    axes[1].margins(0.05, 0.2)
    write(axes[0], words)
    titles = "KL(base || student), prior", "mass on old answers"
    write(axes[1], by_rate(axes[1], rows, ALL, titles, near=0.06))
    axes[0].set(xlabel="new prompts", ylabel="prior prompts")
    axes[1].set(xlabel="drift: KL(base || student)", ylabel="mass on old answers")
    return figure


def cost(rows):
    """New skill against what was spent, up to the first 120 updates."""
    keys = {"matrix products, TFLOP": ("flops", 1e-12),
            "core-seconds": ("core_seconds", 1), "tokens written": ("written", 1)}
    figure, axes = panels(*keys, width=3.3, share=True)
    for axis, (key, unit) in zip(axes, keys.values(), strict=True):
        for label in ("sdft 9e-5", "sft 6e-4, 120", "sft 1e-4, 120"):
            if runs := rows.get(label):
                steps, ys = curve(runs, new_of)
                one = mean(run["work"][key] / run["config"]["steps"] for run in runs)
                x = [step * one * unit for step in steps]
                dashed = {"ls": "--"} if "1e-4" in label else {}
                text = label.removesuffix(", 120").upper().replace("E-", "e-")
                band(axis, x, ys, text, color_of(label), **dashed)
        label_lines(axis)
        axis.set(ylim=(-0.03, 1.05))
    axes[0].set_ylabel("new skill")
    return figure


OTHER_NAMES = {  # what draws an experiment, where it is not the function of its name
    "default": curves, "distance-kl": distance_kl,
    "answers-only": lambda rows: columns(rows, "new", "prior", "thinks", "length")[0],
    "audit": lambda rows: columns(rows, "strict", "OOD", "prior")[0],
    "forgetting": lambda rows: {**curves(rows), **tradeoff(rows)},
    "earlier": lambda rows: {**tradeoff(rows), "_distance": distance(rows)},
}  # fmt: skip


def draw(name, rows, where):
    """<where>/<name>.png, and of some experiments several: <name>_curves.png, ..."""
    drawn = (OTHER_NAMES.get(name) or globals()[name])(rows) if rows else {}
    for end, figure in (drawn if isinstance(drawn, dict) else {"": drawn}).items():
        save(figure, where / f"{name}{end}.png")
