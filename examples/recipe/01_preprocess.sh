#!/usr/bin/env bash
# Tokenise the text of every domain into a training and a held-out set. One process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# shellcheck disable=SC2086  # EXTRA is a list of words
"$PYTHON" -m megashear preprocess --input "$TEXT" --output "$DATA" \
  --tokenizer-model "$SOURCE_HF" --held-out-fraction "$HELD_OUT_FRACTION" --workers "$WORKERS" $EXTRA
