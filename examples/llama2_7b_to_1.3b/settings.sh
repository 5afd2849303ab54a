# shellcheck shell=bash
# Knobs of the scripts in this folder, sourced by each; set one in the environment to change it.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# What goes in: a Hugging Face directory, and one jsonl file or folder per domain
# (arxiv, book, c4, cc, github, stackexchange, wiki).
SOURCE_HF="${SOURCE_HF:-Llama-2-7b-hf}"
TEXT="${TEXT:-text}"

# What comes out.
RUN="${RUN:-runs/llama2_7b_to_1.3b}"
DATA="${DATA:-$RUN/data}"
SOURCE="${SOURCE:-$RUN/source}"
PRUNED="${PRUNED:-$RUN/pruned}"
CUT="${CUT:-$RUN/cut}"
SMALL="${SMALL:-$RUN/small}"
SMALL_HF="${SMALL_HF:-$RUN/small-hf}"
TENSORBOARD="${TENSORBOARD:-$RUN/tensorboard}"

# Text: the recipe holds out 500 sequences a domain, about 2 M tokens; choose a share that gives at
# least that for the smallest domain. The last evaluation of a run reads all that was held out.
HELD_OUT_FRACTION="${HELD_OUT_FRACTION:-0.002}"
WORKERS="${WORKERS:-8}"

# Precision of the checkpoint that pruning starts from.
DTYPE="${DTYPE:-bfloat16}"

# Who runs the commands, and who starts the processes of the training scripts: nodes, processes a
# node and NCCL are set in ../launch, for all recipes alike.
export PYTHON="${PYTHON:-python3}"
LAUNCH="${LAUNCH:-$HERE/../launch/torchrun.sh}"

# Flags for the end of every megashear command: EXTRA=--dry-run checks and starts nothing.
EXTRA="${EXTRA:-}"
