"""prune, pretrain and finetune: from a configuration to a finished run."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Sequence

from megashear.checkpoint.hold import held_together
from megashear.config import FinetuneRun, PretrainRun, PruneRun
from megashear.parallel.launch import distributed
from megashear.parallel.watchdog import collective_timeout_s
from megashear.train.build import assemble
from megashear.train.handover import hand_over, prepare_both
from megashear.train.prepare import PreparedRun, prepare, settle
from megashear.train.result import RunResult

logger = logging.getLogger(__name__)


def prune(
    config: PruneRun, then: PretrainRun | None = None, *, command: Sequence[str] = ()
) -> RunResult:
    """Learn masks and weights together. Collective over the processes torchrun started.

    Args:
        config: the run.
        then: continued pretraining of the cut model, in the same job.
        command: words of the command line, which checkpoints keep.

    Raises:
        ValueError: anything a user can correct, found before processes meet where it can be.
    """
    return _run(prepare_prune(config, then), command)


def pretrain(config: PretrainRun, *, command: Sequence[str] = ()) -> RunResult:
    """Train on language modelling, from a checkpoint or from fresh weights.

    Collective over the processes torchrun started.

    Args:
        config: the run.
        command: words of the command line, which checkpoints keep.

    Raises:
        ValueError: anything a user can correct, found before processes meet where it can be.
    """
    return _run(prepare(config), command)


def finetune(config: FinetuneRun, *, command: Sequence[str] = ()) -> RunResult:
    """Teach a model to answer, from conversations. Collective over the processes torchrun started.

    Args:
        config: the run.
        command: words of the command line, which checkpoints keep.

    Raises:
        ValueError: anything a user can correct, found before processes meet where it can be.
    """
    return _run(prepare(config), command)


def prepare_prune(
    config: PruneRun, then: PretrainRun | None = None, *, is_dry_run: bool = False
) -> PreparedRun:
    """Prepare `prune` before processes meet; no device is needed.

    Raises:
        ValueError: anything a user can correct.
    """
    if then is None:
        return prepare(config, is_dry_run=is_dry_run)
    return prepare_both(config, then, is_dry_run=is_dry_run)


def _run(prepared: PreparedRun, command: Sequence[str]) -> RunResult:
    config, then = prepared.config, prepared.then
    timeout_s = collective_timeout_s(config.train.distributed_timeout_minutes)
    saves = [config.train.save, None if then is None else then.config.train.save]
    with (
        distributed(config.parallel, config.model, timeout_s=timeout_s) as groups,
        held_together(saves, groups),
    ):
        prepared = settle(prepared, groups)
        trainer = assemble(prepared, groups, command=command)
        result = trainer.run(prepared.start.first_step)
        if then is None:
            return result
        if result.step < config.train.train_iters or result.stopped or result.exit_status:
            logger.warning(
                "pruning ended at step %d of %d: neither the cut nor the continued pretraining of "
                "--then-pretrain was begun",
                *(result.step, config.train.train_iters),
            )
            return result
        following = hand_over(trainer, prepared, command=command)
        del trainer, prepared  # the larger model and pruning's text are not needed any more
        gc.collect()
        return dataclasses.replace(following.run(0), pruning=result)
