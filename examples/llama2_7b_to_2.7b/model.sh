# shellcheck shell=bash
# Knobs of this model, sourced by recipe/settings.sh. Its domains are arxiv, book, c4, cc, github,
# stackexchange and wiki.

# Hugging Face directory to prune.
SOURCE_HF="${SOURCE_HF:-Llama-2-7b-hf}"

# Shape to cut to by importance; that of masks is in prune.yaml.
TARGET="${TARGET:---target llama2-2.7b}"

# Loss that each domain should reach; published for this text.
REFERENCE_LOSS="${REFERENCE_LOSS:-$HERE/reference_loss.yaml}"
