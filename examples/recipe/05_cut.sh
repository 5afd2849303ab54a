#!/usr/bin/env bash
# Keep the chosen units, and drop the others: the smaller checkpoint. One process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [[ "$UNITS" == masks ]]; then
  # --exact-target: masks seldom keep the target's count in every row; this keeps the most open
  # units, the model whose loss the pruning run logs as [exact masks].
  FLAGS=(--load "$PRUNED" --exact-target)
else
  # shellcheck disable=SC2206  # TARGET is a list of words
  FLAGS=(--load "$SOURCE" --scores "$SCORES" $TARGET)
fi
# shellcheck disable=SC2086  # EXTRA is a list of words
"$PYTHON" -m megashear cut "${FLAGS[@]}" --output "$CUT" $EXTRA
