"""What a container runs: torchrun, ending with the exit code of its ranks.

`python -m launch.pod [torchrun's options] -m trainer ...`. torchrun itself ends with 1 whatever its ranks end with, and
who starts containers again has nothing but the exit code to tell a run that wants to go on (75, 76) from one that was
refused (2).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trainer.errors import PeerError
from trainer.guards.signals import PREEMPTED

PERMANENT_BELOW = 128
"""Kubeflow's v1 operator, under restartPolicy ExitCode, starts a pod again only for exit codes from here on."""

TRY_AGAIN = (PREEMPTED, PeerError.exit_code)


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process; returns the exit code of the first rank that failed, or 75 after a signal to us.

    --raise-retries, before all other arguments: 128 more for what wants to be tried again.
    """
    raised = list(arguments[:1]) == ["--raise-retries"]
    for ours, torchruns in (("MASTER_ADDR",) * 2, ("MASTER_PORT",) * 2, ("RANK", "NODE_RANK")):
        if ours in os.environ:  # older operators give what torch knew before torchrun
            os.environ.setdefault(f"PET_{torchruns}", os.environ[ours])
    code = _torchrun(arguments[raised:])
    return code + PERMANENT_BELOW if raised and code in TRY_AGAIN else code


def _torchrun(arguments: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        code: int = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as signalled:
        print(f"launch.pod: {signalled}; the ranks have saved and ended", file=sys.stderr, flush=True)
        return PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
