"""score: from a model on disk and training text to importance scores of its units."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.scores import ImportanceScores, fingerprint
from megashear.config import ModelConfig, ScoreRun
from megashear.data.batch import DocumentBorders, MicroBatch, micro_batch
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.mixture import DomainMixture
from megashear.data.sequences import DomainSequences
from megashear.files.output import check_new_file, writing
from megashear.models.activations import FORMULAS, ActivationScores
from megashear.models.llama import check_layout
from megashear.monitor.console import progress
from megashear.parallel import device
from megashear.parallel.agree import check_same, ordered_sum, raise_together
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.train.environment import environment
from megashear.train.evaluate import slabs
from megashear.train.inputs import check_vocabulary
from megashear.train.schedule import run_schedule
from megashear.train.stored_model import StoredModel, find_model

logger = logging.getLogger(__name__)


def score(config: ScoreRun, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the importance of a model's units and write it to --output. Collective over the
    processes torchrun started.

    Args:
        config: the run.
        command: words of the command line, which the file keeps.

    Returns:
        Plain values about what was read.

    Raises:
        ValueError: anything a user can correct.
    """
    prepared = prepare_score(config)
    with distributed(config.parallel, config.model) as groups:
        scores = prepared.measure(groups, command)
        with raise_together():
            if groups.rank == 0:
                with writing("--output", config.output):
                    scores.write(Path(config.output))
    return {name: scores.measured[name] for name in ("sequences", "tokens", "loss")}


@dataclass(frozen=True, kw_only=True)
class PreparedScores:
    """A model and the text to score it on, found and checked."""

    config: ScoreRun
    model: StoredModel
    manifest: DataManifest
    training: Sequence[DomainSequences]
    """Training text of every domain, in the manifest's order."""
    drawn: Sequence[tuple[int, int]]
    """Domain of each sequence to read, and its number in the domain."""
    computes: ModelConfig
    """How the model computes, with documents kept apart as in the run that made it."""

    def measure(self, groups: ParallelGroups, command: Sequence[str] = ()) -> ImportanceScores:
        """Load the model and score it. Collective over the world.

        Args:
            groups: where this rank stands.
            command: words of the command line.

        Returns:
            The scores, equal on every rank; the fingerprint on rank 0 alone.
        """
        config, parallel = self.config, self.config.parallel
        check_same(
            {
                "shape of the model": self.model.shape.to_dict(),
                "tokens of the data": [domain.tokens for domain in self.manifest.domains],
            }
        )
        model = self.model.settle(groups, verify=config.verify_checkpoint)
        chunks = model.build(groups, parallel, self.computes)
        scores = ActivationScores(
            chunks, model.shape, groups, sequence_parallel=parallel.sequence_parallel
        )
        loss = self._pass_through(chunks, scores, groups)
        scores.close()
        values, print_of = scores.whole(), None
        with raise_together():
            if groups.rank == 0:
                print_of = fingerprint(model.weights())
        logger.info(
            "scored on %d sequences of %d tokens, loss %.4f",
            *(len(self.drawn), self.training[0].sequence_length, loss),
        )
        return ImportanceScores(
            shape=model.shape,
            values=values,
            fingerprint=print_of,
            measured=self._measured(model, loss) | environment(groups.world_size, command),
        )

    def _pass_through(
        self,
        chunks: Sequence[torch.nn.Module],
        scores: ActivationScores,
        groups: ParallelGroups,
    ) -> float:
        """Run all sequences forward, and return the mean loss, nats per token."""
        sums = torch.zeros(2, dtype=torch.float64, device=device.device())
        size, length = self.config.micro_batch_size, self.training[0].sequence_length
        total = -(-len(self.drawn) // (size * groups.data_size))  # microbatches of a replica
        batches = self._batches(groups)
        with progress(total, rank=groups.rank, desc="scoring", unit="batch", leave=False) as bar:
            for slab in slabs(batches, groups):
                for found in run_schedule(chunks, slab, forward_only=True):
                    sums += torch.stack([found.sums.sum(), found.counts.sum()])
                # a sequence that only fills a microbatch counts no token
                scores.add(torch.stack([batch.loss_mask[:, 0] for batch in slab]), length)
                bar.update(min(len(slab), total - bar.n))
        (sums,) = ordered_sum([sums], groups.pipeline)  # only last stages measured
        (sums,) = ordered_sum([sums], groups.data)
        return float(sums[0] / sums[1])

    def _batches(self, groups: ParallelGroups) -> Iterator[MicroBatch]:
        """Yield this replica's microbatches, as many as other replicas'; they take turns."""
        size = self.config.micro_batch_size
        # every position counts, so documents are read only to keep attention apart
        borders = DocumentBorders(part_attention=self.computes.reset_attention_mask)
        for turn in range(0, len(self.drawn), size * groups.data_size):
            start = turn + groups.data_rank * size
            own = self.drawn[start : start + size]
            chosen = [*own, *[self.drawn[0]] * (size - len(own))]
            text = torch.stack([self.training[domain][sample] for domain, sample in chosen])
            documents = None
            if borders.are_read:
                numbers = [self.training[domain].documents(sample) for domain, sample in chosen]
                documents = _parts(torch.stack(numbers))
            yield micro_batch(
                *_parts(text),
                [domain for domain, _ in chosen],
                range(start, start + size),
                len(own),
                borders=borders,
                documents=documents,
            )

    def _measured(self, model: StoredModel, loss: float) -> dict[str, Any]:
        """Return how the scores were measured, as plain values."""
        length = self.training[0].sequence_length
        domains = [domain for domain, _ in self.drawn]
        return {
            "model": str(model.directory),
            "stage": model.description.stage,
            "iteration": model.description.iteration,
            "data": str(self.manifest.directory),
            "tokenizer": self.manifest.tokenizer_fingerprint,
            "sequences by domain": {
                name: domains.count(number) for number, name in enumerate(self.manifest.names)
            },
            "sequences": len(self.drawn),
            "sequence length": length,
            "tokens": len(self.drawn) * length,
            "seed": self.config.seed,
            "documents apart": self.computes.reset_attention_mask,
            "bf16": self.computes.bf16,
            "loss": loss,
            "formulas": FORMULAS,
        }


def prepare_score(config: ScoreRun) -> PreparedScores:
    """Prepare `score` before processes meet.

    Raises:
        ValueError: anything a user can correct.
    """
    check_new_file("--output", config.output)
    if config.model.transformer_impl != "local":
        raise ValueError(
            f"--transformer-impl {config.model.transformer_impl} fuses norms with the layers after "
            f"them, so that what norms return, which is scored, cannot be read; leave it out"
        )
    model = find_model(load=config.load, load_hf=config.load_hf)
    check_layout(model.shape, config.parallel)
    manifest = read_manifest(config.data_path)
    manifest.check_text()
    check_vocabulary(manifest, model.shape, model.tokenizer)
    seq_length = model.sequence_length(config.seq_length)
    config.parallel.check_sequence(seq_length)
    model.shape.check_window(seq_length)
    training = [
        DomainSequences(manifest.prefix(name), seq_length, config.seed, number)
        for number, name in enumerate(manifest.names)
    ]
    return PreparedScores(
        config=config,
        model=model,
        manifest=manifest,
        training=training,
        drawn=_draw(training, config.num_sequences),
        computes=model.as_trained(config.model),
    )


def _draw(domains: Sequence[DomainSequences], num_sequences: int) -> list[tuple[int, int]]:
    """Choose sequences of all domains in proportion to their text, none twice."""
    available = [domain.samples_per_epoch for domain in domains]
    tokens = [domain.num_tokens for domain in domains]
    mixture = DomainMixture(
        [number / sum(tokens) for number in tokens],
        available=available,
        when_exhausted="redistribute",
    )
    if sum(available) < num_sequences:
        logger.info(
            "the data has %d sequences, fewer than --num-sequences %d: all are read",
            *(sum(available), num_sequences),
        )
    return [mixture.draw() for _ in range(min(num_sequences, sum(available)))]


def _parts(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of the inputs and the part of the labels, [b, s] each."""
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
