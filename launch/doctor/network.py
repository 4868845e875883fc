"""What can be reached from here: the hub, W&B, proxies; and the clock, by the hub's answer."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

from launch.doctor.findings import Finding, ok, problem, skipped, warning
from trainer.errors import redacted
from trainer.metrics.wandb import choose_mode

_SECONDS = 5.0
_SKEW_WARNING, _SKEW_PROBLEM = 30.0, 300.0
"""Seconds: storage services refuse requests whose time is off by 5 to 15 minutes; a minute confuses logs of ranks."""


@dataclass(frozen=True)
class Answer:
    """Of a server: its HTTP status and Date header, how long it took, and the time here halfway."""

    status: int
    date: str | None
    seconds: float
    at: float


def hub() -> list[Finding]:
    """Whether the hub answers (HF_ENDPOINT is honoured), and what time it has."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if _is_true("HF_HUB_OFFLINE"):
        why = "switched off by HF_HUB_OFFLINE"
        return [ok("hub", f"{why}: only what is local is used"), skipped("clock", f"the hub is {why}")]
    offline = "without a network: export HF_HUB_OFFLINE=1, with data and models as local files"
    try:
        answer = ask(url)
    except OSError as error:
        why = reason(error)
        cure = f"{remedy(error)}; HF_ENDPOINT=https://mirror for a mirror; {offline}"
        return [warning("hub", f"{url}: {why}", cure), skipped("clock", "no server to compare with")]
    if answer.status == 407 or answer.status >= 500:
        cure = f"ask who runs it (or the proxy before it), or wait; {offline}"
        told = warning("hub", f"{url} answers with status {answer.status}", cure)
    else:
        told = ok("hub", f"{url} answers in {answer.seconds:.2f} s", figures={"seconds": answer.seconds})
    return [told, clock(answer, url)]


def clock(answer: Answer, url: str) -> Finding:
    """This clock against the Date of `answer`, which counts whole seconds."""
    try:
        theirs = parsedate_to_datetime(answer.date or "").timestamp() + 0.5
    except ValueError:
        return skipped("clock", f"{url} sends no date")
    skew, doubt = answer.at - theirs, 0.5 + answer.seconds / 2
    seen = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {url}, give or take {doubt:.1f} s"
    figures = {"skew_seconds": skew}
    cure = "synchronise it: timedatectl set-ntp true, or systemctl restart chronyd"
    certain = max(0.0, abs(skew) - doubt)
    if certain > _SKEW_PROBLEM:
        return problem("clock", seen, f"{cure}; TLS, S3 and logins fail with a wrong time", figures)
    if certain > _SKEW_WARNING:
        return warning("clock", seen, cure, figures)
    return ok("clock", seen if certain else f"agrees with {url} to {doubt:.1f} s", figures=figures)


def wandb() -> list[Finding]:
    """Whether the W&B server answers (WANDB_BASE_URL is honoured), where a run would ask it."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    mode = choose_mode("auto")
    if mode != "online":
        why = "WANDB_MODE says so" if os.environ.get("WANDB_MODE") == mode else "there is no key"
        return [ok("wandb", f"runs are {mode}, since {why}", "wandb login, to see runs there as they go on")]
    later = "training goes on without it; WANDB_MODE=offline now, and `wandb sync` later"
    try:
        answer = ask(url)
    except OSError as error:
        return [warning("wandb", f"{url}: {reason(error)}", f"{remedy(error)}; {later}")]
    if answer.status == 407 or answer.status >= 500:
        return [warning("wandb", f"{url} answers with status {answer.status}", later)]
    return [ok("wandb", f"{url} answers in {answer.seconds:.2f} s", figures={"seconds": answer.seconds})]


def ask(url: str) -> Answer:
    """The answer to a HEAD request, through the proxies of the environment. Raises OSError without one in 5 s."""
    before, start = time.time(), time.perf_counter()
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_SECONDS) as response:
            status, headers = response.status, response.headers
    except HTTPError as error:  # an answer all the same
        status, headers = error.code, error.headers
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no HTTP is spoken there ({error!r})") from error
    seconds = time.perf_counter() - start
    return Answer(status, headers["Date"], seconds, before + seconds / 2)


def reason(error: OSError) -> str:
    """What kept the answer away, in a few words."""
    cause = _cause(error)
    if isinstance(cause, socket.gaierror):
        return f"its name cannot be resolved ({cause.strerror})"
    if isinstance(cause, TimeoutError):
        return f"no answer within {_SECONDS:g} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({cause.verify_message})"
    return redacted(getattr(cause, "strerror", None) or str(cause))


def remedy(error: OSError) -> str:
    """What may mend it."""
    cause = _cause(error)
    if isinstance(cause, socket.gaierror):
        return "check the spelling, /etc/resolv.conf and the network; behind a proxy set https_proxy"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "set SSL_CERT_FILE and REQUESTS_CA_BUNDLE to the bundle of your organisation; see to the clock"
    if isinstance(cause, ConnectionRefusedError):
        return "nobody listens there: check host and port, and proxies"
    return "a firewall may drop it: check the network, and set https_proxy where one is needed"


def _cause(error: OSError) -> BaseException | OSError:
    inner = error.reason if isinstance(error, URLError) else error
    return inner if isinstance(inner, BaseException) else error


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def proxies() -> list[Finding]:
    """Whether the proxies that the environment names take connections."""
    named = {scheme: url for scheme, url in getproxies().items() if scheme != "no" and url}
    if not named:
        return [ok("proxies", "none are set")]
    dead = []
    for url in sorted(set(named.values())):
        address = urlsplit(url if "//" in url else f"//{url}")
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=_SECONDS / 2).close()
        except (OSError, ValueError) as error:
            dead.append(f"{redacted(url)} ({reason(error) if isinstance(error, OSError) else error})")
    seen = ", ".join(f"{scheme}_proxy={redacted(url)}" for scheme, url in sorted(named.items()))
    if dead:
        cure = "unset http_proxy, https_proxy and all_proxy, or correct them; no_proxy for hosts that need none"
        return [problem("proxies", f"not reachable: {', '.join(dead)}", cure)]
    return [ok("proxies", f"{seen}; no_proxy={os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or 'none'}")]


def interfaces() -> list[Finding]:
    """The name of this host, and the network interfaces that settings of gloo and NCCL name."""
    findings = [_hostname()]
    there = sorted(path.name for path in Path("/sys/class/net").glob("*"))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if not wanted or wanted.startswith("^"):  # what NCCL is to leave out
            continue
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        names = wanted.removeprefix("=").split(",")
        if not any(name == have if exact else have.startswith(name) for name in names for have in there):
            cure = f"set {variable} to one of {', '.join(there)}, or unset it"
            findings.append(problem("interfaces", f"{variable}={wanted}, and there is no such interface", cure))
    return findings


def _hostname() -> Finding:
    name = socket.gethostname()
    several = int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cure = "set GLOO_SOCKET_IFNAME to the interface that other nodes reach (`ip route`), or mend /etc/hosts"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        seen = f"{name} has no address ({error.strerror})"
        return warning("hostname", seen, cure) if several else ok("hostname", f"{seen}; several nodes need one", cure)
    if address.startswith("127.") and several and not os.environ.get("GLOO_SOCKET_IFNAME"):
        return warning(
            "hostname", f"{name} is {address} here: other nodes would be told to connect to themselves", cure
        )
    return ok("hostname", f"{name}, {address}")
