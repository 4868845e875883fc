"""What came of a translation run, its scores, sentences and files: python scripts/report.py RUN_DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trainer.report.history import read_history
from trainer.report.page import write_report
from trainer.run_directory import RunDirectory

SENTENCES = 10
MIN_WORDS = 5  # shorter sources are labels that show little


def read_generations(run: Path, evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """The sentences of the final evaluation: source, reference, hypothesis."""
    suffix = "" if evaluation["split"] == "validation" else f".{evaluation['split']}"
    path = run / "generations" / f"step_{evaluation['step']:08d}{suffix}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Ten rows at equal distances among those with enough words: nobody chose them."""
    worthy = [row for row in rows if len(row["source"].split()) >= MIN_WORDS] or rows
    return worthy[:: max(1, len(worthy) // SENTENCES)][:SENTENCES]


def describe(run: Path) -> str:
    """The report as text. Raises FileNotFoundError if the run has no final evaluation."""
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    rows = read_generations(run, evaluation)
    lines = [
        f"{len(rows):,} held-out sentences ({evaluation['split']} split), step {evaluation['step']:,}",
        "",
        *(
            f"source      {row['source']}\nreference   {row['reference']}\ntranslation {row['hypothesis']}\n"
            for row in spread(rows)
        ),
        f"BLEU {evaluation['eval/bleu']:.2f}   {evaluation['bleu_signature']}",
        f"chrF {evaluation['eval/chrf']:.2f}   {evaluation['chrf_signature']}",
        f"BLEU of copying the source {evaluation['eval/copy_bleu']:.2f}",
        "",
        f"run directory  {run}",
        f"metrics        {run / 'metrics.jsonl'}",
        f"translations   {run / 'generations'}",
        f"curves         {run / 'report.html'}, {run / 'report.png'}",
        f"W&B files      {run / 'wandb'}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page of curves and print the report."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    if not (run / "evaluation.json").exists():
        sys.exit(f"{run} has no evaluation.json: it is not a finished run that was evaluated.")
    write_report([read_history(RunDirectory(run))], run / "report.html")
    print(describe(run))


if __name__ == "__main__":
    main()
