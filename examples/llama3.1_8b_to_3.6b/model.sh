# shellcheck shell=bash
# Knobs of this model, sourced by recipe/settings.sh. Its domains are those of the text.

# Hugging Face directory to prune.
SOURCE_HF="${SOURCE_HF:-Llama-3.1-8B}"

# Shape to cut to by importance; that of masks is in prune.yaml.
TARGET="${TARGET:---target-num-layers 28 --target-hidden-size 3072 --target-ffn-hidden-size 8192 \
--target-num-attention-heads 24}"

# Loss that each domain should reach; nobody has published it, so 03_reference.sh measures the
# source's own.
REFERENCE_LOSS="${REFERENCE_LOSS:-$RUN/reference_loss.json}"
