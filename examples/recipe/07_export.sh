#!/usr/bin/env bash
# Checkpoint -> Hugging Face directory, tokenizer included. One process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# shellcheck disable=SC2086  # EXTRA is a list of words
"$PYTHON" -m megashear convert --input "$SMALL" --output "$SMALL_HF" $EXTRA
