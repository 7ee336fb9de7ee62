"""Text for people's terminals, in which nothing that was read from data, files or names commands.

Control characters and escape sequences can recolour, move and retitle what stands on a terminal,
and bidirectional overrides reorder it. They are shown instead. What scripts need stays: joiners,
and marks of direction.
"""

import re
import sys

# C0 and C1 controls with DEL; embeddings, overrides and isolates; halves of surrogate pairs, which
# stand for bytes of a file's name that are no text, and which no terminal can be sent.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OF_LAYOUT = re.compile("([\n\t])")
_MARKS = {"\n": "↵", "\t": "→", "\x7f": "␡"}


def visible(text: str) -> str:
    """One line in which unsafe characters, line ends among them, are seen and have no effect.

    Args:
        text: Text from anywhere.

    Returns:
        The text with C0 controls as their pictures (an escape is ␛), the end of a line as ↵, a tab
        as →, and other unsafe characters by their code, as U+202E.
    """
    return _UNSAFE.sub(lambda found: _mark(found[0]), text)


def show(text: str, *, error: bool = False) -> None:
    """Prints text whose line ends and tabs are this program's own; all else is made `visible`.

    Args:
        text: One or more lines.
        error: Whether they go to standard error.
    """
    parts = [part if part in ("\n", "\t") else visible(part) for part in _OF_LAYOUT.split(text)]
    print("".join(parts), file=sys.stderr if error else sys.stdout, flush=True)


def _mark(character: str) -> str:
    code = ord(character)
    if character in _MARKS:
        return _MARKS[character]
    return chr(0x2400 + code) if code < 0x20 else f"U+{code:04X}"
