#!/usr/bin/env bash
# With UNITS=importance: measure how important each unit of the source is.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [[ "$UNITS" != importance ]]; then
  echo "UNITS is $UNITS: 04_prune.sh chooses the units, and no scores are needed"
  exit
fi
# shellcheck disable=SC2086  # EXTRA is a list of words
exec "$LAUNCH" -m megashear score --load "$SOURCE" --data-path "$DATA" \
  --tensor-model-parallel-size 4 --bf16 --seq-length 4096 --micro-batch-size 1 \
  --output "$SCORES" $EXTRA
