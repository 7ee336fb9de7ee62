"""Opening a data set: local files, saved data sets and hub ids, all through `datasets`."""

import glob
import logging
import os
import warnings
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset, DatasetDict

from ekfac_dist.config import DataConfig
from ekfac_dist.errors import DataError

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def open_source(config: DataConfig) -> Dataset:
    """The rows of the configured source and split, the first `max_sequences` of them.

    Raises:
        DataError: There is no such file, hub id, split or column; the file is not what its ending
            says; or there are no rows.
    """
    assert config.source is not None
    # Neither bars of its own nor the unanswerable question whether to try the network again.
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # errors are ours to tell
    rows = _open(config.source, config.subset, config.split)
    for column in (config.text, config.prompt):
        if column is not None and column not in rows.column_names:
            raise DataError(
                f"{config.source} has no column {column!r}; its columns are "
                f"{', '.join(rows.column_names) or 'none'}."
            )
    if len(rows) == 0:
        raise DataError(_no_rows(config.source, config.split))
    if config.max_sequences is not None:
        rows = rows.select(range(min(config.max_sequences, len(rows))))
    return rows


def _open(source: str, subset: str | None, split: str) -> Dataset:
    path = Path(source)
    if subset is not None and path.exists():
        raise DataError(
            f"data.subset is {subset!r}, but {source} is a local path; only hub data sets have "
            "subsets."
        )
    ending = path.suffix.lower()
    if path.is_dir():
        return _open_saved(path, split)
    if path.is_file():
        if ending not in BUILDERS:
            raise DataError(
                f"{source} has the ending {ending or 'none'!r}; files are read by their ending: "
                f"{', '.join(BUILDERS)}."
            )
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty; give a file that holds text.")
        return _load(
            source, split, BUILDERS[ending], data_files={"train": glob.escape(str(path.absolute()))}
        )
    if ending in BUILDERS or source.startswith((".", "/", "~")):
        raise DataError(f"There is no file {source}; data.source names a file that exists.")
    return _load(source, split, source, name=subset)


def _open_saved(path: Path, split: str) -> Dataset:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is a directory without a saved data set; give one that "
            "datasets.save_to_disk wrote, or a file."
        )
    name = split.partition("[")[0]
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
    return saved


def _load(source: str, split: str, builder: str, **arguments: object) -> Dataset:
    local = "data_files" in arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = datasets.load_dataset(builder, split=split, **arguments)
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
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
    return rows


def _no_rows(source: str, split: str) -> str:
    return f"{source} (split {split}) has no rows; give data that has some."


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause that says something."""
    said = error
    while said.__cause__ is not None:
        said = said.__cause__
    text = str(said).strip() or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(" .!")
