"""What is in a factor store, and how healthy it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ekfac_dist.curvature.kronecker import kfac_lambda
from ekfac_dist.curvature.spectrum import departure, effective_rank
from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import FISHER_NAMES, eigenbasis_file, spectrum_file
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.terminal import visible


@dataclass(frozen=True)
class Spectra:
    """One module's eigenvalues, float64.

    Attributes:
        values_I: λ_A [I].
        values_O: λ_S [O].
        lambda_OI: Λ [O, I].
    """

    values_I: Tensor
    values_O: Tensor
    lambda_OI: Tensor


def verify_store(path: str | Path, say: Callable[[str], None]) -> None:
    """Checks every file of a store.

    Args:
        path: The store's directory.
        say: Takes a line for people.

    Raises:
        StoreError: A file is missing, damaged, changed or foreign; each was named before.
    """
    reader = StoreReader(path)
    bad = good = 0
    for file, fault in reader.verify():
        if fault is None:
            good += 1
        else:
            bad += 1
            say(f"BAD  {file} {fault}")
    if bad:
        raise StoreError(f"{path}: {bad} of {good + bad} files are bad; fit the factors again.")
    say(f"verified      {good} files, {as_text(reader.total_bytes())}: all as they were written")


def inspect_store(path: str | Path) -> str:
    """The store's summary: how it was made, and a line for each module.

    Raises:
        StoreError: The store is missing, incomplete or damaged.
    """
    try:
        return _summary(path)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: the manifest or a file's header lacks something, or holds something else: "
            f"{type(error).__name__} {error}."
        ) from error


def _summary(path: str | Path) -> str:
    reader = StoreReader(path)
    factors = Factors(reader)
    manifest = reader.manifest
    data, fisher, model = manifest["data"], manifest["fisher"], manifest["model"]
    coverage = manifest["coverage"]
    kind = FISHER_NAMES[fisher["labels"]]
    rows = []
    for name, module in factors.modules.items():
        spectra = _spectra(reader, factors, name)
        headers = [reader.header(eigenbasis_file(f)) for f in (module.input, module.output)]
        count = int(headers[0]["count"])
        kfac = kfac_lambda(spectra.values_O, spectra.values_I, count, data["num_sequences"])
        rows.append(
            [
                name,
                f"{module.num_outputs}×{module.input_size}{' (bias)' if module.bias else ''}",
                "" if module.leads else "shared",
                str(count),
                f"{effective_rank(spectra.values_I):.1f}",
                f"{effective_rank(spectra.values_O):.1f}",
                f"{effective_rank(spectra.lambda_OI):.0f}",
                f"{spectra.lambda_OI.mean().item():.2e}",
                f"{departure(spectra.lambda_OI, kfac):.3f}",
                f"{max(float(h['residual']) for h in headers):.0e}",
            ]
        )
    tracked, of_mlp = coverage["tracked_parameters"], coverage["tracked_mlp_parameters"]
    about = [
        f"model         {model['name']} ({model['class']}, {model['dtype']})",
        f"data          {data['source']}: {data['num_sequences']} sequences, "
        f"{data['num_positions']} counted positions, {data['num_labels']} labels",
        f"fisher        labels: {fisher['labels']} ({kind}), seed {fisher['seed']}, "
        f"refit: {fisher['refit']}",
        f"coverage      {tracked} parameters tracked: "
        f"{of_mlp / max(1, coverage['mlp_parameters']):.1%} of the MLP's, "
        f"{tracked / max(1, coverage['model_parameters']):.1%} of all",
        *(f"not tracked   {name}: {why}" for name, why in coverage["skipped"].items()),
        f"store         {as_text(reader.total_bytes())}, {len(manifest['files'])} files",
    ]
    lines = [
        *map(visible, about),
        "",
        table(
            [
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
            ],
            rows,
        ),
        "",
        "rank: effective, exp of the entropy of the eigenvalues. Λ−KFAC: ‖Λ − M/N·λ_S λ_Aᵀ‖ / ‖Λ‖.",
        "residual: the larger ‖A − QΛQᵀ‖/‖A‖ of the module's two factors, in float64, before Q is",
        "rounded to the precision that it is stored in.",
    ]
    return "\n".join(lines)


def plot_spectra(path: str | Path, file: str | Path) -> None:
    """Draws every module's eigenvalues of A, S and Λ, largest first, on logarithmic axes.

    Args:
        path: The store's directory.
        file: The image to write; its ending chooses the format.

    Raises:
        ConfigError: matplotlib is not installed, or the ending is no image format.
        OutputError: The image cannot be written.
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
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    colors = colormaps["viridis"]
    number = len(factors.modules)
    for k, name in enumerate(factors.modules):
        spectra = _spectra(reader, factors, name)
        color = colors(k / max(1, number - 1))
        shown = (spectra.values_I, spectra.values_O, spectra.lambda_OI)
        for axis, values in zip(axes, shown, strict=True):
            ordered = values.flatten().sort(descending=True).values
            ordered = ordered[ordered > 0]
            # A million points draw as well by a thousand, evenly spaced on the logarithmic axis.
            picks = torch.logspace(0, torch.log10(torch.tensor(max(1, len(ordered)))).item(), 1000)
            picks = picks.long().clamp(1, max(1, len(ordered))).unique() - 1
            if len(ordered):
                axis.plot(picks + 1, ordered[picks], color=color, label=name, linewidth=1)
    for axis, title in zip(axes, ("A (inputs)", "S (output gradients)", "Λ (refit)"), strict=True):
        axis.set(xscale="log", yscale="log", title=title, xlabel="rank of the eigenvalue")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("eigenvalue")
    handles, labels = axes[0].get_legend_handles_labels()
    if number <= 16:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    else:
        picked = [0, number // 2, number - 1]
        figure.legend(
            [handles[k] for k in picked],
            [labels[k] for k in picked],
            loc="outside right upper",
            fontsize=7,
            title="first, middle, last",
        )
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise ConfigError(f"--plot {file}: {error}.") from error
    except OSError as error:
        raise OutputError(f"--plot {file} cannot be written: {error.strerror or error}.") from error


def _spectra(reader: StoreReader, factors: Factors, name: str) -> Spectra:
    module = factors.modules[name]
    values = [
        factors.eigenvalues(factor, size)
        for factor, size in ((module.input, module.input_size), (module.output, module.num_outputs))
    ]
    shape = (module.num_outputs, module.input_size)
    spectrum = reader.tensor(spectrum_file(name), "lambda", shape)
    return Spectra(values[0].double(), values[1].double(), spectrum.double())
