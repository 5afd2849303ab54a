"""Writes the training and the held-out side of one domain."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megashear.data.indexed import check_pair, read_documents, write_index
from megashear.data.manifest import HELD_OUT_SUFFIX, DomainCounts
from megashear.preprocessing.documents import EncodedChunk, EncodedSide, EncodingPolicy
from megashear.preprocessing.journal import (
    FOLDER,
    DomainState,
    Journal,
    Place,
    SideState,
    read_journal,
    write_journal,
)

logger = logging.getLogger(__name__)


class DomainWriter:
    """Writes one domain: ``{name}.bin/.idx`` and ``{name}_heldout.bin/.idx`` in a directory.

    What an earlier run wrote of the same input is taken over. Memory does not grow with what is
    written.
    """

    def __init__(
        self, directory: Path, name: str, policy: EncodingPolicy, files: Sequence[Path]
    ) -> None:
        """Take up what is there.

        Args:
            directory: holds the outputs and the journal.
            name: of the domain.
            policy: that all chunks of the domain are encoded with.
            files: its input, in order.
        """
        self._directory, self._name = directory, name
        self._fraction = policy.held_out_fraction
        self._files = list(files)
        journal = read_journal(directory, name)
        self._places = list(journal.fitting(files))
        if journal.counts is not None and not self._is_whole(journal, policy.dtype):
            journal, self._places = Journal(), []
        self.counts = None if journal.counts is None else DomainCounts(**journal.counts)
        """What the domain holds where an earlier run finished it; then there is nothing to add."""
        if self.counts is not None:
            return
        self._train = _SideWriter(directory, name, policy.dtype)
        self._held_out = _SideWriter(directory, f"{name}{HELD_OUT_SUFFIX}", policy.dtype)
        if self._places:
            at = self._places[-1].state
            if not (self._train.reaches(at.train) and self._held_out.reaches(at.held_out)):
                logger.warning("domain %s: its files are shorter than noted; begun anew", name)
                self._places = []
        if len(self._places) < len(journal.places):
            kept = f"after {len(self._places)} files" if self._places else "at its beginning"
            logger.warning(
                "domain %s: %s is not what an earlier run read there; going on %s",
                *(name, journal.places[len(self._places)].file, kept),
            )
        state = self._places[-1].state if self._places else DomainState()
        self._skipped = Counter(state.skipped)
        self._text_bytes, self._pretokenised = state.text_bytes, state.pretokenised
        self._lone_surrogates = state.lone_surrogates
        self._train.open(state.train)
        self._held_out.open(state.held_out)
        if self._places and self._places[-1].chunks is not None:
            self._within = self._places.pop().chunks or 0
        else:
            self._within = 0

    @property
    def next_file(self) -> int:
        """Number of the input file to go on with."""
        return len(self._places)

    @property
    def next_chunk(self) -> int:
        """Number of the chunk in ``next_file`` to go on with."""
        return self._within

    def add(self, chunk: EncodedChunk) -> None:
        """Write the documents of the next chunk, each on its side."""
        self._skipped += chunk.skipped
        self._text_bytes += chunk.text_bytes
        self._pretokenised += chunk.num_pretokenised
        self._lone_surrogates += chunk.lone_surrogates
        self._train.add(chunk.train)
        self._held_out.add(chunk.held_out)
        self._within += 1

    def end_file(self) -> None:
        """Note that ``next_file`` has been read to its end."""
        self._places.append(Place.of(self._files[len(self._places)], None, self._state()))
        self._within = 0

    def commit(self) -> None:
        """Make sure that a run that is killed from here on loses nothing up to here."""
        self._train.sync()
        self._held_out.sync()
        places = list(self._places)
        if self._within:
            places.append(Place.of(self._files[len(places)], self._within, self._state()))
        write_journal(self._directory, self._name, Journal(places=tuple(places)))

    def finish(self) -> DomainCounts:
        """Close both sides, none of them empty.

        Raises:
            ValueError: the domain has fewer than two different documents.
        """
        train, held_out = self._train, self._held_out
        if not train.state.documents and not held_out.state.documents:
            skipped = ", ".join(f"{n} {why}" for why, n in sorted(self._skipped.items()))
            raise ValueError(
                f"domain {self._name!r} is empty: its {len(self._files)} files hold no document "
                f"with text ({skipped or 'nothing'} skipped); remove the domain or mend the files"
            )
        self.commit()
        if not (train.state.documents and held_out.state.documents):
            # The files will no longer be what the places say.
            write_journal(self._directory, self._name, Journal())
            if train.state.documents:
                self._divide(train, held_out, self._fraction)
            else:
                self._divide(held_out, train, 1 - self._fraction)
        train.close()
        held_out.close()
        largest = max((train, held_out), key=lambda side: side.state.largest_id)
        counts = DomainCounts(
            name=self._name,
            documents=train.state.documents,
            tokens=train.state.tokens,
            held_out_documents=held_out.state.documents,
            held_out_tokens=held_out.state.tokens,
            skipped=dict(sorted(self._skipped.items())),
            source_bytes=sum(place.size for place in self._places),
            text_bytes=self._text_bytes,
            pretokenised_documents=self._pretokenised,
            lone_surrogates=self._lone_surrogates,
            largest_id=largest.state.largest_id,
            largest_id_at=f"{largest.prefix.name}.bin, token {largest.state.largest_id_at}",
        )
        write_journal(
            self._directory,
            self._name,
            Journal(places=tuple(self._places), counts=asdict(counts)),
        )
        self.counts = counts
        for side in (train, held_out):
            side.lengths.unlink(missing_ok=True)
        return counts

    def _is_whole(self, journal: Journal, dtype: str) -> bool:
        """Whether the outputs of a finished domain are there, made of the files it now has."""
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

    def _state(self) -> DomainState:
        return DomainState(
            train=self._train.state,
            held_out=self._held_out.state,
            skipped=dict(self._skipped),
            text_bytes=self._text_bytes,
            pretokenised=self._pretokenised,
            lone_surrogates=self._lone_surrogates,
        )

    def _divide(self, full: _SideWriter, empty: _SideWriter, share: float) -> None:
        """Move the document whose length comes nearest to ``share`` of all to the empty side."""
        num_documents, num_tokens = full.state.documents, full.state.tokens
        # Not the one whose hash comes nearest: of two books that may be the longer one.
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
            "text another may be",
            *(self._name, num_documents, chosen + 1, held_out, num_tokens),
            *(100 * held_out / num_tokens, 100 * self._fraction),
        )


class _SideWriter:
    """One .bin/.idx in the making, with the lengths of its documents in a file until it is done."""

    def __init__(self, directory: Path, name: str, dtype: str) -> None:
        self.prefix = directory / name
        self.lengths = directory / FOLDER / f"{name}.lengths"
        self.state = SideState()
        self._dtype = np.dtype(dtype)

    @property
    def _text(self) -> Path:
        return Path(f"{self.prefix}.bin")

    def reaches(self, state: SideState) -> bool:
        """Whether the files are there, at least as long as they were at ``state``."""
        return all(
            file.is_file() and file.stat().st_size >= wanted
            for file, wanted in self._sizes(state).items()
        )

    def open(self, state: SideState) -> None:
        """Go on at ``state``; what lies behind it is cut off."""
        self.state = state
        for file, size in self._sizes(state).items():
            file.touch()
            os.truncate(file, size)
        self._streams = (self._text.open("ab"), self.lengths.open("ab"))

    def add(self, side: EncodedSide) -> None:
        if not len(side.lengths):
            return
        assert side.tokens.dtype == self._dtype, (side.tokens.dtype, self._dtype)
        for stream, numbers in zip(self._streams, (side.tokens, side.lengths)):
            stream.write(numbers.tobytes())
        old, place = self.state, int(side.tokens.argmax())
        self.state = replace(
            old,
            documents=old.documents + len(side.lengths),
            tokens=old.tokens + len(side.tokens),
        )
        if (largest := int(side.tokens[place])) > old.largest_id:
            self.state = replace(self.state, largest_id=largest, largest_id_at=old.tokens + place)

    def sync(self) -> None:
        """Bring all that was added to the disk."""
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Write the index; the side is whole from here on."""
        self.sync()
        for stream in self._streams:
            stream.close()
        write_index(Path(f"{self.prefix}.idx"), self.lengths, self._dtype.name)

    def move_text(self, chosen: int, other: _SideWriter) -> None:
        """Write both sides anew, document ``chosen`` and its copies on the empty other one.

        Only a domain of few documents can have an empty side, so this is never much to copy.
        """
        self.close()
        source = self.prefix.with_name(self.prefix.name + "~whole")  # no domain's name has a ~
        for suffix in (".bin", ".idx"):
            Path(f"{self.prefix}{suffix}").rename(f"{source}{suffix}")
        self.open(SideState())
        text = next(itertools.islice(read_documents(source), chosen, None))
        for tokens in read_documents(source):
            side = other if np.array_equal(tokens, text) else self
            side.add(EncodedSide(tokens, np.array([len(tokens)], dtype=np.int32)))
        for suffix in (".bin", ".idx"):
            Path(f"{source}{suffix}").unlink()

    def _sizes(self, state: SideState) -> dict[Path, int]:
        return {
            self._text: state.tokens * self._dtype.itemsize,
            self.lengths: state.documents * np.dtype(np.int32).itemsize,
        }
