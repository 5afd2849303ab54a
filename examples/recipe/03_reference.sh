#!/usr/bin/env bash
# Measure the source's own loss in every domain, where the recipe has no published reference.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [[ -e "$REFERENCE_LOSS" ]]; then
  echo "$REFERENCE_LOSS exists; nothing to measure"
  exit
fi
# shellcheck disable=SC2086  # EXTRA is a list of words
exec "$LAUNCH" -m megashear evaluate --load "$SOURCE" --data-path "$DATA" \
  --tensor-model-parallel-size 4 --bf16 --seq-length 4096 --micro-batch-size 1 \
  --output "$REFERENCE_LOSS" $EXTRA
