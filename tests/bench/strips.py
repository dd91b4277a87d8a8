"""The README's first picture: what SFT and SDFT pull on, token by token.

    python train.py --method both --eval-every 30 --out out-strips
    python tests/bench/strips.py out-strips

reads the records of skill A in both runs (data.token_pull: before, after 30 updates and
at the end of the stage) and draws <out>/pull.png. A box is a token; the number below it
is how hard the method pulls there, in nats: -log p of the student at each token of the
demonstration (SFT), KL(teacher || student) at each token of the student's own response
(SDFT).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402

FULL = 6  # nats at which a box has its darkest colour


def read_strips(folder, method):
    """[(title, [(token, nats), ...]), ...] of a run on skill A, and its query."""
    rows = train.read_metrics(folder / method)
    rows = [row for row in rows if "pull" in row and row["skill"] == "A"]
    if len(rows) < 3 or rows[1]["step"] != 30:
        sys.exit(f"error: {folder / method}: no evaluation after 30 updates\n"
                 "hint: train with --eval-every 30")  # fmt: skip
    titles = ("before", "after 30 updates", f"after {rows[-1]['step']} updates")
    chosen = (rows[0], rows[1], rows[-1])
    strips = [[each[:2] for each in row["pull"][method]] for row in chosen]
    return list(zip(titles, strips, strict=True)), rows[0]["pull"]


def draw_strip(axes, x, y, tokens, colours):
    """Boxes from left to right, each as wide as its token."""
    from matplotlib.patches import Rectangle

    for token, nats in tokens:
        width = 0.16 * max(3, len(token)) + 0.3
        shade = colours(min(nats, FULL) / FULL * 0.8)
        box = {"facecolor": shade, "edgecolor": "0.6", "linewidth": 0.6}
        axes.add_patch(Rectangle((x, y), width, 0.5, **box))
        dark = nats > 0.6 * FULL
        axes.text(x + width / 2, y + 0.24, token, ha="center", va="center", fontsize=10,
                  color="white" if dark else "black")  # fmt: skip
        axes.text(x + width / 2, y - 0.17, f"{nats:.1f}", ha="center", va="center",
                  fontsize=8, color="black" if nats >= 0.05 else "0.65")  # fmt: skip
        x += width + 0.06


def draw(folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.6, 4.6))
    y = 0.0
    (sft, pull), (sdft, _) = (read_strips(folder, name) for name in ("sft", "sdft"))
    axes.text(0, 1.55, f"prompt: {pull['prompt']}", fontsize=11)
    axes.text(0, 1.15, f"demonstration: {pull['demo']}", fontsize=11)
    for strips, colours, heading in (
        (sft, plt.cm.Oranges, "SFT pulls on the demonstration: -log p(token)"),
        (sdft, plt.cm.Blues,
         "SDFT pulls on the student's own response: KL(teacher || student)"),
    ):  # fmt: skip
        axes.text(0, y + 0.45, heading, fontsize=11, weight="bold")
        y -= 0.25
        for title, tokens in strips:
            axes.text(0, y, title, va="center", fontsize=9)
            draw_strip(axes, 2.6, y - 0.25, tokens, colours)
            y -= 0.95
        y -= 0.7
    axes.set_xlim(-0.1, 15.2)
    axes.set_ylim(y + 0.6, 1.9)
    axes.axis("off")
    figure.savefig(folder / "pull.png", dpi=150, bbox_inches="tight", facecolor="white")
    print(folder / "pull.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]))
