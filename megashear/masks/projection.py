"""The projection that holds expected sparsity at its target: one shift for all gates of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megashear.masks.gates import EPS, LOG_ALPHA_MAX, LOG_ALPHA_MIN, probability_closed
from megashear.masks.mask_set import MaskSet

ROUNDS = 3
"""Steps of Newton's method for one projection. Their number is fixed, so that every rank takes part
in as many sums; the little that is left over is made up by the next projection."""
MOST_SHIFT = 2.0
"""Largest shift of log_alpha in a round, for rows in which hardly a gate can still move."""


def project(
    masks: MaskSet,
    targets: Mapping[str, float],
    whole_sums: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    *,
    rounds: int = ROUNDS,
) -> None:
    """Shift every row so that its expected sparsity is the target, and clamp.

    All gates of a row move by the same amount: their order stays what the language model made it.

    Args:
        masks: masks to move.
        targets: target sparsity by kind.
        whole_sums: makes sums over own units, [own rows, 3] by kind, sums over whole rows,
            [num_rows, 3], equal on every process. It is called ``rounds`` times.
        rounds: steps of Newton's method.
    """
    rows = {kind: torch.tensor(part.rows, dtype=torch.long) for kind, part in masks.parts.items()}
    shift = {
        kind: torch.zeros(part.num_rows, dtype=torch.float64) for kind, part in masks.parts.items()
    }
    for _ in range(rounds):
        own = {k: row_sums(mask, shift[k][rows[k]]) for k, mask in masks.log_alpha.items()}
        for kind, sums in whole_sums(own).items():
            shift[kind] += next_shift(sums, masks.parts[kind].num_units, targets[kind])
    for kind, mask in masks.log_alpha.items():
        by = shift[kind][rows[kind], None].to(mask.dtype)
        mask.detach().add_(by).clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)


def row_sums(log_alpha: Tensor, shift: Tensor) -> Tensor:
    """Return what the next shift of a row depends on, summed over the units held here.

    Args:
        log_alpha: [own rows, own units].
        shift: that each row shall have, float64 [own rows].

    Returns:
        float64 [own rows, 3] under that shift: the expected number of closed units, its growth with
        each further unit of log_alpha downwards, and its decline with each upwards. The last two
        differ, because a gate at a clamp moves only inwards.
    """
    shifted = log_alpha.detach().double() + shift[:, None]
    closed = probability_closed(shifted.clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX))
    slope = closed * (1.0 - closed)
    # Gates beyond a clamp do not move at once. Compared in the type of log_alpha, whose clamps are
    # rounded.
    place = shifted.to(log_alpha.dtype)
    down = slope * ((place > LOG_ALPHA_MIN) & (place <= LOG_ALPHA_MAX))
    up = slope * ((place >= LOG_ALPHA_MIN) & (place < LOG_ALPHA_MAX))
    return torch.stack([closed.sum(dim=1), down.sum(dim=1), up.sum(dim=1)], dim=1)


def next_shift(whole: Tensor, num_units: int, target: float) -> Tensor:
    """Return by how much further each row must rise to reach the target, to first order.

    It is a step of Newton's method on logit(sparsity), which is linear in the shift where all gates
    of a row are equal, as at the start.

    Args:
        whole: `row_sums` of whole rows, [num_rows, 3].
        num_units: length of a row.
        target: target sparsity; one that no gate can reach stands for the nearest.

    Returns:
        Shifts of log_alpha, float64 [num_rows], at most ``MOST_SHIFT`` either way.
    """
    bounds = torch.tensor([LOG_ALPHA_MAX, LOG_ALPHA_MIN], dtype=torch.float64)
    least, most = probability_closed(bounds).tolist()
    sparsity = (whole[:, 0] / num_units).clamp(EPS, 1.0 - EPS)
    wanted = torch.logit(torch.tensor(min(max(target, least), most), dtype=torch.float64))
    growth = wanted - torch.logit(sparsity)
    slope = torch.where(growth > 0, whole[:, 1], whole[:, 2]) / num_units
    slope = slope / (sparsity * (1.0 - sparsity))  # of the logit
    # a slope of 0 asks for all that a round may give, and for nothing at the target
    return (-growth / slope.clamp_min(EPS)).clamp(-MOST_SHIFT, MOST_SHIFT)
