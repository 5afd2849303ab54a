"""Write a sharded state dict in megatron-core's torch_dist format, by threads of this process.

megatron-core's own writer starts processes, which still write after their rank was killed, and
leaves the end of each file in a buffer when it syncs. Plans, names and format are megatron-core's.
"""

from __future__ import annotations

import functools
import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megashear.checkpoint.pickles import COMMON
from megashear.checkpoint.torch_dist import EntryFile
from megashear.files.integrity import FileSum, HashingFile
from megashear.files.workers import Task

FILES_PER_RANK = 2
"""Files that a rank writes at a time, as many as in megatron-core."""


@dataclass(frozen=True)
class WrittenFiles:
    """Files that one rank has written."""

    results: list[WriteResult]
    """Place of each entry."""
    sums: dict[str, FileSum]
    """Size and checksum of each file, by name."""


class ShardedWrite:
    """Write of a sharded state dict into a directory.

    Making one plans who writes what; this is collective over the world. Call `write` on every rank,
    in any thread, and then `finish` on rank 0 with what all ranks wrote.

    Args:
        state: as `dist_checkpointing.save` takes it.
        directory: directory that rank 0 has made.
        keep_copy: copy all tensors to host memory now, so that they may change before they are
            written; otherwise they are copied while they are written.
    """

    def __init__(self, state: dict[str, Any], directory: Path, *, keep_copy: bool = False) -> None:
        self.directory = directory
        self._cancelled = threading.Event()
        self._written: dict[str, int] = {}  # by file, for each has a thread of its own
        sharded, common = save_preprocess(state)
        self._common = io.BytesIO()
        torch.save(common, self._common)  # now: its plain values change with the next step
        sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self._writer = _PlannedWriter(directory)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        (_, self._metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(sharded, False), self._writer, None, 0, planner=planner
        )
        self.num_bytes = sum(_size(data) for _, data in self._writer.entries)
        """Bytes of this rank's share."""
        if keep_copy:
            entries = self._writer.entries
            self._writer.entries = [
                (item, data if isinstance(data, io.BytesIO) else data.to("cpu", copy=True))
                for item, data in entries
            ]

    @property
    def num_written(self) -> int:
        """Return the bytes that this rank has written so far."""
        return sum(list(self._written.values()))

    def cancel(self) -> None:
        """Make `write` end soon, with an error."""
        self._cancelled.set()

    def write(self) -> WrittenFiles:
        """Write and sync this rank's files.

        Raises:
            OSError: a file cannot be written.
            InterruptedError: it was cancelled.
        """
        rank = dist.get_rank()
        buckets: list[list[tuple[WriteItem, Any]]] = [[] for _ in range(FILES_PER_RANK)]
        sizes = [0] * FILES_PER_RANK
        for entry in sorted(self._writer.entries, key=lambda entry: -_size(entry[1])):
            lightest = sizes.index(min(sizes))
            buckets[lightest].append(entry)
            sizes[lightest] += _size(entry[1])
        named = {f"__{rank}_{number}.distcp": bucket for number, bucket in enumerate(buckets)}
        tasks = {
            name: Task(functools.partial(self._write_file, name, bucket))
            for name, bucket in named.items()
            if bucket
        }
        results, sums = [], {}
        for name, task in tasks.items():
            of_file, sums[name] = task.result()
            results += of_file
        if rank == 0:
            with HashingFile(self.directory / COMMON) as file:
                file.write(self._common.getbuffer())
            sums[COMMON] = file.sum
        self._writer.entries = []  # frees the copies
        return WrittenFiles(results, sums)

    def finish(self, written: list[WrittenFiles]) -> dict[str, FileSum]:
        """Write the index of all entries, on rank 0.

        Args:
            written: what each rank has written, in the order of ranks.

        Returns:
            Checksums of all files that ranks wrote, for `integrity.write`.

        Raises:
            OSError: a file cannot be written.
        """
        assert self._metadata is not None, "rank 0 alone holds the plan"
        self._writer.finish(self._metadata, [one.results for one in written])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
        return {name: found for one in written for name, found in one.sums.items()}

    def _write_file(
        self, name: str, bucket: list[tuple[WriteItem, Any]]
    ) -> tuple[list[WriteResult], FileSum]:
        results = []
        with EntryFile(self.directory / name) as file:
            for item, data in bucket:
                if self._cancelled.is_set():
                    raise InterruptedError(f"{self.directory / name}: the process ends")
                place = file.append(data.cpu() if isinstance(data, Tensor) else data)
                self._written[name] = file.tell()
                results.append(WriteResult(item.index, place.length, place))
        return results, file.sum


class _PlannedWriter(FileSystemWriterAsync):
    """Part of megatron-core's planning that holds this rank's entries."""

    entries: list[tuple[WriteItem, Any]]

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.entries = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.entries = [
            (item, data.detach() if isinstance(data, Tensor) else data)
            for item in plan.items
            for data in [planner.resolve_data(item)]
        ]

    def storage_meta(self) -> None:
        """Return nothing: it would be a random name, and the directory's, which will change."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)


def _size(data: Tensor | io.BytesIO) -> int:
    return data.getbuffer().nbytes if isinstance(data, io.BytesIO) else data.nbytes
