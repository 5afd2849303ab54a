"""The writer of checkpoints: its index is megatron-core's own, its bytes are the same always."""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megashear.checkpoint import torch_dist, weights
from megashear.checkpoint.description import Description
from megashear.checkpoint.megatron_lm_args import common_state
from megashear.checkpoint.pickles import check_pickles
from megashear.checkpoint.torch_dist import TorchDistWriter
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.files.workers import run_all
from megashear.models import weight_table
from megashear.shape import ModelShape
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

WEIGHTS = random_weights(GROUPED)
DESCRIPTION = Description(shape=GROUPED, iteration=0, stage="converted")


def save_with_megatron(directory: Path, shape: ModelShape) -> None:
    """The same model as megatron-core writes it, with layers stacked as it stacks them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    entries = {}
    for row, layer in weight_table.tensors(shape):
        parts = [WEIGHTS[part.hf_name.format(layer=layer)] for part in row.parts]
        whole = weight_table.fuse(row, parts, shape)
        stacked = [] if layer is None else [(0, layer, shape.num_layers)]
        entries[row.name.format(layer=layer)] = ShardedTensor.from_rank_offsets(
            row.key, whole, *stacked, prepend_axis_num=len(stacked)
        )
    directory.mkdir()
    dist_checkpointing.save(entries | common_state(shape, 0), str(directory))


def test_the_index_says_what_megatron_cores_own_says(tmp_path: Path) -> None:
    run_ranks(1, lambda rank: save_with_megatron(tmp_path / "theirs", GROUPED))
    write_weights(tmp_path / "ours", WEIGHTS, DESCRIPTION)
    ours = check_pickles(tmp_path / "ours" / "iter_0000000")
    theirs = check_pickles(tmp_path / "theirs")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    lengths = [{at: place.length for at, place in m.storage_data.items()} for m in (ours, theirs)]
    assert lengths[0] == lengths[1]
    for name in ("metadata.json", "common.pt"):
        found, wanted = (
            (tmp_path / made / name).read_bytes() for made in ("ours/iter_0000000", "theirs")
        )
        assert found == wanted, name


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_the_bytes_depend_on_neither_workers_nor_the_way_weights_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 50_000)
    write_weights(tmp_path / "one", WEIGHTS, DESCRIPTION)
    write_weights(tmp_path / "three", WEIGHTS, DESCRIPTION, workers=3)
    write_weights(tmp_path / "pairs", WEIGHTS.items(), DESCRIPTION)
    one = files_of(tmp_path / "one")
    assert sum(name.endswith(".distcp") for name in one) > 3
    assert files_of(tmp_path / "three") == one
    assert files_of(tmp_path / "pairs") == one
    read = CheckpointWeights(tmp_path / "three")
    assert all(torch.equal(read[name], weight) for name, weight in WEIGHTS.items())


def test_a_weight_may_be_asked_for_again(tmp_path: Path) -> None:
    write_weights(tmp_path / "out", WEIGHTS, DESCRIPTION)
    read = CheckpointWeights(tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj.weight"
    for _ in range(2):
        assert torch.equal(read[name], WEIGHTS[name])


def test_layers_of_different_formats_are_refused(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    mixed = WEIGHTS | {name: WEIGHTS[name].half()}
    for given in (mixed, mixed.items()):
        with pytest.raises(ValueError, match=r"float32 in one layer and of torch.float16 in anot"):
            write_weights(tmp_path / "out", given, DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_its_index_is_no_checkpoint(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path).file(0) as file:
        file.add("x", torch.ones(3), [3], [0])
    with pytest.raises(ValueError, match="is no checkpoint, or was never finished"):
        check_pickles(tmp_path)


def test_weights_are_asked_for_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that memory is that of one parameter: nothing is asked for ahead of what was written."""
    asked: list[str] = []
    written: list[int] = []

    class Watched(dict[str, Tensor]):
        dtypes = dict.fromkeys(WEIGHTS, torch.float32)

        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    add = torch_dist.TorchDistFile.add

    def counted(self: torch_dist.TorchDistFile, *entry: object) -> None:
        written.append(len(asked))
        add(self, *entry)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_dist.TorchDistFile, "add", counted)
    write_weights(tmp_path / "out", Watched(WEIGHTS), DESCRIPTION)
    parts = [len(row.parts) for row, _ in weight_table.tensors(GROUPED)]
    assert written == [sum(parts[: n + 1]) for n in range(len(parts))]
    assert asked == list(WEIGHTS)


def test_one_failing_job_ends_the_others() -> None:
    ended = []

    def endless() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            ended.append(True)

    def failing() -> Generator[int, None, None]:
        yield 1
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        run_all([endless(), failing(), endless()], workers=2)
    assert ended


def test_no_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="workers is 0, wanted 1 or more"):
        run_all([], 0)
