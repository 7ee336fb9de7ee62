#!/usr/bin/env bash
#SBATCH --job-name=ekfac
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#
# Fits factors on several nodes: one launcher per node, one worker per GPU. Five minutes before its
# time is over, or when it is preempted, the run stores its state; the job is queued again, and then
# goes on from there. The output directory must be one that all nodes see.
#
#   sbatch [--nodes N …] launch/slurm.sh CONFIG.yaml [--FIELD VALUE …]
#
# Submit it from the repository's root, or set EKFAC_DIST_ROOT. Also from the environment:
#   ACCELERATE_CONFIG   the launcher's configuration; launch/accelerate/multi_node.yaml
#   WORKERS_PER_NODE    the number of GPUs that SLURM gives on a node
#   GRACE_SECONDS       what workers have for storing their states; 280. `ekfac-dist plan` says what
#                       they need; for more, --signal=TERM@N with 20 more (and a partition whose
#                       GraceTime is as long, where jobs are preempted)
#   MAX_RESTARTS        how often it is queued again; 100
#   MASTER_PORT         of the first node; by the job's number, so that jobs do not meet
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: sbatch [--nodes N …] launch/slurm.sh CONFIG.yaml [--FIELD VALUE …]" >&2
  exit 2
fi

# SLURM runs a copy of this script from elsewhere: its own place says nothing.
cd "${EKFAC_DIST_ROOT:-$SLURM_SUBMIT_DIR}"
if [[ -d .venv ]]; then
  PATH="$PWD/.venv/bin:$PATH"
fi

restarts="${SLURM_RESTART_COUNT:-0}"
if [[ $restarts -gt 0 ]]; then
  # What was asked to be overwritten was, when the job first began.
  arguments=()
  for argument in "$@"; do
    [[ "$argument" == --overwrite ]] || arguments+=("$argument")
  done
  set -- "${arguments[@]}"
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
num_nodes="${#hosts[@]}"
workers_per_node="${WORKERS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"

launcher=(
  ekfac-dist launch
  --config_file "${ACCELERATE_CONFIG:-launch/accelerate/multi_node.yaml}"
  --num_machines "$num_nodes"
  --num_processes "$((num_nodes * workers_per_node))"
  --main_process_ip "${hosts[0]}"
  --main_process_port "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
)
echo "$num_nodes nodes (${hosts[*]}), $workers_per_node workers on each"

export HF_HUB_DISABLE_TELEMETRY=1
# The launcher kills workers that take longer: a little before SLURM would.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE_SECONDS:-280}"
# srun does not hand on --cpus-per-task by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
status=0
# A node's number is known only there, so the node's own shell puts it in.
# shellcheck disable=SC2016
srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'launcher=("${@:2:$1}"); shift "$(($1 + 1))"
    exec "${launcher[@]}" --machine_rank "$SLURM_NODEID" estimate --config "$@"' \
  node "${#launcher[@]}" "${launcher[@]}" "$@" || status=$?
if [[ $status -eq 143 && $restarts -lt "${MAX_RESTARTS:-100}" ]]; then
  echo "ended by SIGTERM with its state stored; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
