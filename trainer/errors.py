"""The errors a user can cause. Each names the key or file, its value, and the cure; none shows a traceback.

Invariants of our own code are `assert`s; these classes are for what a person can mend.
"""

import re


def redacted(text: str) -> str:
    """`text` with the secrets of the URLs in it left out: user and password, and the query of http(s)."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)


class UserError(ValueError):
    """Base of the family: `str(error)` is one message a person can act on, without the secrets of the URLs in it."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ConfigError(UserError):
    """A configuration that cannot run: unknown key, wrong type, numbers that do not fit each other."""

    def __init__(self, *problems: str) -> None:
        """`problems`: every problem found, each one sentence or two; they are reported together."""
        self.problems = tuple(map(redacted, problems))
        super().__init__("\n".join(problems))


class DataError(UserError):
    """Input that is missing, unreadable, or not what its name says."""


class CheckpointError(UserError):
    """A checkpoint or run directory that is missing, damaged, or belongs to another run."""


class AnomalyError(UserError):
    """A run whose loss or gradients left the path, and that was not to go on."""

    exit_code = 1  # nothing was refused: training was tried


class PeerError(UserError):
    """Another rank of the job hangs or has gone; the job can be started again."""

    exit_code = 76

    def __init__(self, message: str, speaks: bool = True) -> None:
        """`speaks`: this rank is the one to tell it."""
        self.speaks = speaks
        super().__init__(message)


class SetupError(UserError):
    """The machine lacks something: a package (names the extra), a compiler, a device, a permission."""
