"""What files and flags alone can get wrong, checked before processes meet; and the domains."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
)
from megashear.data.held_out import HeldOutSet
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.mixture import normalise_weights
from megashear.data.reference_loss import read_reference
from megashear.data.sequences import DomainSequences
from megashear.models.llama import check_layout
from megashear.parallel import device
from megashear.shape import ModelShape
from megashear.train.optim import check_schedule
from megashear.train.start import Start

logger = logging.getLogger(__name__)


def check_inputs(
    config: PruneRun | PretrainRun, start: Start
) -> tuple[DataManifest, npt.NDArray[np.float64] | None]:
    """Read the data's manifest and references, and refuse what does not fit the run.

    Raises:
        ValueError: layout, device, batches, schedule, checkpoint, data and references that do not
            fit each other; equal on every rank, before any of them waits for another.
    """
    parallel, train, data = config.parallel, config.train, config.data
    replicas = parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    device.install()
    device.check_settings(parallel, config.model)
    check_layout(start.shape, parallel)
    if start.checkpoint is not None:
        # names and shapes, from the index: a rank that found out while loading would be late
        CheckpointWeights(start.checkpoint)
    _check_batches(parallel, train, replicas)
    check_sequence(parallel, train.seq_length)
    _check_recompute(parallel, config.model, start.shape)
    if train.save is None:
        logger.warning("--save is not given: nothing of this run will be kept")
    check_schedule(config.optimizer, train.train_iters)
    _check_precision(start, config.model)
    manifest = read_manifest(data.data_path)
    check_vocabulary(manifest, start.shape, start.tokenizer)
    normalise_weights(starting_weights(data, manifest), len(manifest.names))
    training_sequences(manifest, train)
    held_out_sets(manifest, train.seq_length)
    if train.seq_length > start.shape.max_position_embeddings:
        logger.warning(
            "--seq-length %d is longer than the %d positions the model was made for",
            train.seq_length,
            start.shape.max_position_embeddings,
        )
    return manifest, _references(data, manifest, is_evaluated=train.eval_interval > 0)


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


def starting_weights(data: DataConfig, manifest: DataManifest) -> list[float]:
    """Weight of each domain at the start: as given, or by training tokens."""
    if data.domain_weights:
        return list(data.domain_weights)
    tokens = [domain.tokens for domain in manifest.domains]
    return [count / sum(tokens) for count in tokens]


def training_sequences(manifest: DataManifest, train: TrainConfig) -> list[DomainSequences]:
    """Training text of every domain, in the manifest's order."""
    return [
        DomainSequences(manifest.prefix(name), train.seq_length, train.seed, number)
        for number, name in enumerate(manifest.names)
    ]


def held_out_sets(manifest: DataManifest, seq_length: int) -> list[HeldOutSet]:
    """Held-out text of every domain, in sequences of ``seq_length`` tokens."""
    return [
        HeldOutSet(manifest.held_out_prefix(name), seq_length, domain_index=number)
        for number, name in enumerate(manifest.names)
    ]


def _check_batches(parallel: ParallelConfig, train: TrainConfig, replicas: int) -> None:
    microbatches = train.num_microbatches(replicas)
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and microbatches % stages:
        raise ValueError(
            f"the interleaved schedule wants a multiple of --pipeline-model-parallel-size {stages} "
            f"microbatches per replica, found {microbatches}; change --global-batch-size or "
            f"--micro-batch-size"
        )


def check_sequence(parallel: ParallelConfig, seq_length: int) -> None:
    """Refuse a sequence that sequence parallelism cannot split.

    Raises:
        ValueError: with both numbers.
    """
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and seq_length % tensor:
        raise ValueError(
            f"--seq-length {seq_length} is not a multiple of --tensor-model-parallel-size "
            f"{tensor}, over which --sequence-parallel splits it"
        )


def _references(
    data: DataConfig, manifest: DataManifest, *, is_evaluated: bool
) -> npt.NDArray[np.float64] | None:
    if data.reweight == "constant" or (data.reference_loss is None and not is_evaluated):
        return None
    if data.reference_loss is None:
        raise ValueError(
            f"--reweight {data.reweight} compares losses with --reference-loss, which is not "
            f"given; write a YAML of `domain: loss`, or use --reweight constant"
        )
    return read_reference(data.reference_loss, manifest.names)


def _check_recompute(parallel: ParallelConfig, model: ModelConfig, shape: ModelShape) -> None:
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    layers = shape.num_layers // stages
    uniform = model.recompute_granularity is not None and model.recompute_method == "uniform"
    if uniform and layers % model.recompute_num_layers:
        fitting = [n for n in range(1, layers + 1) if layers % n == 0]
        raise ValueError(
            f"--recompute-num-layers {model.recompute_num_layers} does not divide the {layers} "
            f"layers of a stage, as --recompute-method uniform wants; possible: "
            f"{', '.join(map(str, fitting))}"
        )


def _check_precision(start: Start, model: ModelConfig) -> None:
    if not start.continues or start.description is None:
        return
    saved = start.description.details.get("run", {}).get("model", {}).get("bf16", model.bf16)
    if saved != model.bf16:
        raise ValueError(
            f"{start.checkpoint} was trained {'with' if saved else 'without'} --bf16, and its "
            f"optimizer state has that form; go on the same way, or add --finetune to start again "
            f"from its weights"
        )
