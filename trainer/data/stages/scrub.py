"""A stage that replaces personal data in texts: e-mail addresses, IP addresses, card numbers, phone numbers.

What is found is a matter of form, so both errors occur. Where they conflict: a number that could be a card is one, a
dotted quad is an address and not a version; but ids, dates, times, decimals and slices of arrays stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from trainer.data.stages import Changed, Removed, check_columns, require, text_of, with_column
from trainer.errors import ConfigError
from trainer.tasks import Record
from trainer.wording import did_you_mean

Span = tuple[int, int]

KINDS = ("email", "ip", "card", "phone")
"""In the order of replacement: the stricter the form, the earlier."""

_CAN_MATTER = re.compile(r"[@\d]")
_SIX_DIGITS = re.compile(r"(?:\d[\W_]{0,4}){6}")
"""Fewer, wider apart or among letters, are no subscriber's number."""

# Letters of the scripts with spaces between words, as far as they matter in addresses (Latin, Greek, Cyrillic,
# Armenian). Chinese, Japanese or Thai text touches an address on both sides and must not become a part of it; within
# an address, every letter may stand.
_LETTER = "A-Za-z\u00c0-\u058f\u1e00-\u1fff"
_EMAIL = re.compile(
    rf"[{_LETTER}0-9_][{_LETTER}0-9_.%+&'-]{{0,63}}@"
    rf"(?:[\w-]{{1,63}}\.)+(?:xn--[A-Za-z0-9-]{{2,59}}|[{_LETTER}]{{2,63}})"
)

_IPV4 = re.compile(r"(?<!\w)(?<!\d\.)(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
_IPV6 = re.compile(
    r"(?:(?<![\w:.])|(?<=\w:)(?=[0-9A-F]))"  # at a border, or behind a label as in "ip:2001:db8::1"
    r"(?P<run>[0-9A-F:.]++)(?:%\w++|(?!%\w))(?!\w)",
    re.ASCII | re.IGNORECASE,
)

# Groups are not matched possessively: Python before 3.11.5 then finds too little (gh-106052).
_DIGITS = re.compile(r"[0-9]+")
_CARD_RUN = re.compile(  # groups of digits with one kind of separator, no part of a longer id or of a decimal
    r"(?<!\w)(?<!\w-)(?<!\d\.)\d{4,}+"
    r"(?:(?P<separator>[ \u00a0-])\d++(?:(?P=separator)\d++)*(?!(?P=separator)\d)|(?![ \u00a0-]\d))(?!-?\w|\.\d)",
    re.ASCII,
)
_CARD_ISSUER = re.compile(r"[3-6]|2[2-7]")


class PersonalData:
    """Replaces personal data in texts, `bob@example.com` by `<email>`; removes no record. Twice does what once does.

    email: letters of Latin, Greek and Cyrillic, no quoted names. ip: version 4, and version 6 in all its forms but for
    compressed ones that nobody is assigned (`::2` and `1::2` are slices more often than hosts). card: 13 to 19 digits
    of a payment card's issuer (ISO/IEC 7812-1, first digits 22 to 27 and 3 to 6), in groups of four or more, with
    Luhn's check digit (annex B there); of all other such numbers one in ten passes too. phone: as `phonenumbers`
    (Google's libphonenumber) finds them, valid numbers in international form and in the forms of `regions`.
    """

    name = "personal_data"

    def __init__(
        self,
        columns: Sequence[str],
        kinds: Sequence[str] = KINDS,
        regions: Sequence[str] = (),
        replacement: str = "<{kind}>",
    ) -> None:
        """Raises ConfigError, or SetupError where a library is missing.

        columns: dotted paths; kinds: of email, ip, card, phone; regions: countries (DE, US ...) whose national forms of
        phone numbers are known, besides +49 ...; replacement: what comes in the place, {kind} is what was there.
        """
        check_columns("PersonalData", columns)
        problems = [
            f"PersonalData: kinds: {kind} is not known{did_you_mean(kind, KINDS)} Use {', '.join(KINDS)}."
            for kind in kinds
            if kind not in KINDS
        ]
        if not kinds:
            problems.append("PersonalData: kinds=[] replaces nothing; name one, or leave the stage out.")
        if _CAN_MATTER.search(replacement):
            problems.append(
                f"PersonalData: replacement={replacement} has a digit or an @ and could be taken for what it replaces;"
                " use words, such as <{kind}>."
            )
        if regions and "phone" in kinds:
            supported = require("phonenumbers", "phonenumbers").SUPPORTED_REGIONS
            problems += [
                f"PersonalData: regions: {region} is no country code of two capitals; write DE, US, JP ..."
                for region in regions
                if region not in supported
            ]
        if problems:
            raise ConfigError(*problems)
        finders = {"email": _emails, "ip": _ips}
        if "card" in kinds:
            finders["card"] = partial(_cards, require("stdnum.luhn", "python-stdnum").is_valid)
        if "phone" in kinds:
            library = require("phonenumbers", "phonenumbers")
            finders["phone"] = partial(_phones, library.PhoneNumberMatcher, tuple(regions))
        self._columns = tuple(columns)
        self._finders: list[tuple[Callable[[str], Iterable[Span]], str]] = [
            (finders[kind], replacement.replace("{kind}", kind)) for kind in KINDS if kind in kinds
        ]

    def apply(self, ids: Sequence[str], records: Sequence[Record]) -> list[Record | Changed | Removed]:
        """See `Stage`."""
        return [self._clean(record) for record in records]

    def _clean(self, record: Record) -> Record | Changed:
        result, total = record, 0
        for path in self._columns:
            text = text_of(result, path)
            if text is not None and _CAN_MATTER.search(text):
                clean, count = self._scrub(text)
                if count:
                    result, total = with_column(result, path, clean), total + count
        return Changed(result, total) if total else record

    def _scrub(self, text: str) -> tuple[str, int]:
        """The text, and how many places were replaced. A replacement can uncover another: repeated until none is left.

        That ends, as each takes a digit or an @ away and brings none.
        """
        total, count = 0, 1
        while count:
            count = 0
            for find, replacement in self._finders:
                spans = _merged(find(text))
                if spans:
                    text, count = _replaced(text, spans, replacement), count + len(spans)
            total += count
        return text, total


def _merged(spans: Iterable[Span]) -> list[Span]:
    """In order, overlapping ones made one."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _replaced(text: str, spans: Iterable[Span], replacement: str) -> str:
    parts, place = [], 0
    for begin, end in spans:
        parts += [text[place:begin], replacement]
        place = end
    return "".join((*parts, text[place:]))


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield match.span()


def _ips(text: str) -> Iterator[Span]:
    if text.count(":") >= 2:
        for match in _IPV6.finditer(text):
            begin, end = match.span("run")
            behind_label = text.find(":", begin) + 1  # "12:fe80::1" may be a line's number and an address
            for start in (begin, behind_label):
                length = _ipv6_length(text[start:end])
                if length:
                    yield start, match.end() if start + length == end else start + length
                    break
    if text.count(".") >= 3:
        for match in _IPV4.finditer(text):
            if _address(IPv4Address, match.group()):
                yield match.span()


def _ipv6_length(run: str) -> int:
    """Characters of the address that `run`, a text of hexadecimal digits, colons and full stops, begins with; or 0."""
    while run.count(":") >= 2:
        address = _address(IPv6Address, run)
        if address is not None:
            whole = "::" not in run or "." in run
            assigned = not address.is_reserved or address.is_loopback or address.ipv4_mapped is not None
            return len(run) if (whole or assigned) and _DIGITS.search(run) else 0
        if run[-1] not in ".:":
            return 0
        run = run[:-1]  # of the sentence
    return 0


def _address(family: Callable[[str], Any], text: str) -> Any:
    try:
        return family(text)
    except ValueError:
        return None


def _cards(luhn: Callable[[str], bool], text: str) -> Iterator[Span]:
    for run in _CARD_RUN.finditer(text):
        groups = [match.span() for match in _DIGITS.finditer(text, *run.span())]
        first = 0
        while first < len(groups):
            behind = _card_end(luhn, [text[begin:end] for begin, end in groups[first : first + 5]])
            if behind:
                yield groups[first][0], groups[first + behind - 1][1]
            first += behind or 1


def _card_end(luhn: Callable[[str], bool], groups: Sequence[str]) -> int:
    """How many of the groups, from the first on, are a card's number; the longest that can be, or 0."""
    number, best = "", 0
    for count, group in enumerate(groups, start=1):
        number += group
        if len(number) > 19:
            break
        if len(number) >= 13 and _CARD_ISSUER.match(number) and luhn(number):
            best = count
        if len(group) < 4:  # only the last group of a card is that short; dates have such
            break
    return best


def _phones(matcher: Callable[[str, str | None], Iterable[Any]], regions: Sequence[str], text: str) -> Iterator[Span]:
    if _SIX_DIGITS.search(text) and (regions or "+" in text or "\uff0b" in text):
        for region in regions or (None,):
            for match in matcher(text, region):
                yield match.start, match.end
