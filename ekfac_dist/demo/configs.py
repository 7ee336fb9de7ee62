"""The configurations that the demo writes for its commands, and what they have made already."""

import json
from typing import Any

import yaml

from ekfac_dist.config import DataConfig, EstimateConfig, ModelConfig, QueryConfig
from ekfac_dist.demo.answers import QUERIES
from ekfac_dist.demo.directory import DemoPaths, DemoSettings
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.layout import read_manifest
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.runtime.files import write_whole

ACCELERATE_CONFIG = """\
# Workers on the CPU, which talk through gloo.
# MULTI_GPU with use_cpu is meant: MULTI_CPU without an MPI host file starts one process only.
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
gpu_ids: "-1,-1"  # hides this machine's GPUs, if it has any, from the workers
num_machines: 1
num_processes: {workers}
main_process_port: 0  # any port that is free
mixed_precision: "no"
"""

HEADER = """\
# Written by `ekfac-dist demo`, anew each time: copy it to change it.
"""


def estimate_config(paths: DemoPaths, settings: DemoSettings) -> EstimateConfig:
    """The configuration that the demo's factors are fitted with."""
    return EstimateConfig(
        model=ModelConfig(name=str(paths.model)),
        data=DataConfig(
            source=str(paths.corpus),
            max_tokens=settings.max_tokens,
            max_sequences=settings.max_sequences,
        ),
        batch_tokens=settings.batch_tokens,
        output=str(paths.factors),
    )


def query_config(paths: DemoPaths, settings: DemoSettings) -> QueryConfig:
    """The configuration of the demo's queries: model and data are those of the factors."""
    return QueryConfig(
        factors=str(paths.factors),
        queries=str(paths.queries),
        batch_tokens=settings.batch_tokens,
        output=str(paths.scores),
    )


def write_configs(paths: DemoPaths, settings: DemoSettings, workers: int) -> None:
    """Writes every configuration, and the queries.

    Args:
        paths: Where to; the directory is there.
        settings: What the demo makes.
        workers: Number of workers.

    Raises:
        OutputError: One cannot be written.
    """
    write_whole(paths.accelerate_config, [ACCELERATE_CONFIG.format(workers=workers).encode()])
    for file, config in (
        (paths.estimate_config, estimate_config(paths, settings)),
        (paths.query_config, query_config(paths, settings)),
    ):
        text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
        write_whole(file, [HEADER.encode(), text.encode()])
    lines = [json.dumps(query, ensure_ascii=False) + "\n" for query in QUERIES]
    write_whole(paths.queries, [line.encode() for line in lines])


def is_whole_store(paths: DemoPaths, settings: DemoSettings) -> bool:
    """Whether the factor store is finished, and of this very configuration."""
    try:
        StoreReader(paths.factors)
    except StoreError:
        return False
    return is_store_of(paths, settings)


def is_store_of(paths: DemoPaths, settings: DemoSettings) -> bool:
    """Whether there is a factor store, finished or not, of this very configuration."""
    try:
        found = read_manifest(paths.factors).get("config")
    except StoreError:
        return False
    return found == _plain(estimate_config(paths, settings))


def is_whole_answer(paths: DemoPaths, settings: DemoSettings) -> bool:
    """Whether the scores are finished, of this very configuration, and of these very queries."""
    try:
        reader = ResultsReader(paths.scores)
        members = [one for row in reader.lines(results.QUERIES) for one in row["members"]]
    except StoreError:
        return False
    asked = [{name: member[name] for name in ("prompt", "completion")} for member in members]
    return reader.manifest["config"] == _plain(query_config(paths, settings)) and asked == QUERIES


def _plain(config: EstimateConfig | QueryConfig) -> Any:
    """The configuration as it comes back from JSON."""
    return json.loads(json.dumps(config.as_dict()))
