from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from trainer.composition import compose, config_directory
from trainer.config import config_to_dict, to_config
from trainer.data.tokenizer import ByteTokenizer
from trainer.inspect.__main__ import main, split_arguments

PAIRS = [
    {"en": "a" * size, "de": "ä" * (size // 2 + 1)} for size in (5, 9, 2, 7, 14, 3, 12, 1, 15, 4, 8, 11, 6, 10, 13)
]
COPIES = [{"en": "bbb", "de": "c d"}, {"en": "B" * 3, "de": "c  d"}]
USABLE = [*PAIRS, *COPIES, {"en": "z", "de": "z"}]
LINES = [
    *map(json.dumps, USABLE[:7]),
    '{"en": "broken',
    json.dumps({"en": "x" * 40, "de": "y"}),
    *map(json.dumps, USABLE[7:]),
]
"""Line 7 is no JSON, line 8 is longer than 16 tokens, and one of COPIES is a copy; a token is a byte."""

Outcome = tuple[int, str, str]
Inspect = Callable[..., Outcome]


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Call the command line in this process, in tmp_path: exit code, stdout, stderr."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["inspect"])
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """The words of an experiment on LINES."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    limits = ["task.max_source_length=16", "task.max_target_length=20", "batch.global_size=6", "stop.epochs=1"]
    return ["experiment=quickstart", "data=files", f"data.path={folder}", "tokenizer=byte", *limits]


def figures(inspect: Inspect, words: Sequence[str], *more: str) -> dict[str, Any]:
    code, out, err = inspect(*words, "json=true", *more)
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def tokens(text: str) -> int:
    return len(text.encode()) + 1


def by_length(column: str) -> dict[str, int]:
    return {str(length): count for length, count in Counter(tokens(pair[column]) for pair in USABLE).items()}


def bucketed_padding() -> float:
    """Share of padding when samples of similar lengths are together in batches of 6."""
    sides = [(tokens(pair["en"]), tokens(pair["de"])) for pair in USABLE]
    ordered = sorted(sides, key=lambda pair: (max(pair), *pair))
    batches = [ordered[begin : begin + 6] for begin in range(0, len(ordered), 6)]
    positions = sum(len(batch) * sum(map(max, zip(*batch, strict=True))) for batch in batches)
    return 1 - sum(map(sum, sides)) / positions


def test_figures_are_what_the_file_holds(inspect: Inspect, pairs: list[str], tmp_path: Path) -> None:
    found = figures(inspect, pairs, "n=3")
    totals = found["totals"]
    assert {key: totals[key] for key in totals if key != "seconds"} == {
        "records": len(LINES),
        "samples": len(USABLE),
        "target_tokens": sum(tokens(pair["de"]) for pair in USABLE),
        "bad": 2,
        "removed": 0,
        "duplicates": 1,
        "overlong": 1,
    }
    assert found["overlong_share"] == 1 / len(LINES)
    assert found["epoch_seconds"] == totals["seconds"] > 0
    assert [one["side"] for one in found["lengths"]] == ["source", "target"]
    assert [one["counts"] for one in found["lengths"]] == [by_length("en"), by_length("de")]
    (source,) = found["sources"]
    assert (source["shards"], source["complete"], found["stride"]) == (["train.jsonl"], True, 1)
    broken, overlong = source["rejections"]
    assert broken["count"] == 1 and broken["first"][0].startswith("train.jsonl:7: ")
    assert overlong["reason"] == "N tokens are more than task.max_source_length=16 (task.overlong=skip)"
    assert overlong["first"] == [
        "train.jsonl:8: 41 tokens are more than task.max_source_length=16 (task.overlong=skip)"
    ]
    batches = found["batches"]
    assert (batches["steps"], batches["samples"], batches["epochs"]) == (3, len(USABLE), 1.0)
    assert batches["padding"] == pytest.approx(bucketed_padding())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "pairs"], "nothing is written"


def test_records_and_samples_are_shown_as_they_are(inspect: Inspect, pairs: list[str]) -> None:
    found = figures(inspect, pairs, "n=2", "max_steps=1")
    assert found["batches"]["steps"] == 1
    assert found["batches"]["first_padding"] == found["batches"]["padding"]
    first, second = found["sources"][0]["examples"]
    assert (first["id"], first["record"], second["record"]) == ("train.jsonl:0", PAIRS[0], PAIRS[1])
    source, target = first["fields"]
    assert (source["name"], source["pieces"], source["text"]) == ("source_ids", [*"aaaaa", "</s>"], "aaaaa")
    assert (target["pieces"], target["text"]) == (["", "ä"] * 3 + ["</s>"], "äää")
    assert len(source["ids"]) == source["shape"][0] == 6
    assert len(found["rows"]) == 2 and all(len(row["samples"]) == 1 for row in found["rows"])


def test_packed_rows_hold_every_sample_once(inspect: Inspect, pairs: list[str]) -> None:
    found = figures(inspect, pairs, "data.batching=packed", "n=6")
    shown = [sample["id"] for row in found["rows"] for sample in row["samples"]]
    assert len(shown) == len(set(shown)) == len(USABLE)
    used = {side: sum(row["used"][side] for row in found["rows"]) for side in ("source", "target")}
    assert used == {"source": sum(tokens(p["en"]) for p in USABLE), "target": sum(tokens(p["de"]) for p in USABLE)}
    positions = len(found["rows"]) * sum(found["row_lengths"])
    assert found["batches"]["padding"] == pytest.approx(1 - sum(used.values()) / positions)


def test_the_text_names_the_figures(inspect: Inspect, pairs: list[str], tmp_path: Path) -> None:
    code, out, err = inspect(*pairs, "data.batching=packed", "n=1", f"png={tmp_path}/lengths.png")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    target_tokens = sum(tokens(pair["de"]) for pair in USABLE)
    for line in (f"records {len(LINES)}", f"samples {len(USABLE)}", f"target tokens {target_tokens}"):
        assert line in lines
    assert "duplicates 1" in lines and "bad records 2" in lines
    assert f"too long 1 ({1 / len(LINES):.2%} of the records)" in lines
    assert "1 x bad_record: N tokens are more than task.max_source_length=16 (task.overlong=skip)" in lines
    assert any(line.startswith("train.jsonl:7: ") for line in lines)
    assert any(line.startswith("row 0, source: ") and " full)" in line for line in lines)
    assert any(line.startswith("Tokens: target (mean ") for line in lines)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_what_stages_remove_and_what_is_cut_is_counted(inspect: Inspect, pairs: list[str]) -> None:
    stage = "data.stages=[{_target_: trainer.data.stages.duplicates.ExactDuplicates, columns: [en, de]}]"
    found = figures(inspect, pairs, stage, "task.overlong=truncate")
    assert found["sources"][0]["removed"] == {"exact_duplicates": 1}
    totals = found["totals"]
    assert (totals["removed"], totals["bad"], totals["overlong"], totals["samples"]) == (1, 1, 1, len(USABLE))


def test_a_pass_can_be_cut_short(inspect: Inspect, pairs: list[str]) -> None:
    found = figures(inspect, pairs, "max_records=8")
    totals = found["totals"]
    assert (totals["records"], totals["samples"], totals["bad"], found["epoch_seconds"]) == (8, 7, 1, None)


def test_what_would_stop_training_is_told(inspect: Inspect, pairs: list[str]) -> None:
    found = figures(inspect, pairs, "data.on_bad_record=fail")
    assert (found["totals"]["bad"], found["batches"]) == (2, None)
    assert any("Training would stop: Bad record train.jsonl:7" in warning for warning in found["warnings"])


def test_a_mixture_is_told_source_by_source(inspect: Inspect, pairs: list[str], tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"de": "ab", "en": "cd"}\n' * 3, encoding="utf-8")
    sources = [f"+data.sources.many.path={tmp_path}/pairs", f"+data.sources.few.path={tmp_path}/few.jsonl"]
    words = [word for word in pairs if not word.startswith(("data", "stop"))]
    found = figures(inspect, [*words, "data=mixture", *sources], "max_steps=2")
    assert {one["name"]: one["counts"]["records"] for one in found["sources"]} == {"many": len(LINES), "few": 3}
    assert (found["totals"]["records"], found["totals"]["duplicates"]) == (len(LINES) + 3, 3)
    assert found["sources"][1]["examples"][0]["id"] == "few/few.jsonl:0"


def test_long_texts_of_a_language_model_come_in_pieces(inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "abcdefghijk"}\n{"text": "abc"}\n', encoding="utf-8")
    words = ["experiment=lm_small", "data=files", f"data.path={tmp_path}/train.jsonl", "tokenizer=byte"]
    found = figures(inspect, words, "task.sequence_length=8", "task.overlong=split", "data.batching=packed", "n=1")
    assert [found["totals"][key] for key in ("records", "samples", "overlong", "target_tokens")] == [2, 3, 1, 16]
    (lengths,) = found["lengths"]
    assert (lengths["side"], lengths["counts"]) == ("text", {"4": 2, "8": 1})
    assert found["row_lengths"] == [8]


def test_data_without_text_are_told_by_shapes_and_labels(inspect: Inspect) -> None:
    found = figures(inspect, ["experiment=digits_mlp"], "max_records=100", "n=1")
    table = pyarrow.parquet.read_table(config_directory().parent / "trainer/data/corpora/digits/train.parquet")
    labels = Counter(map(str, table["label"].to_pylist()[:100]))
    assert found["labels"] == {"label": dict(labels)}
    assert found["shapes"] == {"inputs": {"[64]": 100}, "label": {"[1]": 100}}
    assert found["sources"][0]["examples"][0]["record"]["pixels"] == table["pixels"][0].as_py()
    assert found["lengths"] == [] and found["tokenizer"] == "none"
    code, out, _ = inspect("experiment=digits_mlp", "max_records=10", "n=1")
    assert code == 0 and "Shapes: inputs" in out and "Labels: label" in out


def test_a_run_of_that_name_lends_its_tokenizer(inspect: Inspect, pairs: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "earlier"
    folder.mkdir(parents=True)
    config = to_config(compose([*pairs, "name=earlier", "seed=7"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    ByteTokenizer().prepare(lambda: iter(())).save(folder / "tokenizer.json")
    words = [word for word in pairs if word != "tokenizer=byte"]
    found = figures(inspect, words, "name=earlier", "runs_dir=runs")
    assert found["tokenizer"] == "260 entries, runs/earlier/tokenizer.json"
    assert any("another configuration" in warning and "seed: 7 -> 0" in warning for warning in found["warnings"])
    assert len(list(folder.iterdir())) == 2, "nothing is written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_record=3"], "Unknown key max_record=3; did you mean max_records?"),
        (["n=many"], "n=many must be a whole number"),
        (["n=0", "max_steps=0"], "n=0 must be at least 1."),
        (["png=lengths.jpg"], "png=lengths.jpg must be a file name that ends in .png"),
        (["png=nowhere/lengths.png"], "there is no folder nowhere"),
        (["batch.global_sizes=3"], "did you mean batch.global_size?"),
        (["data.path=nowhere"], "nowhere"),
        (["task.source_column=fr"], "no column fr"),
        (["-m"], "--multirun"),
    ],
)
def test_what_cannot_be_done_is_refused(inspect: Inspect, words: list[str], message: str, tmp_path: Path) -> None:
    code, out, err = inspect("experiment=quickstart", *words)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_without_matplotlib_is_refused(inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = inspect("experiment=quickstart", "png=lengths.png")
    assert code == 2 and "pip install shardwright[plots]" in err


def test_arguments_are_split_between_the_command_and_hydra() -> None:
    own = ["n=3", "jsn=true", "png=a=b", "debug.traceback=true"]
    hydra = ["experiment=quickstart", "stepps=4", "tokenizer.max_records=5", "+data.n=1", "name=n", "data/x=y"]
    assert split_arguments([*own, *hydra]) == (own, hydra)


def test_help_needs_no_heavy_library() -> None:
    code = "import sys; from trainer.inspect.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "max_records=" in done.stdout and "experiment=quickstart" in done.stdout
