"""What we ask of the library `wandb`, and its errors in words with a cure; the only importer of it."""

from __future__ import annotations

import json
import netrc
import os
import re
import signal
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainer.errors import SetupError, redacted

if TYPE_CHECKING:
    from wandb import Artifact as Artifact
    from wandb import Run as Run
    from wandb import Table

RUN_ID_FILE = Path("wandb", "run_id")
DEFAULT_URL = "https://api.wandb.ai"
_TABLE_ROWS = 20
_API_SECONDS = 10
_FLUSH_SECONDS = 1.0
"""What W&B was given is on the disk after so long; by itself it takes 15 s."""


@dataclass(frozen=True)
class Start:
    """How a W&B run is to be opened. row: the W&B step after which its history is to be cut, None: leave it; seconds:
    what opening may take; finish_seconds: the last upload."""

    directory: Path
    run_id: str
    name: str
    project: str
    entity: str | None
    config: Mapping[str, Any]
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    row: int | None = None
    seconds: float = 30.0
    finish_seconds: float = 60.0


def start(how: Start, mode: str, stop: Callable[[], None] | None = None) -> Run:
    """Open the W&B run; mode: "online" or "offline"; stop: called where somebody presses W&B's stop button.

    A run that is there already goes on: where `how.row` is given and the server can do it, after that row, else behind
    its last one. Raises SetupError, with the cure, where `wandb` or the key is missing or the server refuses or does
    not answer; the library can be used again then.
    """
    library = _library()
    if mode == "online" and not has_key():
        raise SetupError(f"there is no key for {_url()}; run `wandb login`, or set WANDB_API_KEY")
    flushing = {"x_transaction_log_flush_interval": _FLUSH_SECONDS}
    settings = library.Settings(
        **{name: value for name, value in flushing.items() if name in library.Settings.model_fields},
        silent=True,
        console="off",
        init_timeout=how.seconds,
        login_timeout=how.seconds,
        finish_timeout=how.finish_seconds,  # also holds for what W&B does when the process exits
        finish_timeout_raises=True,
        stop_fn=stop,
    )
    given = {
        "project": how.project,
        "entity": how.entity,
        "name": how.name,
        "id": how.run_id,
        "dir": how.directory,
        "config": dict(how.config),
        "group": how.group,
        "job_type": how.job_type,
        "tags": how.tags or None,
        "mode": "online" if mode == "online" else "offline",
    }
    ways: list[dict[str, Any]] = [{"resume": "allow"}] if mode == "online" else [{}]
    if mode == "online" and how.row is not None:
        ways.insert(0, {"resume_from": f"{how.run_id}?_step={how.row}"})
    for number, way in enumerate(ways, 1):
        try:
            run: Run = library.init(**given, **way, settings=settings.model_copy())  # which it changes
            return run
        except Exception as error:  # of many classes, some of them of libraries beneath
            library.teardown()  # else W&B's process takes the run for open
            if number == len(ways) or not _is_about_rewinding(error):
                raise SetupError(in_words(error, how.entity)) from error
    raise AssertionError("there is at least one way")


def _is_about_rewinding(error: Exception) -> bool:
    return "rewind" in str(error)


def in_words(error: Exception, entity: str | None) -> str:
    """What W&B's error says, in one line, and what to do about it."""
    told = in_one_line(error)
    if re.search(r"\b401\b|api.?key|authenticat|unauthori[sz]ed|log(ged)? ?in", told, re.IGNORECASE):
        return f"{_url()} refuses the key ({told}); run `wandb login --relogin`, or see to WANDB_API_KEY"
    if re.search(r"\b40[34]\b|permission|not found|entity", told, re.IGNORECASE):
        whose = "the entity of the key" if entity is None else f"logging.wandb.entity={entity}"
        return f"{_url()} has no place for this run ({told}); see to {whose}, and whether you may write there"
    return f"{_url()} does not take the run ({told}); see to the network and WANDB_BASE_URL"


def in_one_line(error: Exception) -> str:
    """W&B's error, without the secrets of URLs."""
    return redacted(" ".join(str(error).split())) or type(error).__name__


def give_up() -> None:
    """End W&B's process with whatever it has open: left alone, it would keep ours from ending for as long as it tries
    to upload. What it was given is on the disk."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            if Path("/proc", child, "comm").read_text().strip() == "wandb-core":
                os.kill(int(child), signal.SIGKILL)
    with suppress(Exception, SystemExit):  # it finds its process gone, and would end ours for that
        _library().teardown()


def choose_mode(mode: str) -> str:
    """`mode` with "auto" resolved: WANDB_MODE, else online if there is a key for the server, else offline."""
    if mode != "auto":
        return mode
    if (wanted := os.environ.get("WANDB_MODE")) in ("online", "offline", "disabled"):
        return wanted
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether WANDB_API_KEY or netrc has a key for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(urlsplit(_url()).netloc) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def default_entity() -> str | None:
    """The account that the key belongs to; asks the server. W&B's own errors pass."""
    import wandb

    entity: str | None = wandb.Api().default_entity
    return entity


def run_id(directory: Path) -> str:
    """The id of this run's W&B run: read, or made and written before it is used. The agent of a sweep knows it before
    we do, and tells it."""
    if (known := known_run_id(directory)) is not None:
        return known
    told = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    made = told or new_id()
    path = directory / RUN_ID_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made + "\n")
    return made


def new_id() -> str:
    """For a W&B run."""
    return uuid.uuid4().hex[:12]


def known_run_id(directory: Path) -> str | None:
    """The id of the W&B run of the run in `directory`; None where there is none yet."""
    path = directory / RUN_ID_FILE
    if path.exists() and re.fullmatch(r"[\w-]+", known := path.read_text(errors="replace").strip(), re.ASCII):
        return known
    return None


def generations_table(path: Path) -> Table:
    """The first texts that an evaluation has written."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, _TABLE_ROWS)]
    columns = ("source", "reference", "hypothesis")
    return table(columns, [[row[column] for column in columns] for row in rows])


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Of plain values."""
    made: Table = _library().Table(columns=list(columns), data=[list(row) for row in rows])
    return made


def artifact(name: str, kind: str, metadata: Mapping[str, Any]) -> Artifact:
    """An empty one."""
    made: Artifact = _library().Artifact(name, type=kind, metadata=dict(metadata))
    return made


class Server:
    """W&B's public interface to one run; every call asks the server, and may take some seconds or raise."""

    def __init__(self, path: str) -> None:
        """path: ENTITY/PROJECT/ID."""
        self._api = _library().Api(timeout=_API_SECONDS)
        self._path = path

    def tags(self) -> list[str]:
        """The tags of the run as they are now."""
        place, _, name = self._path.rpartition("/")
        self._api.flush()  # what it remembers of earlier answers
        (run,) = self._api.runs(place, filters={"name": name}, per_page=1, lazy=True)
        return list(run.tags or ())

    def delete(self, artifact_name: str) -> None:
        """Delete a version of an artifact, NAME:ALIAS."""
        place, _, _ = self._path.rpartition("/")
        self._api.artifact(f"{place}/{artifact_name}").delete(delete_aliases=True)


def _url() -> str:
    return os.environ.get("WANDB_BASE_URL", DEFAULT_URL).rstrip("/")


def _library() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise SetupError(
            "wandb is not installed; run `pip install wandb`, or take the W&B sink out of logging=[...]."
        ) from error
    return wandb
