"""Stages judge each record by itself: what they leave out, what they replace, and what they must leave alone."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import luhn

from trainer.build import build, check
from trainer.data.sources import column
from trainer.data.stages import Changed, NeedsPass, Removed, Stage, with_column
from trainer.data.stages.duplicates import ExactDuplicates, NearDuplicates
from trainer.data.stages.filters import Language, Length, LengthRatio
from trainer.data.stages.scrub import PersonalData
from trainer.errors import ConfigError, SetupError
from trainer.tasks import Record

ROOT = Path(__file__).resolve().parents[2]

ENGLISH = "The lights in the living room are switched off at midnight."
GERMAN = "Das Licht im Wohnzimmer wird um Mitternacht ausgeschaltet."
FRENCH = "La lumière du salon est éteinte tous les jours à minuit."

SCRUB = PersonalData(["text"])
SCRUB_REGIONS = PersonalData(["text"], regions=["DE", "US"])
LANGUAGE = Language({"text": "de"})


def ids(count: int) -> list[str]:
    return [f"part-000.jsonl:{offset}" for offset in range(count)]


def removed(stage: Stage, *records: Record) -> list[bool]:
    results = stage.apply(ids(len(records)), records)
    assert len(results) == len(records)
    return [isinstance(result, Removed) for result in results]


def scrubbed(text: str, stage: PersonalData = SCRUB) -> str:
    (result,) = stage.apply(ids(1), [{"text": text}])
    assert not isinstance(result, Removed)
    clean: str = (result.record if isinstance(result, Changed) else result)["text"]
    return clean


def finding_ids(stage: ExactDuplicates | NearDuplicates, shards: dict[str, Sequence[Any]]) -> set[str]:
    """Ids that a survey of texts in shards finds, after the finding has travelled and been adopted."""
    records = [
        (f"{name}:{offset}", {"text": text}) for name, texts in shards.items() for offset, text in enumerate(texts)
    ]
    stage.adopt(pickle.loads(pickle.dumps(stage.survey(iter(records)))))
    results = stage.apply([id for id, _ in records], [record for _, record in records])
    return {id for (id, _), result in zip(records, results, strict=True) if isinstance(result, Removed)}


# Columns


def test_a_changed_copy_shares_the_rest_and_leaves_the_record_alone():
    record = {"translation": {"en": "a", "de": "b"}, "a.b": "c", "n": [1]}
    copy = with_column(record, "translation.en", "x")
    assert copy == {"translation": {"en": "x", "de": "b"}, "a.b": "c", "n": [1]}
    assert record["translation"] == {"en": "a", "de": "b"}
    assert copy["n"] is record["n"]
    assert column(with_column(record, "a.b", "y"), "a.b") == "y"


@pytest.mark.parametrize("record", [{}, {"text": None}, {"text": 3}, {"text": ["bob@example.com"]}, {"other": "x"}])
def test_a_column_that_is_missing_or_no_text_is_left_to_the_task(record: Record):
    stages: list[Stage] = [Length("text"), LengthRatio("text", "other"), LANGUAGE, SCRUB]
    for duplicates in (ExactDuplicates(["text"]), NearDuplicates(["text"])):
        duplicates.adopt(duplicates.survey([("a:0", record), ("a:1", record)]))
        stages.append(duplicates)
    for stage in stages:
        result = stage.apply(["a:1"], [record])
        assert result == [record], stage.name


# Filters


def test_length_counts_characters_without_the_white_space_around():
    stage = Length("pair.en", min_characters=2, max_characters=4)
    texts = ["", " a  ", "ab", "日本語で", "abcde", "  abcd\n"]
    assert removed(stage, *({"pair": {"en": text}} for text in texts)) == [True, True, False, False, True, False]
    (result,) = stage.apply(ids(1), [{"pair": {"en": "abcde"}}])
    assert result == Removed("pair.en has 5 characters, more than max_characters=4")


@pytest.mark.parametrize(
    ("source", "target", "gone"),
    [
        ("abc", "abcdefghi", False),
        ("abc", "abcdefghij", True),
        ("abcdefghij", "abc", True),
        ("", "a", True),
        ("  ", "a", True),
        ("", "", False),
    ],
)
def test_length_ratio_is_of_the_longer_to_the_shorter_side(source: str, target: str, gone: bool):
    assert removed(LengthRatio("s", "t", max_ratio=3.0), {"s": source, "t": target}) == [gone]


def test_length_ratio_lets_short_pairs_pass():
    stage = LengthRatio("s", "t", max_ratio=3, min_characters=15)
    assert removed(stage, {"s": "OK", "t": "In Ordnung"}, {"s": "OK", "t": "Das ist so in Ordnung"}) == [False, True]


def test_language_keeps_its_own_and_short_texts():
    texts = [GERMAN, ENGLISH, FRENCH, "Turn on", "", GERMAN * 100]
    assert removed(LANGUAGE, *({"text": text} for text in texts)) == [False, True, True, False, False, False]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ja", "居間の照明は毎日真夜中に自動的に消灯されます。"),
        ("ru", "Свет в гостиной выключается каждый день в полночь."),
        ("ar", "يتم إطفاء الأنوار في غرفة المعيشة عند منتصف الليل كل يوم."),
        ("hi", "बैठक की बत्तियाँ हर दिन आधी रात को बंद कर दी जाती हैं।"),
        ("en", ENGLISH),
    ],
)
def test_language_tells_scripts_apart(code: str, text: str):
    assert removed(Language({"text": code}), {"text": text}, {"text": FRENCH}) == [False, True]


def test_language_looks_at_every_side_and_says_which_is_wrong():
    stage = Language({"pair.en": "en", "pair.de": "de"}, languages=["de", "en", "fr"], min_probability=0.5)
    good, swapped = {"pair": {"en": ENGLISH, "de": GERMAN}}, {"pair": {"en": ENGLISH, "de": ENGLISH}}
    assert removed(stage, good, swapped) == [False, True]
    (result,) = stage.apply(ids(1), [swapped])
    assert isinstance(result, Removed)
    assert result.reason.startswith("pair.de is de rather than en with probability 0.0")


def test_language_is_right_for_the_short_texts_of_a_user_interface():
    path = ROOT / "trainer/data/corpora/homeassistant_en_de/validation.jsonl.gz"
    pairs = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    pairs = [pair for pair in pairs if min(len(pair["en"]), len(pair["de"])) >= 20]
    right, swapped = Language({"en": "en", "de": "de"}), Language({"en": "de", "de": "en"})
    assert len(pairs) > 100
    assert np.mean(removed(right, *pairs)) < 0.02
    assert np.mean(removed(swapped, *pairs)) > 0.95


# Duplicates


def test_exact_duplicates_leave_out_every_later_copy():
    shards = {
        "https://host:8080/a.jsonl": ["Hello  World", "other", "hello world", ""],
        "b.jsonl": ["third", "\thello\nWORLD ", "OTHER", None, "Straße", "STRASSE", "", "lone \ud800"],
        "c.jsonl": [None, "unique", "lone \ud800"],
    }
    assert finding_ids(ExactDuplicates(["text"]), shards) == {
        "https://host:8080/a.jsonl:2",
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:5",
        "b.jsonl:6",
        "c.jsonl:2",
    }


def test_exact_duplicates_compare_all_columns_together():
    stage = ExactDuplicates(["t.en", "t.de"])
    pairs = [("a b", "c"), ("a", "b c"), ("A B", " c"), ("a b", "d"), ("c", "a b")]
    finding = stage.survey((f"s:{index}", {"t": {"en": en, "de": de}}) for index, (en, de) in enumerate(pairs))
    assert {shard: offsets.tolist() for shard, offsets in finding.items()} == {"s": [2]}


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), max_size=6))
def test_exact_duplicates_keep_exactly_the_first_of_each(shards: list[list[str]]):
    seen: set[str] = set()
    later = set()
    for index, texts in enumerate(shards):
        for offset, text in enumerate(texts):
            if text in seen:
                later.add(f"shard-{index}:{offset}")
            seen.add(text)
    assert finding_ids(ExactDuplicates(["text"]), {f"shard-{i}": texts for i, texts in enumerate(shards)}) == later


def test_a_survey_of_part_of_the_records_keeps_their_offsets():
    """Bad lines and what earlier stages removed are not there, but count."""
    records = [
        ("a:0", "one"),
        ("a:3", "One"),
        ("a:9", "two"),
        ("b:2", "ONE"),
        ("b:5000000000", "two"),
        ("b:7", "three"),
    ]
    found = ExactDuplicates(["text"]).survey((id, {"text": text}) for id, text in records)
    assert {shard: offsets.tolist() for shard, offsets in found.items()} == {"a": [3], "b": [2, 5000000000]}


def similar_pair(rng: random.Random, jaccard: float, size: int = 200) -> tuple[str, str]:
    """Two texts of `size` different words whose sets of words have this similarity."""
    shared = round(2 * size * jaccard / (1 + jaccard))
    words = [f"w{number}" for number in rng.sample(range(10**9), 2 * size - shared)]
    return " ".join(words[:size]), " ".join(words[size - shared :])


@pytest.mark.parametrize(
    ("jaccard", "threshold", "expected"), [(0.95, 0.8, 50), (0.65, 0.8, 0), (0.65, 0.5, 50), (0.3, 0.5, 0)]
)
def test_near_duplicates_go_by_the_similarity_of_shingles(jaccard: float, threshold: float, expected: int):
    rng = random.Random(7)
    first, second = zip(*(similar_pair(rng, jaccard) for _ in range(50)), strict=True)
    stage = NearDuplicates(["text"], threshold=threshold, num_perm=256, shingle=1)
    found = finding_ids(stage, {"a": first, "b": second})
    assert all(id.startswith("b:") for id in found), "the first stays"
    assert len(found) == expected


def test_near_duplicates_of_sentences_and_of_scripts_without_spaces():
    texts = [
        "Please restart Home Assistant to apply the changes that you have made to the configuration file.",
        "Please restart Home Assistant to apply the changes that you have made to the configuration file!",
        "Open the settings and choose a language for the interface of your household and its members.",
        "設定ファイルに加えた変更を適用するには、ホームアシスタントを再起動してください。",
        "設定ファイルに加えた変更を適用するには、ホームアシスタントを再起動してください",
        "short",
        "short",
        "",
    ]
    assert finding_ids(NearDuplicates(["text"], unit="characters"), {"s": texts}) == {"s:1", "s:4", "s:6"}


def test_every_near_duplicate_resembles_one_that_stays():
    """A chain a ~ b ~ c where a and c differ: b goes, c stays, for it is like nothing that is left."""
    words = [f"w{number}" for number in range(140)]
    chain = [" ".join(words[begin : begin + 100]) for begin in (0, 10, 40)]
    assert finding_ids(NearDuplicates(["text"], threshold=0.7, shingle=1), {"s": chain}) == {"s:1"}


def test_near_duplicates_are_the_same_in_every_run_and_keep_columns_apart():
    rng = random.Random(3)
    texts = [text for jaccard in np.linspace(0.6, 0.95, 40) for text in similar_pair(rng, float(jaccard), 60)]
    found = [finding_ids(NearDuplicates(["text"], shingle=1), {"s": texts}) for _ in range(2)]
    assert found[0] == found[1] and 10 < len(found[0]) < 30
    stage = NearDuplicates(["a", "b"], shingle=1)
    swapped = [{"a": texts[0], "b": texts[-1]}, {"a": texts[-1], "b": texts[0]}]
    assert stage.survey((f"s:{index}", record) for index, record in enumerate(swapped)) == {}


# Personal data


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Mail bob@example.com, now.", "Mail <email>, now."),
        ("<bob.smith+tag@mail.example.co.uk>", "<<email>>"),
        ("mailto:o'brien_1@my-host.org?subject=x", "mailto:<email>?subject=x"),
        ("?email=bob@example.com&x", "?email=<email>&x"),
        ("邮箱bob@example.com。", "邮箱<email>。"),
        ("連絡先はbob@example.co.jpまで", "連絡先は<email>まで"),
        ("tanaka@例え.jpへ", "<email>へ"),
        ("Пишите на почта@пример.рф!", "Пишите на <email>!"),
        ("jürgen@müller.de und user@xn--80ak6aa92e.xn--p1ai", "<email> und <email>"),
    ],
)
def test_email_addresses_are_replaced(text: str, clean: str):
    assert scrubbed(text) == clean


@pytest.mark.parametrize(
    "text", ["@bob and a@b", "react@18.2.0", "5 apples @ 2 each", "def f(): ...  @property", "x@.y"]
)
def test_at_signs_that_are_no_email_stay(text: str):
    assert scrubbed(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("from 192.168.0.1:80 to 8.8.8.8.", "from <ip>:80 to <ip>."),
        ("10.0.0.1-10.0.0.9, 10.0.0.0/8", "<ip>-<ip>, <ip>/8"),
        ("地址8.8.8.8。http://1.2.3.4/x", "地址<ip>。http://<ip>/x"),
        ("at 2001:db8::1, or [2001:DB8::2]:443.", "at <ip>, or [<ip>]:443."),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334.", "<ip>."),
        ("1:2:3:4:5:6:7:8 and ::1", "<ip> and <ip>"),
        ("fe80::1%eth0 inet6:fe80::2/64 ip:2001:db8::9: up", "<ip> inet6:<ip>/64 ip:<ip>: up"),
        ("::ffff:192.0.2.1 ::ffff:c000:201 64:ff9b::8.8.8.8", "<ip> <ip> <ip>"),
        ("2001:db8::/32 and 17:fe80::3", "<ip>/32 and 17:<ip>"),
    ],
)
def test_ip_addresses_are_replaced(text: str, clean: str):
    assert scrubbed(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3, v1.2.3.4, 1.2.3.4.5 and 10.1.2.3rc1",
        "256.1.1.1 or 1.2.3.400 or 192.168.001.001",
        "at 12:30:45 on 2024-01-15T12:30:45",
        "a[::2] a[1::2] a[0:1::2] a[::-1]",
        "std::abc1 crate::a1::b2 f :: Int dead::beef",
        "00:1A:2B:3C:4D:5E",
        "1:2:3:4:5:6:7 ratio 3:2:1",
    ],
)
def test_versions_times_and_slices_are_no_ip_addresses(text: str):
    assert scrubbed(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("4111 1111 1111 1111", "<card>"),
        ("5500-0000-0000-0004,4111111111111111;", "<card>,<card>;"),
        ("Amex 3782 822463 10005, 378282246310005", "Amex <card>, <card>"),
        ("Diners 30569309025904 (3056 930902 5904)", "Diners <card> (<card>)"),
        ("Visa 4222222222222, 2-series 2223003122003222", "Visa <card>, 2-series <card>"),
        ("4111 1111 1111 1111 12/27, no. 12 6011 1111 1111 1117", "<card> 12/27, no. 12 <card>"),
        ("4111 1111 1111 1111 5500 0000 0000 0004", "<card> <card>"),
        ("カード番号は4111\u00a01111\u00a01111\u00a01111です", "カード番号は<card>です"),
    ],
)
def test_card_numbers_are_replaced(text: str, clean: str):
    assert scrubbed(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "order 4111 1111 1111 1112",
        "ISBN 9780306406157 and 978-0-306-40615-7",
        "from 2024-01-15 2024-02-20 to 31-12-2024 01-01-2025",
        "20240115 20240220 and 1700000000000",
        "id 41111111111111111111111 and x4111111111111111 and 4111111111111111a",
        "550e8400-e29b-41d4-4111-111111111111",
        "sizes 4111 11 1111 11 1111",
        "0.4111111111111111 and 4111111111111111.5",
        "0000 0000 0000 0000",
    ],
)
def test_other_long_numbers_are_no_cards(text: str):
    assert scrubbed(text) == text


@pytest.mark.parametrize(
    ("text", "clean", "clean_with_regions"),
    [
        ("call +49 30 12345678.", "call <phone>.", "call <phone>."),
        ("+1 (650) 253-0000, +44 20 8765 4321", "<phone>, <phone>", "<phone>, <phone>"),
        ("電話は+81 3-1234-5678まで", "電話は<phone>まで", "電話は<phone>まで"),
        ("Tel. 089 1234567 oder", "Tel. 089 1234567 oder", "Tel. <phone> oder"),
        ("(650) 253-0000 today", "(650) 253-0000 today", "<phone> today"),
        ("0049 30 12345678", "0049 30 12345678", "<phone>"),
        ("on 2024-01-15 at 12:30:45, 15/01/2024", None, None),
        ("pi is 3.14159265, +5 points, +1234 or 2 + 2 = 4", None, None),
        ("build 20240115.1 of abc8005001234", None, None),
    ],
)
def test_phone_numbers_are_replaced(text: str, clean: str | None, clean_with_regions: str | None):
    assert scrubbed(text) == (text if clean is None else clean)
    assert scrubbed(text, SCRUB_REGIONS) == (text if clean_with_regions is None else clean_with_regions)


def test_a_changed_record_is_a_copy_with_a_count():
    stage = PersonalData(["t.en", "t.de", "t.fr"], kinds=["email", "ip"], replacement="[{kind}]")
    record = {"t": {"en": "a@b.org and c@d.org", "de": "8.8.8.8, +49 30 12345678", "fr": None}, "n": 1}
    (result,) = stage.apply(ids(1), [record])
    assert result == Changed({"t": {"en": "[email] and [email]", "de": "[ip], +49 30 12345678", "fr": None}, "n": 1}, 3)
    assert record["t"]["en"] == "a@b.org and c@d.org"
    untouched = {"t": {"en": "nothing", "de": "12", "fr": "x"}}
    assert stage.apply(ids(1), [untouched])[0] is untouched


PLAIN = st.text(st.characters(exclude_categories=("Nd", "No", "Nl", "Cs"), exclude_characters="@"), max_size=30)
PIECES = st.sampled_from(
    [
        "a@b.co",
        "@",
        "+49 30 12345678",
        "8.8.8.8",
        "1.",
        "2001:db8::1",
        "::",
        ":",
        "4111 1111 1111 1111",
        "0",
        "x",
        " ",
        "-",
    ]
)


@given(st.lists(PIECES | PLAIN, max_size=12).map("".join), st.sampled_from(["<{kind}>", "", "{kind}", ":", ".", "-"]))
@settings(max_examples=150)
def test_scrubbing_twice_is_scrubbing_once(text: str, replacement: str):
    stage = PersonalData(["text"], regions=["DE"], replacement=replacement)
    once = scrubbed(text, stage)
    assert scrubbed(once, stage) == once


@given(PLAIN)
def test_text_without_digits_and_at_signs_stays(text: str):
    record = {"text": text}
    assert SCRUB_REGIONS.apply(ids(1), [record])[0] is record


def cards() -> st.SearchStrategy[str]:
    def spell(issuer: str, rest: str, separator: str) -> str:
        number = issuer + rest + luhn.calc_check_digit(issuer + rest)
        return separator.join(number[begin : begin + 4] for begin in range(0, len(number), 4))

    issuers, digits = (
        st.sampled_from(["4", "51", "2221", "34", "6011"]),
        st.text("0123456789", min_size=11, max_size=14),
    )
    return st.builds(spell, issuers, digits, st.sampled_from(["", " ", "-"]))


NAMES = st.from_regex(r"[a-z0-9][a-z0-9._%+-]{0,30}", fullmatch=True)
DOMAINS = st.from_regex(r"([a-z0-9][a-z0-9-]{0,10}\.){1,3}[a-z]{2,8}", fullmatch=True)
GLOBAL_V6 = st.ip_addresses(network="2000::/3")
PLANTED = {
    "email": st.builds("{}@{}".format, NAMES, DOMAINS),
    "ip": st.ip_addresses(v=4).map(str) | GLOBAL_V6.map(str) | GLOBAL_V6.map(lambda address: address.exploded),
    "card": cards(),
}


@pytest.mark.parametrize("kind", PLANTED)
@given(data=st.data())
@settings(max_examples=100)
def test_what_is_planted_is_found(kind: str, data: st.DataObject):
    before, planted, after = data.draw(PLAIN), data.draw(PLANTED[kind]), data.draw(PLAIN)
    assert scrubbed(f"{before} {planted} {after}") == f"{before} <{kind}> {after}"


# All of them


def test_results_do_not_depend_on_the_batch():
    texts = [GERMAN, ENGLISH, "", "bob@example.com", "call +49 30 12345678", "a b c", GERMAN, "A B  C", FRENCH * 3]
    records: list[Record] = [{"text": text, "other": "abc"} for text in texts]
    stages: list[Stage] = [Length("text", 2, 100), LengthRatio("text", "other"), LANGUAGE, SCRUB]
    for duplicates in (ExactDuplicates(["text"]), NearDuplicates(["text"])):
        assert isinstance(duplicates, NeedsPass)
        duplicates.adopt(duplicates.survey(zip(ids(len(records)), records, strict=True)))
        stages.append(duplicates)
    for stage in stages:
        whole = stage.apply(ids(len(records)), records)
        places = list(zip(ids(len(records)), records, strict=True))
        alone = [stage.apply([id], [record])[0] for id, record in reversed(places)]
        assert whole == alone[::-1], stage.name
        assert any(result is not record for result, record in zip(whole, records, strict=True)), stage.name
        assert stage.apply([], []) == []


def test_only_the_duplicates_need_a_pass():
    assert not any(isinstance(stage, NeedsPass) for stage in (SCRUB, LANGUAGE, Length("a"), LengthRatio("a", "b")))


def test_stages_are_built_from_a_configuration():
    part = {"_target_": "trainer.data.stages.filters.LengthRatio", "source_column": "en", "target_column": "de"}
    assert isinstance(build(part, "data.stages.0"), LengthRatio)
    (problem,) = check({**part, "max_ratios": 3}, "data.stages.0", ())
    assert "did you mean data.stages.0.max_ratio?" in problem
    part = {"_target_": "trainer.data.stages.scrub.PersonalData", "columns": ["text"], "kinds": ["card"]}
    assert isinstance(build(part, "data.stages.0"), PersonalData)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Length("a", min_characters=-1), "min_characters=-1"),
        (lambda: Length("a", 5, 4), "max_characters=4 leaves nothing"),
        (lambda: LengthRatio("a", "b", max_ratio=0.5), "max_ratio=0.5"),
        (lambda: LengthRatio("a", "b", max_ratio=float("nan")), "max_ratio=nan"),
        (lambda: LengthRatio("a", "a"), "names a column twice"),
        (lambda: Language({}), "names no column"),
        (lambda: Language({"a": "de"}, min_probability=0), "min_probability=0"),
        (lambda: Language({"a": "de"}, min_probability=0.8), "min_probability=0.8"),
        (lambda: Language({"a": "german"}), "'german' (of a) is not known; use one of ace, af"),
        (lambda: Language({"a": False}), "in YAML, quote it: 'no'"),
        (lambda: Language({"a": "de"}, languages=["en"]), "languages=['en'] lacks de, the language of a"),
        (lambda: ExactDuplicates([]), "names no column"),
        (lambda: NearDuplicates(["a"], threshold=1.0), "use ExactDuplicates"),
        (lambda: NearDuplicates(["a"], threshold=0.99, num_perm=16), "num_perm=16 is too few for threshold=0.99"),
        (lambda: NearDuplicates(["a"], num_perm=2), "num_perm=2"),
        (lambda: NearDuplicates(["a"], shingle=0), "shingle=0"),
        (lambda: NearDuplicates(["a"], unit="lines"), "unit=lines"),
        (lambda: PersonalData(["a"], kinds=["e-mail"]), "did you mean email?"),
        (lambda: PersonalData(["a"], kinds=[]), "kinds=[]"),
        (lambda: PersonalData(["a"], regions=["de"]), "regions: de is no country code"),
        (lambda: PersonalData(["a"], replacement="x@example.com"), "replacement=x@example.com"),
    ],
)
def test_values_that_cannot_be_are_refused(make: Callable[[], Stage], words: str):
    with pytest.raises(ConfigError) as refusal:
        make()
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("py3langid.langid", lambda: Language({"a": "de"})),
        ("datasketch", lambda: NearDuplicates(["a"])),
        ("stdnum.luhn", lambda: PersonalData(["a"], kinds=["card"])),
        ("phonenumbers", lambda: PersonalData(["a"], kinds=["phone"])),
    ],
)
def test_a_missing_library_is_told_with_the_cure(
    module: str, make: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SetupError, match=r"pip install shardwright\[filters\]"):
        make()
    PersonalData(["a"], kinds=["email", "ip"])
    ExactDuplicates(["a"])
