"""Opening a factor store: its manifest is checked before any factor is read."""

from pathlib import Path

from torch import nn

from ekfac_dist.errors import StoreError
from ekfac_dist.factors.comparison import check_model
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import MANIFEST, REMEDY, eigenbasis_file, spectrum_file
from ekfac_dist.factors.reader import StoreReader

# Fields that the manifest's entries must have, and their types.
_FIELDS: dict[str, dict[str, type]] = {
    "model": {"fingerprint": str},
    "data": {"fingerprint": str, "num_sequences": int},
    "fisher": {"labels": str, "seed": int, "refit": str},
    "config": {"model": dict, "data": dict},
}
# Fields that stores of earlier versions lack, all or none of them.
_LATER_FIELDS: dict[str, dict[str, type]] = {
    "model": {"whole": str, "untracked": dict, "configuration": dict},
}


def load_factors(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    verify: bool = True,
    allow_changes: bool = False,
) -> Factors:
    """Opens a factor store.

    A module's files are read, memory-mapped, when the module is first used. A store does not depend
    on how many workers fitted it, nor on the device or dtype that its factors are used with.

    Args:
        path: The store's directory.
        model: The model that the factors are to be used with. It is compared with the one that they
            were fitted for: tracked modules, all other weights, and configuration. It may hold the
            same weights in another dtype, wider or narrower. A warning names what could not be
            compared: quantised weights, and what stores of earlier versions lack.
        verify: Check each file's SHA-256 before it is first read.
        allow_changes: Accept a model that differs outside the tracked modules, with a warning.

    Raises:
        StoreError: If the store is missing, incomplete, of another format, or of another model; or
            if one of its files is missing or of another size. A file of the right size whose
            content has changed raises it when it is first read.
    """
    reader = StoreReader(path, verify=verify)
    _check_entries(reader)
    factors = Factors(reader)
    for module in factors.modules.values():
        for file in (
            eigenbasis_file(module.input),
            eigenbasis_file(module.output),
            spectrum_file(module.name),
        ):
            reader.check(file)
    if model is not None:
        check_model(str(path), factors, model, allow_changes=allow_changes).warn()
    return factors


def _check_entries(reader: StoreReader) -> None:
    """Checks that the manifest has all fields that are read of it, of the right types."""
    manifest = reader.manifest
    for name, fields in _FIELDS.items():
        entry = manifest[name]
        wrong = [field for field, kind in fields.items() if type(entry.get(field)) is not kind]
        for field, kind in _LATER_FIELDS.get(name, {}).items():
            if "whole" in entry and type(entry.get(field)) is not kind:
                wrong.append(field)
        if wrong:
            raise StoreError(
                f"{reader.path / MANIFEST} is damaged: its {name} has no whole {', '.join(wrong)}. "
                f"{REMEDY}"
            )
    if not manifest["modules"]:
        raise StoreError(f"{reader.path / MANIFEST} is damaged: it has no modules. {REMEDY}")
