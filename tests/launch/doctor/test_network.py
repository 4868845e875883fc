"""Servers that are wrong, silent, or not there, all on the loopback interface."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from launch.doctor import network
from tests.conftest import find_free_port
from tests.launch.doctor.examine import examine

ONLINE = {"HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None, "no_proxy": "127.0.0.1"}


@contextmanager
def server(seconds_ahead=0.0, status=200, date=True):
    """A web server whose clock is `seconds_ahead`; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response_only(status)
            if date:
                self.send_header("Date", formatdate(time.time() + seconds_ahead, usegmt=True))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()


@pytest.mark.parametrize(
    "ahead, state, code", [(0, "ok", 0), (120, "warning", 0), (-7200, "problem", 1), (7200, "problem", 1)]
)
def test_the_clock_is_compared_with_the_hub(ahead, state, code):
    with server(ahead) as url:
        exit_code, found = examine("hub", env={**ONLINE, "HF_ENDPOINT": url})
    assert (found["hub"]["state"], found["clock"]["state"], exit_code) == ("ok", state, code)
    assert abs(found["clock"]["figures"]["skew_seconds"] + ahead) < 3
    if ahead:
        assert ("behind" if ahead > 0 else "ahead of") in found["clock"]["seen"] and "set-ntp" in found["clock"]["cure"]


def test_an_unreachable_hub_is_a_finding_with_a_cure():
    url = f"http://127.0.0.1:{find_free_port()}"
    code, found = examine("hub", env={**ONLINE, "HF_ENDPOINT": url})
    assert code == 0 and found["hub"]["state"] == "warning" and found["clock"]["state"] == "skipped"
    assert "refused" in found["hub"]["seen"] and "HF_HUB_OFFLINE=1" in found["hub"]["cure"]


def test_switched_off_is_no_fault():
    code, found = examine("hub", env={"HF_HUB_OFFLINE": "1"})
    assert code == 0 and found["hub"]["state"] == "ok" and "HF_HUB_OFFLINE" in found["hub"]["seen"]


@pytest.mark.parametrize("status, state", [(404, "ok"), (401, "ok"), (503, "warning"), (407, "warning")])
def test_what_a_hub_answers(monkeypatch, status, state):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with server(status=status, date=False) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        found = {finding.name: finding for finding in network.hub()}
    assert found["hub"].state == state and found["clock"].state == "skipped"


def test_silence_is_bounded(monkeypatch):
    monkeypatch.setattr(network, "_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError) as told:
        network.ask(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert network.reason(told.value) == "no answer within 0.3 s"


def test_what_speaks_no_http_is_told(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def babble():
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.close()

        threading.Thread(target=babble, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert "no HTTP is spoken there" in network.hub()[0].seen


def test_wandb_is_asked_only_where_a_run_would_ask_it():
    silent = f"http://127.0.0.1:{find_free_port()}"
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": silent, "WANDB_MODE": None, "no_proxy": "127.0.0.1"}
    code, found = examine("wandb", env=key)
    assert code == 0 and found["wandb"]["state"] == "warning" and "wandb sync" in found["wandb"]["cure"]
    _, found = examine("wandb", env={**key, "WANDB_MODE": "offline"})
    assert found["wandb"]["state"] == "ok" and "WANDB_MODE says so" in found["wandb"]["seen"]
    with server() as url:
        _, found = examine("wandb", env={**key, "WANDB_BASE_URL": url})
    assert found["wandb"]["state"] == "ok" and url in found["wandb"]["seen"]


def test_a_dead_proxy_is_a_problem_and_its_password_stays_secret():
    proxy = f"http://user:hunter2@127.0.0.1:{find_free_port()}"
    code, found = examine("proxies", env={"https_proxy": proxy, "http_proxy": proxy})
    assert code == 1 and "not reachable" in found["proxies"]["seen"] and "unset" in found["proxies"]["cure"]
    assert "hunter2" not in str(found)


def test_a_proxy_that_listens_is_told():
    with server() as url:
        code, found = examine("proxies", env={"https_proxy": url})
    assert code == 0 and url in found["proxies"]["seen"]


def test_an_interface_that_is_not_there():
    code, found = examine("interfaces", env={"GLOO_SOCKET_IFNAME": "nosuch0", "NCCL_SOCKET_IFNAME": "l"})
    assert code == 1 and "GLOO_SOCKET_IFNAME=nosuch0" in found["interfaces"]["seen"], "NCCL takes a prefix"
    assert "lo" in found["interfaces"]["cure"]


def test_a_host_name_that_leads_nowhere_on_several_nodes(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert network.interfaces()[0].state == "ok", "on one machine it does not matter"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    found = network.interfaces()[0]
    assert found.state == "warning" and "GLOO_SOCKET_IFNAME" in found.cure
