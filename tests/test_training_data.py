"""Runs on data as they come: mixed, packed, filtered, damaged, cut short; nothing is lost and nothing is silent."""

from __future__ import annotations

import gzip
import json
import statistics
from collections import Counter
from itertools import islice
from pathlib import Path

import boto3
import pytest

from tests.data.servers import Fault, FaultyServer, serving
from trainer.data.corpora import __path__ as corpora

with gzip.open(Path(corpora[0]) / "homeassistant_en_de" / "train.jsonl.gz", "rt") as lines:
    PAIRS = [json.loads(line) for line in islice(lines, 1500)]

TINY = (
    "experiment=quickstart",
    *("model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.encoder_layers=1", "model.decoder_layers=1"),
    *("tokenizer.vocab_size=400", "tokenizer.max_records=2000", "task.max_source_length=400"),
    *("task.max_target_length=400", "batch.global_size=48", "schedule.warmup=1", "log.every=1", "eval.every=0"),
    *("eval.final_split=none", "checkpoint.every=0", "logging=[]", "data.trace=true", "name=run"),
)


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seen(run: Path) -> Counter[str]:
    return Counter(id for path in (run / "samples").glob("*.jsonl") for row in read(path) for id in row["ids"])


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_what_is_not_used_is_counted_and_told_once_over_kills_and_ranks(run_trainer, tmp_path):
    """Bad records, duplicates and pairs of odd lengths: in quarantine.jsonl each once, in metrics.jsonl as counts."""
    rows = [*PAIRS[:700], "{torn", *PAIRS[700:1400], {"en": "Only English"}, PAIRS[3], {**PAIRS[5], "de": "x" * 300}]
    path = write(tmp_path / "train.jsonl", rows)
    words = [
        *TINY, f"data.path={path}", "data.max_bad_fraction=0.5", "stop.epochs=1", "checkpoint.every=7",
        "data.stages=[{_target_: trainer.data.stages.filters.LengthRatio, source_column: en, target_column: de,"
        " max_ratio: 9}, {_target_: trainer.data.stages.duplicates.ExactDuplicates, columns: [en, de]}]",
    ]  # fmt: skip
    texts = [json.dumps(row).lower() for row in PAIRS[:1400]]
    duplicates = 1 + len(texts) - len(set(texts))
    whole = run_trainer([*words, "steps=100", "name=whole"]).check().runs_dir / "whole"
    runs_dir = run_trainer([*words, "steps=3"]).check().runs_dir
    run_trainer([*words, "steps=9", "engine=zero2"], ranks=2).check()
    run_trainer([*words, "steps=100"], ranks=3).check()
    for run in (whole, runs_dir / "run"):
        told = read(run / "quarantine.jsonl")
        stages = Counter(row["stage"] for row in told)
        assert stages["bad_record"] == 2 and stages["length_ratio"] >= 1 and stages["exact_duplicates"] >= duplicates
        places = {(row["shard"], row["offset"]) for row in told}
        assert len(places) == len(told) and ("train.jsonl", 700) in places
        assert set(seen(run).values()) == {1}
        assert len(seen(run)) + len(told) == len(rows)
        assert [row for row in read(run / "metrics.jsonl") if "data" in row][-1]["data"] == dict(stages)
    assert seen(whole) == seen(runs_dir / "run")


@pytest.mark.timeout(300)
def test_a_bad_record_may_end_the_run_and_a_checkpoint_is_left(run_trainer, tmp_path):
    path = write(tmp_path / "train.jsonl", [*PAIRS[:1200], "{torn", *PAIRS[1200:]])
    words = [*TINY, f"data.path={path}", "data.on_bad_record=fail", "data.lanes=2", "data.block=96", "steps=40"]
    done = run_trainer(words)
    assert done.returncode == 2 and "Traceback" not in done.output
    assert "train.jsonl:1200: line 1201 is not JSON" in done.stderr and "data.on_bad_record=skip" in done.stderr
    run = done.runs_dir / "run"
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert step == len(read(run / "metrics.jsonl")) >= 10
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    run_trainer([*words[:-2], "data.on_bad_record=skip", "data.block=96", "steps=25"]).check()
    assert len(seen(run)) == 25 * 48 and set(seen(run).values()) == {1}


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_data_that_break_on_one_rank_stop_all_with_a_checkpoint_and_nothing_is_lost(run_trainer, tmp_path):
    """A shard of one rank is cut short; mended, the run goes on to the same samples as if it had never been."""
    folder = tmp_path / "pairs"
    for number in range(4):
        text = "".join(json.dumps(row) + "\n" for row in PAIRS[300 * number : 300 * (number + 1)])
        folder.mkdir(exist_ok=True)
        (folder / f"train-{number}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    words = [
        *TINY, f"data.path={folder}", "data.lanes=2", "data.block=48", "data.shuffle=false", "stop.epochs=1",
        "steps=100", "engine=zero2",
    ]  # fmt: skip
    whole = (folder / "train-3.jsonl.gz").read_bytes()
    (folder / "train-3.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    done = run_trainer(words, ranks=2)
    run = done.runs_dir / "run"
    assert done.returncode != 0
    assert "rank 1: train-3.jsonl.gz: cannot be read at record" in done.output
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "rank 1: train-3.jsonl.gz" in status["reason"]
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{status['step']:08d}"]
    assert status["step"] > 5
    (folder / "train-3.jsonl.gz").write_bytes(whole)
    run_trainer(words, ranks=2).check()
    assert set(seen(run).values()) == {1} and len(seen(run)) == 1200


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_packed_mixture_gives_one_curve_on_any_ranks_and_workers(run_trainer, tmp_path):
    """Two sources with columns of their own, packed; 1 rank, 2 ranks, accumulation, 2 workers: fp32 within 1e-5."""
    for number in range(12):
        write(tmp_path / "a" / f"train-{number:02d}.jsonl", PAIRS[60 * number : 60 * (number + 1)])
        turned = [{"english": row["en"], "german": row["de"]} for row in PAIRS[720 + 60 * number : 780 + 60 * number]]
        write(tmp_path / "b" / f"train-{number:02d}.jsonl", turned)
    common = [
        *TINY, "data=mixture", "data.lanes=12", "data.block=64", "data.batching=packed", "precision=fp32", "steps=8",
        "batch.global_size=12", "model.dropout=0.0", f"+data.sources.a={{path: {tmp_path / 'a'}, weight: 0.7}}",
        f"+data.sources.b={{path: {tmp_path / 'b'}, weight: 0.3, task: {{source_column: english,"
        " target_column: german}}",
    ]  # fmt: skip
    runs_dir = run_trainer([*common, "name=one"]).check().runs_dir
    run_trainer([*common, "name=workers", "data.workers=2", "batch.micro_size=3"]).check()
    run_trainer([*common, "name=ranks", "engine=zero2", "batch.micro_size=3"], ranks=2).check()
    run_trainer([*common, "name=both", "engine=zero3", "data.workers=3"], ranks=2).check()
    reference = [row["loss"] for row in read(runs_dir / "one" / "metrics.jsonl") if "loss" in row]
    assert len(reference) == 8 and reference[-1] < reference[0]
    told = [row["mixture"]["a"] for row in read(runs_dir / "one" / "metrics.jsonl") if "loss" in row]
    for name in ("workers", "ranks", "both"):
        ratios = [row["mixture"]["a"] for row in read(runs_dir / name / "metrics.jsonl") if "loss" in row]
        assert ratios == pytest.approx(told), name
        losses = [row["loss"] for row in read(runs_dir / name / "metrics.jsonl") if "loss" in row]
        assert losses == pytest.approx(reference, rel=1e-5), name
        assert seen(runs_dir / name) == seen(runs_dir / "one")
    shares = Counter(id.split("/")[0] for id in seen(runs_dir / "one").elements())
    assert shares["a"] / shares.total() == pytest.approx(0.7, abs=0.03)
    assert statistics.mean(told) == pytest.approx(shares["a"] / shares.total(), abs=0.02)


class GoesDown(FaultyServer):
    """Answers nothing but 503 once a file whose name holds `last` has been asked for, until it is `well`."""

    last = "train-05"
    well = False

    def next_fault(self, method: str) -> Fault | None:
        down = not self.well and any(self.last in path and method == "GET" for method, path, _ in self.requests)
        return Fault(503) if down else None


@pytest.mark.timeout(300)
def test_a_storage_server_that_goes_down_costs_nothing_but_time(run_trainer, tmp_path):
    """S3 (moto) behind a proxy that fails in mid-run: the run saves, names the URL and ends; later it goes on."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with serving(GoesDown(upstream=(host, port))) as server:
            client = boto3.client(
                "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                aws_access_key_id="me", aws_secret_access_key="secret",
            )  # fmt: skip
            client.create_bucket(Bucket="pairs")
            for number in range(10):
                rows = PAIRS[100 * number : 100 * (number + 1)]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                client.put_object(Bucket="pairs", Key=f"train-{number:02d}.jsonl.gz", Body=gzip.compress(text.encode()))
            words = [
                *TINY, "data.path=s3://pairs/train-*.jsonl.gz", "data.validation=null", "data.test=null",
                "data.lanes=2", "data.block=24", "data.shuffle=false", "stop.epochs=1", "steps=100",
                "data.retry_seconds=1", "tokenizer.max_records=300",
            ]  # fmt: skip
            env = {**keys, "AWS_ENDPOINT_URL": server.url, "AWS_EC2_METADATA_DISABLED": "true"}
            done = run_trainer(words, env=env)
            run = done.runs_dir / "run"
            assert done.returncode == 2 and "Traceback" not in done.output
            assert "train-05.jsonl.gz: cannot be read at record 0" in done.stderr and "s3://pairs" in done.stderr
            step = json.loads((run / "status.json").read_text())["step"]
            assert step > 3 and (run / "checkpoints" / f"step_{step:08d}").is_dir()
            server.well = True
            run_trainer(words, env=env).check()
        assert set(seen(run).values()) == {1} and len(seen(run)) == 1000
    finally:
        moto.stop()
