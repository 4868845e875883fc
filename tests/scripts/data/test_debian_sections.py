"""Package descriptions with their sections (scripts/data/debian_sections.py)."""

from debian_sections import deal, family, read_rows

PACKAGES = """\
Package: libexample2
Source: example2 (2.1-3)
Section: libs
Description-md5: aaa

Package: example-doc
Source: example3
Section: contrib/doc
Description-md5: bbb

Package: undescribed
Section: misc
"""
DESCRIPTIONS = {
    "aaa": "a library of examples\n It shows\n them.\n .\n  - one",
    "bbb": "manual of the examples\n Pages.",
}


def test_packages_get_their_description_and_section() -> None:
    rows = list(read_rows(PACKAGES, DESCRIPTIONS))
    text = "a library of examples\nIt shows them.\n- one"
    assert rows[0] == ("example0", {"text": text, "section": "libs", "package": "libexample2"})
    assert rows[1][1]["section"] == "doc"
    assert [key for key, _ in rows] == ["example0", "example0"]  # versions of one source


def test_a_source_of_another_name_is_another_family() -> None:
    assert family({"Package": "gcc-12"}) == family({"Package": "cpp", "Source": "gcc-13 (13.2)"}) == "gcc-0"
    assert family({"Package": "gcc-12"}) != family({"Package": "gccgo-12"})


def test_splits_share_neither_families_nor_texts() -> None:
    rows = [(f"family{n % 97}", {"text": f"Text {n % 800}", "section": "x", "package": str(n)}) for n in range(4000)]
    splits = deal(iter(rows))
    families = {row["package"]: key for key, row in rows}
    for name, others in (("test", ("train", "validation")), ("validation", ("train",))):
        for other in others:
            assert not {row["text"] for row in splits[name]} & {row["text"] for row in splits[other]}
            assert not {families[row["package"]] for row in splits[name]} & {
                families[row["package"]] for row in splits[other]
            }
    texts = [row["text"] for split in splits.values() for row in split]
    assert len(set(texts)) == len(texts) == 800
