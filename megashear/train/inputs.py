"""What a run reads: text of every domain, and what its mixture follows."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megashear.config import (
    DataConfig,
    FinetuneRun,
    PruneRun,
    TrainConfig,
    TrainingRun,
    WhenExhausted,
)
from megashear.data.batch import DocumentBorders
from megashear.data.conversations import ConversationSequences, HeldOutConversations
from megashear.data.held_out import HeldOutSet
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.mixture import DomainMixture, normalise_weights
from megashear.data.phases import PhasedMixture, Phases, read_phases
from megashear.data.reference_loss import read_reference
from megashear.data.reweight import SCORES, Reweighting
from megashear.data.sequences import DomainSequences
from megashear.data.shares import ShareLimits, Vector, limits_of, weights_of
from megashear.shape import ModelShape
from megashear.train.evaluate import subsample_size
from megashear.train.pruning import modes_of_evaluation
from megashear.train.start import Start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What a run reads, opened and checked."""

    manifest: DataManifest
    training: Sequence[DomainSequences]
    """Training text of every domain, in the manifest's order."""
    held_out: Sequence[HeldOutSet]
    """Held-out text of every domain, in the manifest's order."""
    weights: Vector
    """Weight of each domain at the start."""
    references: Vector | None
    """Loss that each domain should have, nats per token; None where none are given."""
    reweighting: Reweighting | None
    """Moves the weights after evaluations; None leaves them alone."""
    phase_changes: Mapping[int, Vector]
    """Weights of the phases by their first sample; empty where there are no phases."""
    eval_sequences: int
    """Held-out sequences per domain in an evaluation within the run."""

    def replicated(self) -> dict[str, object]:
        """Return what must be equal on all ranks, by name; files of other hosts may differ."""
        return {
            "tokens of the data": [domain.tokens for domain in self.manifest.domains],
            "reference losses": None if self.references is None else self.references.tolist(),
            "phases": {first: part.tolist() for first, part in self.phase_changes.items()},
        }

    def mixture(self, *, when_exhausted: WhenExhausted) -> DomainMixture:
        """Make the mixture as the run begins; the state of a resumed run is yet to be loaded.

        Args:
            when_exhausted: what happens once a domain's sequences are read.
        """
        limit = None
        if when_exhausted != "repeat":
            limit = [domain.samples_per_epoch for domain in self.training]
        if self.phase_changes:
            return PhasedMixture(self.phase_changes, available=limit, when_exhausted=when_exhausted)
        return DomainMixture(self.weights, available=limit, when_exhausted=when_exhausted)


def read_inputs(config: TrainingRun, start: Start) -> Inputs:
    """Open the data and read what the mixture follows.

    Args:
        config: the run.
        start: where it begins.

    Raises:
        ValueError: data, weights, phases or references that do not fit the run or each other.
    """
    train, data = config.train, config.data
    # text
    manifest = read_manifest(data.data_path)
    names = manifest.names
    check_vocabulary(manifest, start.shape, start.tokenizer)
    if isinstance(config, FinetuneRun):
        manifest.check_chat()
    else:
        manifest.check_text()
    limits = limits_of(data.domain_floor, data.domain_cap, names)
    weights = shares = starting_weights(data, manifest, limits)
    is_packed = isinstance(config, FinetuneRun) and config.data.pack
    training = training_sequences(manifest, train, is_packed=is_packed)
    held_out = held_out_sets(manifest, train.seq_length, borders_of(config), is_packed=is_packed)
    # mixture
    changes: Mapping[int, Vector] = {}
    if data.domain_phases is not None:
        phases = read_phases(data.domain_phases, names, limits)
        weights, shares = phases.weights[0], np.max(phases.weights, axis=0)
        changes = _phase_changes(phases, train, start)
    if not start.resumes:
        _warn_of_dominant(names, shares, data.dominant_share)
    references = _references(data, manifest, is_evaluated=train.eval_interval > 0)
    reweighting = None
    if data.reweight in SCORES and references is not None:
        reweighting = Reweighting(
            policy=data.reweight,
            eta=data.reweight_eta,
            references=references,
            domains=names,
            smoothing=data.reweight_smoothing,
            limits=limits,
            dominant_share=data.dominant_share,
        )
    return Inputs(
        manifest=manifest,
        training=training,
        held_out=held_out,
        weights=weights,
        references=references,
        reweighting=reweighting,
        phase_changes=changes,
        eval_sequences=_eval_sequences(config, start, len(names)),
    )


def _phase_changes(phases: Phases, train: TrainConfig, start: Start) -> Mapping[int, Vector]:
    """Return the weights of the phases by their first sample.

    Raises:
        ValueError: phases that count tokens, where samples were of several lengths.
    """
    drawn = 0
    if start.resumes:
        assert start.description is not None
        known = start.description.known
        assert known.consumed_samples is not None
        assert known.loader is not None
        drawn = known.consumed_samples
        _check_tokens(phases, train, known.loader)
    return phases.changes(
        seq_length=train.seq_length,
        global_batch_size=train.global_batch_size,
        first_step=start.first_step,
        first_sample=drawn,
    )


def _check_tokens(phases: Phases, train: TrainConfig, saved: Mapping[str, Any]) -> None:
    changed = any(first for first, _ in saved.get("origins", []))
    if phases.unit == "start_token" and (changed or saved["sequence_length"] != train.seq_length):
        raise ValueError(
            f"--domain-phases begin at tokens and --seq-length is {train.seq_length}, but the "
            f"saved run read samples of another length ({saved['sequence_length']} last); give "
            f"start_step or start_sample in the file, or the saved --seq-length"
        )


def _warn_of_dominant(names: Sequence[str], shares: Vector, dominant: float) -> None:
    for name, share in zip(names, shares):
        if share > dominant:
            logger.warning(
                "%s takes %.1f %% of the mixture by its given weight, more than "
                "--dominant-share %g",
                *(name, 100 * share, dominant),
            )


def check_vocabulary(manifest: DataManifest, shape: ModelShape, directory: Path | None) -> None:
    """Refuse data of another tokenizer than the model's.

    Args:
        manifest: of the data.
        shape: of the model.
        directory: of the model's own tokenizer files, if it carries any.

    Raises:
        ValueError: ids without an embedding, or another tokenizer than the checkpoint carries.
    """
    manifest.check_vocab(shape.vocab_size)
    if directory is None:
        return
    # the checkpoint may carry the tokenizer in two formats; the data were made with one of them
    carried = [directory / name for name in ("tokenizer.model", "tokenizer.json")]
    known = [hashlib.sha256(path.read_bytes()).hexdigest() for path in carried if path.is_file()]
    if known and manifest.tokenizer_fingerprint not in known:
        raise ValueError(
            f"{manifest.directory} was tokenised with another tokenizer than the model's in "
            f"{directory}; preprocess again with --tokenizer-model {directory}"
        )


def starting_weights(data: DataConfig, manifest: DataManifest, limits: ShareLimits) -> Vector:
    """Return each domain's weight at the start: as given, or by training tokens within the limits.

    Raises:
        ValueError: weights that are none, of other domains, or outside the limits.
    """
    if not data.domain_weights:
        tokens = np.array([domain.tokens for domain in manifest.domains], dtype=np.float64)
        return limits.project(tokens / tokens.sum()) if limits.bind else tokens / tokens.sum()
    given = weights_of(data.domain_weights, manifest.names, flag="--domain-weights")
    weights = normalise_weights(given, len(manifest.names))
    if outside := limits.violations(weights, manifest.names):
        raise ValueError(
            f"--domain-weights: {'; '.join(outside)}, its --domain-floor or --domain-cap; change "
            f"one of the two"
        )
    return weights


def borders_of(config: TrainingRun) -> DocumentBorders:
    """Return what the borders of documents mean in a run."""
    are_packed = isinstance(config, FinetuneRun) and config.data.pack
    return DocumentBorders.of(config.model, are_packed=are_packed)


def training_sequences(
    manifest: DataManifest, train: TrainConfig, *, is_packed: bool = False
) -> list[DomainSequences]:
    """Open the training text of every domain, in the manifest's order.

    Args:
        manifest: of the data.
        train: has the sequence length and the seed.
        is_packed: of conversations: lay several into a sequence.
    """
    opened: Callable[..., DomainSequences] = DomainSequences
    if manifest.chat_format is not None:
        opened = functools.partial(ConversationSequences, is_packed=is_packed)
    return [
        opened(manifest.prefix(name), train.seq_length, train.seed, number)
        for number, name in enumerate(manifest.names)
    ]


def held_out_sets(
    manifest: DataManifest, seq_length: int, borders: DocumentBorders, *, is_packed: bool = False
) -> list[HeldOutSet]:
    """Open the held-out text of every domain, in the manifest's order.

    Args:
        manifest: of the data.
        seq_length: tokens of a sequence.
        borders: what the borders of documents mean.
        is_packed: of conversations: lay several into a sequence.
    """
    opened: Callable[..., HeldOutSet] = HeldOutSet
    if manifest.chat_format is not None:
        opened = functools.partial(HeldOutConversations, is_packed=is_packed)
    return [
        opened(manifest.held_out_prefix(name), seq_length, domain_index=number, borders=borders)
        for number, name in enumerate(manifest.names)
    ]


def _references(data: DataConfig, manifest: DataManifest, *, is_evaluated: bool) -> Vector | None:
    if data.reference_loss is not None:
        try:
            return read_reference(data.reference_loss, manifest.names)
        except ValueError as error:
            raise ValueError(f"--reference-loss: {error}") from None
    if data.reweight in ("constant", "schedule") or not is_evaluated:
        return None
    raise ValueError(
        f"--reweight {data.reweight} compares losses with --reference-loss, which is not given; "
        f"make one with `megashear reference-loss`, or use --reweight constant"
    )


def _eval_sequences(config: TrainingRun, start: Start, num_domains: int) -> int:
    """Return the sequences per domain of an evaluation: by the flags, or as in the run that is
    resumed, so that its curve continues."""
    num_modes = len(modes_of_evaluation(config.masks)) if isinstance(config, PruneRun) else 1
    asked = subsample_size(config.train, num_domains=num_domains, num_modes=num_modes)
    saved = start.description.known.eval_sequences if start.description else None
    if not start.resumes or saved is None:
        return asked
    if saved != asked:
        logger.info(
            "evaluations read %d sequences a domain as in the saved run, not %d as the flags say; "
            "--finetune would start a run of its own",
            *(saved, asked),
        )
    return saved
