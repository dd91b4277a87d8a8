"""The picture of each experiment, from the complete rows of its table."""

from statistics import mean

import style
from experiments import READ


def values(runs, title):
    return [READ[title](run) for run in runs]


def curve(runs, of):
    """x and one list of y for each run; of: a record of an evaluation -> y."""
    x = [row["step"] for row in runs[0]["evaluations"]]
    return x, [[of(row) for row in run["evaluations"]] for run in runs]


def new_of(row):
    return mean(row["new"].values())


def prior_of(row):
    return mean(row["prior"].values())


# ---- One for each experiment -------------------------------------------------------


def frontier(axis, rows, families):
    """Prior against new, a point for each rate, joined in the order of the rates."""
    for family, text in families.items():
        ends = "," + family.partition(",")[2] if "," in family else ""
        start = family.partition(",")[0] + " "
        color, marker = style.COLORS[start.strip()], style.MARKERS[start.strip()]
        points = []
        for label, runs in rows.items():
            rate = label.removeprefix(start).removesuffix(ends)
            if label.startswith(start) and label.endswith(ends) and rate[0].isdigit():
                if "," in rate or " " in rate:
                    continue
                at = style.cross(axis, values(runs, "new"), values(runs, "prior"),
                                 color, marker)  # fmt: skip
                points.append((float(rate), rate, at))
        points.sort()
        axis.plot(*zip(*[at for *_, at in points], strict=True), color=color, lw=1.2)
        for i, (_, rate, at) in enumerate(points):
            word = f"{text}  {rate}" if i == 0 else rate
            style.write(axis, *at, word, color, fontsize=7 if i else 8)
    axis.set(xlabel="new skill", xlim=(-0.03, 1.12), ylim=(-0.03, 1.08))


def skills(rows):
    figure, axes = style.panels(
        "SFT 300 updates, SDFT 120", "all 120 updates", width=4.2, height=3.6
    )
    families = {"sdft": "SDFT", "reinvoke": "SFT + re-invoke", "dft": "DFT"}
    frontier(axes[0], rows, {**families, "sft": "SFT"})
    frontier(axes[1], rows, {"sdft": "SDFT", "sft, 120": "SFT"})
    for axis in axes:
        if "base" in rows:
            at = values(rows["base"], "new"), values(rows["base"], "prior")
            style.write(axis, *style.cross(axis, *at, style.GREY, "X"), "base",
                        style.GREY)  # fmt: skip
    axes[0].set_ylabel("prior skills, mean of five")
    return figure


def onpolicy(rows):
    figure, axes = style.panels("new skill", "prior skills", width=3.5)
    names = {"sdft": "on-policy", "offpolicy": "teacher writes, KL",
             "imitate": "teacher writes, imitate"}  # fmt: skip
    colors = dict(zip(names, style.OTHERS, strict=False))
    for axis, of in zip(axes, (new_of, prior_of), strict=False):
        labels = []
        for name, text in names.items():
            if runs := rows.get(f"{name} 9e-5"):
                x, ys = curve(runs, of)
                style.band(axis, x, ys, colors[name])
                labels.append((mean(y[-1] for y in ys), text, colors[name]))
        axis.set_xlabel("updates at 9e-5")
        style.label_lines(axis, labels)
    return figure


def teacher(rows):
    """What happens over updates: each run a thin line."""
    kinds = [label for label in rows if label != "base"]
    figure, axes = style.panels("KL(student || teacher), nats a token",
                                "prior skills", "its gate", width=3.5)  # fmt: skip
    colors = dict(zip(kinds, style.OTHERS, strict=False))
    ends = [[], [], []]
    for label in kinds:
        runs = rows[label]
        x = [row["step"] for row in runs[0]["records"]]
        ys = [[row["kl_student_teacher"] for row in run["records"]] for run in runs]
        series = [(x, ys), curve(runs, prior_of)]
        series.append(curve(runs, lambda row: row["teacher_gate"]))
        for i, (x, ys) in enumerate(series):
            for y in ys:
                axes[i].plot(x, y, color=colors[label], lw=0.5, alpha=0.5)
            line = [mean(at) for at in zip(*ys, strict=True)]
            axes[i].plot(x, line, color=colors[label], lw=1.8)
            ends[i].append((line[-1], label, colors[label]))
    axes[0].set_yscale("log")
    for axis, labels in zip(axes, ends, strict=True):
        style.label_lines(axis, labels)
        axis.set_xlabel("updates, three skills")
    return figure


PICTURES = {"skills": skills, "onpolicy": onpolicy, "teacher": teacher}


def draw(name, rows, where):
    """<where>/<name>.png, if there is anything to show."""
    if rows and name in PICTURES:
        style.save(PICTURES[name](rows), where / f"{name}.png")
