#!/usr/bin/env bash
# Start the processes of a job on this node; run it on every node, with the words for torchrun:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 .../torchrun.sh -m megashear prune --config prune.yaml ...
set -euo pipefail

# Number of nodes, number of this node (from 0), and address of the first node.
NNODES="${NNODES:-1}"
if ((NNODES > 1)); then
  : "${NODE_RANK:?which of the $NNODES nodes is this? set it to 0 on the first, 1 on the next, ...}"
  : "${MASTER_ADDR:?set it, the same on all nodes, to the address of the one with NODE_RANK 0}"
fi
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
# Port of the first node; with one node any free port, so that two jobs do not collide.
MASTER_PORT="${MASTER_PORT:-$( ((NNODES > 1)) && echo 29500 || echo 0)}"
JOB="${JOB:-megashear}"
# Processes per node, one per GPU.
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
# How often all processes are started again after one has failed; with --resume they resume. Wrong
# flags cause restarts too, so keep 0 until a job has started well.
MAX_RESTARTS="${MAX_RESTARTS:-0}"
# Seconds that processes have to save after torchrun got SIGTERM; torchrun's own default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
PYTHON="${PYTHON:-python3}"

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# An older torch ignores the variable and kills after 30 s. Read its source, because importing torch
# takes seconds.
knows_the_timeout() {
  "$PYTHON" - <<'PYTHON'
import importlib.util, pathlib, sys
torch = importlib.util.find_spec("torch")
if torch is not None and torch.origin:
    launcher = pathlib.Path(torch.origin).parent / "distributed/launcher/api.py"
    sys.exit("TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in launcher.read_text(encoding="utf-8"))
PYTHON
}
if ((TORCH_ELASTIC_SHUTDOWN_TIMEOUT > 30)) && ! knows_the_timeout; then
  echo "torchrun.sh: this torch does not know TORCH_ELASTIC_SHUTDOWN_TIMEOUT: it kills the processes" \
    "30 s after SIGTERM, saved or not. Where an evaluation, a step and two saves take longer: a newer" \
    "torch (2.13 knows it), or --exit-duration-in-mins below the job's time limit, which needs no" \
    "signal, and --save-interval for what stops the job otherwise" >&2
fi

# Find a wrong call in one process, whose error is then the last line: torchrun would print a
# traceback of its own below the error.
if [[ "${1-} ${2-}" == "-m megashear" ]]; then
  found="$(WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$PYTHON" "$@" --dry-run 2>&1 >/dev/null)" || {
    status=$?
    printf '%s\n' "$found" >&2
    exit "$status"
  }
fi

# c10d, not static: when a process fails, the agents of all nodes restart their processes at once.
# Ranks then follow the names of the hosts, and NODE_RANK only decides which node hosts the store:
# torchrun's own guess fails if a host has several names.
IS_HOST="$( ((NODE_RANK == 0)) && echo true || echo false)"
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB" \
  --rdzv-conf "is_host=$IS_HOST" --max-restarts "$MAX_RESTARTS" "$@"
