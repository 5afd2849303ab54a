#!/usr/bin/env bash
# Continue to train the cut model; when started again, resume from the last checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# shellcheck disable=SC2086  # EXTRA is a list of words
exec "$LAUNCH" -m megashear pretrain --config "$HERE/pretrain.yaml" \
  --data-path "$DATA" --reference-loss "$REFERENCE_LOSS" \
  --load "$CUT" --save "$SMALL" --resume --tensorboard-dir "$TENSORBOARD/pretrain" \
  "${DISTILL[@]}" $EXTRA
