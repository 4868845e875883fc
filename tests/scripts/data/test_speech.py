"""Sentences cut at their pauses (scripts/data/speech.py)."""

from speech import Piece, cut, places_of, sounds_of

LABELS = """#
0.10000 125 pau
0.20000 125 k
0.30000 125 oo
0.40000 125 tt
0.50000 125 pau
0.60000 125 i
0.70000 125 pp
0.80000 125 jj
0.90000 125 ooo
1.10000 125 s
1.20000 125 pau
"""


def test_sounds_become_letters() -> None:
    sounds = sounds_of(LABELS)
    assert "".join(sound or " " for _, _, sound in sounds) == " кVт VпйVс "  # noqa: RUF001
    assert sounds[1][:2] == (0.1, 0.2)


def test_a_sentence_is_cut_where_words_end_at_a_pause() -> None:
    """A sound too many and a letter too few do not move the border."""
    assert list(cut("Кот, и пёс", sounds_of(LABELS))) == [Piece("кот", 0.1, 0.4), Piece("и пёс", 0.5, 1.1)]


def test_a_pause_within_a_word_does_not_cut_it() -> None:
    assert list(cut("Которипёс", sounds_of(LABELS))) == [Piece("которипёс", 0.1, 1.1)]


def test_letters_and_sounds_side_by_side() -> None:
    assert places_of("abc", "abc") == [0, 1, 2, 3]
    assert places_of("abc", "axbc")[-1] == 3 and places_of("abc", "axbc")[0] == 0
    assert places_of("abcd", "ad") == [0, 1, 4] or places_of("abcd", "ad") == [0, 3, 4]
