"""The text of each token of a sequence, readable in any script.

Tokens can split the bytes of a character, and what is read as one character can be several Unicode
characters: a letter and its accents, an emoji and its skin tone. Tokens that can be read only
together are a run:

    tokens    "caf"  "e"  U+0301  " au"       U+0301 is the accent of the e
    texts     "caf"  "é"  ""      " au"       the first token of a run has the run's text

So the texts of all tokens, joined, are the sequence's text. Knows tokenizers and Unicode only.
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
_END_LENGTH = 32  # characters of a run that are looked at; only flag letters need more than one
_CONTINUES = re.compile("[\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")  # joiner, skin, tags


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + k): byte for k, byte in enumerate(others)}


class TokenTexts:
    """Gives the texts of one tokenizer's tokens.

    Tokens of byte-level vocabularies (GPT-2, Llama 3) and of SentencePiece with byte fallback
    (Llama 2) are read as bytes; others (WordPiece) as the tokenizer decodes a token that follows
    another one.

    Args:
        tokenizer: A `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet() if self._decoded("Ġ") == " " else None
        self._falls_back_to_bytes = self._decoded("<0x41>") == "A"
        self._added = set(tokenizer.added_tokens_decoder)
        self._bytes_of: dict[int, bytes] = {}

    def of(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; "" for one that is read together with those before it.

        The space that SentencePiece puts before a text is part of it. Bytes that are no character,
        such as at the end of a sequence that was cut, become �.

        Args:
            ids: The tokens of a sequence.
        """
        runs: list[tuple[int, list[str]]] = []
        run_end = ""  # the last characters of the current run
        for first, text in self._whole_characters(ids):
            if runs and _continues(run_end, text):
                runs[-1][1].append(text)
            else:
                runs.append((first, [text]))
                run_end = ""
            run_end = (run_end + text)[-_END_LENGTH:]
        texts = [""] * len(ids)
        for first, parts in runs:
            texts[first] = "".join(parts)
        return texts

    def _whole_characters(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """(index of the first token, text) of each piece of whole characters, in order.

        A piece is one token, or several that share the bytes of a character.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces: list[tuple[int, str]] = []
        is_whole = True
        for index, content in enumerate(map(self._bytes, ids)):
            if not is_whole and content and not 0x80 <= content[0] < 0xC0:
                # A character begins before the last one is complete: that one was cut off.
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + decoder.decode(b"", final=True))
                is_whole = True
            text = decoder.decode(content)
            if is_whole:
                pieces.append((index, text))
            else:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + text)
            is_whole = not decoder.getstate()[0]
        if not is_whole:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + decoder.decode(b"", final=True))
        return pieces

    def _bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, in UTF-8."""
        if token_id not in self._bytes_of:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            self._bytes_of[token_id] = self._read(token_id, _UNREADABLE if token is None else token)
        return self._bytes_of[token_id]

    def _read(self, token_id: int, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte and self._falls_back_to_bytes:
            return bytes.fromhex(byte[1])
        if self._alphabet is not None:
            if token_id in self._added or any(char not in self._alphabet for char in token):
                return token.encode()
            return bytes(self._alphabet[char] for char in token)
        if "▁" in token:  # SentencePiece's space, which decoding a first token would drop
            return token.replace("▁", " ").encode()
        if token_id in self._added:
            return token.encode()
        after_a = self._decoded("a", token)
        return (after_a[1:] if after_a.startswith("a") else self._decoded(token)).encode()

    def _decoded(self, *tokens: str) -> str:
        return str(self._tokenizer.convert_tokens_to_string(list(tokens)))


def _continues(end: str, text: str) -> bool:
    """Whether a text is read as one character together with the end of the text before it.

    Args:
        end: The last characters of the text before it.
        text: The text.
    """
    if not end or not text:
        return False
    if unicodedata.category(text[0]).startswith("M") or _CONTINUES.match(text):
        return True
    if _FLAG_LETTERS.match(text[0]):
        letters = _FLAG_LETTERS.search(end)
        return letters is not None and len(letters[0]) % 2 == 1
    return end.endswith(_ZERO_WIDTH_JOINER)
