"""A model on disk: found and checked before processes meet, loaded at any layout."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megashear.checkpoint.description import (
    TOKENIZER,
    Description,
    find_iteration,
    read_description,
)
from megashear.checkpoint.store import agree_on_iteration, load_weights
from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import ModelConfig, ParallelConfig
from megashear.conversion.hf import HfWeights
from megashear.conversion.sharded_hf import describe, load_hf
from megashear.models.llama import build_chunks
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train.start import check_no_masks, check_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model without masks, in a checkpoint or a Hugging Face directory."""

    directory: Path
    """One iteration's directory, or the Hugging Face directory."""
    description: Description
    """What the directory says of the model."""
    load: str | None
    """What named the checkpoint; None for a Hugging Face directory."""

    @property
    def shape(self) -> ModelShape:
        """Extents of the model."""
        return self.description.shape

    @property
    def tokenizer(self) -> Path:
        """Directory of the model's own tokenizer files, if it carries any."""
        return self.directory if self.load is None else self.directory / TOKENIZER

    def as_trained(self, model: ModelConfig) -> ModelConfig:
        """Return how the model computes, with documents kept apart as flags ask for, or as in the
        run that made the checkpoint."""
        saved = self.description.known.flags
        names = ("reset_attention_mask", "eod_mask_loss")
        asked = {name: getattr(model, name) or getattr(saved, name) for name in names}
        for name in names:
            if asked[name] and not getattr(model, name):
                logger.info("--%s, as the run that made the checkpoint", name.replace("_", "-"))
        return dataclasses.replace(model, **asked)

    def sequence_length(self, asked: int | None) -> int:
        """Return the length asked for, or that of the run that made the checkpoint.

        Other lengths give other losses and scores.

        Raises:
            ValueError: neither is known.
        """
        if asked is not None:
            return asked
        if (length := self.description.known.flags.seq_length) is None:
            raise ValueError(
                f"--seq-length is not given and {self.directory}, of stage "
                f"{self.description.stage!r}, was not trained by megashear; give the length of "
                f"sequences, tokens, say that of the losses or scores to compare with"
            )
        return length

    def weights(self) -> Mapping[str, Tensor]:
        """Open the weights by Hugging Face name, in this process; each is read when asked for."""
        return HfWeights(self.directory) if self.load is None else CheckpointWeights(self.directory)

    def settle(self, groups: ParallelGroups, *, verify: bool) -> StoredModel:
        """Return the newest whole iteration of the checkpoint. Collective over the world.

        Args:
            groups: where this rank stands.
            verify: compare the checksums of all files, not only their sizes.

        Raises:
            ValueError: on every rank: none is whole, or the one that is cannot be taken.
        """
        if self.load is None:
            return self
        whole = agree_on_iteration(self.load, groups, contents=verify)
        with raise_together():
            # another one where the newest is damaged, or where a newer one was saved meanwhile
            return self if whole == self.directory else _read(whole, self.load)

    def build(
        self, groups: ParallelGroups, parallel: ParallelConfig, model: ModelConfig
    ) -> list[torch.nn.Module]:
        """Build this rank's chunks, without memory for gradients, and load their weights.

        Collective over the world.

        Args:
            groups: where this rank stands.
            parallel: how the model is divided.
            model: precision and layers.
        """
        chunks = build_chunks(self.shape, groups, parallel, model, variant=model.transformer_impl)
        if self.load is None:
            load_hf(self.directory, chunks, groups)
        else:
            load_weights(self.directory, chunks)
        return chunks


def find_model(*, load: str | None, load_hf: str | None) -> StoredModel:
    """Find the model that --load or --load-hf names; the latter counts where both are given.

    Raises:
        ValueError: there is none, it is damaged, or it is nothing without its masks.
    """
    if load_hf is not None:
        directory = Path(load_hf)
        return StoredModel(directory=directory, description=describe(directory), load=None)
    assert load is not None
    return _read(find_iteration(load), load)


def _read(directory: Path, load: str) -> StoredModel:
    description = read_description(directory)
    check_no_masks(directory, description)
    check_weights(directory)
    return StoredModel(directory=directory, description=description, load=load)
