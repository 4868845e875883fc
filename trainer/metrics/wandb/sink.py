"""The sink: one W&B run for a training run, however often it is resumed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, SetupError
from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.wandb import client
from trainer.metrics.wandb.alerts import KINDS, Alerts, Stall, read_reason
from trainer.metrics.wandb.artifacts import ARTIFACTS, Checkpoints
from trainer.metrics.wandb.background import Background
from trainer.metrics.wandb.rows import Rows
from trainer.wording import did_you_mean

if TYPE_CHECKING:
    from trainer.metrics.wandb.client import Run

_log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
_LOOK_SECONDS = 5.0
"""Between two looks at the signs of life."""


class WandbSink:
    """One W&B run a training run, however often it is resumed: its id is kept in `<run>/wandb/run_id`.

    mode: "auto" is what WANDB_MODE says, else online with a key (WANDB_API_KEY or netrc) and offline without; files of
    an offline run lie in `<run>/wandb` and are uploaded by `wandb sync`. A run that cannot be opened online is kept
    offline. start_seconds, finish_seconds: how long opening and the last upload may take. The x axis of every chart is
    our own `step`.

    rewind: a resumed run cuts its W&B history back to the checkpoint, where the server can. group, job_type, tags: of
    the W&B run. artifacts: what becomes of checkpoints: "none", "reference" (a version names where it lies), "upload".
    alerts: the kinds that are sent, of stall, alarm, failure, finish, each once in alert_seconds; stall_seconds: in one
    part of a step. stop_tag: a tag that, added to the run on the server, makes it save and stop; looked for every
    poll_seconds; None: never.
    """

    def __init__(
        self,
        project: str = "shardwright",
        entity: str | None = None,
        mode: str = "auto",
        start_seconds: float = 30.0,
        finish_seconds: float = 60.0,
        rewind: bool = True,
        group: str | None = None,
        job_type: str | None = "train",
        tags: Sequence[str] = (),
        artifacts: str = "reference",
        alerts: Sequence[str] = KINDS,
        alert_seconds: float = 300.0,
        stall_seconds: float = 300.0,
        stop_tag: str | None = "stop",
        poll_seconds: float = 30.0,
    ) -> None:
        """Raises ConfigError for an unknown mode, kind of alert, or treatment of artifacts."""
        problems = [
            f"logging: {key}={value} of WandbSink is not known{did_you_mean(value, known)}"
            f" Choose from {', '.join(known)}."
            for key, values, known in (("mode", [mode], MODES), ("artifacts", [artifacts], ARTIFACTS))
            for value in values
            if value not in known
        ]
        problems += [
            f"logging: alerts=[{kind}] of WandbSink is not known{did_you_mean(kind, KINDS)}"
            f" Choose from {', '.join(KINDS)}."
            for kind in alerts
            if kind not in KINDS
        ]
        limits = {
            "start_seconds": start_seconds,
            "finish_seconds": finish_seconds,
            "alert_seconds": alert_seconds,
            "stall_seconds": stall_seconds,
            "poll_seconds": poll_seconds,
        }
        problems += [
            f"logging: {key}={value:g} of WandbSink is not a time; give seconds above 0."
            for key, value in limits.items()
            if not value > 0
        ]
        if problems:
            raise ConfigError(*problems)
        self._project, self._entity, self._mode = project, entity, mode
        self._start_seconds, self._finish_seconds = start_seconds, finish_seconds
        self._rewind, self._group, self._job_type, self._tags = rewind, group, job_type, tuple(tags)
        self._artifacts, self._kinds, self._alert_seconds = artifacts, tuple(alerts), alert_seconds
        self._stall_seconds, self._stop_tag, self._poll_seconds = stall_seconds, stop_tag, poll_seconds
        self._run: Run | None = None
        self._events: list[tuple[int, str]] = []
        self._step = 0

    def open(self, run: RunInfo) -> None:
        """See the contract. Raises SetupError if `wandb` is not installed."""
        mode = client.choose_mode(self._mode)
        if mode == "disabled":
            return
        self._directory, self._ask_to_stop = run.directory, run.ask_to_stop
        self._rows = Rows(run.directory / "wandb" / "rows.jsonl", run.first_step)
        how = client.Start(
            directory=run.directory,
            run_id=client.run_id(run.directory),
            name=run.name,
            project=self._project,
            entity=self._entity,
            config={**run.config, "plan": dict(run.plan)},
            group=self._group,
            job_type=self._job_type,
            tags=self._tags,
            row=self._rows.last if self._rewind and run.first_step > 0 else None,
            seconds=self._start_seconds,
            finish_seconds=self._finish_seconds,
        )
        self._run, self._online = self._start(how, mode)
        self._rows.go_on(self._run.starting_step if self._online else None)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._rows_lane, self._files_lane = Background("wandb-rows"), Background("wandb-files")
        self._alerts = Alerts(self._kinds, self._alert_seconds, self._alert)
        self._name = run.name
        self._checkpoints = Checkpoints(self._artifacts, how, run.config, self._server if self._online else None)
        self._over, self._order = threading.Event(), threading.Lock()
        stall = Stall(run.directory / "heartbeats", int(run.plan.get("world_size", 1)), self._stall_seconds)
        threading.Thread(target=self._watch, args=(stall,), name="wandb-watch", daemon=True).start()

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        if self._run is not None:
            self._step = max(self._step, info.step)
            row = {name: value for name, value in info.row().items() if value is not None}
            self._log(info.step, lambda: row)

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract. A few of the generations written for this step go along as a table."""
        if self._run is None:
            return
        split = metrics.get("split", "eval")  # curves of the validation split stay free of other splits' points
        row: dict[str, Any] = {"step": step} | {
            name.replace("eval/", f"{split}/", 1): value for name, value in metrics.items() if name != "split"
        }
        self._log(step, lambda: row)
        suffix = "" if split in ("eval", "validation") else f".{split}"
        path = self._directory / "generations" / f"step_{step:08d}{suffix}.jsonl"
        if path.is_file():
            self._files_lane.do(lambda: self._log_table(step, f"generations{suffix}", client.generations_table(path)))

    def event(self, step: int, message: str) -> None:
        """See the contract: kept as the run's summary field `last_event`, and when the run closes as a table of all."""
        if (run := self._run) is not None:
            self._events.append((step, message))
            self._step = max(self._step, step)
            self._rows_lane.do(lambda: run.summary.update({"last_event": f"step {step}: {message}"}))

    def alarm(self, step: int, message: str) -> None:
        """See the contract: an event, and an alert."""
        self.event(step, message)
        if self._run is not None:
            self._alerts.tell("alarm", f"{self._name}: {message}")

    def saved(self, step: int, checkpoint: Path) -> None:
        """See the contract: a version of the run's artifact."""
        if (run := self._run) is not None:
            self._files_lane.do(lambda: self._checkpoints.log(run, step, checkpoint))

    def close(self, status: str) -> None:
        """See the contract. Raises TimeoutError, with the way to finish it, where the last upload takes too long."""
        if self._run is None:
            return
        if self._events:
            events = client.table(("step", "event"), self._events)
            self._files_lane.do(lambda: self._log_table(self._step, "events", events))
        self._over.set()
        kind = "failure" if status == "failed" else "finish"
        self._alerts.tell(kind, f"{self._name}: {status}; {read_reason(self._directory)}")
        in_time = self._files_lane.close(self._finish_seconds)
        run, self._run = self._run, None

        def finish() -> None:
            run.summary["status"] = status
            run.finish(exit_code=int(status == "failed"))

        try:
            self._rows_lane.do(finish)
            in_time &= self._rows_lane.close(2 * self._finish_seconds)  # W&B keeps to its own limit, unless it hangs
        except TimeoutError:
            in_time = False
        finally:
            self._rows.close()
        if not in_time:
            client.give_up()
            raise TimeoutError(
                f"the upload did not end within {self._finish_seconds:g} s; finish it with `{_sync(self._directory)}`"
            )

    def _start(self, how: client.Start, mode: str) -> tuple[Run, bool]:
        """The W&B run, and whether it is online. What keeps it from that is told once."""
        if mode == "online":
            waiting = sorted(how.directory.glob("wandb/offline-run-*/*.wandb"))
            try:
                if any(not path.with_name(f"{path.name}.synced").exists() for path in waiting):
                    raise SetupError(f"a part of it in {how.directory / 'wandb'} was recorded off line")
                stop = partial(self._ask_to_stop, "the stop button of W&B")
                return client.start(how, "online", stop), True
            except SetupError as error:
                if "not installed" in str(error):
                    raise
                _log.warning(
                    "W&B: the run is recorded off line: %s. Training goes on; `%s` brings it to the server.",
                    error,
                    _sync(how.directory),
                )
        return client.start(replace(how, row=None), "offline"), False

    def _log(self, step: int, row: Callable[[], Mapping[str, Any]], late: bool = False) -> None:
        run = self._run
        assert run is not None, "the caller has looked"
        with self._order:  # W&B drops a row whose number is not the highest so far
            number = self._rows.take(step, late)
            self._rows_lane.do(lambda: run.log(dict(row()), step=number, commit=True))

    def _log_table(self, step: int, name: str, table: Any) -> None:
        """In the thread of files: as a row of its own. W&B asks the server before it takes a table, which would hold up
        the rows behind it while there is no answer."""
        while self._online and not self._answers() and not self._over.wait(_LOOK_SECONDS):
            pass
        self._log(step, lambda: {"step": step, name: table}, late=True)

    def _answers(self) -> bool:
        try:
            self._server().tags()
        except Exception as error:
            _log.info("W&B: no answer: %s", error)
            return False
        return True

    def _alert(self, title: str, text: str, level: str) -> None:
        if (run := self._run) is not None:
            self._rows_lane.do(lambda: run.alert(title, text, level=level, wait_duration=self._alert_seconds))

    def _server(self) -> client.Server:
        assert self._run is not None, "asked while the run is open"
        return client.Server(self._run.path)

    def _watch(self, stall: Stall) -> None:
        """In a thread: stalls, and the tag that stops. No fault of the server ends it."""
        server: client.Server | None = None
        since_poll = self._poll_seconds
        wait = min(_LOOK_SECONDS, self._poll_seconds)
        while True:
            if (late := stall.look()) is not None:
                with suppress(Exception):  # what ended the thread of rows is told by the next row
                    self._alerts.tell("stall", f"{self._name}: {late}")
            if self._online and self._stop_tag is not None and since_poll >= self._poll_seconds:
                since_poll = 0.0
                try:
                    server = server or self._server()
                    if self._stop_tag in server.tags():
                        self._ask_to_stop(f"the tag {self._stop_tag} of the W&B run, which keeps it from going on")
                        self._online = False  # nothing is left to look for
                except Exception as error:  # no answer, or one that is not understood: asked again
                    _log.info("W&B: the tags of the run could not be read: %s", error)
            if self._over.wait(wait):
                return
            since_poll += wait


def _sync(directory: Path) -> str:
    return f"wandb sync --include-online {directory / 'wandb'}"
