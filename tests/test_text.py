"""Text on its way out: nothing that a terminal obeys, and nothing lost."""

from __future__ import annotations

import json
import sys
import unicodedata

import msgspec
import pytest
from hypothesis import given, strategies as st

from trio_wal._text import encodable, plain_json, printable

ANY = st.text(st.characters(codec=None, exclude_categories=()))


def test_what_is_printable_stays_as_it_is() -> None:
    text = "/data/žurnál [bold] \\x1b 日本 'quoted' 🙂"
    assert printable(text) is text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nOK: 1 segment", "a\\x0aOK: 1 segment"),
        ("\x7f", "\\x7f"),
        ("\x9b31m", "\\u009b31m"),
        ("\x85", "\\u0085"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\u202egol.2", "\\u202egol.2"),
        ("\u2066\u2069", "\\u2066\\u2069"),
        ("\xa0", "\\u00a0"),
        ("no\udcffne", "no\\xffne"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_is_not_printable_is_shown_by_its_number(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_every_code_point_comes_out_printable() -> None:
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(text)
    assert shown.isprintable()
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in shown)


@given(ANY)
def test_what_utf_8_cannot_hold_is_shown_and_all_else_stays(text: str) -> None:
    shown = encodable(text)
    shown.encode()
    if not any("\ud800" <= char <= "\udfff" for char in text):
        assert shown is text


@given(st.lists(st.text()))
def test_json_says_the_same_when_it_is_made_printable(texts: list[str]) -> None:
    line = msgspec.json.encode({"texts": texts})
    plain = plain_json(line)
    assert plain.decode().isprintable()
    assert json.loads(plain) == msgspec.json.decode(plain) == {"texts": texts}


def test_a_table_of_what_was_shown_does_not_grow_for_ever() -> None:
    from trio_wal._text import _TEXT

    for code in range(0x10000, 0x20000):
        printable(f"\n{chr(code)}")
    assert len(_TEXT) <= 0x10000
