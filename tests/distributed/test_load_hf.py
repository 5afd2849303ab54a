"""--load-hf: each rank reads its own slices, and is filled as from the converted checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.description import Description, read_description
from megashear.checkpoint.store import load_weights
from megashear.checkpoint.weights import write_weights
from megashear.config import (
    DataConfig,
    EvaluateRun,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainRun,
    TrainConfig,
)
from megashear.conversion import hf, sharded_hf
from megashear.models import weight_table
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape
from megashear.train import measure, run
from tests import text_run
from tests.conversions import megatron_to_hf
from tests.distributed.test_resume import finished_tensors
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.text_run import TextRun
from tests.tiny import SOURCE, layout, megatron_weights, named_parameters, shard

LAYOUTS = [layout(tp=2, pp=2), layout(pp=2, vpp=2), layout(tp=4, sp=True)]


class Filled(NamedTuple):
    """One rank's parameters by Megatron name, and what it read."""

    from_hf: dict[str, Tensor]
    from_checkpoint: dict[str, Tensor]
    tensor_rank: int
    bytes_read: int


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same float32 weights as a Hugging Face directory in several files and a checkpoint."""
    folder = tmp_path_factory.mktemp("stored")
    weights = random_weights(SOURCE)
    hf.write_directory(folder / "hf", weights.items(), SOURCE, max_shard_bytes=100_000)
    assert len(list((folder / "hf").glob("*.safetensors"))) > 2
    description = Description(shape=SOURCE, iteration=0, stage="converted")
    run_ranks(1, lambda rank: write_weights(folder / "checkpoint", weights, description))
    return folder / "hf", folder / "checkpoint"


def fill(
    stored: tuple[Path, Path],
    parallel: ParallelConfig,
    *,
    model: ModelConfig | None = None,
    broken: Callable[[], None] | None = None,
    shape: ModelShape = SOURCE,
) -> list[Filled]:
    """Fill a model on every rank in both ways, from fresh weights that differ."""

    def body(rank: int) -> Filled:
        if broken is not None:
            broken()
        groups = ParallelGroups.create(parallel)
        counted = count_bytes()

        def filled(seed: int, load: Callable[[Any], None]) -> dict[str, Tensor]:
            config = model or ModelConfig()
            chunks = build_llama(shape, groups, parallel, config, variant="local", seed=seed)
            load(chunks)
            return {n: p.detach().clone() for n, p in named_parameters(chunks).items()}

        from_hf = filled(1, lambda chunks: sharded_hf.load_hf(stored[0], chunks, groups))
        bytes_read = counted[0]
        from_checkpoint = filled(2, lambda chunks: load_weights(stored[1], chunks))
        return Filled(from_hf, from_checkpoint, groups.tensor_rank, bytes_read)

    return run_ranks(parallel.model_parallel_size, body)


def count_bytes() -> list[int]:
    """Count what is read of Hugging Face weights in this process from here on."""
    counted = [0]
    read_slice, read_whole = hf.HfWeights.read_slice, hf.HfWeights.__getitem__

    def slices(weights: hf.HfWeights, name: str, part: tuple[slice, ...]) -> Tensor:
        found = read_slice(weights, name, part)
        counted[0] += found.nbytes
        return found

    def wholes(weights: hf.HfWeights, name: str) -> Tensor:
        found = read_whole(weights, name)
        counted[0] += found.nbytes
        return found

    hf.HfWeights.read_slice = slices  # type: ignore[method-assign]
    hf.HfWeights.__getitem__ = wholes  # type: ignore[method-assign]
    return counted


@pytest.mark.parametrize("parallel", LAYOUTS)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_rank_is_filled_as_from_the_converted_checkpoint(
    stored: tuple[Path, Path], parallel: ParallelConfig, bf16: bool
) -> None:
    ranks = fill(stored, parallel, model=ModelConfig(bf16=bf16))
    # and as sliced by hand
    whole, size = megatron_weights(), parallel.tensor_model_parallel_size
    names = set()
    for rank in ranks:
        assert rank.from_hf.keys() == rank.from_checkpoint.keys()
        for name, tensor in rank.from_hf.items():
            assert torch.equal(tensor, rank.from_checkpoint[name]), name
            by_hand = shard(name, whole[name], rank.tensor_rank, size)
            assert torch.equal(tensor, by_hand.to(tensor.dtype)), name
        names |= rank.from_hf.keys()
    assert names == whole.keys()


@pytest.mark.parametrize(
    "parts",
    [
        {"family": "qwen3", "qk_norm": True, "tied_embeddings": True},
        # Qwen2's heads are as wide as hidden size over heads
        {"family": "qwen2", "qkv_bias": True, "tied_embeddings": True, "hidden_size": 64},
    ],
)
def test_every_part_of_a_family_is_read_and_the_vocabulary_padded(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    shape = replace(SOURCE, vocab_size=61, **parts)
    weights = random_weights(shape)
    hf.write_directory(tmp_path / "hf", weights, shape)
    description = Description(shape=shape, iteration=0, stage="converted")
    write_weights(tmp_path / "checkpoint", weights, description)
    of_shape = (tmp_path / "hf", tmp_path / "checkpoint")
    ranks = fill(of_shape, layout(tp=2, pp=2), shape=shape)
    for rank in ranks:
        assert rank.from_hf.keys() == rank.from_checkpoint.keys()
        for name, tensor in rank.from_hf.items():
            assert torch.equal(tensor, rank.from_checkpoint[name]), name
    embeddings = [rank.from_hf["embedding.word_embeddings.weight"] for rank in ranks[:2]]
    whole = torch.cat(embeddings)  # of both tensor ranks of the first stage
    assert torch.equal(whole[:61], weights["model.embed_tokens.weight"])
    assert whole.shape[0] == 62
    assert not whole[61:].any()


def test_slices_of_another_rank_are_noticed(stored: tuple[Path, Path]) -> None:
    place = sharded_hf._place

    def mirrored(entry: Any, shape: Any) -> Any:
        row, layer, start = place(entry, shape)
        extents = row.extents(shape)
        if row.fusion is weight_table.Fusion.GATE_UP:  # gate and up keep their halves
            extents = (extents[0] // 2, *extents[1:])
        of_other = tuple(
            begin // whole * whole + (whole - begin % whole - size)
            for begin, whole, size in zip(start, extents, entry.local_shape)
        )
        return row, layer, of_other

    def swap() -> None:
        sharded_hf._place = mirrored

    for rank in fill(stored, layout(tp=2), broken=swap):
        same = {n for n, t in rank.from_hf.items() if torch.equal(t, rank.from_checkpoint[n])}
        assert same == {name for name in rank.from_hf if "norm" in name}


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_rank_reads_no_more_than_it_holds(
    stored: tuple[Path, Path], parallel: ParallelConfig
) -> None:
    ranks = fill(stored, parallel)
    for rank in ranks:
        assert rank.bytes_read == sum(tensor.nbytes for tensor in rank.from_hf.values())
    whole = 4 * SOURCE.num_params()
    # norms are on every tensor rank, and first and last stages have a vocabulary more
    share = whole / len(ranks)
    assert max(rank.bytes_read for rank in ranks) < 1.2 * share


def pretraining(text: TextRun, folder: Path, parallel: ParallelConfig, **train: Any) -> PretrainRun:
    return PretrainRun(
        parallel=parallel,
        train=TrainConfig(
            train_iters=4,
            global_batch_size=4,
            seq_length=text_run.SEQUENCE,
            eval_interval=0,
            eval_sequences=4,
            text_samples=0,
            save=str(folder / "saved"),
            **train,
        ),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(data_path=str(text.data), reweight="constant"),
    )


def start(config: PretrainRun, world_size: int) -> None:
    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        run.pretrain(config)

    run_ranks(world_size, body)


@pytest.fixture(scope="module")
def text_hf(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starting checkpoint of ``text`` as a Hugging Face directory, tokenizer included."""
    directory = tmp_path_factory.mktemp("text_hf") / "hf"
    megatron_to_hf(text.checkpoint, directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    return directory


def test_a_run_from_hf_is_the_run_from_its_checkpoint(
    text: TextRun, text_hf: Path, tmp_path: Path
) -> None:
    parallel = layout(tp=2)
    start(pretraining(text, tmp_path / "load", parallel, load=str(text.checkpoint)), 2)
    # stopped half way and resumed: the second start must not go back to the directory
    halves = tmp_path / "hf"
    start(pretraining(text, halves, parallel, load_hf=str(text_hf), exit_interval=2), 2)
    start(pretraining(text, halves, parallel, load_hf=str(text_hf), resume=True), 2)
    wanted = finished_tensors(tmp_path / "load" / "saved", 4)
    found = finished_tensors(halves / "saved", 4)
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []

    of_load = read_description(tmp_path / "load" / "saved" / "iter_0000004")
    for step in (2, 4):
        saved = halves / "saved" / f"iter_{step:07d}"
        description = read_description(saved)
        assert description.token_ids == of_load.token_ids
        assert description.tokenizer_sha256 == of_load.tokenizer_sha256 is not None
        carried = {path.name for path in (saved / "tokenizer").iterdir()}
        assert {"tokenizer.model", "generation_config.json"} <= carried


def test_held_out_loss_of_a_directory_is_that_of_its_checkpoint(
    text: TextRun, text_hf: Path
) -> None:
    def evaluated(**source: str) -> dict[str, Any]:
        config = EvaluateRun(
            parallel=layout(tp=2),
            data_path=str(text.data),
            seq_length=text_run.SEQUENCE,
            **source,
        )
        (found, _) = run_ranks(2, lambda rank: as_rank(rank, config))
        del found["checkpoint"]
        return found

    def as_rank(rank: int, config: EvaluateRun) -> dict[str, Any]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        return measure.evaluate(config)

    assert evaluated(load_hf=str(text_hf)) == evaluated(load=str(text.checkpoint))


def test_a_file_that_breaks_while_ranks_read_stops_them_all(
    stored: tuple[Path, Path],
) -> None:
    def body(rank: int) -> str:
        parallel = layout(tp=2)
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local")
        if rank == 1:

            def unreadable(weights: hf.HfWeights, name: str, part: tuple[slice, ...]) -> Tensor:
                raise OSError("the file server is gone")

            hf.HfWeights.read_slice = unreadable  # type: ignore[method-assign]
        with pytest.raises((ValueError, OSError)) as caught:
            sharded_hf.load_hf(stored[0], chunks, groups)
        return str(caught.value)

    messages = run_ranks(2, body)
    assert messages == ["rank 1: the file server is gone", "the file server is gone"]


def test_a_weight_that_is_not_finite_stops_all_ranks_before_the_first_step(
    stored: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = random_weights(SOURCE)
    name, row = "model.layers.3.mlp.down_proj.weight", SOURCE.ffn_hidden_size - 1
    weights[name][5, row] = float("nan")  # tensor rank 1 alone reads it
    hf.write_directory(tmp_path / "hf", weights, SOURCE, max_shard_bytes=100_000)
    description = Description(shape=SOURCE, iteration=0, stage="converted")
    run_ranks(1, lambda rank: write_weights(tmp_path / "checkpoint", weights, description))

    def body(rank: int) -> list[str]:
        parallel = layout(tp=2)
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local")
        sharded_hf.load_hf(stored[0], chunks, groups)  # the twins
        load_weights(stored[1], chunks)
        said = []
        for load in (
            lambda: sharded_hf.load_hf(tmp_path / "hf", chunks, groups),
            lambda: load_weights(tmp_path / "checkpoint", chunks),
        ):
            with pytest.raises(ValueError, match=r"is nan; .*download the weights again") as caught:
                load()
            said.append(str(caught.value))
        return said

    (told, both), (own, again) = run_ranks(2, body)
    file = next(path for path in (tmp_path / "hf").glob("*.safetensors") if path.name in own)
    assert own.startswith(f"{file}: {name}[5, {row}] is nan; ")
    assert told == f"rank 1: {own}"
    place = f"decoder.layers.mlp.linear_fc2.weight[3, 5, {row}]"
    assert both == again
    assert both.startswith(f"checkpoint {tmp_path}/checkpoint/iter_0000000: {place} is nan; ")
