"""Weights & Biases as a view of the run; the only importer of `wandb`."""

from __future__ import annotations

import json
import netrc
import os
import re
import threading
import uuid
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainer.errors import ConfigError, SetupError
from trainer.metrics import RunInfo, StepInfo

if TYPE_CHECKING:
    import wandb

MODES = ("auto", "online", "offline", "disabled")
RUN_ID_FILE = Path("wandb", "run_id")
_TABLE_ROWS = 20


class WandbSink:
    """One W&B run a training run, however often it is resumed: its id is kept in `<run>/wandb/run_id`.

    mode: "auto" is what WANDB_MODE says, else online with a key (WANDB_API_KEY or netrc) and offline without; files of
    an offline run lie in `<run>/wandb` and are uploaded by `wandb sync`. start_seconds, finish_seconds: how long
    opening and the last upload may take. The x axis of every chart is our own `step`.
    """

    def __init__(
        self,
        project: str = "shardwright",
        entity: str | None = None,
        mode: str = "auto",
        start_seconds: float = 30.0,
        finish_seconds: float = 60.0,
    ) -> None:
        """Raises ConfigError for an unknown mode."""
        if mode not in MODES:
            raise ConfigError(f"logging: the mode {mode} of WandbSink is not known; choose one of {', '.join(MODES)}.")
        self._project = project
        self._entity = entity
        self._mode = mode
        self._start_seconds = start_seconds
        self._finish_seconds = finish_seconds
        self._run: wandb.Run | None = None

    def open(self, run: RunInfo) -> None:
        """See the contract. Raises SetupError if `wandb` is not installed; W&B's own errors pass."""
        mode = choose_mode(self._mode)
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise SetupError(
                "wandb is not installed; run `pip install wandb`, or take the W&B sink out of logging=[...]."
            ) from error
        self._directory = run.directory
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self._start_seconds,
            login_timeout=self._start_seconds,
            finish_timeout=self._finish_seconds,  # also holds for what W&B does when the process exits
            finish_timeout_raises=True,
        )
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            name=run.name,
            id=_run_id(run.directory),
            dir=run.directory,
            config={**run.config, "plan": dict(run.plan)},
            mode="online" if mode == "online" else "offline",
            resume="allow"
            if mode == "online"
            else None,  # offline there is nothing to ask; the id alone joins the parts
            settings=settings,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        if self._run is not None:
            self._run.log({name: value for name, value in info.row().items() if value is not None})

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract. A few of the generations written for this step go along as a table."""
        if self._run is None:
            return
        split = metrics.get("split", "eval")  # curves of the validation split stay free of other splits' points
        row: dict[str, Any] = {"step": step} | {
            name.replace("eval/", f"{split}/", 1): value for name, value in metrics.items() if name != "split"
        }
        for path in sorted((self._directory / "generations").glob(f"step_{step:08d}*.jsonl")):
            row[f"generations{path.stem.removeprefix(f'step_{step:08d}')}"] = _table(path)
        self._run.log(row)

    def event(self, step: int, message: str) -> None:
        """See the contract: kept as the run's summary field `last_event`."""
        if self._run is not None:
            self._run.summary["last_event"] = f"step {step}: {message}"

    def close(self, status: str) -> None:
        """See the contract. Raises TimeoutError, with the way to finish it, where the last upload takes too long."""
        if self._run is None:
            return
        run, self._run = self._run, None
        run.summary["status"] = status
        failures: list[Exception] = []

        def finish() -> None:
            try:
                run.finish(exit_code=int(status == "failed"))
            except Exception as error:
                failures.append(error)

        finishing = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        finishing.start()
        finishing.join(2 * self._finish_seconds)  # W&B keeps to its own limit, unless it hangs
        if finishing.is_alive() or any(isinstance(failure, TimeoutError) for failure in failures):
            raise TimeoutError(
                f"the upload did not end within {self._finish_seconds:g} s; finish it with"
                f" `wandb sync {self._directory / 'wandb'}/*run-*`"
            )
        for failure in failures:
            raise failure


def choose_mode(mode: str) -> str:
    """`mode` with "auto" resolved: WANDB_MODE, else online if there is a key for the server, else offline."""
    if mode != "auto":
        return mode
    if (wanted := os.environ.get("WANDB_MODE")) in ("online", "offline", "disabled"):
        return wanted
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def default_entity() -> str | None:
    """The account that the key belongs to; asks the server. W&B's own errors pass."""
    import wandb

    entity: str | None = wandb.Api().default_entity
    return entity


def _netrc_has_key() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def _run_id(directory: Path) -> str:
    """The id of this run's W&B run: read, or made and written before it is used. The agent of a sweep knows it before
    we do, and tells it."""
    path = directory / RUN_ID_FILE
    if path.exists() and re.fullmatch(r"[\w-]+", known := path.read_text(errors="replace").strip(), re.ASCII):
        return known
    told = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    run_id = told or uuid.uuid4().hex[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n")
    return run_id


def _table(path: Path) -> wandb.Table:
    import wandb

    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, _TABLE_ROWS)]
    columns = ("source", "reference", "hypothesis")
    return wandb.Table(columns=list(columns), data=[[row[column] for column in columns] for row in rows])
