"""Opening a data set: local files, saved data sets and hub ids, all through `datasets`.

A local source is read from a copy in the cache that depends on the source's content alone; see
`source_copy`. Knows no tokenizer.
"""

import glob
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
from datasets import Dataset, DatasetDict, Features, Value

from ekfac_dist.config import DataConfig
from ekfac_dist.data.source_copy import Content, file_stats, read_copied
from ekfac_dist.data.token_columns import read_npy
from ekfac_dist.errors import DataError
from ekfac_dist.runtime.files import file_sha256

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".npy": "npy",  # read here, not by `datasets`
}


def content_of(config: DataConfig) -> Content | None:
    """The content of a local source; None for a hub id, or a path that `open_source` refuses.

    Raises:
        DataError: If a file cannot be read.
    """
    assert config.source is not None
    path = Path(config.source)
    try:
        if path.is_dir():
            files = _saved_files(path, _split_name(config.split))
        else:
            files = [path] if path.is_file() and path.suffix.lower() in BUILDERS else []
        if not files:
            return None
        stats = file_stats(files)
        digests = [file_sha256(file) for file in files]
    except OSError as error:
        raise DataError(f"{path} could not be read: {error.strerror or error}.") from error
    if path.is_file():
        return Content(digests[0], stats)
    listing = "".join(
        f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)
    )
    return Content(hashlib.sha256(listing.encode()).hexdigest(), stats)


def open_source(config: DataConfig, content: Content | None = None) -> Dataset:
    """The examples of the configured source and split, the first `max_sequences` of them.

    The `_fingerprint` of a local source's examples depends on its content, not its path or times.

    Args:
        config: Source, split and columns.
        content: What `content_of` returned; None: it is determined here.

    Raises:
        DataError: If there is no such file, hub id, split or column; if a file's format is not what
            its ending says, or the file changes while it is read; or if there are no examples.
    """
    assert config.source is not None
    # No progress bars, and no prompt that asks whether to retry the network: nobody can answer it.
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # errors are reported as DataErrors
    examples = _open_any(config, content or content_of(config))
    _require_columns(examples, config)
    if len(examples) == 0:
        raise DataError(_no_rows(config.source, config.split))
    if config.max_sequences is not None:
        examples = examples.select(range(min(config.max_sequences, len(examples))))
    return examples


def _open_any(config: DataConfig, content: Content | None) -> Dataset:
    """Opens a file, a saved data set or a hub id, whichever the source is."""
    source, split = str(config.source), config.split
    path = Path(source)
    if config.subset is not None and path.exists():
        raise DataError(
            f"data.subset is {config.subset!r}, but {source} is a local path; only hub data sets "
            "have subsets."
        )
    ending = path.suffix.lower()
    if path.is_dir():
        return _open_saved(config, path, content)
    if path.is_file():
        if ending not in BUILDERS:
            raise DataError(
                f"{source} has the ending {ending or 'none'!r}; files are read by their ending: "
                f"{', '.join(BUILDERS)}."
            )
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty; give a file that holds text.")
        if BUILDERS[ending] == "npy":
            return _open_npy(config, path, content)
        with _reading_errors(source, split, local=True):
            return _open_file(path, BUILDERS[ending], split, content)
    if ending in BUILDERS or source.startswith((".", "/", "~")):
        raise DataError(f"There is no file {source}; data.source names a file that exists.")
    with _reading_errors(source, split, local=False):
        return _open_hub(source, config.subset, split)


def _open_file(path: Path, kind: str, split: str, content: Content | None) -> Dataset:
    """Opens a file through its copy in the cache."""
    options = _reading_options(kind, path)

    def builder(folder: Path) -> datasets.DatasetBuilder:
        return datasets.load_dataset_builder(
            kind,
            data_files={"train": glob.escape(str(path.absolute()))},
            cache_dir=str(folder / "builder"),  # extracted archives go there too
            **options,
        )

    def write(folder: Path) -> None:
        builder(folder).download_and_prepare(str(folder / "rows"))

    def read(folder: Path) -> Dataset:
        reader = builder(folder)
        reader.download_and_prepare(str(folder / "rows"))  # finds the prepared copy
        shutil.rmtree(folder / "builder", ignore_errors=True)
        return reader.as_dataset(split)

    reading_options = f"{kind} {options}"
    return read_copied([path], path, content, reading_options, split, write, read)


def _open_npy(config: DataConfig, path: Path, content: Content | None) -> Dataset:
    """Opens a NumPy file of token ids through its copy in the cache."""
    if config.tokens is None:
        raise DataError(
            f"{path} is a file of numbers; set data.tokens to a name for its column, such as "
            "input_ids, if they are token ids."
        )
    column = config.tokens
    if config.split != "train":
        raise DataError(
            f"data.split is {config.split!r}, but {path} has no splits; use data.max_sequences."
        )
    return read_copied(
        [path],
        path,
        content,
        f"npy {column}",
        config.split,
        lambda folder: read_npy(path, column).save_to_disk(str(folder)),
        lambda folder: Dataset.load_from_disk(str(folder)),
    )


def _reading_options(kind: str, path: Path) -> dict[str, Any]:
    """Builder options with which `datasets` reads texts exactly as they are in the file."""
    if kind == "text":
        return {"encoding": "utf-8-sig"}  # drops a byte order mark
    if kind != "csv":
        return {}
    # Every column is text, and no word, such as "None" or "NA", stands for a missing value.
    # Without an index column, a row with too many cells is an error instead of being shifted.
    names = list(pandas.read_csv(path, nrows=0, index_col=False).columns)
    return {
        "features": Features({name: Value("string") for name in names}),
        "na_filter": False,
        "index_col": False,
        "skip_blank_lines": len(names) > 1,  # in a single column a blank line may be a cell
    }


def _open_hub(source: str, subset: str | None, split: str) -> Dataset:
    """Opens a data set of the hub."""
    builder = datasets.load_dataset_builder(source, subset)
    if builder.name == "csv":  # only an empty cell is a missing value
        builder = datasets.load_dataset_builder(
            source, subset, keep_default_na=False, na_values=[""]
        )
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _open_saved(config: DataConfig, path: Path, content: Content | None) -> Dataset:
    """Opens a directory that `datasets.save_to_disk` wrote, through its copy in the cache."""
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is a directory without a saved data set; give one that "
            "datasets.save_to_disk wrote, or a file."
        )
    split, name = config.split, _split_name(config.split)
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} is no readable saved data set: {_cause_of(error)}.") from error
    if isinstance(saved, DatasetDict):
        if name not in saved:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(saved)}.")
        saved = saved[name]
    elif saved.split is not None and str(saved.split).partition("[")[0] != name:
        raise DataError(f"{path} has no split {name!r}; it has {saved.split}.")
    if name != split:
        raise DataError(
            f"data.split is {split!r}; a part of a split can be taken from files and hub data, not "
            "from a saved data set: use data.max_sequences."
        )
    _require_columns(saved, config)
    columns = config.columns
    with _reading_errors(str(path), split, local=True):
        return read_copied(
            _saved_files(path, name),
            path,
            content,
            f"saved {columns}",
            split,
            lambda folder: saved.select_columns(columns).save_to_disk(str(folder)),
            lambda folder: Dataset.load_from_disk(str(folder)),
        )


def _saved_files(path: Path, split: str) -> list[Path]:
    """The files of a saved data set's split; [] if there is none.

    Files that `map` caches beside them (`cache-…`) are not part of the data set.
    """
    folder = path / split if (path / "dataset_dict.json").exists() else path
    if not (folder / "state.json").exists():
        return []
    return sorted(
        file for file in folder.iterdir() if file.is_file() and not file.name.startswith("cache-")
    )


def _split_name(split: str) -> str:
    """The split of an expression such as train[:1000]."""
    return split.partition("[")[0]


def _require_columns(examples: Dataset, config: DataConfig) -> None:
    for column in config.columns:
        if column not in examples.column_names:
            raise DataError(
                f"{config.source} has no column {column!r}; its columns are "
                f"{', '.join(examples.column_names) or 'none'}."
            )


@contextmanager
def _reading_errors(source: str, split: str, *, local: bool) -> Iterator[None]:
    """Turns a source's reading errors into a `DataError` that says what would help."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A row has more cells than the CSV file's first line names; they would be lost.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            yield
    except (
        datasets.exceptions.DatasetGenerationError,
        pyarrow.ArrowInvalid,
        pandas.errors.ParserError,
        pandas.errors.EmptyDataError,
    ) as error:
        if not local:
            raise DataError(f"{source} could not be read: {_cause_of(error)}.") from error
        ending = os.path.splitext(source)[1]
        raise DataError(
            f"{source} is not what its ending {ending} says: {_cause_of(error)}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        cause = _cause_of(error)
        if "corresponds to no data" in cause:
            raise DataError(_no_rows(source, split)) from error
        if "Unrecognized instruction" in cause:
            raise DataError(
                f"data.split is {split!r}, which names no split or part of one, such as train or "
                "train[:1000]."
            ) from error
        if "split" in cause.lower():
            raise DataError(f"{source} has no split {split!r}: {cause}.") from error
        raise DataError(f"{source} could not be read: {cause}.") from error
    except (OSError, ImportError, RuntimeError) as error:
        if local:
            raise DataError(f"{source} could not be read: {_cause_of(error)}.") from error
        raise DataError(
            f"{source} is no file here and could not be had from the hub: {_cause_of(error)}. Set "
            "data.source to a file, or to a data set that the hub has."
        ) from error


def _no_rows(source: str, split: str) -> str:
    return f"{source} (split {split}) has no rows; give data that has some."


def _cause_of(error: BaseException) -> str:
    """The first line of the innermost exception in a chain of causes."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    if isinstance(innermost, pandas.errors.ParserWarning):
        return "a row has more cells than the first line names; quote cells that hold commas"
    text = str(innermost).strip() or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(" .!")
