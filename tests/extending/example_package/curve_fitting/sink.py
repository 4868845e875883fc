"""A sink: the loss, as a column of text."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.metrics import RunInfo, StepInfo


class TextSink:
    """`losses.txt` in the run directory: a line a logged step, and one for each evaluation."""

    def open(self, run: RunInfo) -> None:
        self._file = (run.directory / "losses.txt").open("a")

    def log(self, info: StepInfo) -> None:
        print(info.step, f"{info.loss:.6f}", file=self._file, flush=True)

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        print(step, "evaluation", metrics["eval/loss"], file=self._file, flush=True)

    def event(self, step: int, message: str) -> None:
        print(step, message, file=self._file, flush=True)

    def close(self, status: str) -> None:
        self._file.close()
