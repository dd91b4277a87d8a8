"""One style for all pictures: no background, grey text and colors that read on white
paper and on dark pages alike, and a label at each line in place of a legend."""

import math
from itertools import product
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
    """The mean of runs (a list of lists) as a line; returns a label for label_lines."""
    y = [mean(column) for column in zip(*rows, strict=True)]
    axis.plot(x, y, color=color, **{"lw": 1.8, **style})
    return y[-1], label, color


def band(axis, x, rows, label, color, **style):
    """A line, and the range of the runs as a band."""
    low, high = (list(map(of, zip(*rows, strict=True))) for of in (min, max))
    end = line(axis, x, rows, label, color, **style)
    axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
    return end


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
    for x, y, text, color in words:
        own = axis.transData.transform((x, y))
        others = [point for point in points if abs(point - own).max() > 1]

        def put(dy, dx, at=(x, y), text=text, color=color):
            side = "left" if dx > 0 else "right"
            return axis.annotate(text, at, (dx, dy), textcoords="offset points",
                                 color=color, fontsize=7, ha=side)  # fmt: skip

        def covered(place, others=others, put=put):
            word = put(*place)
            box = word.get_window_extent()
            word.remove()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 20
            if not (inside and frame.y0 <= box.y0 and box.y1 <= frame.y1):
                return math.inf
            hidden = sum(box.padded(7).contains(*point) for point in others)
            return hidden + 9 * sum(box.overlaps(each) for each in taken)

        sides = (5, -5) if own[0] < (frame.x0 + frame.x1) / 2 else (-5, 5)
        places = product((4, -9, 13, -18, 22, -27, 31, -36, 45), sides)
        taken.append(put(*min(places, key=covered)).get_window_extent())


def label_lines(axis, labels):
    """Words right of the axis, [(y, text, color)], at the height where the lines end,
    moved apart where they would overlap."""
    axis.figure.canvas.draw()  # the limits are known only now
    # 10.5 points, as a share of the axis
    gap, places = 10.5 / (axis.get_window_extent().height * 72 / axis.figure.dpi), []
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
        axis.plot([mean(values)] * 2, [-i - 0.28, -i + 0.28], color=color, lw=2)
    axis.set_yticks([-i for i in range(len(rows))], list(rows))
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.tick_params(axis="y", length=0)
    for text in axis.get_yticklabels():  # none, where another panel has them
        text.set_color(colors.get(text.get_text(), GREY))
