"""Draw the curves of runs, from their metrics.jsonl: python scripts/curves.py RUN_DIR ... [--out FILE.png]"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

PANELS = (
    ("loss", "training loss (nats per target token)"),
    ("eval/loss", "validation loss (nats per target token)"),
    ("lr", "learning rate"),
    ("tokens_per_second", "target tokens per second"),
)


def read_curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of a run; only its evaluations of the validation split for `eval/...`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row.get(key) is not None and row.get("split", "validation") == "validation"]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write a PNG of four panels, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        for run in runs:
            steps, values = read_curve(run, key)
            axis.plot(steps, values, label=run.name, marker="." if len(steps) < 20 else None)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="default: curves.png in the first run directory")
    options = parser.parse_args()
    out = options.out or options.runs[0] / "curves.png"
    draw(options.runs, out)
    print(out)


if __name__ == "__main__":
    main()
