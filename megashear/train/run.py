"""prune, pretrain and evaluate: from a configuration to a finished run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megashear.checkpoint.description import (
    TOKENIZER,
    Description,
    find_iteration,
    latest_iteration,
    read_description,
)
from megashear.checkpoint.store import check_save_directory, load_run, load_weights
from megashear.checkpoint.weights import CheckpointWeights
from megashear.config import (
    DataConfig,
    EvaluateRun,
    MaskConfig,
    ParallelConfig,
    PretrainRun,
    PruneRun,
    TrainConfig,
)
from megashear.data.held_out import HeldOutSet
from megashear.data.loader import MixtureLoader
from megashear.data.manifest import DataManifest, read_manifest
from megashear.data.mixture import DomainMixture
from megashear.data.reference_loss import read_reference
from megashear.data.sequences import DomainSequences
from megashear.masks.constraint import SparsityConstraint
from megashear.masks.mask_set import target_units, whole_parts
from megashear.models.llama import build_llama, check_layout
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.shape import PRESETS, ModelShape
from megashear.train.evaluate import evaluate_domains
from megashear.train.loop import RunData, Trainer, mask_state
from megashear.train.objectives import LanguageModelling, StructuredPruning, check_streams
from megashear.train.optim import build_optimizer, build_schedule, check_schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    shape: ModelShape
    checkpoint: Path | None
    """One iteration's directory; None starts from fresh weights."""
    description: Description | None
    continues: bool
    """Whether optimizer, masks, data and step come from the checkpoint too."""

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return self.description.iteration if self.continues and self.description else 0


def prune(config: PruneRun) -> dict[str, Any]:
    """Learn masks and weights together. Collective over the processes torchrun started.

    Returns:
        What was reached and where it lies.

    Raises:
        ValueError: anything a user can mend, found before processes meet where it can be.
    """
    train = config.train
    start = _find_start(
        train,
        stage=StructuredPruning.stage,
        without="--load is not given; pruning starts from a checkpoint that `megashear convert` "
        "wrote",
    )
    target = target_shape(config.masks, start.shape)
    manifest, references = _check(config, start)
    targets = target_units(start.shape, target)
    # built once here for its refusals: unreachable targets, a bound too low
    SparsityConstraint(
        whole_parts(start.shape, target),
        targets,
        warmup_steps=config.masks.sparsity_warmup_iters,
        lambda2_max=config.masks.lambda2_max,
        force=config.masks.force_lambda2_max,
    )
    check_streams(
        config.masks.mask_noise_streams,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )
    if start.continues:
        _check_same_target(start, target)
    with distributed(config.parallel, config.model) as groups:
        chunks = build_llama(
            start.shape, groups, config.parallel, config.model, variant="masked", seed=train.seed
        )
        objective = StructuredPruning(
            chunks,
            groups,
            source=start.shape,
            target=target,
            config=config.masks,
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            sequence_parallel=config.parallel.sequence_parallel,
            clip_grad=config.optimizer.clip_grad,
            betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
            eps=config.optimizer.adam_eps,
        )
        details = {"target_shape": target.to_dict()}
        trainer = _trainer(config, start, objective, manifest, references, groups, details)
        return trainer.run(start.first_step)


def pretrain(config: PretrainRun) -> dict[str, Any]:
    """Language modelling from a checkpoint or from fresh weights. Collective over the processes
    torchrun started.

    Returns:
        What was reached and where it lies.

    Raises:
        ValueError: anything a user can mend, found before processes meet where it can be.
    """
    fresh = None if config.init_shape is None else read_shape(config.init_shape)
    start = _find_start(
        config.train,
        stage=LanguageModelling.stage,
        without="--load is not given; name a checkpoint, or --init-shape for fresh weights",
        fresh=fresh,
    )
    manifest, references = _check(config, start)
    with distributed(config.parallel, config.model) as groups:
        chunks = build_llama(
            start.shape,
            groups,
            config.parallel,
            config.model,
            variant=config.model.transformer_impl,
            init_method_std=config.init_method_std,
            seed=config.train.seed,
        )
        objective = LanguageModelling(chunks)
        trainer = _trainer(config, start, objective, manifest, references, groups, {})
        return trainer.run(start.first_step)


def evaluate(config: EvaluateRun) -> dict[str, Any]:
    """Held-out loss per domain over all held-out sequences. Collective over the processes torchrun
    started.

    Returns:
        Losses by domain, their mean, tokens, parameters.

    Raises:
        ValueError: anything a user can mend.
    """
    directory = find_iteration(config.load)
    description = read_description(directory)
    if config.output is not None and Path(config.output).exists():
        raise ValueError(f"--output {config.output} exists; choose another or remove it first")
    _check_no_masks(directory, description)
    check_layout(description.shape, config.parallel)
    CheckpointWeights(directory)  # refuses tensors that are not this shape's; reads none
    manifest = read_manifest(config.data_path)
    _check_vocabulary(manifest, description.shape, directory)
    with distributed(config.parallel, config.model) as groups:
        chunks = build_llama(
            description.shape,
            groups,
            config.parallel,
            config.model,
            variant=config.model.transformer_impl,
        )
        load_weights(directory, chunks)
        held_out = _held_out(manifest, config.seq_length)
        found = evaluate_domains(
            LanguageModelling(chunks),
            "loss",
            manifest.names,
            held_out,
            [range(len(part)) for part in held_out],
            groups,
            micro_batch_size=config.micro_batch_size,
        )
        summary = {
            "checkpoint": str(directory),
            "parameters": description.shape.num_params(),
            "held-out loss": found.losses,
            "mean": found.mean,
            "tokens": found.tokens,
        }
        if config.output is not None and groups.rank == 0:
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)
            Path(config.output).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def target_shape(masks: MaskConfig, source: ModelShape) -> ModelShape:
    """The shape that the flags ask for; what they leave out stays as in the source.

    Raises:
        ValueError: an unknown preset, or extents that do not belong together.
    """
    if masks.target is not None:
        if masks.target not in PRESETS:
            raise ValueError(
                f"--target {masks.target} is not known; presets: {', '.join(PRESETS)}; or give the "
                f"--target-* extents"
            )
        preset = PRESETS[masks.target]
        source = dataclasses.replace(
            preset,
            vocab_size=source.vocab_size,
            norm_epsilon=source.norm_epsilon,
            rotary_base=source.rotary_base,
            max_position_embeddings=source.max_position_embeddings,
        )
    heads = masks.target_num_attention_heads
    groups = masks.target_num_query_groups
    if heads is not None and groups is None:
        # whole groups go: the number of query heads in each stays
        if heads % source.heads_per_group:
            raise ValueError(
                f"--target-num-attention-heads {heads} is not a multiple of "
                f"{source.heads_per_group}, the query heads of one key/value head, which go "
                f"together; the nearest: {max(1, heads // source.heads_per_group)} * "
                f"{source.heads_per_group}"
            )
        groups = heads // source.heads_per_group
    wanted = {
        "num_layers": masks.target_num_layers,
        "hidden_size": masks.target_hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": masks.target_ffn_hidden_size,
    }
    return dataclasses.replace(source, **{k: v for k, v in wanted.items() if v is not None})


def read_shape(name: str) -> ModelShape:
    """A preset by name, or the extents in a JSON file.

    Raises:
        ValueError: neither, or the file holds something else.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"--init-shape {name} is neither a preset ({', '.join(PRESETS)}) nor a JSON file"
        )
    try:
        return ModelShape(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--init-shape {name}: {error}; wanted a JSON object of the extents "
            f"{', '.join(field.name for field in dataclasses.fields(ModelShape))}"
        ) from None


def _find_start(
    train: TrainConfig, *, stage: str, without: str, fresh: ModelShape | None = None
) -> Start:
    """Where the run begins; ``without`` is what to say where nothing names a beginning."""
    check_save_directory(train.save, train.load, resume=train.resume)
    source = train.load
    resumed = (
        train.resume
        and train.save is not None
        and Path(train.save).is_dir()
        and latest_iteration(Path(train.save)) is not None
    )
    if resumed:
        source = train.save
    if source is None:
        if fresh is None:
            raise ValueError(without)
        return Start(shape=fresh, checkpoint=None, description=None, continues=False)
    if fresh is not None and not resumed:
        raise ValueError(
            f"--load {source} and --init-shape exclude each other; a checkpoint has its own shape"
        )
    directory = find_iteration(source)
    description = read_description(directory)
    if stage != StructuredPruning.stage:
        _check_no_masks(directory, description)
    continues = description.stage == stage and (resumed or not train.finetune)
    if continues and description.iteration > train.train_iters:
        raise ValueError(
            f"{directory} is at step {description.iteration} and --train-iters is "
            f"{train.train_iters}; raise it, or add --finetune to start again from its weights"
        )
    return Start(
        shape=description.shape, checkpoint=directory, description=description, continues=continues
    )


def _check_no_masks(directory: Path, description: Description) -> None:
    if description.stage == StructuredPruning.stage:
        raise ValueError(
            f"--load {directory} is of a pruning run, whose weights are nothing without its masks; "
            f"fold them in with `megashear cut` and load the result"
        )


def _check(
    config: PruneRun | PretrainRun, start: Start
) -> tuple[DataManifest, npt.NDArray[np.float64] | None]:
    """Everything that files and flags alone can get wrong, before processes meet."""
    parallel, train, data = config.parallel, config.train, config.data
    replicas = parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    device.install()
    device.check_settings(parallel, config.model)
    check_layout(start.shape, parallel)
    if start.checkpoint is not None:
        # names and shapes, from the index: a rank that found out while loading would be late
        CheckpointWeights(start.checkpoint)
    _check_batches(parallel, train, replicas)
    check_schedule(config.optimizer, train.train_iters)
    manifest = read_manifest(data.data_path)
    _check_vocabulary(manifest, start.shape, start.checkpoint)
    DomainMixture(_starting_weights(data, manifest))
    _sequences(manifest, train)
    _held_out(manifest, train.seq_length)
    if train.seq_length > start.shape.max_position_embeddings:
        logger.warning(
            "--seq-length %d is longer than the %d positions the model was made for",
            train.seq_length,
            start.shape.max_position_embeddings,
        )
    return manifest, _references(data, manifest, is_evaluated=train.eval_interval > 0)


def _check_batches(parallel: ParallelConfig, train: TrainConfig, replicas: int) -> None:
    microbatches = train.num_microbatches(replicas)
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and microbatches % stages:
        raise ValueError(
            f"the interleaved schedule wants a multiple of --pipeline-model-parallel-size {stages} "
            f"microbatches per replica, found {microbatches}; change --global-batch-size or "
            f"--micro-batch-size"
        )
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and train.seq_length % tensor:
        raise ValueError(
            f"--seq-length {train.seq_length} is not a multiple of --tensor-model-parallel-size "
            f"{tensor}, over which --sequence-parallel splits it"
        )


def _check_vocabulary(manifest: DataManifest, shape: ModelShape, directory: Path | None) -> None:
    manifest.check_vocab(shape.vocab_size)
    if directory is None:
        return
    # the checkpoint may carry the tokenizer in two formats; the data were made with one of them
    carried = [directory / TOKENIZER / name for name in ("tokenizer.model", "tokenizer.json")]
    known = [hashlib.sha256(path.read_bytes()).hexdigest() for path in carried if path.is_file()]
    if known and manifest.tokenizer_fingerprint not in known:
        raise ValueError(
            f"{manifest.directory} was tokenised with another tokenizer than the model's in "
            f"{directory / TOKENIZER}; preprocess again with --tokenizer-model "
            f"{directory / TOKENIZER}"
        )


def _check_same_target(start: Start, target: ModelShape) -> None:
    assert start.description is not None
    saved = start.description.details["target_shape"]
    for extent, wanted in target.to_dict().items():
        if saved[extent] != wanted:
            raise ValueError(
                f"{start.checkpoint} was pruned towards {extent} {saved[extent]}, and the target "
                f"now has {wanted}; go on with the same target, or add --finetune to start new "
                f"masks from its weights"
            )


def _starting_weights(data: DataConfig, manifest: DataManifest) -> list[float]:
    if data.domain_weights:
        return list(data.domain_weights)
    tokens = [domain.tokens for domain in manifest.domains]
    return [count / sum(tokens) for count in tokens]


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


def _sequences(manifest: DataManifest, train: TrainConfig) -> list[DomainSequences]:
    return [
        DomainSequences(manifest.prefix(name), train.seq_length, train.seed, number)
        for number, name in enumerate(manifest.names)
    ]


def _held_out(manifest: DataManifest, seq_length: int) -> list[HeldOutSet]:
    return [
        HeldOutSet(manifest.held_out_prefix(name), seq_length, domain_index=number)
        for number, name in enumerate(manifest.names)
    ]


def _trainer(
    config: PruneRun | PretrainRun,
    start: Start,
    objective: LanguageModelling,
    manifest: DataManifest,
    references: npt.NDArray[np.float64] | None,
    groups: ParallelGroups,
    details: dict[str, Any],
) -> Trainer:
    """Build what is left, and fill it from the checkpoint. Collective over the world."""
    train, chunks = config.train, objective.chunks
    optimizer = build_optimizer(chunks, config.optimizer, bf16=config.model.bf16)
    schedule = build_schedule(optimizer, config.optimizer, train.train_iters)
    loader = MixtureLoader(
        _sequences(manifest, train),
        DomainMixture(_starting_weights(config.data, manifest)),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
    )
    if start.continues:
        assert start.checkpoint is not None
        description = load_run(
            start.checkpoint, chunks, optimizer, groups, masks=mask_state(objective)
        )
        schedule.load_state_dict(description.details["scheduler"])
        loader.load_state_dict(description.details["loader"])
        logger.info("continuing %s at step %d", start.checkpoint, description.iteration)
    elif start.checkpoint is not None:
        load_weights(start.checkpoint, chunks)
        # float32 masters were made from the fresh weights
        optimizer.reload_model_params()
        logger.info("starting from the weights of %s", start.checkpoint)
    else:
        logger.info("starting from fresh weights, seed %d", train.seed)
    return Trainer(
        shape=start.shape,
        chunks=chunks,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        data=RunData(
            manifest=manifest,
            loader=loader,
            held_out=_held_out(manifest, train.seq_length),
            references=references,
        ),
        groups=groups,
        train=train,
        optimizer_config=config.optimizer,
        data_config=config.data,
        details=details | {"run": dataclasses.asdict(config)},
    )
