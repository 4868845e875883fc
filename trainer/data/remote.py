"""Files by URL: opened through fsspec, and read on through what networks and servers do.

A fault that may pass (a connection reset or stalled, a body cut short, HTTP 408, 425, 429 and 5xx, and what the
storage libraries make of these) is waited out: the file is opened again at the byte where it broke off. What will not
pass (404, 403, 401, a certificate that is not trusted) fails at once.
"""

from __future__ import annotations

import email.utils
import errno
import http
import io
import logging
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import fsspec

from trainer.errors import DataError, SetupError, redacted

_log = logging.getLogger(__name__)

_BUFFER = 2 << 20
"""Bytes asked for at once when a file is read from front to back."""

_REQUEST_MOST, _REQUEST_LEAST = 8 << 20, 64 << 10
"""Bytes of one request; it is halved at every fault, so that a line which breaks often still brings something."""

_TRANSIENT_ERRNO = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
_TRANSIENT_STATUS = {408, 425, 429}
_TRANSIENT_S3 = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "InternalError"}
_TRANSIENT_CLASSES = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "botocore.ResponseParserError",
    "botocore.ResponseStreamingError",
    "http.HTTPException",
    "httpx.TransportError",
    "requests.ConnectionError",
    "requests.ChunkedEncodingError",
    "requests.Timeout",
    "urllib3.ProtocolError",
}
"""`package.Class` of what the libraries raise, also as a base class; named, since importing them takes seconds."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retries:
    """How long faults are waited out, in seconds.

    total_seconds: from the first fault without a byte in between until it is an error; first_wait: the first pause,
    which doubles up to longest_wait and varies at random by half; stall_seconds: so long without a byte is a fault.
    """

    total_seconds: float = 300
    first_wait: float = 0.5
    longest_wait: float = 30
    stall_seconds: float = 30


_policy = Retries()
_told: set[tuple[str, str]] = set()


def set_retries(retries: Retries) -> None:
    """Let `retries` hold for everything opened from now on without a policy of its own."""
    global _policy
    _policy = retries


def is_remote(path: str) -> bool:
    """Whether `path` is a URL."""
    return "://" in path


def filesystem(path: str, retries: Retries | None = None) -> tuple[Any, str]:
    """(fsspec's file system, name within it) of a path or URL.

    Raises SetupError where a package is missing that the protocol needs, DataError for an unknown protocol.
    """
    protocols = re.findall(r"(?:^|::)(\w[\w+.-]*)://", path)
    options = {protocol: _options(protocol, retries or _policy) for protocol in protocols}
    try:
        found, name = fsspec.core.url_to_fs(path, **{key: value for key, value in options.items() if value})
    except ImportError as error:
        cure = "Run `pip install shardwright[s3]`." if {"s3", "s3a"} & set(protocols) else str(error)
        raise SetupError(
            f"{redacted(path)}: a package that reads {protocols[-1]}:// is not installed. {cure}"
        ) from error
    except ValueError as error:
        raise DataError(f"{redacted(path)}: {error}. Is the URL written as it should be?") from error
    if "s3" in found.protocol:
        found.retries = 1  # ours are the only ones
    return found, name


def _options(protocol: str, retries: Retries) -> dict[str, Any]:
    """Time-outs for a file system; what the user's fsspec configuration says goes before."""
    own = fsspec.config.conf.get(protocol, {})
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=retries.stall_seconds, sock_read=retries.stall_seconds)
        # an encoded body has another length than the file; the environment knows proxies and, by ~/.netrc, passwords
        client = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}, "trust_env": True}
        return {"client_kwargs": client | own.get("client_kwargs", {})}
    if protocol in ("s3", "s3a"):
        stall = retries.stall_seconds
        config = {"connect_timeout": stall, "read_timeout": stall, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": config | own.get("config_kwargs", {})}
    return {}


def open_file(path: str, retries: Retries | None = None) -> IO[bytes]:
    """A file open for reading; by URL (see `is_remote`), faults that may pass are waited out.

    Raises OSError, at once or while reading, where the file cannot be read; SetupError and DataError as `filesystem`.
    """
    if is_remote(path):
        return io.BufferedReader(_RemoteFile(path, retries or _policy), _BUFFER)
    return open(path, "rb", buffering=1 << 18)


def has_ranges(path: str, retries: Retries | None = None) -> bool:
    """Whether a file by URL can be read from its middle. Raises as `open_file`."""
    with _RemoteFile(path, retries or _policy) as file:
        file.seek(1)
        file.read(1)
        return not file.streamed


def retrying(action: Callable[[], T], path: str, retries: Retries | None = None) -> T:
    """What `action` returns, tried again while it fails with faults that may pass.

    path: what people are told. Raises FileNotFoundError or OSError, in words without secrets, when that is of no use.
    """
    policy = retries or _policy
    first_fault: float | None = None
    wait = policy.first_wait
    num_tries = 0
    while True:
        num_tries += 1
        try:
            return action()
        except Exception as error:  # the libraries raise what they like
            told = _telling(error)
            words, status = _words(told), _status(told)
            if not is_transient(error):
                missing = status in (404, 410) or (status is None and isinstance(error, FileNotFoundError))
                raise (FileNotFoundError if missing else OSError)(words) from error
            now = time.monotonic()
            first_fault = now if first_fault is None else first_fault
            pause = max(min(wait, policy.longest_wait) * random.uniform(0.5, 1), _retry_after(told))
            if now + pause > first_fault + policy.total_seconds:
                raise OSError(f"{words}; gave up after {num_tries} tries in {now - first_fault:.0f} s") from error
            _tell_once(path, words, policy)
        time.sleep(pause)
        wait *= 2


def _tell_once(path: str, words: str, policy: Retries) -> None:
    kind = re.sub(r"\d{4,}", "", words)  # whatever the byte
    if (path, kind) not in _told:
        _told.add((path, kind))
        _log.warning("%s: %s; trying again for up to %g s", redacted(path), words, policy.total_seconds)


def is_transient(error: BaseException) -> bool:
    """Whether a fault may pass by itself."""
    chain = list(_chain(error))
    if any("certificate verify failed" in str(part).lower() for part in chain):
        return False
    if any(isinstance(part, socket.gaierror) and part.errno != socket.EAI_AGAIN for part in chain):
        return False
    return next((bool(verdict) for part in chain if (verdict := _may_pass(part)) is not None), False)


def _may_pass(part: BaseException) -> bool | None:
    """What one error of a chain says about it; None where it says nothing, as one that only wraps another."""
    if _response(part).get("Error", {}).get("Code") in _TRANSIENT_S3:
        return True
    status = _status(part)
    if status is not None:
        return status in _TRANSIENT_STATUS or status >= 500
    names = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(part).__mro__}
    passing = (
        isinstance(part, ConnectionError | TimeoutError | socket.gaierror | _CutShort) or names & _TRANSIENT_CLASSES
    )
    return True if passing or (isinstance(part, OSError) and part.errno in _TRANSIENT_ERRNO) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it; s3fs fails on some of its own time-outs, which are then but the context."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _telling(error: BaseException) -> BaseException:
    """The error of the chain that says what happened."""
    return next((part for part in _chain(error) if _may_pass(part) is not None), error)


def _response(error: BaseException) -> dict[str, Any]:
    """botocore's answer of the server; empty for other errors."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _status(part: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    for value in (
        getattr(part, "status", None),
        getattr(getattr(part, "response", None), "status_code", None),
        _response(part).get("ResponseMetadata", {}).get("HTTPStatusCode"),
    ):
        if isinstance(value, int) and value >= 400:
            return value
    return None


def _retry_after(part: BaseException) -> float:
    """Seconds that the server asks to wait (`Retry-After` in seconds or as a date); 0 where it does not."""
    headers = (
        getattr(part, "headers", None)
        or getattr(getattr(part, "response", None), "headers", None)
        or _response(part).get("ResponseMetadata", {}).get("HTTPHeaders")
        or {}
    )
    value = headers.get("Retry-After") or headers.get("retry-after") or "0"
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _words(part: BaseException) -> str:
    """What happened, in one line without secrets."""
    status = _status(part)
    if status is not None:
        known = status in {entry.value for entry in http.HTTPStatus}
        return f"HTTP {status} {http.HTTPStatus(status).phrase}" if known else f"HTTP {status}"
    if isinstance(part, FileNotFoundError):
        return "no such file"
    return redacted(str(part)).strip() or type(part).__name__


class _CutShort(OSError):
    """A body that ended before its end."""


class _RemoteFile(io.RawIOBase):
    """A file by URL that knows its place and goes on from there after a fault. `streamed`: the server has no ranges."""

    def __init__(self, path: str, retries: Retries) -> None:
        self._body: Any = None
        self._path = path
        self._retries = retries
        self._filesystem, self._name = filesystem(path, retries)
        self._place = 0
        self._most = _REQUEST_MOST
        self._size: int | None = None
        self.streamed = False
        retrying(self._connect, path, retries)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise OSError(f"the server does not say how large {redacted(self._path)} is")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size or 0}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        if self._size is not None and self._place >= self._size:
            return 0
        data = retrying(lambda: self._read(len(buffer)), self._path, self._retries)
        buffer[: len(data)] = data
        self._place += len(data)
        self._most = min(2 * self._most, _REQUEST_MOST)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _connect(self) -> None:
        """Open the body; the size is known from the first time on. Raises OSError where it is another one now."""
        size = self._filesystem.info(self._name).get("size")
        if self._size is not None and size is not None and size != self._size:
            raise OSError(f"changed while it was read: it had {self._size} bytes and has {size} now")
        self._size = size if size is not None else self._size
        # s3fs then asks for the version it has just seen
        known = {"size": size} if "https" in self._filesystem.protocol else {}
        raw = getattr(self._filesystem, "async_impl", False) or "hf" in self._filesystem.protocol
        options: dict[str, Any] = {"block_size": 0 if self.streamed else _BUFFER} | known
        if raw:
            options["cache_type"] = "none"  # the buffer above is enough
        self._body = self._filesystem.open(self._name, "rb", **options)

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def _read(self, count: int) -> bytes:
        """Between 1 and `count` bytes from the place on; none at the end of a file whose size is not known."""
        try:
            return self._read_once(count)
        except Exception as error:
            self._drop()
            self._most = max(self._most // 2, _REQUEST_LEAST)
            if isinstance(error, ValueError) and not self.streamed:  # fsspec's word for a server without ranges
                self.streamed = True
                return self._read(count)
            raise

    def _read_once(self, count: int) -> bytes:
        if self._body is None or (self.streamed and self._body.tell() > self._place):
            self._drop()
            self._connect()
        count = min(count, self._most)
        if self._size is not None:
            count = min(count, self._size - self._place)
        if not self.streamed and self._body.tell() != self._place:
            self._body.seek(self._place)
        while (before := self._place - self._body.tell()) > 0:
            if not self._body.read(min(before, _BUFFER)):
                raise _CutShort(f"the body ends at byte {self._body.tell()}, before byte {self._place}")
        data: bytes = self._body.read(count)
        if not data and self._size is not None:
            raise _CutShort(f"the body ends at byte {self._place} of {self._size}")
        return data
