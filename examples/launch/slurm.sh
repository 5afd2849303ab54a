#!/usr/bin/env bash
# A training script on the nodes of a Slurm job, which is queued again where it ended before its end:
#   sbatch --nodes 2 .../launch/slurm.sh .../llama2_7b_to_2.7b/03_prune.sh
# Flags of sbatch override the lines below; accounts, partitions and modules are yours to add.
#SBATCH --job-name=megashear
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM to all processes of the step, not to this script, 300 s before the time is over.
#SBATCH --signal=TERM@300
set -euo pipefail

# A failure sooner than this, in seconds, is one of the call or of a node, and would come again.
SHORTEST="${SHORTEST:-600}"
# How often the job is queued again, at most.
MAX_REQUEUES="${MAX_REQUEUES:-50}"
# Words before the script that runs on every node; `srun` and its flags.
SRUN="${SRUN:-srun --kill-on-bad-exit=1}"

if (($# == 0)); then
  echo "usage: sbatch [flags of sbatch] slurm.sh SCRIPT [ARGUMENT ...]" >&2
  exit 2
fi
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${HOSTS[0]:?scontrol named no hosts for $SLURM_JOB_NODELIST}"
# Jobs that share a host meet at different ports.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export NNODES="$SLURM_JOB_NUM_NODES"
export JOB="$SLURM_JOB_ID"
export NPROC_PER_NODE="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
export MAX_RESTARTS="${MAX_RESTARTS:-3}"

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${HOSTS[*]}"
SECONDS=0
status=0
# shellcheck disable=SC2016,SC2086  # each task expands its own SLURM_NODEID; SRUN is a list of words
$SRUN bash -c 'NODE_RANK="$SLURM_NODEID" exec "$@"' - "$@" || status=$?
if ((status == 0)); then
  echo "done after $SECONDS s"
  exit 0
fi
if ((SECONDS < SHORTEST)); then
  echo "status $status after $SECONDS s, sooner than SHORTEST=$SHORTEST: read the log above; not" \
    "queued again" >&2
  exit "$status"
fi
if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
  echo "status $status after $SECONDS s; queued again $MAX_REQUEUES times already, no more" >&2
  exit "$status"
fi
echo "status $status after $SECONDS s: queued again, to go on from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID"
