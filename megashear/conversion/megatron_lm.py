"""Read the weights of a Megatron-LM checkpoint, whose arguments describe the model."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megashear.checkpoint.description import (
    DESCRIPTION,
    TRACKER,
    TRACKER_BYTES,
    Description,
    iteration_name,
)
from megashear.checkpoint.megatron_lm_args import shape_of_arguments, vocab_size_of_arguments
from megashear.checkpoint.pickles import METADATA, check_index, read_common
from megashear.checkpoint.weights import CheckpointWeights
from megashear.files.integrity import CHECKSUMS
from megashear.files.regular import read_bytes

logger = logging.getLogger(__name__)

RELEASE = "release"
"""Tracker and directory of a checkpoint that has no iteration number."""
_PREFIXES = ("", "model.", "module.")
"""What may stand before the names of the model's tensors: a wrapper's attribute."""
_EMBEDDING = "embedding.word_embeddings.weight"
_VOCABULARY = (_EMBEDDING, "output_layer.weight")
_BESIDE = ("optimizer.", "rng_state", "rerun_state_machine")
"""First parts of the names of what is saved beside the model."""


def find_megatron_lm(checkpoint: Path | str) -> Path | None:
    """Return the directory of a Megatron-LM checkpoint's newest iteration; None if there is none.

    Args:
        checkpoint: a checkpoint's directory, or directly one iteration's.

    Raises:
        ValueError: Megatron-LM wrote it, but in a format that no other layout can read.
    """
    directory = Path(checkpoint)
    tracker = directory / TRACKER
    if tracker.is_file():
        newest = read_bytes(tracker, TRACKER_BYTES).decode("utf-8", errors="replace").strip()
        if newest != RELEASE and not re.fullmatch(r"[0-9]{1,18}", newest):
            return None
        directory /= newest if newest == RELEASE else iteration_name(int(newest))
    if next(directory.glob("mp_rank_*"), None) is not None:
        raise ValueError(
            f"{directory} is in Megatron-LM's format for one layout only (--ckpt-format torch); "
            f"let Megatron-LM load it and save it with --ckpt-format torch_dist (or --ckpt-convert-"
            f"format torch_dist)"
        )
    # a checkpoint of megashear without description still has checksums, and is damaged
    if (directory / DESCRIPTION).exists() or (directory / CHECKSUMS).exists():
        return None
    return directory if (directory / METADATA).is_file() else None


class MegatronLmWeights(CheckpointWeights):
    """The weights of a Megatron-LM checkpoint by Hugging Face name; see `CheckpointWeights`.

    A GPT in the torch_dist format, of either spec. The ``args`` of its common state (``common.pt``,
    or an entry of the index from megatron-core 0.19 on) say what model it is; no other object of
    its pickles is made. Rows that pad the vocabulary are left out.

    Args:
        checkpoint: a checkpoint's directory, or one iteration's.
        vocab_size: tokens of the vocabulary, where the arguments do not say it; else all rows that
            are stored count.

    Raises:
        ValueError: it is incomplete, could run code, has no arguments, or is a model that is not
            supported; the argument or the tensor is named.
    """

    def __init__(self, checkpoint: Path | str, *, vocab_size: int | None = None) -> None:
        directory = find_megatron_lm(checkpoint)
        if directory is None:
            raise ValueError(f"{checkpoint} is no Megatron-LM checkpoint in the torch_dist format")
        where = f"Megatron-LM checkpoint {directory}"
        metadata = check_index(directory)
        common = read_common(directory, foreign=True, metadata=metadata)
        args = common.get("args")
        if not isinstance(args, argparse.Namespace):
            raise ValueError(
                f"{where} has no args in its common state, which say what model it is; save it "
                f"with Megatron-LM itself"
            )
        prefix = _prefix(metadata, where)
        stored = metadata.state_dict_metadata[prefix + _EMBEDDING]
        assert isinstance(stored, TensorStorageMetadata)
        vocab_size = _vocab_size(args, vocab_size, stored.size[0], where)
        shape = shape_of_arguments(args, where, vocab_size=vocab_size)
        iteration = common.get("iteration")
        description = Description(
            shape=shape,
            iteration=0,
            stage="converted",
            details={"megatron_lm_iteration": iteration if isinstance(iteration, int) else None},
        )
        self._open(directory, metadata, description, prefix=prefix, padded=_VOCABULARY)

    def _is_weight(self, key: str) -> bool:
        return not key.startswith(_BESIDE)


def _prefix(metadata: Metadata, where: str) -> str:
    for prefix in _PREFIXES:
        found = metadata.state_dict_metadata.get(prefix + _EMBEDDING)
        if isinstance(found, TensorStorageMetadata):
            return prefix
    raise ValueError(f"{where} has no {_EMBEDDING}; is it a GPT of megatron-core?")


def _vocab_size(args: argparse.Namespace, given: int | None, stored: int, where: str) -> int:
    if given is not None and not 0 < given <= stored:
        raise ValueError(
            f"--vocab-size is {given}, and {where} stores {stored} rows of the vocabulary"
        )
    known = vocab_size_of_arguments(args, where, stored=stored)
    if given is None and known is None:
        logger.warning(
            "%s does not say how many of the %d rows of its vocabulary are tokens; all are kept, "
            "also those that pad it, unless --vocab-size says it",
            where,
            stored,
        )
    return given or known or stored
