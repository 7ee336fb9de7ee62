"""All stages of a fit, for each group of modules, into a store.

    group 1   covariance pass → decomposition → refit pass
    group 2   the same, with the memory of group 1 free again
    …         then the manifest

How many groups there are, and what else is done for the workers' memory, `arrangement` decides.
"""

from dataclasses import replace

import torch

from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.arrangement_on_workers import arranged, in_steps_of, largest_share
from ekfac_dist.fit.checkpoints import Checkpoints
from ekfac_dist.fit.group import GroupFit
from ekfac_dist.fit.manifest import FitInputs, FitSummary, store_manifest
from ekfac_dist.models.load.on_workers import model_fingerprints
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Owners
from ekfac_dist.runtime.memory import peak_bytes
from ekfac_dist.runtime.processes import World


def fit_factors(
    inputs: FitInputs,
    world: World,
    sink: FactorSink,
    checkpoints: Checkpoints,
    *,
    show_progress: bool,
) -> FitSummary:
    """Runs every stage for every group of modules, and finishes the store.

    Args:
        inputs: The prepared model, the data and the settings.
        world: The workers.
        sink: Where the factors are written.
        checkpoints: How the states of passes are saved.
        show_progress: Whether worker 0 shows progress.
    """
    sequences, discovery = inputs.sequences, inputs.discovery
    dtype = getattr(torch, inputs.settings.factors.accumulate)
    context = PassContext(
        inputs.model, sequences, [], world, dtype, show_progress, task=inputs.task
    )
    arrangement = arranged(inputs, context, sink)
    context = in_steps_of(arrangement.step_tokens, context)
    share = largest_share(context)
    groups = arrangement.groups
    owners = Owners.of(world, arrangement.shard, discovery.modules)
    context = replace(context, owners=owners, checkpoints=arrangement.checkpoints)
    context = replace(context, row_order=context.noted_row_order(discovery.modules))
    summary = FitSummary(sequences, discovery, world.size, len(groups))
    for number, group in enumerate(groups, start=1):
        name = f"{number}" if len(groups) == 1 else f"{number}/{len(groups)}"
        GroupFit(
            name,
            list(group),
            context,
            arrangement.step_tokens,
            owners,
            share,
            inputs.settings.factors,
            sink,
            checkpoints,
            summary,
        ).fit()
    peaks = world.gather(peak_bytes(world.device))
    summary.peak_bytes = {place: max(p.get(place, 0) for p in peaks) for place in peaks[0]}
    if summary.discovery is not discovery:  # experts without factors were left out
        inputs.fingerprints = model_fingerprints(inputs.model, summary.discovery.modules, world)
    with world.agree(takes_part=world.is_main):
        sink.finish(store_manifest(inputs, summary))
    return summary
