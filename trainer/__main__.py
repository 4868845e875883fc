"""`python -m trainer`, also under torchrun, srun and the deepspeed launcher: from words to an exit code.

0 finished, 2 refused configuration or input, 75 preempted, 76 a rank hangs or has gone, 1 anything else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from trainer.build import part_problems
from trainer.composition import execute
from trainer.config import to_config
from trainer.errors import ConfigError, PeerError, UserError, redacted
from trainer.plan import make_plan
from trainer.srun import ranks_from_srun

if TYPE_CHECKING:
    from omegaconf import DictConfig

PATIENCE_SECONDS = 10.0
"""How long another rank leaves rank 0 to tell of an error that all of them have, before it tells its own."""


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    arguments = without_local_rank(sys.argv[1:])
    os.environ.update(ranks_from_srun(os.environ))
    try:
        return execute(_job, arguments)
    except UserError as error:
        return _refuse(error, show_traceback="debug=traceback" in arguments or "debug.traceback=true" in arguments)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """`arguments` without the --local_rank that the deepspeed launcher adds; LOCAL_RANK gets its value if unset."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(words, "0"))
        else:
            kept.append(word)
    return kept


def _job(composed: DictConfig, overrides: list[str]) -> int:
    """One run of one composition. What the user can mend becomes a message and an exit code."""
    try:
        config = to_config(composed, part_problems)
        make_plan(config, int(os.environ.get("WORLD_SIZE", "1")))  # refused here, before torch is asked for anything
        from trainer.main import run

        return run(config, overrides)
    except UserError as error:
        return _refuse(error, show_traceback=composed.debug.traceback is True)


def _refuse(error: UserError, show_traceback: bool) -> int:
    """Tell the error once per job, and return its exit code.

    An error of all ranks is rank 0's to tell. The others wait, because a launcher that sees one rank end ends the rest,
    perhaps before rank 0 has spoken; if nobody ends them, the error was this rank's alone, and it tells it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, PeerError):
        if not error.speaks:
            return error.exit_code
    elif rank != 0:

        def end(signal_number: int, frame: FrameType | None) -> None:
            raise SystemExit(error.exit_code)

        signal.signal(signal.SIGTERM, end)
        time.sleep(PATIENCE_SECONDS)
    if show_traceback:
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    problems = list(error.problems) if isinstance(error, ConfigError) else [str(error)]
    prefix = f"[rank {rank}] error: " if rank else "error: "
    message = (
        problems[0] if len(problems) == 1 else "\n".join([f"{len(problems)} problems", *map("  - {}".format, problems)])
    )
    print(f"{prefix}{message}", file=sys.stderr, flush=True)
    _tell_torchrun(message)
    return error.exit_code


def _tell_torchrun(message: str) -> None:
    """Have torchrun end with the message too, whose own traceback would scroll it away (the error file of
    torch.distributed.elastic)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:  # it has been told already
            json.dump({"message": message.replace("\n", "\n  "), "timestamp": int(time.time())}, file)


if __name__ == "__main__":
    sys.exit(main())
