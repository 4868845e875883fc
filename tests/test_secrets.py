"""Passwords and keys: none stands in a run directory or in what a run prints, and none is taken where it would."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data import servers
from tests.data.servers import Fault, FaultyServer, serving
from tests.test_config import facts, part
from trainer.config import to_config
from trainer.data.corpora import __path__ as corpora
from trainer.errors import ConfigError, redacted

PASSWORD = "hunter2-pw-19f3"
USER = f"someone:{PASSWORD}"
SECRETS = {
    "WANDB_API_KEY": "deadbeefcafe0123456789abcdef0123456789ab",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0000KEYID",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/0123456789abcdefghij",
    "AWS_SESSION_TOKEN": "planted-aws-session-token-0123456789",
    "HF_TOKEN": "hf_PlantedTokenPlantedTokenPlanted",
}


class Guarded(servers._Handler):
    """Answers only to whom it knows."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == f"Basic {base64.b64encode(USER.encode()).decode()}":
            super().do_GET()
        else:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET


@pytest.fixture
def digits() -> Iterator[FaultyServer]:
    """Serves the packaged digits to a user with a password."""
    server = FaultyServer(Path(corpora[0]) / "digits")
    server.RequestHandlerClass = Guarded
    with serving(server):
        yield server


@pytest.mark.timeout(180)
def test_no_secret_of_the_environment_is_written_or_told(run_trainer, tmp_path, digits):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login someone password {PASSWORD}\n")
    digits.faults = [Fault(503), Fault("reset")]
    done = run_trainer(
        [
            *("experiment=digits_mlp", f"data.path={digits.url}/train.parquet", "data.train=train", "steps=4"),
            *("data.validation=null", "data.test=null", "eval.final_split=none", "log.every=1", "name=run"),
            *("logging=[console,wandb]", "debug=traceback"),
        ],
        env={**SECRETS, "NETRC": str(tmp_path / "netrc")},
    ).check()
    assert "HTTP 503" in done.stderr and digits.faults == [], "the faults were told"
    files = [path for path in done.runs_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    contents = {str(path): path.read_bytes() for path in files} | {"the output": done.output.encode()}
    for name, secret in {**SECRETS, "password": PASSWORD, "user": base64.b64encode(USER.encode()).decode()}.items():
        found = [where for where, content in contents.items() if secret.encode() in content]
        assert not found, f"{name} stands in {found}"


URLS = {
    "user and password": f"https://{USER}@host/train.jsonl",
    "a token for a user": f"https://{PASSWORD}@host/train.jsonl",
    "an @ in the password": f"https://someone:p@{PASSWORD}@host/train.jsonl",
    "behind a cache": f"simplecache::https://{USER}@host/train.jsonl",
    "keys of S3": f"s3://{USER}@bucket/train.jsonl",
    "signed for S3": f"https://host/train.jsonl?X-Amz-Date=1&X-Amz-Signature={PASSWORD}",
    "signed for Azure": f"https://host/train.jsonl?se=2&sig={PASSWORD}",
    "a token": f"https://host/train.jsonl?access_token={PASSWORD}",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "from the environment"])
def test_a_url_with_a_secret_is_refused_wherever_it_comes_from(url, typed, monkeypatch):
    monkeypatch.setenv("SECRET_URL", url)
    value = url if typed else "${oc.env:SECRET_URL}"
    for key, change in {
        "data.path": {"data": part(path=value)},
        "checkpoint.remote": {"checkpoint": {"remote": value}},
        "data.sources.one.files.1": {"data": part(sources={"one": {"files": ["x", value]}})},
    }.items():
        with pytest.raises(ConfigError) as caught:
            to_config(facts(**change))
        told = str(caught.value)
        assert PASSWORD not in told and f"{key}=" in told and "leave it out of the URL" in told and "~/.netrc" in told


@pytest.mark.parametrize(
    "url",
    [
        *("https://host/a@b/train.jsonl", "https://host/x?download=true", "hf://datasets/a/b@main/train.jsonl"),
        *("abfs://container@account.dfs.core.windows.net/x", "sftp://someone@host/x", "s3://bucket/x", "someone@host"),
        *("https://host/x?num_tokens=5", "https://host:8080/x"),
    ],
)
def test_a_url_without_a_secret_is_taken(url):
    assert to_config(facts(data=part(path=url))).data["path"] == url


def test_a_secret_within_other_mistakes_is_not_told(run_trainer):
    done = run_trainer(
        ["experiment=digits_mlp", f"data.pathh='https://{USER}@host/x'", f"steps='https://{USER}@host'", "name=run",
         f"data.path=https://{USER}@host/a b", "debug=traceback"]
    )  # fmt: skip
    assert done.returncode == 2 and PASSWORD not in done.output and "data.pathh" in done.stderr
    assert not done.runs_dir.exists()


def test_what_is_left_of_a_url():
    assert redacted(f"x 'https://{USER}@host/a?b=c' y") == "x 'https://host/a' y"
    assert redacted(f"https://a:{PASSWORD}@b@host/") == "https://host/"
