"""One style for all pictures: no background, mid-grey text that reads on white paper
and on dark pages alike, colors of middle brightness, and a label at each line in place
of a legend."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GREY = "#808080"
COLORS = {
    "base": "#8a8a8a", "sft": "#e07b1a", "dft": "#c2529a", "reinvoke": "#a08a1e",
    "sdft": "#3f8fd6", "teacher": "#2aa198", "prior": "#8a8a8a",
}  # fmt: skip
OTHERS = ("#3f8fd6", "#e07b1a", "#2aa198", "#c2529a", "#a08a1e", "#7a6fd0", "#d0504a",
          "#4c9f50", "#8a8a8a")  # fmt: skip
MARKERS = {"sft": "o", "dft": "^", "reinvoke": "D", "sdft": "s", "base": "X"}

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


def save(figure, path):
    figure.savefig(path, bbox_inches="tight", transparent=True)
    plt.close(figure)


def band(axis, x, rows, color, **style):
    """The mean of several runs (a list of lists) as a line, their range as a band."""
    columns = list(zip(*rows, strict=True))
    y = [sum(c) / len(c) for c in columns]
    (line,) = axis.plot(x, y, color=color, **{"lw": 1.8, **style})
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
    return line


def cross(axis, xs, ys, color, marker="o"):
    """Runs as their mean, with their range in both directions; returns the mean."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    axis.plot([min(xs), max(xs)], [y, y], color=color, lw=0.8, alpha=0.6)
    axis.plot([x, x], [min(ys), max(ys)], color=color, lw=0.8, alpha=0.6)
    axis.plot([x], [y], marker, color=color, ms=5)
    return x, y


def write(axis, words):
    """Words beside points, [(x, y, text, color, size)]: each at the first place inside
    the panel where it covers no other word or point. Call it when all is drawn."""
    axis.figure.draw_without_rendering()  # places are known only now
    points = [line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 1]
    points = axis.transData.transform([point[0] for point in points])
    frame, taken = axis.get_window_extent(), []
    for x, y, text, color, size in words:
        own = axis.transData.transform((x, y))
        left = own[0] < (frame.x0 + frame.x1) / 2
        sides = [(5, "left"), (-5, "right")][:: 1 if left else -1]
        places = [(dx, dy, side) for dy in (4, -9, 13, -18, 22, -27, 31, -36, 45)
                  for dx, side in sides]  # fmt: skip
        best = None
        for dx, dy, side in places:
            word = axis.annotate(text, (x, y), (dx, dy), textcoords="offset points",
                                 color=color, fontsize=size, ha=side)  # fmt: skip
            box = word.get_window_extent()
            others = [point for point in points if abs(point - own).max() > 1]
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 20
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            covered = 9 * sum(box.overlaps(each) for each in taken)
            covered += sum(box.padded(7).contains(*point) for point in others)
            word.remove()
            if inside and (best is None or covered < best[0]):
                best = covered, (dx, dy), side
        _, offset, side = best or (0, places[0][:2], places[0][2])
        word = axis.annotate(text, (x, y), offset, textcoords="offset points",
                             color=color, fontsize=size, ha=side)  # fmt: skip
        box = word.get_window_extent()
        taken.append(box)


def label_lines(axis, labels):
    """Words right of the axis, [(y, text, color)], at the height where the lines end,
    moved apart where they would overlap."""
    axis.figure.canvas.draw()  # the limits are known only now
    box = axis.get_window_extent().height * 72 / axis.figure.dpi  # points
    gap = 10.5 / box  # of the axis
    places = []
    for y, text, color in sorted(labels, key=lambda each: each[0]):
        at = axis.transAxes.inverted().transform(axis.transData.transform((1, y)))[1]
        at = min(max(at, 0.0), 1.0)
        places.append([max(at, places[-1][0] + gap) if places else at, text, color])
    if places and places[-1][0] > 1.02:  # down again from the top
        top = 1.02
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
        middle = sum(values) / len(values)
        axis.plot([middle] * 2, [-i - 0.28, -i + 0.28], color=color, lw=2)
    axis.set_yticks([-i for i in range(len(rows))], list(rows))
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.tick_params(axis="y", length=0)
    for text in axis.get_yticklabels():  # none, where another panel has them
        text.set_color(colors.get(text.get_text(), GREY))
