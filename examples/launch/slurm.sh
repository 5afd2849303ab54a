#!/usr/bin/env bash
# Run a training script on the nodes of a Slurm job, and queue the job again until the run has ended:
#   sbatch --nodes 2 .../launch/slurm.sh .../recipe/06_pretrain.sh
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
# Send SIGTERM to all processes of the step, not to this script, 300 s before the time limit.
#SBATCH --signal=TERM@300
set -euo pipefail

# The run's --save: the job is queued again only if it has saved a later checkpoint since its start.
SAVE="${SAVE:-}"
# Without SAVE this script cannot see progress: after a failure before the time limit it queues the
# job again only until the job was queued, for whatever reason, this often.
MAX_BLIND_REQUEUES="${MAX_BLIND_REQUEUES:-3}"
# Seconds between SIGTERM and the time limit; the number in --signal.
SIGNAL="${SIGNAL:-300}"
# A failure sooner than this, in seconds, is due to the call or a node, and would happen again.
SHORTEST="${SHORTEST:-600}"
# Largest number of times that the job is queued again.
MAX_REQUEUES="${MAX_REQUEUES:-50}"
# Words before the script on every node: `srun` and its flags.
SRUN="${SRUN:-srun --kill-on-bad-exit=1}"

if (($# == 0)); then
  echo "usage: sbatch [flags of sbatch] slurm.sh SCRIPT [ARGUMENT ...]" >&2
  exit 2
fi

# Print what Slurm knows of this job under a name; nothing if it knows nothing.
shown() {
  local all
  all="$(SLURM_TIME_FORMAT=standard scontrol -o show job "$SLURM_JOB_ID")" || return 0
  if [[ " $all " =~ " $1="([^ ]*) ]]; then echo "${BASH_REMATCH[1]}"; fi
}
checkpoint() {
  local step
  step="$(cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null)" || :
  if [[ "$step" =~ ^[0-9]+$ ]]; then echo "$((10#$step))"; else echo none; fi
}
# Slurm may send the signal up to a minute early.
is_time_over() {
  local end
  end="$(shown EndTime)"
  end="$(date -d "${end:-Unknown}" +%s 2>/dev/null)" && ((end - $(date +%s) <= SIGNAL + 60))
}
give_up() {
  echo "status $status after $SECONDS s$1; not queued again" >&2
  exit "$status"
}

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${HOSTS[0]:?scontrol named no hosts for $SLURM_JOB_NODELIST}"
# Jobs that share a host meet at different ports.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export NNODES="$SLURM_JOB_NUM_NODES"
export JOB="$SLURM_JOB_ID"
export NPROC_PER_NODE="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
export MAX_RESTARTS="${MAX_RESTARTS:-3}"

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${HOSTS[*]}"
PREEMPTED_BEFORE="$(shown PreemptTime)"
SAVED_BEFORE="$(checkpoint)"
SECONDS=0
status=0
# shellcheck disable=SC2016,SC2086  # each task expands its own SLURM_NODEID; SRUN is a list of words
$SRUN bash -c 'NODE_RANK="$SLURM_NODEID" exec "$@"' - "$@" || status=$?
if ((status == 0)); then
  echo "done after $SECONDS s"
  exit 0
fi

RESTARTS="${SLURM_RESTART_COUNT:-0}"
PREEMPTED="$(shown PreemptTime)"
if ((RESTARTS >= MAX_REQUEUES)); then
  give_up ", and MAX_REQUEUES=$MAX_REQUEUES reached"
elif [[ "${PREEMPTED:-None}" != None && "$PREEMPTED" != "$PREEMPTED_BEFORE" ]]; then
  # Slurm gave the job time to end, and does not queue it again if it ended in that time.
  echo "preempted at $PREEMPTED"
elif ((SECONDS < SHORTEST)); then
  give_up ", sooner than SHORTEST=$SHORTEST: read the log above"
elif [[ -n "$SAVE" ]]; then
  SAVED="$(checkpoint)"
  # A run that diverged names an older checkpoint, which is no progress.
  if ((${SAVED/none/-1} <= ${SAVED_BEFORE/none/-1})); then
    give_up ", and no later checkpoint in $SAVE since the start ($SAVED_BEFORE then, $SAVED now): read the log above"
  fi
elif ((RESTARTS >= MAX_BLIND_REQUEUES)) && ! is_time_over; then
  give_up ", before the time was over, and queued again $RESTARTS times already (at most \
MAX_BLIND_REQUEUES=$MAX_BLIND_REQUEUES): read the log above. With SAVE set to the run's --save the job is \
queued again as long as it saves checkpoints"
fi
echo "status $status after $SECONDS s: queued again, to resume from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID"
