"""Where one job goes over from pruning to continued pretraining: what must fit, and a check."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megashear.checkpoint.description import latest_iteration
from megashear.config import PretrainRun, PruneRun, TrainConfig
from megashear.train.evaluate import evaluate_domains
from megashear.train.loop import Trainer
from megashear.train.objectives import LanguageModelling, StructuredPruning

logger = logging.getLogger(__name__)

_SAME_MODEL_SETTINGS = ("bf16",)

_SEAM = 1e-4
"""Relative; law 2 holds logits to 1e-5 in float32, and a loss is a mean of many."""
_SEAM_BF16 = 3e-2
"""Relative; bfloat16 keeps 8 bits, and gates are folded into weights instead of activations."""


def check_then(config: PruneRun, then: PretrainRun) -> None:
    """Refuse continued pretraining that this job cannot go over to.

    Raises:
        ValueError: another layout or precision, a beginning of its own, or the same --save.
    """
    where = f"--then-pretrain {config.then_pretrain}"
    for part, fields in (("parallel", None), ("model", _SAME_MODEL_SETTINGS)):
        here, there = getattr(config, part), getattr(then, part)
        for field in dataclasses.fields(here):
            found, wanted = getattr(there, field.name), getattr(here, field.name)
            if (fields is None or field.name in fields) and found != wanted:
                raise ValueError(
                    f"{where}: {field.name} is {found}, pruning has {wanted}, and one job keeps "
                    f"it; set it to {wanted}, or end the job, `megashear cut` and pretrain in "
                    f"another"
                )
    if then.model.transformer_impl != "local":
        raise ValueError(
            f"{where}: transformer_impl is {then.model.transformer_impl}; the model is cut into "
            f"local layers: set it to local, or `megashear cut` and pretrain in a job of its own"
        )
    begins = {
        "load": then.train.load,
        "init_shape": then.init_shape,
        "finetune": then.train.finetune or None,
    }
    for name, value in begins.items():
        if value is not None:
            raise ValueError(
                f"{where}: {name} is {value}, but it begins with the model that was pruned; "
                f"leave {name} out"
            )
    if config.train.save is None:
        raise ValueError(
            f"{where} needs --save: a job that is stopped while it pretrains must find pruning "
            f"finished"
        )
    if config.train.exit_interval and then.train.save is None:
        logger.warning("%s: save is not given, and nothing of it will be kept", where)
    if then.train.save is not None and _same(then.train.save, config.train.save):
        raise ValueError(
            f"{where}: save is {then.train.save}, the directory of pruning; choose another"
        )
    if not config.train.resume and holds_checkpoint(then.train.save):
        raise ValueError(
            f"{where}: save {then.train.save} holds a run already; add --resume to go on with it, "
            f"or choose another directory"
        )


def holds_checkpoint(save: str | None) -> bool:
    """Whether a run has saved there."""
    return save is not None and Path(save).is_dir() and latest_iteration(Path(save)) is not None


def resuming(train: TrainConfig) -> TrainConfig:
    """The same run, gone on with."""
    return dataclasses.replace(train, resume=True)


def check_seam(
    objective: StructuredPruning, cut: Trainer, *, bf16: bool
) -> dict[str, tuple[float, float]]:
    """Evaluate the masked and the cut model on the same text. Collective over the world.

    Args:
        objective: of pruning, its model still whole.
        cut: what goes on.
        bf16: whether both compute in bfloat16.

    Returns:
        By domain the loss under exact masks and that of the cut model, nats per token.

    Raises:
        RuntimeError: on every rank, if they differ by more than rounding.
    """
    masked = _losses(objective, "exact", cut)
    smaller = _losses(cut.objective, "loss", cut)
    tolerance = _SEAM_BF16 if bf16 else _SEAM
    for name, before in masked.items():
        after = smaller[name]
        logger.info("cut in flight: %s loss %.6f masked, %.6f cut", name, before, after)
        if not abs(after - before) <= tolerance * abs(before):
            # losses are equal on all ranks, so that all of them stop here
            raise RuntimeError(
                f"the loss of {name} is {before:.6f} under exact masks and {after:.6f} after the "
                f"cut: the cut model is not the one that was trained. Pruning is saved: cut it "
                f"with `megashear cut`, and report this"
            )
    return {name: (before, smaller[name]) for name, before in masked.items()}


def _losses(objective: LanguageModelling, mode: str, run: Trainer) -> dict[str, float]:
    held_out, train = run.data.held_out, run.train
    chosen = [part.subsample(train.eval_sequences, train.seed) for part in held_out]
    return evaluate_domains(
        objective,
        mode,
        run.data.manifest.names,
        held_out,
        chosen,
        run.groups,
        micro_batch_size=train.micro_batch_size,
    ).losses


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
