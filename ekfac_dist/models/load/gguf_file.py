"""GGUF files: where one is, and whether all of it is there.

`transformers` reads the weights, with the package `gguf`; a file that was cut short would fail in
the middle of that, with an error about array shapes. So the table of tensors, at the file's
beginning, is compared with the file's size first. Layout (version 2 and 3, little-endian):

    "GGUF"  version u32  number of tensors u64  number of entries u64
    entries   key (string), type u32, value
    tensors   name (string), number of dimensions u32, each u64, type u32, offset u64
    data      from the next multiple of `general.alignment` (32 if there is no such entry)

A string is its length in bytes, u64, and its bytes; an array is its elements' type u32, their
number u64, and the elements.
"""

import copy
import functools
import importlib.util
import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, modeling_gguf_pytorch_utils
from transformers.utils import cached_file

from ekfac_dist.config import ModelConfig
from ekfac_dist.errors import ModelError, first_line

_STRING, _ARRAY = 8, 9
# The format of each type of number, for `struct`.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = "general.alignment"


def gguf_path(config: ModelConfig) -> Path:
    """The configured GGUF file on this machine's disk; one of the hub is downloaded first.

    Args:
        config: The model's configuration, with `gguf`.

    Raises:
        ModelError: If there is no such file, it is no whole GGUF file, or the package `gguf` is not
            installed.
    """
    assert config.name is not None
    assert config.gguf is not None
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.gguf ({config.gguf}) needs the package gguf; install it: "
            "pip install 'ekfac_dist[gguf]'."
        )
    directory = Path(config.name)
    if directory.is_dir():
        path = directory / config.gguf
        if not path.is_file():
            others = sorted(file.name for file in directory.glob("*.gguf"))
            raise ModelError(
                f"There is no file {config.gguf} in {directory}; it holds "
                f"{', '.join(others) or 'no .gguf file'}. Set model.gguf to a file that is there."
            )
    else:
        try:
            found = cached_file(config.name, config.gguf, revision=config.revision)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The file {config.gguf} of model {config.name} could not be had: "
                f"{first_line(error)}."
            ) from error
        path = Path(str(found))
    require_whole(path)
    return path.absolute()


def settings_in(path: Path) -> Any:
    """The `transformers` configuration that a GGUF file describes.

    It is kept, for the file's vocabulary is read with it, which takes seconds.
    """
    return copy.deepcopy(_settings_in(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _settings_in(path: Path, changed_ns: int) -> Any:
    return AutoConfig.from_pretrained(path.parent, gguf_file=str(path))


def dequantising(settings: Any) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` with which a GGUF file's weights become plain ones.

    Args:
        settings: The model's configuration, from `settings_in`.
    """
    arguments: dict[str, Any] = {"config": settings}
    if hasattr(transformers, "GgufConfig"):  # in versions that can also leave weights as they are
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return arguments


def forget_quantisation(model: Any) -> None:
    """Removes from a model what tells of its GGUF file, and would keep it from being saved."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if name in vars(owner):
            delattr(owner, name)


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Context in which no worker shows the bar with which `transformers` reads a GGUF file.

    It heeds none of the library's settings about progress bars.
    """
    reader: Any = modeling_gguf_pytorch_utils
    bar = reader.tqdm
    reader.tqdm = lambda tensors, **options: tensors
    try:
        yield
    finally:
        reader.tqdm = bar


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's files are in a directory; else a GGUF file's own is used."""
    return (directory / "tokenizer.json").is_file() or (directory / "tokenizer.model").is_file()


def require_whole(path: Path) -> None:
    """Refuses a file that is no GGUF file, or is shorter than its table of tensors says.

    Raises:
        ModelError: If it is refused, or cannot be read.
    """
    try:
        size = path.stat().st_size
        needed = _needed_bytes(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is no GGUF file of version 2 or 3 ({first_line(error)}); give one that is, or "
            "copy it again."
        ) from error
    except (struct.error, IndexError, OverflowError) as error:
        raise ModelError(
            f"{path} ends, after {size} bytes, before its table of tensors does; copy or download "
            "it again."
        ) from error
    if size < needed:
        raise ModelError(
            f"{path} has {size} bytes, but its tensors need {needed}: it was cut short. Copy or "
            "download it again."
        )


def _needed_bytes(path: Path) -> int:
    """How many bytes a file must have for all of its tensors."""
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return _Header(content).needed_bytes()


class _Header:
    """Reads a GGUF file's beginning.

    Args:
        content: The file's bytes.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0

    def needed_bytes(self) -> int:
        """How many bytes the file must have for all of its tensors."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        alignment = self._alignment(num_entries)
        end_of_data = 0
        for _ in range(num_tensors):
            name = self._string().decode()
            num_values = math.prod(self._number("Q") for _ in range(self._number("I")))
            kind, offset = self._number("I"), self._number("Q")
            if kind not in {known.value for known in GGML_QUANT_SIZES}:
                raise ValueError(f"its tensor {name} is of unknown type {kind}")
            values, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # of a block
            end_of_data = max(end_of_data, offset + num_values // values * size)
        return -(-self._at // alignment) * alignment + end_of_data

    def _alignment(self, num_entries: int) -> int:
        """Passes over all entries; the alignment of the data in bytes."""
        alignment = 32
        for _ in range(num_entries):
            key, kind = self._string(), self._number("I")
            if key == _ALIGNMENT.encode():
                alignment = self._number(_NUMBERS[kind])
                if alignment < 1:
                    raise ValueError(f"its {_ALIGNMENT} is {alignment}")
            else:
                self._skip(kind)
        return alignment

    def _skip(self, kind: int) -> None:
        """Passes over a value of a type."""
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            kind, number = self._number("I"), self._number("Q")
            if kind in _NUMBERS:
                self._bytes(number * struct.calcsize(_NUMBERS[kind]))
            else:
                for _ in range(number):
                    self._skip(kind)
        elif kind in _NUMBERS:
            self._number(_NUMBERS[kind])
        else:
            raise ValueError(f"it has an entry of unknown type {kind}")

    def _number(self, kind: str) -> int:
        size = struct.calcsize(f"<{kind}")
        (number,) = struct.unpack(f"<{kind}", self._bytes(size))
        return number

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _bytes(self, number: int) -> bytes:
        end = self._at + number
        if end > len(self._content):
            raise IndexError
        part = self._content[self._at : end]
        self._at = end
        return part
