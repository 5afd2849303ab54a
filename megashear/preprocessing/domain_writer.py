"""Writes the training and the held-out side of one domain."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megashear.data.indexed import check_pair
from megashear.data.manifest import HELD_OUT_SUFFIX, DomainCounts
from megashear.preprocessing.documents import EncodedChunk, EncodingPolicy
from megashear.preprocessing.journal import (
    DomainState,
    Journal,
    Place,
    read_journal,
    write_journal,
)
from megashear.preprocessing.side_writer import SideWriter

logger = logging.getLogger(__name__)


class DomainWriter:
    """Writes one domain: ``{name}.bin/.idx`` and ``{name}_heldout.bin/.idx`` in a directory.

    Keeps what an earlier run wrote of the same input. Memory does not grow with what is written.
    """

    def __init__(
        self, directory: Path, name: str, policy: EncodingPolicy, files: Sequence[Path]
    ) -> None:
        """Resume what an earlier run began, or begin.

        Args:
            directory: holds the outputs and the journal.
            name: name of the domain.
            policy: encodes all chunks of the domain.
            files: input of the domain, in order.
        """
        self._directory, self._name = directory, name
        self._fraction = policy.held_out_fraction
        self._files = list(files)
        self._train = SideWriter(directory, name, policy.dtype)
        self._held_out = SideWriter(directory, f"{name}{HELD_OUT_SUFFIX}", policy.dtype)
        self._state, self._within = DomainState(), 0
        journal = read_journal(directory, name)
        self._places = list(journal.fitting(files))
        self.counts: DomainCounts | None = None
        """Counts of the finished domain; then there is nothing to add."""
        if journal.counts is None:
            self._resume(journal)
        elif self._is_whole(journal, policy.dtype):
            self.counts = DomainCounts(**journal.counts)
        else:
            self._places = []
            self._resume(Journal())

    @property
    def next_file(self) -> int:
        """Number of the input file to read next."""
        return len(self._places)

    @property
    def next_chunk(self) -> int:
        """Number of the chunk in ``next_file`` to read next."""
        return self._within

    def add(self, chunk: EncodedChunk) -> None:
        """Write the documents of the next chunk, each on its side."""
        self._train.add(chunk.train)
        self._held_out.add(chunk.held_out)
        self._within += 1
        old = self._state
        self._state = DomainState(
            train=self._train.state,
            held_out=self._held_out.state,
            skipped=dict(Counter(old.skipped) + Counter(chunk.skipped)),
            text_bytes=old.text_bytes + chunk.text_bytes,
            pretokenised=old.pretokenised + chunk.num_pretokenised,
            lone_surrogates=old.lone_surrogates + chunk.lone_surrogates,
        )

    def end_file(self) -> None:
        """Note that ``next_file`` has been read to its end."""
        self._places.append(Place.of(self._files[len(self._places)], None, self._state))
        self._within = 0

    def commit(self) -> None:
        """Bring everything to the disk, so that a run killed later loses nothing of it."""
        self._train.sync()
        self._held_out.sync()
        places = list(self._places)
        if self._within:
            places.append(Place.of(self._files[len(places)], self._within, self._state))
        write_journal(self._directory, self._name, Journal(places=tuple(places)))

    def finish(self) -> DomainCounts:
        """Close both sides, neither of them empty.

        Raises:
            ValueError: the domain has fewer than two different documents.
        """
        train, held_out, state = self._train, self._held_out, self._state
        if not train.state.documents and not held_out.state.documents:
            skipped = ", ".join(f"{n} {why}" for why, n in sorted(state.skipped.items()))
            raise ValueError(
                f"domain {self._name!r} is empty: its {len(self._files)} files hold no document "
                f"with text ({skipped or 'nothing'} skipped); remove the domain or mend the files"
            )
        self.commit()
        if not (train.state.documents and held_out.state.documents):
            # The places would no longer describe the files.
            write_journal(self._directory, self._name, Journal())
            if train.state.documents:
                self._divide(train, held_out, self._fraction)
            else:
                self._divide(held_out, train, 1 - self._fraction)
        train.close()
        held_out.close()
        largest = max((train, held_out), key=lambda side: side.state.largest_id)
        self.counts = DomainCounts(
            name=self._name,
            documents=train.state.documents,
            tokens=train.state.tokens,
            held_out_documents=held_out.state.documents,
            held_out_tokens=held_out.state.tokens,
            skipped=dict(sorted(state.skipped.items())),
            source_bytes=sum(place.size for place in self._places),
            text_bytes=state.text_bytes,
            pretokenised_documents=state.pretokenised,
            lone_surrogates=state.lone_surrogates,
            largest_id=largest.state.largest_id,
            largest_id_at=f"{largest.prefix.name}.bin, token {largest.state.largest_id_at}",
        )
        journal = Journal(places=tuple(self._places), counts=asdict(self.counts))
        write_journal(self._directory, self._name, journal)
        for side in (train, held_out):
            side.lengths.unlink(missing_ok=True)
        return self.counts

    def _resume(self, journal: Journal) -> None:
        """Open both sides after the last place that still fits its input file."""
        name = self._name
        if self._places:
            at = self._places[-1].state
            if not (self._train.reaches(at.train) and self._held_out.reaches(at.held_out)):
                logger.warning("domain %s: its files are shorter than noted; begun anew", name)
                self._places = []
        if len(self._places) < len(journal.places):
            kept = f"after {len(self._places)} files" if self._places else "at its beginning"
            logger.warning(
                "domain %s: %s is not what an earlier run read there; resumed %s",
                *(name, journal.places[len(self._places)].file, kept),
            )
        if self._places:
            self._state = self._places[-1].state
        self._train.open(self._state.train)
        self._held_out.open(self._state.held_out)
        if self._places and self._places[-1].chunks is not None:
            self._within = self._places.pop().chunks or 0

    def _is_whole(self, journal: Journal, dtype: str) -> bool:
        """Return whether the outputs of a finished domain exist, made of the files it now has."""
        assert journal.counts is not None
        counts = DomainCounts(**journal.counts)
        if not len(self._places) == len(journal.places) == len(self._files):
            logger.warning("domain %s: its files are others than before; begun anew", self._name)
            return False
        for suffix, tokens in (("", counts.tokens), (HELD_OUT_SUFFIX, counts.held_out_tokens)):
            try:
                pair = check_pair(self._directory / f"{self._name}{suffix}")
            except ValueError as error:
                logger.warning("domain %s is begun anew: %s", self._name, error)
                return False
            if pair.num_tokens != tokens or pair.dtype != np.dtype(dtype).type:
                logger.warning("domain %s: %s is not as noted; begun anew", self._name, pair.prefix)
                return False
        return True

    def _divide(self, full: SideWriter, empty: SideWriter, share: float) -> None:
        """Move the document whose length comes nearest to ``share`` of all to the empty side."""
        num_documents, num_tokens = full.state.documents, full.state.tokens
        # Not the document whose hash comes nearest: of two books that may be the longer one.
        lengths = np.fromfile(full.lengths, dtype=np.int32)
        chosen = int(np.abs(lengths - share * num_tokens).argmin())
        full.move_text(chosen, empty)
        if not full.state.documents:
            raise ValueError(
                f"domain {self._name!r} has {num_documents} documents, all of one text; a domain "
                f"needs two different ones, to train on one and hold the other out: add text, or "
                f"split the document"
            )
        held_out = self._held_out.state.tokens
        logger.warning(
            "domain %s: by hash all its %d documents fell on one side, so document %d of them was "
            "moved to the other: %d of %d tokens (%.1f %%) are held out, wanted %g %%; with more "
            "text another document may be moved",
            *(self._name, num_documents, chosen + 1, held_out, num_tokens),
            *(100 * held_out / num_tokens, 100 * self._fraction),
        )
