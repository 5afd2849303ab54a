#!/usr/bin/env bash
# What each domain's loss should be: nobody has published it for this text, so the source's own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# shellcheck disable=SC2086  # EXTRA is a list of words
exec "$LAUNCH" -m megashear evaluate --load "$SOURCE" --data-path "$DATA" \
  --tensor-model-parallel-size 4 --bf16 --seq-length 4096 --micro-batch-size 1 \
  --output "$REFERENCE_LOSS" $EXTRA
