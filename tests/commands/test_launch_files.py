"""The files that people start from: configurations, launcher settings, scripts."""

import dataclasses
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from ekfac_dist.config import (
    DampingConfig,
    DataConfig,
    EstimateConfig,
    FactorsConfig,
    ModelConfig,
    PlanConfig,
    QueryConfig,
    ScoresConfig,
    field_types,
)
from ekfac_dist.demo.directory import DemoPaths, DemoSettings, RealDemoSettings
from ekfac_dist.demo.real import job_of
from ekfac_dist.fit.plan import make_plan

ROOT = Path(__file__).parents[2]
QUERY = ROOT / "configs" / "query.yaml"
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - {QUERY})
LAUNCHERS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def leaves(plain, prefix=""):
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def as_config(plain):
    parts = {"model": ModelConfig, "data": DataConfig, "factors": FactorsConfig}
    return EstimateConfig(
        **{name: parts[name](**value) if name in parts else value for name, value in plain.items()}
    )


def test_there_are_the_promised_files():
    names = [path.stem for path in CONFIGS]
    assert names == ["demo", "gpt2", "llama-3-8b", "pythia-1.4b", "smollm2"]
    launchers = ["cpu", "fsdp", "multi_gpu", "multi_node", "one_gpu"]
    assert [path.stem for path in LAUNCHERS] == launchers


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_an_estimate_configuration(path):
    plain = load(path)
    assert set(leaves(plain)) <= set(field_types(EstimateConfig))
    config = as_config(plain)
    assert config.output.startswith("runs/")
    assert config.factors.accumulate == "float32"


SHAPES = {  # what the named models' own configurations say
    "demo": transformers.LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=688),
    "gpt2": transformers.GPT2Config(),
    "llama-3-8b": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "pythia-1.4b": transformers.GPTNeoXConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16
    ),
    "smollm2": transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_fits_the_machine_that_it_names_in_one_pair_of_passes(path, tmp_path):
    machine = re.search(
        r"^# Machine: --workers (\d+) --device_memory (\w+)$", path.read_text(), re.M
    )
    assert machine is not None
    plain = load(path)
    SHAPES[path.stem].save_pretrained(tmp_path)
    planned = make_plan(
        PlanConfig(
            model=ModelConfig(name=str(tmp_path), dtype=plain["model"]["dtype"]),
            data=DataConfig(max_tokens=plain["data"]["max_tokens"]),
            factors=FactorsConfig(**plain["factors"]),
            batch_tokens=plain["batch_tokens"],
            workers=int(machine[1]),
            device_memory=machine[2],
            gflops=1000,
        )
    )
    assert planned.fits
    assert len(planned.groups) == 1


def test_the_queries_configuration_is_a_query_configuration():
    plain = load(QUERY)
    assert set(leaves(plain)) <= set(field_types(QueryConfig))
    parts = {"damping": DampingConfig, "scores": ScoresConfig}
    config = QueryConfig(
        **{name: parts[name](**value) if name in parts else value for name, value in plain.items()}
    )
    assert config.factors == load(ROOT / "configs" / "gpt2.yaml")["output"]


def test_the_demos_configuration_is_what_the_demo_fits():
    config = as_config(load(ROOT / "configs" / "demo.yaml"))
    settings = DemoSettings()
    assert config.data.max_sequences == settings.max_sequences
    assert config.data.max_tokens == settings.max_tokens
    assert config.batch_tokens == settings.batch_tokens
    factors = dataclasses.asdict(config.factors)
    assert factors == dataclasses.asdict(FactorsConfig())


def test_the_real_demos_configuration_is_what_that_demo_fits():
    written = load(ROOT / "configs" / "smollm2.yaml")
    paths = DemoPaths(Path("runs/demo-real"))
    job = job_of(paths, RealDemoSettings())
    fitted = dataclasses.asdict(job.estimate)
    given = dataclasses.asdict(as_config(written))
    for config in (fitted, given):
        del config["output"], config["save_minutes"]
    assert given == fitted


@pytest.mark.parametrize(
    ("name", "kind", "use_cpu", "num_machines"),
    [
        ("cpu", DistributedType.MULTI_GPU, True, 1),
        ("one_gpu", DistributedType.NO, False, 1),
        ("multi_gpu", DistributedType.MULTI_GPU, False, 1),
        ("multi_node", DistributedType.MULTI_GPU, False, 2),
        ("fsdp", DistributedType.FSDP, False, 1),
    ],
)
def test_a_launcher_configuration_starts_what_its_name_says(name, kind, use_cpu, num_machines):
    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.use_cpu is use_cpu
    assert config.num_machines == num_machines
    assert config.mixed_precision == "no"
    assert config.num_processes >= 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_executable_and_parses(path):
    assert path.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", path], check=True)


def test_every_requirement_is_pinned():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and "==" in str(pin.specifier) for pin in pins)
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert versions["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for wanted in (*project["dependencies"], *(one for extra in extras for one in extra)):
        requirement = Requirement(wanted)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of stubs: two nodes on this machine, and a launcher that says what it is told."""
    stubs = {
        "scontrol": "printf 'node-a\\nnode-b\\n'",
        "srun": (
            'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@"; done'
        ),
        "ekfac-dist": """printf '<%s>' "$@"; echo""",
    }
    for name, body in stubs.items():
        stub = tmp_path / name
        stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
        stub.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "31234567",
        "SLURM_GPUS_ON_NODE": "4",
    }


def run_slurm(environment, *arguments):
    return subprocess.run(
        ["bash", ROOT / "launch" / "slurm.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_slurm_gives_workers_time_to_save_their_states_before_it_kills_them(slurm, tmp_path):
    (tmp_path / "ekfac-dist").write_text(
        "#!/usr/bin/env bash\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n"
    )
    text = (ROOT / "launch" / "slurm.sh").read_text()
    announced = int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", text, re.M)[1])
    seconds = [int(line) for line in run_slurm(slurm, "c.yaml").stdout.splitlines()[1:]]
    assert seconds == [announced - 20] * 2
    longer = run_slurm({**slurm, "GRACE_SECONDS": "900"}, "c.yaml")
    assert longer.stdout.splitlines()[1:] == ["900"] * 2


def test_slurm_starts_one_launcher_per_node_with_its_own_number(slurm):
    done = run_slurm(slurm, "my config.yaml", "--data.max_tokens", "256")
    assert done.returncode == 0, done.stderr
    first, *launched = done.stdout.splitlines()
    assert first == "2 nodes (node-a node-b), 4 workers on each"
    for rank, line in enumerate(launched):
        assert line == (
            "<launch><--config_file><launch/accelerate/multi_node.yaml>"
            "<--num_machines><2><--num_processes><8>"
            "<--main_process_ip><node-a><--main_process_port><24567>"
            f"<--machine_rank><{rank}>"
            "<estimate><--config><my config.yaml><--data.max_tokens><256>"
        )
    assert len(launched) == 2


def test_slurms_settings_can_be_given_in_the_environment(slurm):
    changes = {"WORKERS_PER_NODE": "1", "MASTER_PORT": "29511", "ACCELERATE_CONFIG": "my.yaml"}
    done = run_slurm({**slurm, **changes}, "config.yaml")
    assert "<--config_file><my.yaml>" in done.stdout
    assert "<--num_processes><2>" in done.stdout
    assert "<--main_process_port><29511>" in done.stdout


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (143, True)])
def test_slurm_queues_a_preempted_run_again(slurm, tmp_path, status, requeued):
    (tmp_path / "ekfac-dist").write_text(f"#!/usr/bin/env bash\nexit {status}\n")
    stub = tmp_path / "scontrol"
    stub.write_text(f'{stub.read_text()}echo; echo "scontrol $*"\n')
    srun = tmp_path / "srun"
    srun.write_text(srun.read_text().replace('"$@"; done', '"$@" || exit $?; done'))
    done = run_slurm(slurm, "config.yaml")
    assert done.returncode == status
    assert ("scontrol requeue 31234567" in done.stdout) == requeued


def test_slurm_without_a_configuration_says_how_it_is_used(slurm):
    done = run_slurm(slurm)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
