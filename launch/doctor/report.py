"""The findings as a table for people, and as one JSON object for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from launch.doctor.findings import worst
from launch.doctor.nodes import Report

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def as_json(reports: Sequence[Report]) -> str:
    """{"state": the worst, "findings": [{host, name, state, seen, cure, figures}, ...]}"""
    rows = [{"host": report.host, **asdict(finding)} for report in reports for finding in report.findings]
    return json.dumps({"state": worst([row["state"] for row in rows]), "findings": rows}, indent=1, ensure_ascii=False)


def show(reports: Sequence[Report]) -> None:
    """Print a table, what several machines have alike in one row, and a closing line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    reports = [report for report in reports if report.findings]
    hosts = list(dict.fromkeys(report.host for report in reports))
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for report in reports:
        for finding in report.findings:
            where = rows.setdefault((finding.name, finding.state, finding.seen, finding.cure), [])
            where += [report.host] * (report.host not in where)
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("check", "", "seen", "what to do", title=f"python -m launch.doctor on {', '.join(hosts)}")
    for (name, state, seen, cure), where in rows.items():
        place = "" if len(where) == len(hosts) else f"{', '.join(where)}: "
        table.add_row(name, Text(state, _COLOURS[state]), Text(place + seen), Text(cure))
    console.print(table)
    counts = {state: sum(key[1] == state for key in rows) for state in _COLOURS}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count), highlight=False)
