"""Which row of a W&B history belongs to which step of ours.

W&B numbers the rows of a history (`_step`); they only ever go up, and a row that does not is dropped. A step can have
several rows (an evaluation is one more), and after a rollback steps come again. So each row gets a number of its own,
and a file says which, for `resume_from` cuts a history after such a number.
"""

from __future__ import annotations

import json
from pathlib import Path

from trainer.metrics.json_lines import JsonLines, truncate_after

_TAIL_BYTES = 4096


class Rows:
    """`{"step": 200, "row": 21}` for each row, cut back to the checkpoint when a run resumes or rolls back.

    last: the row that the history ends with at the checkpoint, None where none is known.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Writes nothing yet."""
        self._path, self._step = path, first_step
        before = _last_row(path)
        self._next = 0 if before is None else before + 1
        if path.exists():
            truncate_after(path, first_step)
        self.last = _last_row(path)

    def go_on(self, starting_row: int | None) -> None:
        """Begin with the row that the server expects; None: it is not asked, so behind all that were given."""
        self._lines = JsonLines(self._path, self._step)
        if starting_row is not None:
            rewound = self.last is not None and starting_row == self.last + 1
            self._next = starting_row if rewound else max(self._next, starting_row)

    def take(self, step: int, late: bool = False) -> int:
        """The number of one more row, of `step`; late: rows of later steps may have gone before."""
        if step < self._step and not late:  # the run was rolled back
            truncate_after(self._path, step - 1)
        self._step = self._step if late else step
        number, self._next = self._next, self._next + 1
        self._lines.write({"step": self._step, "row": number})
        return number

    def close(self) -> None:
        """No more rows follow."""
        self._lines.close()


def _last_row(path: Path) -> int | None:
    """The number in the last whole line; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and line.startswith(b"{")]
    return int(json.loads(whole[-1])["row"]) if whole else None
