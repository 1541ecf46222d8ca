"""Strings and numbers as they are shown: nothing invisible, nothing that a browser would act on."""

import html
import re
import unicodedata

import numpy as np
import pytest

from jaxinterp.report.text import count, finite, fixed, number, percent, plain, short_count, token_html


def seen(markup: str) -> str:
    """What a reader sees of a piece of HTML."""
    return html.unescape(re.sub(r"<span class=w>(.*?)</span>", r"\1", markup))


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", " the"),
        ("\n", "↵"),
        ("\n\n    ", "↵↵····"),
        ("\t\r", "⇥␍"),
        (" ", "·"),
        ("", "∅"),
        ("\x00\x07\x7f", "␀␇␡"),
        ("a\u200bb", "a\\u200bb"),
        ("\u202etxt", "\\u202etxt"),
        ("\ud800", "\\ud800"),
        ("\u00a0", "⍽"),
        ("\U000e0041", "\\U000e0041"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("é", "é"),
        ("</script>", "</script>"),
        ("&amp;", "&amp;"),
        (" " * 40, "···········…"),
    ],
)
def test_a_token_is_shown_with_nothing_hidden(token: str, shown: str) -> None:
    assert seen(token_html(token)) == shown


def test_a_token_alone_shows_its_spaces() -> None:
    assert seen(token_html(" the ", alone=True)) == "·the·"
    assert seen(token_html("a b", alone=True)) == "a b"


def test_markup_in_tokens_and_text_is_escaped() -> None:
    for text in ("</script><script>alert(1)</script>", "<!--", "\"'><img src=x onerror=y>", "a\n<b>"):
        for markup in (plain(text), re.sub(r"</?span[^>]*>", "", token_html(text))):
            assert not set("<>\"'") & set(markup), markup


def test_no_character_is_lost_or_left_invisible() -> None:
    for code in (*range(0x300), *range(0x2000, 0x2070), 0xFEFF, 0xFFFE, 0xE000, 0x10FFFF):
        shown = seen(token_html("x" + chr(code)))[1:]
        assert shown, hex(code)
        assert all(unicodedata.category(one) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} for one in shown), hex(
            code
        )


def test_numbers() -> None:
    assert [number(value) for value in (None, 0.0, 0.1234, -2.0, 1234.5, 3.2e-7, 1e7)] == [
        "–",
        "0",
        "0.123",
        "−2.00",
        "1,234",
        "3.20×10⁻⁷",
        "1.00×10⁷",
    ]
    assert [number(value) for value in (float("nan"), float("inf"), float("-inf"))] == ["NaN", "∞", "−∞"]
    assert fixed(-0.5, 2) == "−0.50" and fixed(None, 2) == "–"
    assert percent(0.829) == "82.9\u202f%" and percent(float("nan")) == "NaN"
    assert count(8192) == "8,192"
    assert [short_count(value) for value in (950, 200_000, 1_500_000, None)] == ["950", "200k", "1.5M", "–"]


def test_what_counts_as_a_finite_number() -> None:
    assert all(map(finite, (0, 1.5, np.float32(2), np.int64(3))))
    assert not any(map(finite, (None, float("nan"), float("inf"), "1", True, [1.0])))
