"""Batches of this replica, equal on all its tensor and pipeline ranks, and resumable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch

from megashear.data.batch import MicroBatch, micro_batch
from megashear.data.held_out import HeldOutSet
from megashear.data.mixture import DomainMixture, MixtureState
from megashear.data.sequences import DomainSequences

__all__ = ["DomainSequences", "HeldOutSet", "LoaderState", "MicroBatch", "MixtureLoader"]


class LoaderState(TypedDict):
    """Where a loader stands: plain numbers and names, a few for each domain."""

    domains: list[str]
    samples_per_epoch: list[int]
    sequence_length: int
    seed: int
    mixture: MixtureState


class MixtureLoader:
    """Draws global batches from a mixture of domains and reads this replica's share of them.

    All ranks draw the same samples in the same order, each replica reads its own, so nothing is
    communicated, and a state saved at one data-parallel size is resumed at any other. There are
    no worker processes to lose or to wait for: reading is a copy out of a memory map, some
    10,000 sequences a second.
    """

    def __init__(
        self,
        domains: Sequence[DomainSequences],
        mixture: DomainMixture,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        """Take the domains in the order of the mixture's weights.

        Args:
            domains: sequences of every domain, all with one seed and one sequence length.
            mixture: chooses the domain of each sample; its weights may change between batches.
            global_batch_size: sequences in a step, over all replicas.
            micro_batch_size: sequences that go through the model together.
            data_parallel_rank: which replica this is.
            data_parallel_size: number of replicas.

        Raises:
            ValueError: the batch does not divide, or domains and mixture do not belong together.
        """
        if len(domains) != len(mixture.weights):
            raise ValueError(
                f"{len(domains)} domains but --domain-weights has {len(mixture.weights)}; give "
                f"one weight for each of {[domain.name for domain in domains]}"
            )
        share = micro_batch_size * data_parallel_size
        if global_batch_size < 1 or share < 1 or global_batch_size % share:
            raise ValueError(
                f"--global-batch-size {global_batch_size} is not a positive multiple of "
                f"--micro-batch-size {micro_batch_size} * data-parallel size {data_parallel_size} "
                f"= {share}"
            )
        assert 0 <= data_parallel_rank < data_parallel_size, (
            data_parallel_rank,
            data_parallel_size,
        )
        assert len({(domain.seed, domain.sequence_length) for domain in domains}) == 1
        assert [domain.domain_index for domain in domains] == list(range(len(domains)))
        self.domains = list(domains)
        self.mixture = mixture
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        replica_size = global_batch_size // data_parallel_size
        start = data_parallel_rank * replica_size
        self._own = range(start, start + replica_size)

    @property
    def consumed_samples(self) -> int:
        """Sequences drawn so far by all replicas together."""
        return self.mixture.num_drawn

    def next_batch(self) -> list[MicroBatch]:
        """The microbatches of this replica for the next step.

        Replica d of dp has samples [d B / dp, (d + 1) B / dp) of a global batch of B.
        """
        drawn = [self.mixture.draw() for _ in range(self._global_batch_size)]
        batches = []
        for start in range(self._own.start, self._own.stop, self._micro_batch_size):
            places = range(start, start + self._micro_batch_size)
            chosen = [drawn[place] for place in places]
            text = torch.stack([self.domains[domain][sample] for domain, sample in chosen])
            batches.append(micro_batch(text, [domain for domain, _ in chosen], places, len(places)))
        return batches

    def state_dict(self) -> LoaderState:
        """Where the next batch begins, for any data-parallel size; fit for JSON."""
        return {
            "domains": [domain.name for domain in self.domains],
            "samples_per_epoch": [domain.samples_per_epoch for domain in self.domains],
            "sequence_length": self.domains[0].sequence_length,
            "seed": self.domains[0].seed,
            "mixture": self.mixture.state_dict(),
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on where the loader that gave ``state`` stood, with its weights.

        The batch sizes and the data-parallel size may differ from the saved run's.

        Raises:
            ValueError: the text, the seed or the sequence length differ, so that going on would
                repeat some samples and skip others.
        """
        here = self.state_dict()
        for key, way_out in (
            ("domains", "resume with the data of the saved run"),
            ("sequence_length", "resume with the saved --seq-length"),
            ("samples_per_epoch", "resume with the data of the saved run"),
            ("seed", "resume with the saved --seed"),
        ):
            if state[key] != here[key]:  # type: ignore[literal-required]
                raise ValueError(
                    f"cannot resume the data: {key} was {state[key]} in the saved run and is "  # type: ignore[literal-required]
                    f"{here[key]} now, which would repeat and skip samples; {way_out}, "  # type: ignore[literal-required]
                    f"or start a new run from its weights"
                )
        self.mixture.load_state_dict(state["mixture"])
