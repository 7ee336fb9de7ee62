"""What each token of a sequence stands for in its text, so that any script can be read.

Tokens can split the bytes of a character, and what is read as one character can be several of
Unicode's: a letter and its accents, an emoji and its skin tone. Tokens that can be read only
together are a run. The first one of a run has the text of all, the others have "": so the texts of
all tokens, joined, are the sequence's text.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_UNREADABLE = "�"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ZERO_WIDTH_JOINER = "\u200d"
_FLAG_LETTERS = re.compile("[\U0001f1e6-\U0001f1ff]+$")
_END_LENGTH = 32
_CONTINUES = re.compile("[\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")  # joiner, skin, tags


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


class TokenTexts:
    """Reads the tokens of one tokenizer.

    Byte-level vocabularies (GPT-2, Llama 3) and SentencePiece's with byte fallback (Llama 2) are
    read byte by byte, others (WordPiece) as the tokenizer decodes a token behind another one.

    Args:
        tokenizer: A `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet() if self._decoded("Ġ") == " " else None
        self._falls_back_to_bytes = self._decoded("<0x41>") == "A"
        self._added = set(tokenizer.added_tokens_decoder)
        self._known: dict[int, bytes] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, "" for one that is read together with those before it.

        A space that SentencePiece puts before a text is kept. Bytes that are no character, as at
        the end of a sequence that was cut, are �.
        """
        runs: list[tuple[int, list[str]]] = []
        end = ""  # of the run so far
        for number, text in self._whole_characters(ids):
            if runs and _continues(end, text):
                runs[-1][1].append(text)
            else:
                runs.append((number, [text]))
                end = ""
            end = (end + text)[-_END_LENGTH:]
        texts = [""] * len(ids)
        for number, parts in runs:
            texts[number] = "".join(parts)
        return texts

    def _whole_characters(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """(number of the first token, text) of tokens that only together are whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        found: list[tuple[int, str]] = []
        is_whole = True
        for number, content in enumerate(map(self._bytes, ids)):
            if not is_whole and content and not 0x80 <= content[0] < 0xC0:  # it was cut there
                found[-1] = (found[-1][0], found[-1][1] + decoder.decode(b"", final=True))
                is_whole = True
            text = decoder.decode(content)
            if is_whole:
                found.append((number, text))
            else:
                found[-1] = (found[-1][0], found[-1][1] + text)
            is_whole = not decoder.getstate()[0]
        if not is_whole:
            found[-1] = (found[-1][0], found[-1][1] + decoder.decode(b"", final=True))
        return found

    def _bytes(self, number: int) -> bytes:
        """What a token adds to a text, in UTF-8."""
        if number not in self._known:
            token = self._tokenizer.convert_ids_to_tokens(number)
            self._known[number] = self._read(number, _UNREADABLE if token is None else token)
        return self._known[number]

    def _read(self, number: int, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte and self._falls_back_to_bytes:
            return bytes.fromhex(byte[1])
        if self._alphabet is not None:
            if number in self._added or any(one not in self._alphabet for one in token):
                return token.encode()
            return bytes(self._alphabet[one] for one in token)
        if "▁" in token:  # SentencePiece's space; decoded alone or in front it would be lost
            return token.replace("▁", " ").encode()
        if number in self._added:
            return token.encode()
        behind = self._decoded("a", token)
        return (behind[1:] if behind.startswith("a") else self._decoded(token)).encode()

    def _decoded(self, *tokens: str) -> str:
        return str(self._tokenizer.convert_tokens_to_string(list(tokens)))


def _continues(end: str, text: str) -> bool:
    """Whether a text is read as one character with the end of the one before it."""
    if not end or not text:
        return False
    if unicodedata.category(text[0]).startswith("M") or _CONTINUES.match(text):
        return True
    if _FLAG_LETTERS.match(text[0]):
        letters = _FLAG_LETTERS.search(end)
        return letters is not None and len(letters[0]) % 2 == 1
    return end.endswith(_ZERO_WIDTH_JOINER)
