#!/usr/bin/env bash
# Hugging Face directory -> checkpoint that any layout loads. One process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# shellcheck disable=SC2086  # EXTRA is a list of words
"$PYTHON" -m megashear convert --input "$SOURCE_HF" --output "$SOURCE" --dtype "$DTYPE" $EXTRA
