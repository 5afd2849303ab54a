"""What a run says on the console: log lines and a progress bar."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


class _AboveTheBar(logging.Handler):
    """Writes records to stderr without tearing a progress bar that stands there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # logging must not end a run; handleError is its way to say so
            self.handleError(record)


def configure_logging(rank: int) -> None:
    """Let megashear log to stderr on rank 0 from INFO, on other ranks from ERROR only.

    Other libraries keep their own logging; a few warnings of torch and megatron-core that no user
    of megashear can correct are dropped. May be called again, with the rank that turns out.

    Args:
        rank: of this process in the whole run.
    """
    logger = logging.getLogger("megashear")
    for handler in [h for h in logger.handlers if isinstance(h, _AboveTheBar)]:
        logger.removeHandler(handler)
    handler = _AboveTheBar()
    where = "" if rank == 0 else f" [rank {rank}]"
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s", "%H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not sys.warnoptions:  # -W or PYTHONWARNINGS: whoever asks for warnings gets them all
        _drop_warnings_for_others()


def _drop_warnings_for_others() -> None:
    """Leave out what every rank would print a dozen times and no user of megashear can correct."""
    for message in (
        r"(Transformer Engine|Apex).* not installed",  # at import; neither is needed
        "full scope is deprecated",  # TransformerConfig about its own default
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    # between torch and megatron-core, about names that will change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")


def progress(
    total: int,
    *,
    rank: int = 0,
    initial: int = 0,
    desc: str = "",
    unit: str = "step",
    leave: bool = True,
    stream: TextIO | None = None,
) -> tqdm[Any]:
    """Return a bar over long work, shown on rank 0 where stderr is a terminal.

    Args:
        total: steps of the whole work.
        rank: of this process; others than 0 get a bar that shows nothing.
        initial: steps done before, of a run that continues.
        desc: what goes on, left of the bar.
        unit: what is counted.
        leave: whether the finished bar stays, or makes room for the line that tells the result.
        stream: where to draw; stderr unless given.

    Returns:
        A tqdm bar: ``update()`` after each step, ``close()`` or ``with`` at the end.
    """
    stream = sys.stderr if stream is None else stream
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        file=stream,
        disable=rank != 0 or not stream.isatty(),
        leave=leave,
        dynamic_ncols=True,
    )


def format_step(
    step: int,
    total_steps: int,
    *,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    tokens_per_second: float,
    eta_seconds: float | None,
) -> str:
    """Return a line on a step, which fits 100 columns after the time.

    Args:
        step: steps done.
        total_steps: steps of the run.
        loss: mean language-modelling loss of the log window, nats per token.
        learning_rate: of the weights.
        grad_norm: of the weights, before clipping.
        tokens_per_second: over all devices.
        eta_seconds: time left; None where not known yet.
    """
    parts = [
        f"step {step}/{total_steps}",
        f"loss {loss:.3f}",
        f"lr {learning_rate:.1e}".replace("e-0", "e-"),
        f"grad {grad_norm:.2f}",
        f"{format_count(tokens_per_second)} tok/s",
        f"ETA {format_duration(eta_seconds)}",
    ]
    return " | ".join(parts)


def format_terms(terms: Mapping[str, tuple[float, float]]) -> str:
    """Return a line on further terms of the loss in a log window.

    Args:
        terms: mean and weight of each.
    """
    shown = (f"{name} {mean:.3f} (weight {weight:g})" for name, (mean, weight) in terms.items())
    return f"  {' | '.join(shown)}"


def format_masks(penalty: float | None, sparsity: Mapping[str, tuple[float, float]]) -> str:
    """Return a line on the masks of a step, which fits 100 columns.

    Args:
        penalty: what the constraint adds to the loss; None if it adds nothing.
        sparsity: expected and target sparsity of each kind of mask.
    """
    kinds = " ".join(
        f"{kind} {_share(now)}/{_share(goal)}" for kind, (now, goal) in sparsity.items()
    )
    before = "" if penalty is None else f"penalty {penalty:.3f} | "
    return f"  {before}sparsity {kinds}"


def _share(value: float) -> str:
    """Return three digits behind the point, without the 0 before it."""
    return f"{value:.3f}".removeprefix("0")


def format_evaluation(
    step: int,
    losses: Mapping[str, float],
    *,
    errors: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    seconds: float | None = None,
) -> str:
    """Return one line on an evaluation.

    Args:
        step: steps done.
        losses: held-out loss of each domain, nats per token.
        errors: standard error of each; none are shown where there are none, nor one that is NaN.
        weights: weight of each domain in the mixture from here on; None if it stays.
        seconds: time the evaluation took.
    """
    mean = sum(losses.values()) / len(losses) if losses else float("nan")
    parts = [f"step {step}: held-out loss {mean:.3f}"]
    shown = {d: f"+-{e:.3f}" for d, e in (errors or {}).items() if not math.isnan(e)}
    parts.append(" ".join(f"{d} {loss:.3f}{shown.get(d, '')}" for d, loss in losses.items()))
    if weights is not None:
        kept = " ".join(f"{domain} {weight:.3f}" for domain, weight in weights.items())
        parts.append(f"weights {kept}")
    if seconds is not None:
        parts.append(f"took {format_duration(seconds)}")
    return " | ".join(parts)


def format_count(value: float) -> str:
    """Return a count with three or more digits and a unit prefix: ``41.2 k``, ``950``."""
    for scale, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.1f}{prefix}"
    return f"{value:.0f}"


def format_duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds: ``1:02:33``, with days from one on; ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"
