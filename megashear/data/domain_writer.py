"""Writes the training and the held-out side of one domain."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megashear.data.documents import EncodedChunk, EncodingPolicy
from megashear.data.manifest import HELD_OUT_SUFFIX, DomainCounts

logger = logging.getLogger(__name__)


class DomainWriter:
    """Writes one domain: ``{name}.bin/.idx`` and ``{name}_heldout.bin/.idx`` in a directory."""

    def __init__(self, directory: Path, name: str, policy: EncodingPolicy) -> None:
        self._name = name
        self._fraction = policy.held_out_fraction
        self._train = _SideWriter(directory / name, policy.dtype)
        self._held_out = _SideWriter(directory / f"{name}{HELD_OUT_SUFFIX}", policy.dtype)
        self._num_skipped = 0

    def add(self, chunk: EncodedChunk) -> None:
        """Write the documents of a chunk, each on its side."""
        self._num_skipped += chunk.num_skipped
        for document in chunk.documents:
            side = self._held_out if document.held_out else self._train
            side.add(document.tokens)

    def finish(self, source_bytes: int) -> DomainCounts:
        """Close both sides, none of them empty.

        Raises:
            ValueError: the domain has fewer than two different documents.
        """
        train, held_out = self._train, self._held_out
        if not train.lengths and not held_out.lengths:
            raise ValueError(
                f"domain {self._name!r} is empty: its files hold {self._num_skipped} documents "
                f"without text and no other; remove the domain or mend the files"
            )
        train.close()
        held_out.close()
        if not held_out.lengths:
            self._divide(train, held_out, self._fraction)
        elif not train.lengths:
            self._divide(held_out, train, 1 - self._fraction)
        return DomainCounts(
            name=self._name,
            documents=len(train.lengths),
            tokens=sum(train.lengths),
            held_out_documents=len(held_out.lengths),
            held_out_tokens=sum(held_out.lengths),
            skipped_documents=self._num_skipped,
            source_bytes=source_bytes,
        )

    def _divide(self, full: _SideWriter, empty: _SideWriter, share: float) -> None:
        """Move the document whose length comes nearest to ``share`` of all to the empty side."""
        num_documents, num_tokens = len(full.lengths), sum(full.lengths)
        # Not the one whose hash comes nearest: of two books that may be the longer one.
        chosen = int(np.abs(np.array(full.lengths) - share * num_tokens).argmin())
        full.move_text(chosen, empty)
        if not full.lengths:
            raise ValueError(
                f"domain {self._name!r} has {num_documents} documents, all of one text; a domain "
                f"needs two different ones, to train on one and hold the other out: add text, or "
                f"split the document"
            )
        held_out = sum(self._held_out.lengths)
        logger.warning(
            "domain %s: by hash all its %d documents fell on one side, so document %d was moved "
            "to the other: %d of %d tokens (%.1f %%) are held out, wanted %g %%",
            *(self._name, num_documents, chosen, held_out, num_tokens),
            *(100 * held_out / num_tokens, 100 * self._fraction),
        )


class _SideWriter:
    """One .bin/.idx in the making."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype).type
        self._open()

    def _open(self) -> None:
        self._builder = IndexedDatasetBuilder(f"{self._prefix}.bin", dtype=self._dtype)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        lengths: list[int] = self._builder.sequence_lengths
        return lengths

    def add(self, tokens: npt.NDArray[np.integer]) -> None:
        self._builder.add_document(tokens, [len(tokens)])

    def close(self) -> None:
        self._builder.finalize(f"{self._prefix}.idx")

    def move_text(self, chosen: int, other: _SideWriter) -> None:
        """Write both sides anew, document ``chosen`` and its copies on the empty other one.

        Only a domain of few documents can have an empty side, so this is never much to copy.
        """
        source = self._prefix.with_name(self._prefix.name + "~whole")  # no domain's name has a ~
        for suffix in (".bin", ".idx"):
            Path(f"{self._prefix}{suffix}").rename(f"{source}{suffix}")
        self._open()
        other._open()
        whole = IndexedDataset(str(source))
        text = whole[chosen]
        for tokens in (whole[place] for place in range(len(whole))):
            (other if np.array_equal(tokens, text) else self).add(tokens)
        self.close()
        other.close()
        for suffix in (".bin", ".idx"):
            Path(f"{source}{suffix}").unlink()
