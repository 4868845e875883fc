"""Completion of command lines in bash: `eval "$(python -m trainer.complete)"`, then TAB behind `-m trainer`.

It knows the groups, their choices, keys with their present values, and files, for `python -m trainer`, `torchrun ... -m
trainer` and `deepspeed --module trainer`. Other command lines are left to what completed them before.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from trainer.commands import run_command

_BASH = r"""
_shardwright_complete() {
    local line=${COMP_LINE:0:COMP_POINT} arguments
    case $line in
        *" -m trainer "*) arguments=${line##*" -m trainer "} ;;
        *" --module trainer "*) arguments=${line##*" --module trainer "} ;;
        *) compopt -o default -o bashdefault; return ;;
    esac
    local word=${arguments##* }
    # "=" separates words in readline's eyes: only what comes behind the last one is replaced.
    local before=${word%"${word##*=}"}
    [[ $COMP_WORDBREAKS == *=* ]] || before=
    mapfile -t COMPREPLY < <(python -m trainer.complete line="$arguments" 2>/dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    compopt -o nospace
}
complete -F _shardwright_complete python torchrun deepspeed
"""


@dataclass(frozen=True)
class CompleteOptions:
    """Arguments of `python -m trainer.complete`. line: what stands behind `-m trainer`; null: print the function."""

    line: str | None = None


def complete(options: CompleteOptions) -> None:
    """Print the completions of `line`, one a line, or the bash function that asks for them."""
    if options.line is None:
        print(_BASH.strip())
        return
    from trainer.composition import completions

    for text in completions(options.line):
        print(text)


if __name__ == "__main__":
    sys.exit(run_command(CompleteOptions, complete, __doc__ or ""))
