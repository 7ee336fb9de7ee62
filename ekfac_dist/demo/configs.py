"""The configurations that the demo writes, and checks whether their results exist already."""

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
    """The configuration of `estimate`."""
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
    """The configuration of `query`, which takes model and data from the factors."""
    return QueryConfig(
        factors=str(paths.factors),
        queries=str(paths.queries),
        batch_tokens=settings.batch_tokens,
        output=str(paths.scores),
    )


def write_configs(paths: DemoPaths, settings: DemoSettings, workers: int) -> None:
    """Writes all configurations and the queries.

    Args:
        paths: The demo's directory, which must exist.
        settings: Settings of the demo.
        workers: Number of workers.

    Raises:
        OutputError: If a file cannot be written.
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
    """Whether the factor store is complete and was fitted with these settings."""
    try:
        StoreReader(paths.factors)
    except StoreError:
        return False
    return is_store_of(paths, settings)


def is_store_of(paths: DemoPaths, settings: DemoSettings) -> bool:
    """Whether a factor store with these settings exists, complete or unfinished."""
    try:
        stored = read_manifest(paths.factors).get("config")
    except StoreError:
        return False
    return stored == _as_json(estimate_config(paths, settings))


def is_whole_answer(paths: DemoPaths, settings: DemoSettings) -> bool:
    """Whether the scores are complete, with these settings and of the demo's queries."""
    try:
        reader = ResultsReader(paths.scores)
        members = [member for line in reader.lines(results.QUERIES) for member in line["members"]]
    except StoreError:
        return False
    queries = [{name: member[name] for name in ("prompt", "completion")} for member in members]
    same_config = reader.manifest["config"] == _as_json(query_config(paths, settings))
    return same_config and queries == QUERIES


def _as_json(config: EstimateConfig | QueryConfig) -> Any:
    """The configuration as it is read back from JSON."""
    return json.loads(json.dumps(config.as_dict()))
