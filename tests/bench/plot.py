"""The accuracies of a run over its updates, as a picture: OUT/plot.png.

    python train.py --method both --eval-every 20
    python tests/bench/plot.py out

One panel for each method. Needs matplotlib.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402


def evaluations_of(out):
    """{method: its evaluations, one after the other} of the runs in a folder."""
    found = {}
    for method in train.METHODS:
        rows = [row for row in train.read_metrics(out / method) if "new" in row]
        found |= {method: rows} if rows else {}
    if not found:
        raise train.UserError(f"no run in {out}", "python train.py makes one")
    return found


def plot(out):
    """Draw it; returns its path. A plot.png of somebody else gets another name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = evaluations_of(out)
    size = (5 * len(found), 3.5)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False)
    for axis, (method, rows) in zip(axes[0], found.items(), strict=True):
        x = [row["step"] for row in rows]
        for name in rows[0]["new"]:
            y = [row["new"][name] for row in rows]
            axis.plot(x, y, marker="o", label=f"skill {name}")
        for name in rows[0]["prior"]:
            y = [row["prior"][name] for row in rows]
            axis.plot(x, y, "--", label=name, alpha=0.7)
        axis.set(title=method.upper(), xlabel="updates", ylim=(-0.03, 1.03))
    axes[0][0].set_ylabel("accuracy, held-out queries")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    path, ours = out / "plot.png", {"Title": "SDFT, train.py"}
    if path.exists() and b"train.py" not in path.read_bytes()[:1000]:
        os.replace(path, train.free_name(path))
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata=ours)
    plt.close(figure)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default="out", help="(out)")
    try:
        print(f"picture: {plot(parser.parse_args().out)}")
    except (ImportError, OSError, ValueError) as error:
        missing = isinstance(error, ImportError)
        hint = getattr(error, "hint", "is the path right?")
        hint = "pip install matplotlib" if missing else hint
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
