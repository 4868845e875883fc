"""Conversations and preferences made of packages (scripts/data/packages.py), and histories (interactions.py)."""

import io
import math
import os
import pickle

import pytest
from interactions import TableUnpickler, histories, popularity
from packages import Package, conversation, preferences, read_packages

PACKAGES = [
    Package(f"lib{number}", "lib", f"library number {number} of many", "libs", "https://example.org")
    for number in range(40)
]


def test_questions_alternate_with_the_facts_of_the_package() -> None:
    talks = [conversation(package)["messages"] for package in PACKAGES]
    for package, messages in zip(PACKAGES, talks, strict=True):
        assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert package.name in messages[0]["content"] and messages[1]["content"] == package.synopsis
        assert {one["content"] for one in messages[3::2]} <= {"libs", "https://example.org"}
    assert {len(messages) for messages in talks} == {2, 4, 6}


def test_the_rejected_answer_is_anothers_or_half_of_the_right_one() -> None:
    pairs = list(preferences(PACKAGES))
    assert {pair["kind"] for pair in pairs} == {"cut", "other"}
    synopses = {package.synopsis for package in PACKAGES}
    for pair in pairs:
        assert pair["chosen"] in synopses and pair["rejected"] != pair["chosen"]
        if pair["kind"] == "cut":
            assert pair["chosen"].startswith(pair["rejected"]) and pair["rejected"] == "library number"
        else:
            assert pair["rejected"] in synopses


def test_packages_are_read_from_the_lists_of_apt() -> None:
    class Lists:
        def lists(self, pattern: str) -> list[tuple[str, str]]:
            if "Translation" in pattern:
                return [("t", "Description-md5: 1\nDescription-en: good  tool\n long text\n\nDescription-md5: 2\n")]
            return [
                ("p", "Package: a\nSource: s (1)\nSection: net\nDescription-md5: 1\n\nPackage: b\nDescription-md5: 2")
            ]

    assert read_packages(Lists()) == [Package("a", "s", "good tool", "net", "")]


def test_histories_are_in_order_and_without_rare_films() -> None:
    ratings = [(1, 10 - film, film, f"film {film}") for film in range(5)]
    ratings += [(user, film, film, f"film {film}") for user in range(2, 6) for film in range(4)]
    people, titles = histories(ratings)
    assert titles == ["film 0", "film 1", "film 2", "film 3"], "film 4 has one rating"
    assert people == [[3, 2, 1, 0], *([[0, 1, 2, 3]] * 4)]


def test_the_popular_are_ranked_without_what_was_seen() -> None:
    train = [[0], [0], [0], [1], [1], [2]]
    found = popularity(train, [[0, 2], [1, 2], [0, 1]])
    assert found["recall@10"] == 1.0
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3) * 2 + 1) / 3)


def test_a_table_that_calls_anything_else_is_not_read() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"needs no posix\.getpid"):
        TableUnpickler(io.BytesIO(pickle.dumps(os.getpid))).load()
