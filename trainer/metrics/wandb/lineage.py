"""What commands tell W&B that use a trained run: a short run of their own, with the checkpoint as its input."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import SetupError
from trainer.metrics.wandb import client
from trainer.metrics.wandb.artifacts import checkpoint_name, fill

if TYPE_CHECKING:
    from trainer.config import Config

SINK = "trainer.metrics.wandb.WandbSink"


def tell(
    kind: str,
    config: Config,
    directory: Path,
    steps: Sequence[int],
    options: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    texts: Path | None = None,
    export: Path | None = None,
) -> None:
    """Tell of a command that has used the checkpoints of `steps` of the run in `directory`, where that run is in W&B
    with its checkpoints, and W&B is online; otherwise nothing is done. What goes wrong is a warning.

    kind: evaluate, generate, export: the job type; options: of the command; metrics: that it found, by name; texts: the
    generations it wrote; export: the folder it wrote, which becomes an artifact.
    """
    sink = next((dict(one) for one in config.logging.values() if one["_target_"] == SINK), None)
    if sink is None or sink.get("artifacts", "reference") == "none":
        return
    run_id = client.known_run_id(directory)
    if run_id is None or client.choose_mode(sink.get("mode", "auto")) != "online":
        return
    how = client.Start(
        directory=directory,
        run_id=client.new_id(),
        name=f"{config.name} {kind}",
        project=sink.get("project", "shardwright"),
        entity=sink.get("entity"),
        config={"run": config.name, "steps": list(steps), **options},
        group=sink.get("group"),
        job_type=kind,
        seconds=sink.get("start_seconds", 30.0),
        finish_seconds=sink.get("finish_seconds", 60.0),
    )
    try:
        run = client.start(how, "online")
        name = checkpoint_name(config.name, run_id)
        for step in steps:
            run.use_artifact(f"{name}:step-{step}", type="model")
        found = {key: value for key, value in (metrics or {}).items() if not isinstance(value, str)}
        tables = {} if texts is None else {"generations": client.generations_table(texts)}
        if found or tables:
            run.log({"step": steps[0], **found, **tables})
        if export is not None:
            place = export.resolve().as_uri()
            made = client.artifact(f"{name}-export", "export", {"steps": list(steps), "place": place})
            fill(made, export, place, sink.get("artifacts") == "upload", "export")
            run.log_artifact(made)
        run.finish()
    except SetupError as error:
        _warn(kind, str(error))
    except Exception as error:  # the command has done its work
        client.give_up()
        _warn(kind, client.in_one_line(error))


def _warn(kind: str, reason: str) -> None:
    print(f"warning: W&B was not told of this {kind}: {reason}", file=sys.stderr, flush=True)
