"""No pickle of a checkpoint may run code before, or while, it is read."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megashear.checkpoint import pickles
from megashear.checkpoint.pickles import check_pickles
from megashear.checkpoint.weights import CheckpointWeights
from tests.ranks import run_ranks

Harmed = Callable[[Callable[[Path], object]], Path]


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def change_metadata(directory: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def add_byte_entry(directory: Path, value: Any) -> None:
    """As megatron-core stores a ShardedObject: a torch.save file inside of a .distcp file."""
    stored = io.BytesIO()
    torch.save(value, stored)
    (directory / "__0_9.distcp").write_bytes(stored.getvalue())

    def add(metadata: Metadata) -> None:
        place = type(next(iter(metadata.storage_data.values())))
        metadata.state_dict_metadata["rng"] = BytesStorageMetadata()
        length = len(stored.getvalue())
        metadata.storage_data[MetadataIndex("rng")] = place("__0_9.distcp", 0, length)

    change_metadata(directory, add)


def test_each_file_of_an_index_is_looked_at_once(
    tmp_path: Path, harmed: Harmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    iteration = harmed(lambda directory: None) / "iter_0000120"
    looked: list[Path] = []
    refuse = pickles.refuse_pointer
    monkeypatch.setattr(pickles, "refuse_pointer", lambda path: (looked.append(path), refuse(path)))
    entries = pickles.check_index(iteration).storage_data
    assert len(looked) == len(set(looked)) < len(entries)
    (looked[-1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{looked[-1].name} is a pointer of Git LFS"):
        pickles.check_index(iteration)


@pytest.mark.parametrize("where", [".metadata", "planner_data", "common.pt", "byte entry"])
def test_code_is_refused_and_not_run(tmp_path: Path, harmed: Harmed, where: str) -> None:
    ran = tmp_path / "ran"

    def harm(directory: Path) -> None:
        if where == ".metadata":
            (directory / ".metadata").write_bytes(pickle.dumps(Malicious(ran)))
        elif where == "planner_data":
            bad = Malicious(ran)
            change_metadata(directory, lambda metadata: setattr(metadata, "planner_data", bad))
        elif where == "common.pt":
            torch.save({"args": Malicious(ran)}, directory / "common.pt")
        else:
            add_byte_entry(directory, Malicious(ran))

    checkpoint = harmed(harm)
    with pytest.raises(ValueError, match=r"wants to load posix\.mkdir .*refused"):
        CheckpointWeights(checkpoint)
    assert not ran.exists()


def add_to_tensors(directory: Path, value: Any) -> None:
    """Put a pickle where the index says that the first tensor lies."""
    stored = io.BytesIO()
    torch.save(value, stored)

    def add(metadata: Metadata) -> None:
        place = metadata.storage_data[
            next(index for index in metadata.storage_data if index.fqn == EMBEDDING)
        ]
        path = directory / place.relative_path
        place.offset, place.length = path.stat().st_size, len(stored.getvalue())
        path.write_bytes(path.read_bytes() + stored.getvalue())

    change_metadata(directory, add)


EMBEDDING = "embedding.word_embeddings.weight"


def test_code_in_the_place_of_a_tensor_is_refused_and_not_run(
    tmp_path: Path, harmed: Harmed
) -> None:
    ran = tmp_path / "ran"
    checkpoint = harmed(lambda directory: add_to_tensors(directory, Malicious(ran)))
    weights = CheckpointWeights(checkpoint)
    with pytest.raises(Exception, match=r"posix\.mkdir|Weights only load failed"):
        weights["model.embed_tokens.weight"]
    assert not ran.exists()


def test_megatron_core_reads_tensors_without_running_code(tmp_path: Path, harmed: Harmed) -> None:
    ran = tmp_path / "ran"
    directory = harmed(lambda d: add_to_tensors(d, Malicious(ran))) / "iter_0000120"
    check_pickles(directory)

    def body(rank: int) -> None:
        entry = FileSystemReader(directory).read_metadata().state_dict_metadata[EMBEDDING]
        wanted = ShardedTensor.from_rank_offsets(EMBEDDING, torch.empty(entry.size))
        with pytest.raises(BaseException, match=r"posix\.mkdir|Weights only load failed"):
            dist_checkpointing.load({"x": wanted}, str(directory))

    run_ranks(1, body)
    assert not ran.exists()


def test_the_pickle_of_that_test_does_run_code_elsewhere(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_plain_values_and_tensors_pass(harmed: Harmed) -> None:
    def harm(directory: Path) -> None:
        torch.save({"iteration": 3, "lr": [0.1, None]}, directory / "common.pt")
        add_byte_entry(directory, {"state": torch.ones(3)})

    checkpoint = harmed(harm)
    assert "rng" in check_pickles(checkpoint / "iter_0000120").state_dict_metadata
    assert len(CheckpointWeights(checkpoint)) == 39


def test_a_pickle_that_is_no_pickle_is_refused(harmed: Harmed) -> None:
    checkpoint = harmed(lambda directory: (directory / "common.pt").write_bytes(b"nonsense"))
    with pytest.raises(ValueError, match=r"common.pt .*(broken|refused)"):
        CheckpointWeights(checkpoint)


def test_entries_outside_of_the_checkpoint_are_refused(harmed: Harmed) -> None:
    def point_outside(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../../other"

    checkpoint = harmed(lambda directory: change_metadata(directory, point_outside))
    with pytest.raises(ValueError, match=r"into \.\./\.\./other, which is not a file of its own"):
        CheckpointWeights(checkpoint)


@pytest.mark.parametrize("wrong", [-1, 2**63, "3", 1.5])
def test_entries_at_no_place_are_refused(harmed: Harmed, wrong: Any) -> None:
    def move(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).offset = wrong

    checkpoint = harmed(lambda directory: change_metadata(directory, move))
    with pytest.raises(ValueError, match=r"\.metadata is broken: .* bytes from byte .* on; copy"):
        CheckpointWeights(checkpoint)
