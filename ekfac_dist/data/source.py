"""Opening a data set: local files, saved data sets and hub ids, all through `datasets`.

`datasets` knows a local file again by its path and time of change, so a file that was rewritten and
had its time restored would give its old rows. Here the content of a local source decides: its rows
are copied, once, into a folder of the cache that is named by the SHA-256 of the source's bytes,

    sources/<of the path>/<of the content, and how it is read>/

which gets its name only when it is whole and the source did not change meanwhile, and which nobody
writes to afterwards.
"""

import glob
import hashlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
from datasets import Dataset, DatasetDict, Features, Value
from filelock import FileLock

from ekfac_dist.config import DataConfig
from ekfac_dist.data.tokenizing import cache_directory
from ekfac_dist.errors import DataError
from ekfac_dist.runtime.files import file_sha256

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
# A folder with a source's former content goes when a new one is made and nobody has opened it for
# so long: another run may still read from it.
_KEEP_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class Content:
    """What a local source holds.

    Attributes:
        sha256: SHA-256 of a file's bytes; of a saved data set, over its split's files and names.
        stats: Of each file the size in bytes, and when its content and its status last changed, in
            ns; as they were before the bytes were read.
    """

    sha256: str
    stats: tuple[tuple[int, int, int], ...]


def content_of(config: DataConfig) -> Content | None:
    """What a local source holds now; None of a hub id, or of what `open_source` refuses.

    Raises:
        DataError: It cannot be read.
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
        stats = _stats(files)
        digests = [file_sha256(file) for file in files]
    except OSError as error:
        raise DataError(f"{path} could not be read: {error.strerror or error}.") from error
    if path.is_file():
        return Content(digests[0], stats)
    named = "".join(f"{file.name} {sha}\n" for file, sha in zip(files, digests, strict=True))
    return Content(hashlib.sha256(named.encode()).hexdigest(), stats)


def open_source(config: DataConfig, content: Content | None = None) -> Dataset:
    """The rows of the configured source and split, the first `max_sequences` of them.

    Of a local source the rows' `_fingerprint` depends on its content, not on its path and times.

    Args:
        config: Source, split and columns.
        content: What `content_of` gave; None: it is asked here.

    Raises:
        DataError: There is no such file, hub id, split or column; the file is not what its ending
            says, or changes while it is read; or there are no rows.
    """
    assert config.source is not None
    # Neither bars of its own nor the unanswerable question whether to try the network again.
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # errors are ours to tell
    rows = _open(config, content or content_of(config))
    _require_columns(rows, config)
    if len(rows) == 0:
        raise DataError(_no_rows(config.source, config.split))
    if config.max_sequences is not None:
        rows = rows.select(range(min(config.max_sequences, len(rows))))
    return rows


def _open(config: DataConfig, content: Content | None) -> Dataset:
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
        with _told(source, split, local=True):
            return _open_file(path, BUILDERS[ending], split, content)
    if ending in BUILDERS or source.startswith((".", "/", "~")):
        raise DataError(f"There is no file {source}; data.source names a file that exists.")
    with _told(source, split, local=False):
        return _open_hub(source, config.subset, split)


def _open_file(path: Path, kind: str, split: str, content: Content | None) -> Dataset:
    options = _options(kind, path)

    def builder(folder: Path) -> datasets.DatasetBuilder:
        return datasets.load_dataset_builder(
            kind,
            data_files={"train": glob.escape(str(path.absolute()))},
            cache_dir=str(folder / "builder"),  # what is unpacked of a file goes there too
            **options,
        )

    def write(folder: Path) -> None:
        builder(folder).download_and_prepare(str(folder / "rows"))

    def read(folder: Path) -> Dataset:
        reader = builder(folder)
        reader.download_and_prepare(str(folder / "rows"))  # finds what was written
        shutil.rmtree(folder / "builder", ignore_errors=True)
        return reader.as_dataset(split)

    how = f"{kind} {options}"
    return _copied([path], path, content, how, split, write, read)


def _options(kind: str, path: Path) -> dict[str, Any]:
    """How `datasets` has to read a kind of file, so that texts are what stands in the file."""
    if kind == "text":
        return {"encoding": "utf-8-sig"}  # without a byte order mark
    if kind != "csv":
        return {}
    # Every column is text, of which no word means that there is none, such as "None" or "NA".
    # Without an index column a row with too many cells is told of, not read one column off.
    names = list(pandas.read_csv(path, nrows=0, index_col=False).columns)
    return {
        "features": Features({name: Value("string") for name in names}),
        "na_filter": False,
        "index_col": False,
        "skip_blank_lines": len(names) > 1,  # in a single column it may be a cell of spaces
    }


def _open_hub(source: str, subset: str | None, split: str) -> Dataset:
    builder = datasets.load_dataset_builder(source, subset)
    if builder.name == "csv":  # only an empty cell is none
        builder = datasets.load_dataset_builder(
            source, subset, keep_default_na=False, na_values=[""]
        )
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _open_saved(config: DataConfig, path: Path, content: Content | None) -> Dataset:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is a directory without a saved data set; give one that "
            "datasets.save_to_disk wrote, or a file."
        )
    split, name = config.split, _split_name(config.split)
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} is no readable saved data set: {_cause(error)}.") from error
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
    columns = [column for column in (config.text, config.prompt) if column is not None]
    with _told(str(path), split, local=True):
        return _copied(
            _saved_files(path, name),
            path,
            content,
            f"saved {columns}",
            split,
            lambda folder: saved.select_columns(columns).save_to_disk(str(folder)),
            lambda folder: Dataset.load_from_disk(str(folder)),
        )


def _copied(
    files: list[Path],
    path: Path,
    content: Content | None,
    how: str,
    split: str,
    write: Callable[[Path], object],
    read: Callable[[Path], Dataset],
) -> Dataset:
    """The rows of a local source, from the copy in the cache, which is made if it is not there.

    Args:
        files: The source's files.
        path: The source.
        content: What it holds.
        how: What else the copy depends on.
        split: Which of the copy's rows are read.
        write: Copies the rows into a folder that is there.
        read: Reads such a folder.
    """
    if content is None:
        raise DataError(f"{path} was not there a moment ago; run it again.")
    key = hashlib.sha256(f"{content.sha256}|{how}|{datasets.__version__}".encode()).hexdigest()[:32]
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    home = cache_directory() / "sources" / name
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be cached under {home}: {error.strerror or error}; set HF_HOME to a "
            "directory that can be written."
        ) from error
    folder, part = home / key, home / f"{key}.part"
    with FileLock(home / "lock"):
        if not folder.exists():
            _remove_former(home)
            part.mkdir()
            try:
                write(part)
                if _stats(files) != content.stats:
                    raise DataError(
                        f"{path} changed while it was read; run it again when it is written whole."
                    )
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        os.utime(folder)
        rows = read(folder)
    rows._fingerprint = hashlib.sha256(f"{key}|{split}".encode()).hexdigest()[:32]
    return rows


def _remove_former(home: Path) -> None:
    """Removes copies that nobody finished, or opened lately."""
    for folder in home.iterdir():
        is_old = time.time() - folder.stat().st_mtime > _KEEP_SECONDS
        if folder.is_dir() and (is_old or folder.suffix == ".part"):
            shutil.rmtree(folder, ignore_errors=True)


def _saved_files(path: Path, split: str) -> list[Path]:
    """The files of a saved data set's split; the results of `map` beside them are none of it."""
    folder = path / split if (path / "dataset_dict.json").exists() else path
    if not (folder / "state.json").exists():
        return []
    return sorted(
        file for file in folder.iterdir() if file.is_file() and not file.name.startswith("cache-")
    )


def _stats(files: list[Path]) -> tuple[tuple[int, int, int], ...]:
    found = [file.stat() for file in files]
    return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in found)


def _split_name(split: str) -> str:
    return split.partition("[")[0]


def _require_columns(rows: Dataset, config: DataConfig) -> None:
    for column in (config.text, config.prompt):
        if column is not None and column not in rows.column_names:
            raise DataError(
                f"{config.source} has no column {column!r}; its columns are "
                f"{', '.join(rows.column_names) or 'none'}."
            )


@contextmanager
def _told(source: str, split: str, *, local: bool) -> Iterator[None]:
    """Turns what goes wrong with a source into an error that says what would do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A CSV file's rows have more cells than the first line names, which would be lost.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            yield
    except (
        datasets.exceptions.DatasetGenerationError,
        pyarrow.ArrowInvalid,
        pandas.errors.ParserError,
        pandas.errors.EmptyDataError,
    ) as error:
        if not local:
            raise DataError(f"{source} could not be read: {_cause(error)}.") from error
        ending = os.path.splitext(source)[1]
        raise DataError(
            f"{source} is not what its ending {ending} says: {_cause(error)}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error}.") from error
    except ValueError as error:
        said = _cause(error)
        if "corresponds to no data" in said:
            raise DataError(_no_rows(source, split)) from error
        if "Unrecognized instruction" in said:
            raise DataError(
                f"data.split is {split!r}, which names no split or part of one, such as train or "
                "train[:1000]."
            ) from error
        if "split" in said.lower():
            raise DataError(f"{source} has no split {split!r}: {said}.") from error
        raise DataError(f"{source} could not be read: {said}.") from error
    except (OSError, ImportError, RuntimeError) as error:
        if local:
            raise DataError(f"{source} could not be read: {_cause(error)}.") from error
        raise DataError(
            f"{source} is no file here and could not be had from the hub: {_cause(error)}. Set "
            "data.source to a file, or to a data set that the hub has."
        ) from error


def _no_rows(source: str, split: str) -> str:
    return f"{source} (split {split}) has no rows; give data that has some."


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause that says something."""
    said = error
    while said.__cause__ is not None:
        said = said.__cause__
    if isinstance(said, pandas.errors.ParserWarning):
        return "a row has more cells than the first line names; quote cells that hold commas"
    text = str(said).strip() or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(" .!")
