"""The accuracies of a run over its updates, as a picture: OUT/plot.png.

    python train.py --method both --eval-every 20
    python tests/bench/plot.py out

One panel for each method. Needs matplotlib.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402


def plot(out):
    """Draw it; returns its path. A plot.png of somebody else gets another name."""
    import matplotlib  # noqa: F401 (style, once imported, does not notice its absence)
    import style

    runs = {}
    for method in train.METHODS:
        if rows := [row for row in train.read_metrics(out / method) if "new" in row]:
            runs[method.upper()] = rows
    if not runs:
        raise train.UserError(f"no run in {out}", "python train.py makes one")
    figure, axes = style.panels(*runs, width=4.4, share=True)
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
    style.save(figure, path, metadata={"Title": "SDFT, train.py"})
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default="out", help="(out)")
    try:
        print(f"picture: {plot(parser.parse_args().out)}")
    except (ImportError, OSError, ValueError) as error:
        hint = getattr(error, "hint", "is the path right?")
        hint = "pip install matplotlib" if isinstance(error, ImportError) else hint
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
