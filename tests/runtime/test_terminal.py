"""Text for terminals: nothing in it acts, and what scripts need stays."""

import pytest

from ekfac_dist.runtime.terminal import show, visible

UNSAFE = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xDC9B]


def test_every_unsafe_character_is_seen_and_no_other_changes():
    for code in range(0x3000):
        assert (visible(chr(code)) == chr(code)) == (code not in UNSAFE), hex(code)
    assert visible("\x1b[31m\x07 \x7f \x9b \u202e") == "␛[31m␇ ␡ U+009B U+202E"
    assert visible("one\r\n\ttwo") == "one␍↵→two"


def test_bytes_of_a_name_that_are_no_text_are_shown():
    name = b"caf\xe9".decode(errors="surrogateescape")
    assert visible(name) == "cafU+DCE9"


@pytest.mark.parametrize("text", ["می\u200cخواهم", "👩\u200d👧", "क्\u200dष", "\u200eα\u200f"])
def test_joiners_and_marks_of_scripts_stay(text):
    assert visible(text) == text


@pytest.mark.parametrize("error", [False, True])
def test_what_is_shown_keeps_its_own_lines_and_tabs(capfd, error):
    show("a\tb\n\x1b[2Jc\x85\n", error=error)
    assert capfd.readouterr()[error] == "a\tb\n␛[2JcU+0085\n\n"
