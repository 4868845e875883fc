"""Secrets in the URLs of a configuration, which is written down: they are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PASSWORD = re.compile(r"https?://[^/\s'\"]*@|\w://[^/\s'\"]*:[^/\s'\"]*@")
"""Whatever stands before the host of a web server (many take a token for a user), and a password before any other. A
user alone is none: Azure writes CONTAINER@ACCOUNT."""

_SIGNATURE = re.compile(
    r"https?://[^\s'\"]*[?&](([\w-]*[_-])?(signature|credential|token|secret|password|api_?key)|sig|awsaccesskeyid)=",
    re.IGNORECASE,
)
"""A query that lets everybody in who knows it."""


def secret_problems(values: Mapping[str, Any]) -> list[str]:
    """Why a configuration (nested, resolved) must not be written down: the keys whose URLs hold secrets. The secrets
    are still in the texts; ConfigError leaves them out."""
    return [
        f"{key}={text} holds a user, a password or a signature, which everybody could read in config.yaml;"
        " leave it out of the URL. Web servers are given what ~/.netrc (or the file that NETRC names) says of them, S3"
        " what AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws say."
        for key, text in _texts(values)
        if _PASSWORD.search(text) or _SIGNATURE.search(text)
    ]


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, below in items:
            yield from _texts(below, f"{key}.{name}" if key else str(name))
