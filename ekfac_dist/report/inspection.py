"""Inspection of a factor store: verification, a summary of every module, plots of spectra."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.curvature.kronecker import kfac_lambda
from ekfac_dist.curvature.spectrum import departure, effective_rank
from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import FISHER_NAMES, eigenbasis_file, spectrum_file
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.report import halves
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.terminal import visible


@dataclass(frozen=True)
class Spectra:
    """One module's eigenvalues, float64, on the CPU.

    Attributes:
        values_I: λ_A [I], eigenvalues of the input factor.
        values_O: λ_S [O], eigenvalues of the output factor.
        lambda_OI: Λ [O, I], corrected eigenvalues.
    """

    values_I: Tensor
    values_O: Tensor
    lambda_OI: Tensor


def verify_store(path: str | Path, say: Callable[[str], None]) -> None:
    """Compares every file of a store with its size and checksum in the manifest.

    Args:
        path: The store's directory.
        say: Called with each line of output.

    Raises:
        StoreError: If a file is missing, damaged, changed or does not belong to the store; a line
            of output names each of them before.
    """
    reader = StoreReader(path)
    num_bad = num_good = 0
    for file, fault in reader.verify():
        if fault is None:
            num_good += 1
        else:
            num_bad += 1
            say(f"BAD  {file} {fault}")
    if num_bad:
        raise StoreError(
            f"{path}: {num_bad} of {num_good + num_bad} files are bad; fit the factors again."
        )
    say(
        f"verified      {num_good} files, {as_text(reader.total_bytes())}: all as they were written"
    )


def inspect_store(path: str | Path) -> str:
    """A store's summary as text: how it was made, and a table row for each module.

    Args:
        path: The store's directory.

    Raises:
        StoreError: If the store is missing, incomplete or damaged.
    """
    try:
        return _store_summary(StoreReader(path))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: the manifest or a file's header lacks something, or holds something else: "
            f"{type(error).__name__} {error}."
        ) from error


def _store_summary(reader: StoreReader) -> str:
    factors = Factors(reader)
    store_lines = [*_store_lines(reader), *halves.lines(_halves(reader))]
    header = [
        "module",
        "O×I",
        "input",
        "count",
        "rank A",
        "rank S",
        "rank Λ",
        "mean Λ",
        "Λ−KFAC",
        "residual",
        *(halves.HEADER if _halves(reader) else ()),
    ]
    rows = [_module_row(reader, factors, name) for name in factors.modules]
    lines = [
        *map(visible, store_lines),
        "",
        table(header, rows),
        "",
        "rank: effective, exp of the entropy of the eigenvalues. Λ−KFAC: ‖Λ − M/N·λ_S λ_Aᵀ‖ / ‖Λ‖.",
        "residual: the larger ‖A − QΛQᵀ‖/‖A‖ of the module's two factors, in float64, before Q is",
        "rounded to the precision that it is stored in; probed with random vectors.",
        *(halves.LEGEND if _halves(reader) else ()),
    ]
    return "\n".join(lines)


def _store_lines(reader: StoreReader) -> list[str]:
    """Model, data, Fisher, coverage and size of a store."""
    manifest = reader.manifest
    data, fisher, model = manifest["data"], manifest["fisher"], manifest["model"]
    coverage = manifest["coverage"]
    fisher_name = FISHER_NAMES[fisher["labels"]]
    tracked, tracked_mlp = coverage["tracked_parameters"], coverage["tracked_mlp_parameters"]
    return [
        f"model         {model['name']} ({model['class']}, {model['dtype']})",
        f"data          {data['source']}: {data['num_sequences']} sequences, "
        f"{data['num_positions']} counted positions, {data['num_labels']} labels",
        f"fisher        labels: {fisher['labels']} ({fisher_name}), seed {fisher['seed']}, "
        f"refit: {fisher['refit']}",
        f"coverage      {tracked} parameters tracked: "
        f"{tracked_mlp / max(1, coverage['mlp_parameters']):.1%} of the MLP's, "
        f"{tracked / max(1, coverage['model_parameters']):.1%} of all",
        *(f"not tracked   {name}: {why}" for name, why in coverage["skipped"].items()),
        f"store         {as_text(reader.total_bytes())}, {len(manifest['files'])} files",
    ]


def _module_row(reader: StoreReader, factors: Factors, name: str) -> list[str]:
    """A module's row of the summary's table."""
    module, spectra = factors.modules[name], _spectra(reader, factors, name)
    headers = [reader.header(eigenbasis_file(f)) for f in (module.input, module.output)]
    count, num_sequences = int(headers[0]["count"]), reader.manifest["data"]["num_sequences"]
    kfac_OI = kfac_lambda(spectra.values_O, spectra.values_I, count, num_sequences)
    return [
        name,
        f"{module.num_outputs}×{module.input_size}{' (bias)' if module.bias else ''}",
        "" if module.leads else "shared",
        str(count),
        f"{effective_rank(spectra.values_I):.1f}",
        f"{effective_rank(spectra.values_O):.1f}",
        f"{effective_rank(spectra.lambda_OI):.0f}",
        f"{spectra.lambda_OI.mean().item():.2e}",
        f"{departure(spectra.lambda_OI, kfac_OI):.3f}",
        f"{max(float(header['residual']) for header in headers):.0e}",
        *halves.cells(_halves(reader), name),
    ]


def _halves(reader: StoreReader) -> Mapping[str, Any] | None:
    """What half of the data changes, as the manifest has it; None in those of earlier versions."""
    return reader.manifest.get("halves")


def plot_spectra(path: str | Path, file: str | Path) -> None:
    """Draws every module's eigenvalues of A, S and Λ, largest first, on logarithmic axes.

    Beside them, what factors of half of the data are off, if the store says so.


    Args:
        path: The store's directory.
        file: The image to write; its suffix chooses the format.

    Raises:
        ConfigError: If matplotlib is not installed, or the suffix is no image format.
        OutputError: If the image cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib; install it with: pip install 'ekfac_dist[report]'."
        ) from error
    matplotlib.use("agg")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    reader = StoreReader(path)
    factors = Factors(reader)
    of_halves = _halves(reader)
    num_axes = 3 if of_halves is None else 4
    figure = Figure(figsize=(13 / 3 * num_axes, 4.2), layout="constrained")
    axes, *_ = figure.subplots(1, num_axes, squeeze=False)
    colors = colormaps["viridis"]
    num_modules = len(factors.modules)
    for k, name in enumerate(factors.modules):
        spectra = _spectra(reader, factors, name)
        color = colors(k / max(1, num_modules - 1))
        module_values = (spectra.values_I, spectra.values_O, spectra.lambda_OI)
        for axis, values in zip(axes[:3], module_values, strict=True):
            _draw_spectrum(axis, values, color, name)
    titles = ("A (inputs)", "S (output gradients)", "Λ (refit)")
    for axis, title in zip(axes[:3], titles, strict=True):
        axis.set(xscale="log", yscale="log", title=title, xlabel="rank of the eigenvalue")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("eigenvalue")
    if of_halves is not None:
        halves.draw(axes[3], of_halves)
    _add_legend(figure, axes[0], num_modules)
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise ConfigError(f"--plot {file}: {error}.") from error
    except OSError as error:
        raise OutputError(f"--plot {file} cannot be written: {error.strerror or error}.") from error


def _draw_spectrum(axis: Any, values: Tensor, color: Any, name: str) -> None:
    """Draws a module's positive eigenvalues on a matplotlib axis, largest first."""
    ordered = values.flatten().sort(descending=True).values
    ordered = ordered[ordered > 0]
    # A thousand points, evenly spaced on the logarithmic axis, look the same as a million.
    ranks = torch.logspace(0, torch.log10(torch.tensor(max(1, len(ordered)))).item(), 1000)
    indices = ranks.long().clamp(1, max(1, len(ordered))).unique() - 1
    if len(ordered):
        axis.plot(indices + 1, ordered[indices], color=color, label=name, linewidth=1)


def _add_legend(figure: Any, axis: Any, num_modules: int) -> None:
    """Adds a legend that names all modules, or the first, middle and last of many."""
    handles, labels = axis.get_legend_handles_labels()
    if num_modules <= 16:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
        return
    named = [0, num_modules // 2, num_modules - 1]
    figure.legend(
        [handles[k] for k in named],
        [labels[k] for k in named],
        loc="outside right upper",
        fontsize=7,
        title="first, middle, last",
    )


def _spectra(reader: StoreReader, factors: Factors, name: str) -> Spectra:
    module = factors.modules[name]
    values = [
        factors.eigenvalues(factor, size)
        for factor, size in ((module.input, module.input_size), (module.output, module.num_outputs))
    ]
    shape = (module.num_outputs, module.input_size)
    spectrum = reader.tensor(spectrum_file(name), "lambda", shape)
    return Spectra(values[0].double(), values[1].double(), spectrum.double())
