"""What a demo fits and asks: the configurations that it writes, and whether their results exist."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ekfac_dist.config import EstimateConfig, QueryConfig
from ekfac_dist.demo.directory import DemoPaths
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one demo fits and asks.

    Attributes:
        estimate: The configuration of `estimate`.
        query: The configuration of `query`, which takes model and data from the factors.
        queries: The queries, {"prompt", "completion"} each.
        note: What the report says about its texts; None: nothing.
    """

    estimate: EstimateConfig
    query: QueryConfig
    queries: Sequence[dict[str, str]]
    note: str | None = None


def write_configs(paths: DemoPaths, job: Job, workers: int) -> None:
    """Writes all configurations and the queries.

    Args:
        paths: The demo's directory, which must exist.
        job: What the demo fits and asks.
        workers: Number of workers.

    Raises:
        OutputError: If a file cannot be written.
    """
    write_whole(paths.accelerate_config, [ACCELERATE_CONFIG.format(workers=workers).encode()])
    for file, config in ((paths.estimate_config, job.estimate), (paths.query_config, job.query)):
        text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
        write_whole(file, [HEADER.encode(), text.encode()])
    lines = [json.dumps(query, ensure_ascii=False) + "\n" for query in job.queries]
    write_whole(paths.queries, [line.encode() for line in lines])


def is_whole_store(paths: DemoPaths, job: Job) -> bool:
    """Whether the factor store is complete and was fitted as the job says."""
    try:
        StoreReader(paths.factors)
    except StoreError:
        return False
    return is_store_of(paths, job)


def is_store_of(paths: DemoPaths, job: Job) -> bool:
    """Whether a factor store of the job exists, complete or unfinished."""
    try:
        stored = read_manifest(paths.factors).get("config")
    except StoreError:
        return False
    return stored == _as_json(job.estimate)


def is_whole_answer(paths: DemoPaths, job: Job) -> bool:
    """Whether the scores are complete, computed as the job says and of its queries."""
    try:
        reader = ResultsReader(paths.scores)
        members = [member for line in reader.lines(results.QUERIES) for member in line["members"]]
    except StoreError:
        return False
    queries = [{name: member[name] for name in ("prompt", "completion")} for member in members]
    same_config = reader.manifest["config"] == _as_json(job.query)
    return same_config and queries == list(job.queries)


def is_unfinished_answer(paths: DemoPaths, job: Job) -> bool:
    """Whether there are scores that `query` began as the job says, and can go on with."""
    try:
        manifest = json.loads((paths.scores / results.MANIFEST).read_text(encoding="utf-8"))
        return manifest["complete"] is False and manifest["config"] == _as_json(job.query)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _as_json(config: EstimateConfig | QueryConfig) -> Any:
    """The configuration as it is read back from JSON."""
    return json.loads(json.dumps(config.as_dict()))
