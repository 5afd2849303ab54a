#!/usr/bin/env bash
# Learn masks and weights together; when started again, resume from the last checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# shellcheck disable=SC2086  # EXTRA is a list of words
exec "$LAUNCH" -m megashear prune --config "$HERE/prune.yaml" \
  --data-path "$DATA" --reference-loss "$REFERENCE_LOSS" \
  --load "$SOURCE" --save "$PRUNED" --resume --tensorboard-dir "$TENSORBOARD/prune" \
  ${TEACHER:+--distill-from "$TEACHER"} $EXTRA
