"""Files by URL on servers that fail: what passes is waited out, what does not is told, and no record is lost."""

from __future__ import annotations

import email.utils
import gzip
import io
import json
import logging
import random
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.servers import Fault, FaultyServer, serving
from trainer.data import files, remote
from trainer.data.files import FileSource
from trainer.data.locate import find_files
from trainer.data.remote import Retries
from trainer.errors import DataError, SetupError

QUICK = Retries(total_seconds=20, first_wait=0.001, longest_wait=0.01, stall_seconds=0.3)
BRIEF = Retries(total_seconds=0.2, first_wait=0.05, longest_wait=0.05, stall_seconds=0.1)
KINDS = ("pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet")
# random words, lest a compressed file fit one request
ROWS = [{"n": number, "text": random.Random(number).randbytes(20).hex()} for number in range(2000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "pairs.jsonl").write_bytes(lines)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "pairs.parquet", row_group_size=500)
    return folder


@pytest.fixture(autouse=True)
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests for each file."""
    for name, size in (("_BUFFER", 16 << 10), ("_REQUEST_MOST", 32 << 10), ("_REQUEST_LEAST", 2 << 10)):
        monkeypatch.setattr(remote, name, size)
    monkeypatch.setattr(remote, "_told", set())


@pytest.fixture
def web(folder: Path) -> Iterator[FaultyServer]:
    with serving(FaultyServer(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def s3_storage(folder: Path) -> Iterator[tuple[str, int]]:
    """An S3 service (moto) whose bucket `data` holds the files."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    storage = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    storage.start()
    address = storage.get_host_and_port()
    reset = urllib.request.Request(f"http://{address[0]}:{address[1]}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # all servers of a process share one storage
    for name in ("", *KINDS):
        body = (folder / name).read_bytes() if name else b""
        url = f"http://{address[0]}:{address[1]}/data/{name}".rstrip("/")
        put = urllib.request.Request(url, body, {"Content-Type": "application/octet-stream"}, method="PUT")
        with urllib.request.urlopen(put) as answer:
            assert answer.status == 200
    yield address
    storage.stop()
    storage._server.server_close()


@pytest.fixture
def s3(s3_storage: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    with serving(FaultyServer(upstream=s3_storage)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # it would talk to the server of the test before
        yield server


@pytest.fixture(params=["web", "s3"])
def place(request: pytest.FixtureRequest) -> Any:
    server = request.getfixturevalue(request.param)
    return SimpleNamespace(server=server, prefix=server.url if request.param == "web" else "s3://data")


def source(place: Any, name: str, retries: Retries = QUICK, **options: Any) -> FileSource:
    return FileSource([f"{place.prefix}/{name}"], [name], retries=retries, **options)


def everything(found: FileSource) -> list[Any]:
    return [record for index in range(len(found.shards)) for record in found.open(index, 0)]


FAULTS = {
    "500": Fault(500),
    "503": Fault(503),
    "429 with Retry-After": Fault(429, retry_after="0"),
    "408": Fault(408),
    "reset in the body": Fault("reset"),
    "body cut short": Fault("truncate"),
    "stall": Fault("stall"),
}


@pytest.mark.parametrize("name", KINDS)
def test_faults_that_pass_change_no_record(place: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = source(place, name)
    for kind, fault in FAULTS.items():
        place.server.faults = [fault] * (1 if kind == "stall" else 3)
        reading = found.open(0, 700)
        first = next(reading)
        place.server.faults += [fault]
        assert [first, *reading] == ROWS[700:], kind
        assert place.server.faults == [], kind
    told = [record.getMessage() for record in caplog.records if record.name == remote.__name__]
    assert all(message.startswith(f"{place.prefix}/{name}: ") for message in told)
    assert len(told) == len(set(told)) >= 4, "each kind of fault is told, and once"


@pytest.mark.parametrize("name", KINDS)
def test_a_server_that_stays_ill_is_an_error_after_which_the_rest_can_be_read(place: Any, name: str) -> None:
    found = source(place, name, BRIEF)
    reading = found.open(0, 0)
    records = [next(reading) for _ in range(100)]
    place.server.always = Fault(503)
    with pytest.raises(DataError, match=r"HTTP 503 .*gave up after \d+ tries in 0 s") as caught:
        for record in reading:
            records.append(record)
    assert 100 <= len(records) < len(ROWS)
    words = str(caught.value)
    assert f"{name}: cannot be read at record {len(records)}: " in words and f"({place.prefix}/{name})" in words
    with pytest.raises(DataError, match=f"at record {len(records)}: HTTP 503"):
        next(found.open(0, len(records)))
    place.server.always = None
    assert records + list(found.open(0, len(records))) == ROWS


@pytest.mark.parametrize("status", [401, 403, 404])
def test_faults_that_do_not_pass_fail_at_once(place: Any, status: int) -> None:
    found = source(place, "pairs.jsonl")
    place.server.always = Fault(status)
    place.server.requests.clear()
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"pairs.jsonl: cannot be read at record 5: (HTTP 40[134]|no such file)"):
        next(found.open(0, 5))
    assert time.monotonic() - begin < 5 and len(place.server.requests) < 4


def test_a_line_that_breaks_in_every_other_body_still_arrives(web: FaultyServer) -> None:
    web.faults = [Fault("truncate"), Fault("reset")] * 20
    assert everything(FileSource([f"{web.url}/pairs.jsonl"], ["x"], retries=QUICK)) == ROWS


@pytest.mark.parametrize(
    ("name", "sizes"),
    # nobody finds the end of a Parquet file whose size is not told
    [*((name, True) for name in KINDS), ("pairs.jsonl", False), ("pairs.jsonl.gz", False)],
)
def test_a_server_without_ranges_is_read_from_its_beginning_again(web: FaultyServer, name: str, sizes: bool) -> None:
    web.ranges, web.sizes = False, sizes
    place = SimpleNamespace(server=web, prefix=web.url)
    reading = source(place, name).open(0, 300)
    first = next(reading)
    web.faults = [Fault("truncate"), Fault(503), Fault("reset")] if sizes else [Fault(503)]
    assert [first, *reading] == ROWS[300:]


def test_parts_by_url_are_those_of_the_local_file(place: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALLEST", 4096)
    for name in ("pairs.jsonl", "pairs.parquet"):
        far = source(place, name, min_shards=7)
        near = FileSource([str(folder / name)], [name], min_shards=7)
        assert far.shards == near.shards and len(far.shards) > 3
        place.server.faults = [Fault("reset"), Fault(503), Fault("truncate")]
        assert everything(far) == ROWS and far.uncut == near.uncut
        for index in (0, 2, len(far.shards) - 1):
            assert list(far.open(index, 5)) == list(near.open(index, 0))[5:]


def test_a_server_without_ranges_says_why_a_file_is_not_cut(web: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALLEST", 4096)
    web.ranges = False
    found = FileSource([f"{web.url}/pairs.jsonl"], ["pairs.jsonl"], min_shards=4, retries=QUICK)
    assert found.shards == ["pairs.jsonl"]
    assert found.uncut == "pairs.jsonl comes from a server that cannot send a part of a file, so it cannot be split"


def test_many_files_on_a_server_are_measured_by_one_listing(s3: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 30 << 10)
    monkeypatch.setattr(files, "_FEW", 1)
    paths, names = find_files("s3://data", "train", "pairs", None)
    assert names == sorted(KINDS)
    s3.requests.clear()
    found = FileSource(paths, names, retries=QUICK)
    assert found.shards[1] == "pairs.jsonl@30720" and found.shards[-2:] == ["pairs.jsonl.gz", "pairs.parquet"]
    assert [request for request in s3.requests if request[0] == "HEAD"] == []
    assert everything(found) == ROWS * 3


@pytest.mark.parametrize("name", ["pairs.arrow", "pairs.tar", "pairs.tar.gz"])
def test_arrow_and_tar_by_url(web: FaultyServer, tmp_path: Path, name: str) -> None:
    web.folder = tmp_path
    if name == "pairs.arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    else:
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as archive:
            for row in ROWS[:200]:
                member = tarfile.TarInfo(f"{row['n']:04}.json")
                member.size = len(content := json.dumps(row).encode())
                archive.addfile(member, io.BytesIO(content))
    near = list(FileSource([str(tmp_path / name)], [name]).open(0, 0))
    assert len(near) >= 200
    for offset in (0, 150):
        web.faults = [Fault("reset"), Fault(503), Fault("truncate")]
        assert list(FileSource([f"{web.url}/{name}"], [name], retries=QUICK).open(0, offset)) == near[offset:]


def test_retry_after_is_heeded_in_seconds_and_as_a_date(web: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    date = email.utils.formatdate(time.time() + 10, usegmt=True)
    web.faults = [Fault(429, retry_after="7"), Fault(503, retry_after=date), Fault(503, retry_after="soon")]
    assert everything(FileSource([f"{web.url}/pairs.jsonl"], ["x"], retries=QUICK)) == ROWS
    assert pauses[0] == 7 and 8 < pauses[1] <= 10 and pauses[2] < 1
    web.faults = [Fault(503, retry_after="3600")]
    with pytest.raises(DataError, match="HTTP 503 Service Unavailable; gave up after 1 tries"):
        everything(FileSource([f"{web.url}/pairs.jsonl"], ["x"], retries=QUICK))


def test_pauses_double_and_vary_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    answers = iter([ConnectionResetError()] * 8)

    def act() -> str:
        for error in answers:
            raise error
        return "done"

    assert remote.retrying(act, "http://x", Retries(300, 0.5, 4, 1)) == "done"
    most = [0.5, 1, 2, 4, 4, 4, 4, 4]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, most, strict=True))


@pytest.mark.parametrize(("count", "faults"), [(9000, [Fault("reset")]), (3000, [])])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, count: int, faults: list[Fault]) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n' * 8000)
    with serving(FaultyServer(tmp_path)) as server:
        reading = FileSource([f"{server.url}/x.jsonl"], ["x.jsonl"], retries=QUICK).open(0, 0)
        next(reading)
        (tmp_path / "x.jsonl").write_text('{"n": 2}\n' * count)
        server.faults = list(faults)
        with pytest.raises(DataError, match=f"changed while it was read: it had 72000 bytes and has {count * 9} now"):
            list(reading)


def test_secrets_of_a_url_are_not_told(web: FaultyServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)  # what runs write down; other packages tell more to who asks for more
    url = f"http://someone:password@127.0.0.1:{web.server_port}/pairs.jsonl?X-Signature=abc/def"
    paths, names = find_files(url, "train", "train", None)
    assert names == ["pairs.jsonl"]
    assert everything(FileSource(paths, names, retries=QUICK)) == ROWS
    web.always = Fault(503)
    with pytest.raises(DataError) as caught:
        list(FileSource(paths, names, retries=BRIEF).open(0, 0))
    web.always = Fault(403)
    with pytest.raises(DataError) as refused:
        find_files(url, "train", "train", None)
    told = f"{caught.value}{refused.value}{caplog.text}"
    assert "password" not in told and "abc" not in told and "HTTP 403 Forbidden" in told
    assert f"http://127.0.0.1:{web.server_port}/pairs.jsonl: HTTP 503" in caplog.text


def test_finding_files_outlasts_faults_and_tells_missing_from_ill(place: Any) -> None:
    remote.set_retries(QUICK)
    try:
        place.server.faults = [Fault(503, method="HEAD"), Fault(503), Fault(503, method="HEAD")]
        assert find_files(f"{place.prefix}/pairs.jsonl", "train", "train", None)[1] == ["pairs.jsonl"]
        with pytest.raises(DataError, match=r"other.jsonl: no such file"):
            find_files(f"{place.prefix}/other.jsonl", "train", "train", None)
        place.server.faults = []
        place.server.always = Fault(500)
        remote.set_retries(BRIEF)
        with pytest.raises(DataError, match=r"pairs.jsonl.*HTTP 500 .*gave up after"):
            find_files(f"{place.prefix}/pairs.jsonl", "train", "train", None)
    finally:
        remote.set_retries(Retries())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", refuse)
    with pytest.raises(SetupError, match=r"s3://data/x.jsonl: .* Run `pip install shardwright\[s3\]`"):
        find_files("s3://data/x.jsonl", "train", "train", None)
    monkeypatch.undo()
    with pytest.raises(DataError, match="nonsense://x: Protocol not known"):
        find_files("nonsense://x", "train", "train", None)


def test_what_may_pass_is_told_from_what_will_not() -> None:
    import ssl

    import aiohttp
    import botocore.exceptions as boto

    def caused(error: Exception, cause: Exception) -> Exception:
        error.__cause__ = cause
        return error

    def answer(status: int, code: str = "") -> Exception:
        return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

    passing = [
        ConnectionResetError(),
        TimeoutError(),
        aiohttp.ClientPayloadError(),
        aiohttp.ServerDisconnectedError(),
        boto.ReadTimeoutError(endpoint_url="x"),
        boto.EndpointConnectionError(endpoint_url="x"),
        caused(OSError(16, "busy"), answer(503, "SlowDown")),
        caused(OSError(22, "bad"), answer(400, "RequestTimeout")),
        caused(FileNotFoundError("x"), aiohttp.ClientConnectionError()),
        remote.socket.gaierror(remote.socket.EAI_AGAIN, "later"),
    ]
    lasting = [
        FileNotFoundError("x"),
        PermissionError("x"),
        caused(PermissionError("x"), answer(403)),
        boto.NoCredentialsError(),
        caused(aiohttp.ClientConnectionError(), ssl.SSLCertVerificationError("certificate verify failed: self-signed")),
        remote.socket.gaierror(remote.socket.EAI_NONAME, "no such host"),
        ValueError("x"),
    ]
    assert [error for error in passing if not remote.is_transient(error)] == []
    assert [error for error in lasting if remote.is_transient(error)] == []
