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
from megashear.checkpoint.store import agree_on_iteration, load_weights, read_log_alpha
from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import EvaluateRun, GenerateRun, Masks, ModelConfig, ParallelConfig
from megashear.conversion.hf import HfWeights
from megashear.conversion.sharded_hf import describe, load_hf
from megashear.masks.mask_set import MaskSet, exact_gates, expected_gates
from megashear.masks.targets import target_units, whole_parts
from megashear.models.binding import MaskBinding
from megashear.models.llama import build_chunks, check_layout, own_layers
from megashear.models.parts import own_parts
from megashear.parallel.agree import raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.tokenizer import tokenizer_files
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.models import Tokenizer
from megashear.train.reading import Reader
from megashear.train.schedule import ForwardPass
from megashear.train.start import check_no_masks, check_weights
from megashear.train.target import check_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model in a checkpoint or a Hugging Face directory."""

    directory: Path
    """One iteration's directory, or the Hugging Face directory."""
    description: Description
    """What the directory says of the model."""
    load: str | None
    """What named the checkpoint; None for a Hugging Face directory."""
    masks: Masks | None = None
    """Masks of a pruning run to run the model under; None of a model without masks."""

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

    def check_runnable(self, parallel: ParallelConfig, model: ModelConfig) -> None:
        """Refuse a layout that does not divide the model, and layers that know no masks.

        Raises:
            ValueError: with the way out.
        """
        check_layout(self.shape, parallel)
        if self.masks is not None:
            check_layers(model)

    def open_tokenizer(self, named: str | None) -> Tokenizer:
        """Open the tokenizer that --tokenizer-model names, or the model's own.

        Raises:
            ValueError: there is none, or it has ids without an embedding.
        """
        if named is None and not tokenizer_files.find(self.tokenizer):
            raise ValueError(
                f"{self.directory} carries no tokenizer; name one with --tokenizer-model"
            )
        tokenizer = load_tokenizer(self.tokenizer if named is None else named)
        if tokenizer.vocab_size > self.shape.vocab_size:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens and the model an embedding of "
                f"{self.shape.vocab_size}; name the model's own tokenizer with --tokenizer-model"
            )
        if tokenizer.note is not None:
            logger.warning("%s", tokenizer.note)
        return tokenizer

    def end_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the tokens that end a text, as the model and its tokenizer name them."""
        return tokenizer_files.end_tokens(self.description.token_ids, tokenizer)

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
            return self if whole == self.directory else _read(whole, self.load, self.masks)

    def build(
        self, groups: ParallelGroups, parallel: ParallelConfig, model: ModelConfig
    ) -> list[torch.nn.Module]:
        """Build this rank's chunks, without memory for gradients, and load their weights; masks are
        not applied. Collective over the world.

        Args:
            groups: where this rank stands.
            parallel: how the model is divided.
            model: precision and layers.
        """
        chunks = build_chunks(self.shape, groups, parallel, model, variant=model.transformer_impl)
        if self.load is None:
            load_hf(self.directory, chunks, groups)
        else:
            # masks fold into float32 masters where there are some, as in the cut
            load_weights(self.directory, chunks, exact=self.masks is not None)
        return chunks

    def open(
        self, groups: ParallelGroups, parallel: ParallelConfig, model: ModelConfig
    ) -> ForwardPass:
        """Load the model to run it forward, under its masks if it has any.

        Collective over the world; arguments as for `build`.
        """
        chunks = self.build(groups, parallel, model)
        if self.masks is None:
            return ForwardPass(chunks=chunks)
        target = self.description.known.target
        parts = own_parts(whole_parts(self.shape, target), own_layers(chunks), groups)
        binding = MaskBinding(
            *(chunks, MaskSet(parts), self.shape, groups),
            sequence_parallel=parallel.sequence_parallel,
        )
        log_alpha = read_log_alpha(self.directory)
        if self.masks == "exact":
            gates = exact_gates(log_alpha, target_units(self.shape, target))
        else:
            gates = expected_gates(log_alpha)
        binding.bind({0: binding.slice_gates(gates)})
        return ForwardPass(chunks=chunks, select=binding.select)

    def open_reader(
        self, groups: ParallelGroups, config: EvaluateRun | GenerateRun
    ) -> tuple[StoredModel, Reader]:
        """Settle which iteration is read, and load it to be asked about text.

        Collective over the world; errors as for `settle`.
        """
        model = self.settle(groups, verify=config.verify_checkpoint)
        reader = Reader(
            model=model.open(groups, config.parallel, config.model),
            shape=model.shape,
            groups=groups,
            micro_batch_size=config.micro_batch_size,
        )
        return model, reader


def find_model(*, load: str | None, load_hf: str | None, masks: Masks | None = None) -> StoredModel:
    """Find the model that --load or --load-hf names; the latter counts where both are given.

    Args:
        load: a checkpoint.
        load_hf: a Hugging Face directory.
        masks: masks to take of a pruning run; None refuses such a run.

    Raises:
        ValueError: there is none, it is damaged, or it is nothing without its masks.
    """
    if load_hf is not None:
        directory = Path(load_hf)
        return StoredModel(directory=directory, description=describe(directory), load=None)
    assert load is not None
    return _read(find_iteration(load), load, masks)


def _read(directory: Path, load: str, masks: Masks | None) -> StoredModel:
    description = read_description(directory)
    if description.known.mask_extents is None or masks is None:
        masks = None
        check_no_masks(directory, description)
    check_weights(directory)
    return StoredModel(directory=directory, description=description, load=load, masks=masks)
