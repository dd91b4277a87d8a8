"""Pictures of a run of train.py; they need matplotlib.

    python train.py --method both --eval-every 20
    python tests/bench/plot.py out              # OUT/plot.png: accuracies over updates

    python train.py --method both --eval-every 30 --out out-pull
    python tests/bench/plot.py out-pull --pull  # OUT/pull.png: the README's first one

--pull: what SFT and SDFT pull on in skill A (data.token_pull), before, after 30 updates
and at the end. A box is a token; below it is how hard the method pulls there, in nats:
-log p of the student at each token of the demonstration (SFT), KL(teacher || student)
at each token of the student's own response (SDFT).
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "exercises"), str(HERE)]

import train  # noqa: E402

FULL = 6  # nats at which a box has its darkest colour


def read(out, key):
    """{method: the evaluations in OUT that have a key}, of the methods that ran."""
    rows = {method: [row for row in train.read_metrics(out / method) if key in row]
            for method in train.METHODS}  # fmt: skip
    return {method: of for method, of in rows.items() if of}


def plot(out):
    """One panel for each method; returns the path. A plot.png of somebody else gets
    another name."""
    import matplotlib  # noqa: F401 (pictures, once imported, does not notice)
    import pictures

    runs = {method.upper(): rows for method, rows in read(out, "new").items()}
    if not runs:
        raise train.UserError(f"no run in {out}", "python train.py makes one")
    figure, axes = pictures.panels(*runs, width=4.4, share=True)
    for axis, rows in zip(axes, runs.values(), strict=True):
        x = [row["step"] for row in rows]
        for group, name in [(g, n) for g in ("new", "prior") for n in rows[0][g]]:
            dashes, label = ("o-", f"skill {name}") if group == "new" else ("--", name)
            axis.plot(x, [row[group][name] for row in rows], dashes, label=label)
        axis.set(xlabel="updates", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("accuracy, held-out queries")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path = out / "plot.png"
    if path.exists() and b"train.py" not in path.read_bytes()[:1000]:
        os.replace(path, train.free_name(path))
    pictures.save(figure, path, metadata={"Title": "SDFT, train.py"})
    return path


def draw_strip(axes, x, y, tokens, colours):
    """Boxes from left to right, each as wide as its token."""
    for token, nats in tokens:
        width = 0.16 * max(3, len(token)) + 0.3
        axes.bar(x + width / 2, 0.5, width, y, linewidth=0.6, edgecolor="0.6",
                 facecolor=colours(min(nats, FULL) / FULL * 0.8))  # fmt: skip
        dark = "white" if nats > 0.6 * FULL else "black"
        light = "black" if nats >= 0.05 else "0.65"
        for at, text, size, color in (
            (0.24, token, 10, dark), (-0.17, f"{nats:.1f}", 8, light),
        ):  # fmt: skip
            axes.text(x + width / 2, y + at, text, fontsize=size, color=color,
                      ha="center", va="center")  # fmt: skip
        x += width + 0.06


def pull(out):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = {method: [row for row in rows if row["skill"] == "A"]
            for method, rows in read(out, "pull").items()}  # fmt: skip
    steps = [[row["step"] for row in rows[1:-1]][:1] for rows in runs.values()]
    if steps != [[30], [30]]:
        raise train.UserError(f"{out}: not both methods, evaluated after 30 updates",
                              "train with --method both --eval-every 30")  # fmt: skip
    figure, axes = plt.subplots(figsize=(9.6, 4.6))
    of, y = runs["sft"][0]["pull"], 0.0
    axes.text(0, 1.55, f"prompt: {of['prompt']}", fontsize=11)
    axes.text(0, 1.15, f"demonstration: {of['demo']}", fontsize=11)
    for method, colours, heading in (
        ("sft", plt.cm.Oranges, "the demonstration: -log p(token)"),
        ("sdft", plt.cm.Blues, "the student's own response: KL(teacher || student)"),
    ):
        heading = f"{method.upper()} pulls on {heading}"
        axes.text(0, y + 0.45, heading, fontsize=11, weight="bold")
        y -= 0.25
        for i in (0, 1, -1):
            row = runs[method][i]
            title = f"after {row['step']} updates" if row["step"] else "before"
            axes.text(0, y, title, va="center", fontsize=9)
            strip = [each[:2] for each in row["pull"][method]]
            draw_strip(axes, 2.6, y - 0.25, strip, colours)
            y -= 0.95
        y -= 0.7
    axes.set(xlim=(-0.1, 15.2), ylim=(y + 0.6, 1.9))
    axes.axis("off")
    path = out / "pull.png"
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default="out", help="(out)")
    parser.add_argument("--pull", action="store_true", help="the pull on each token")
    args = parser.parse_args()
    try:
        print(f"picture: {(pull if args.pull else plot)(args.out)}")
    except (ImportError, OSError, ValueError) as error:
        hint = getattr(error, "hint", "is the path right?")
        hint = "pip install matplotlib" if isinstance(error, ImportError) else hint
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
