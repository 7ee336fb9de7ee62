"""Prints text on a terminal without letting characters from data or file names control it.

Control characters and escape sequences can recolour, move or retitle what a terminal shows, and
bidirectional overrides can reorder it, so visible symbols are printed in their place. Joiners and
directional marks stay, since many writing systems need them.
"""

import re
import sys

# C0 and C1 controls with DEL; bidirectional embeddings, overrides and isolates; lone surrogates,
# which stand for undecodable bytes of a file name and cannot be encoded for a terminal.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LAYOUT = re.compile("([\n\t])")
_MARKS = {"\n": "↵", "\t": "→", "\x7f": "␡"}


def visible(text: str) -> str:
    """Text as a single line, with unsafe characters replaced by visible symbols.

    Args:
        text: Any text.

    Returns:
        The text with C0 controls as their control pictures (an escape is ␛), a line end as ↵, a
        tab as →, and other unsafe characters as their code, such as U+202E.
    """
    return _UNSAFE.sub(lambda match: _mark(match[0]), text)


def show(text: str, *, error: bool = False) -> None:
    """Prints text; line ends and tabs take effect, other unsafe characters are made `visible`.

    Args:
        text: One or more lines.
        error: Whether to print to standard error instead of standard output.
    """
    parts = [part if part in ("\n", "\t") else visible(part) for part in _LAYOUT.split(text)]
    print("".join(parts), file=sys.stderr if error else sys.stdout, flush=True)


def _mark(character: str) -> str:
    code = ord(character)
    if character in _MARKS:
        return _MARKS[character]
    return chr(0x2400 + code) if code < 0x20 else f"U+{code:04X}"
