#!/usr/bin/env bash
# With UNITS=masks: learn masks and weights together; when started again, resume from the last
# checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [[ "$UNITS" != masks ]]; then
  echo "UNITS is $UNITS: 04_score.sh chooses the units, and no masks are learned"
  exit
fi
# shellcheck disable=SC2086  # EXTRA is a list of words
exec "$LAUNCH" -m megashear prune --config "$HERE/prune.yaml" \
  --data-path "$DATA" --reference-loss "$REFERENCE_LOSS" \
  --load "$SOURCE" --save "$PRUNED" --resume --tensorboard-dir "$TENSORBOARD/prune" \
  "${DISTILL[@]}" $EXTRA
