# shellcheck shell=bash
# Knobs of this model, sourced by recipe/settings.sh. Its domains are arxiv, book, c4, cc, github,
# stackexchange and wiki.

# Hugging Face directory to prune.
SOURCE_HF="${SOURCE_HF:-Llama-2-7b-hf}"

# Loss that each domain should reach; published for this text.
REFERENCE_LOSS="${REFERENCE_LOSS:-$HERE/reference_loss.yaml}"
