# shellcheck shell=bash
# Knobs of the scripts in this folder, sourced by each; set one in the environment to change it.

# The folder of a model beside this one, or the path of another: prune.yaml, pretrain.yaml, model.sh.
RECIPE="${RECIPE:-llama2_7b_to_2.7b}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && cd "$RECIPE" && pwd)"

# What goes in, beside the source of model.sh: one jsonl file or folder per domain.
TEXT="${TEXT:-text}"

# How units are chosen: `importance`, from activations on some of the text, so that all tokens are
# left for the smaller model, or `masks`, learned with the weights, as in the published recipes.
# docs/quality.md compares them.
UNITS="${UNITS:-importance}"
if [[ "$UNITS" != importance && "$UNITS" != masks ]]; then
  echo "UNITS=$UNITS; wanted importance or masks" >&2
  exit 2
fi

# What comes out.
RUN="${RUN:-runs/$(basename "$HERE")}"
DATA="${DATA:-$RUN/data}"
SOURCE="${SOURCE:-$RUN/source}"
SCORES="${SCORES:-$RUN/scores.json}"
PRUNED="${PRUNED:-$RUN/pruned}"
CUT="${CUT:-$RUN/cut}"
SMALL="${SMALL:-$RUN/small}"
SMALL_HF="${SMALL_HF:-$RUN/small-hf}"
TENSORBOARD="${TENSORBOARD:-$RUN/tensorboard}"

# Model to learn from, a checkpoint or a Hugging Face directory: the source, if no other is given.
# TEACHER=none learns from the text alone, as the published recipes do, in less time a step:
# `megashear plan --distill` says how much less.
TEACHER="${TEACHER:-$SOURCE}"
DISTILL=()
[[ "$TEACHER" == none ]] || DISTILL=(--distill-from "$TEACHER")

# Share of the text to hold out. LLaMA-2's recipes hold out 500 sequences a domain, about 2 M tokens:
# choose a share that gives at least that for the smallest domain. The last evaluation of a run
# reads all that was held out.
HELD_OUT_FRACTION="${HELD_OUT_FRACTION:-0.002}"
WORKERS="${WORKERS:-8}"

# Precision of the checkpoint that pruning starts from.
DTYPE="${DTYPE:-bfloat16}"

# Who runs the commands, and who starts the processes of the training scripts: nodes, processes a
# node and NCCL are set in ../launch, for all recipes alike.
export PYTHON="${PYTHON:-python3}"
LAUNCH="${LAUNCH:-$(dirname "${BASH_SOURCE[0]}")/../launch/torchrun.sh}"

# Flags for the end of every megashear command: EXTRA=--dry-run checks and starts nothing.
EXTRA="${EXTRA:-}"

source "$HERE/model.sh"
