#!/usr/bin/env bash
# Fold the masks into the weights and drop the closed units. One process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# --exact-target: masks seldom keep the target's count in every row; this keeps the most open units,
# the model whose loss the pruning run logs as [exact masks].
# shellcheck disable=SC2086  # EXTRA is a list of words
"$PYTHON" -m megashear cut --load "$PRUNED" --output "$CUT" --exact-target $EXTRA
