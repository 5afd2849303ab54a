"""MaskSet: log_alpha of this process, and the gates that it gives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from megashear.masks.gates import (
    LOG_ALPHA_MAX,
    closed_sums,
    deterministic_gates,
    logistic_noise,
    num_closed_expected,
    sample_gates,
    uniform_noise,
)
from megashear.masks.kinds import KINDS
from megashear.masks.targets import MaskPart


class MaskSet:
    """log_alpha of the gates whose weights this process holds.

    Everything is on the CPU: masks are tiny, and the host must know the number of open gates
    without waiting for a device.

    Args:
        parts: the parts that this process holds, by kind.
        dtype: type of log_alpha, float32 in training; float64 to compare shards with the whole
            beyond the rounding of float32.
    """

    def __init__(
        self, parts: Mapping[str, MaskPart], *, dtype: torch.dtype = torch.float32
    ) -> None:
        assert set(parts) <= set(KINDS), f"unknown kinds of mask in {sorted(parts)}"
        self.parts: dict[str, MaskPart] = {kind: parts[kind] for kind in KINDS if kind in parts}
        self.log_alpha: dict[str, nn.Parameter] = {
            kind: nn.Parameter(
                torch.full((len(part.rows), len(part.units)), LOG_ALPHA_MAX, dtype=dtype)
            )  # [own rows, own units]
            for kind, part in self.parts.items()
        }
        self._ahead: dict[tuple[int, int, int, str], Tensor] = {}

    def draw_ahead(self, *, seed: int, step: int, kinds: Mapping[int, Collection[str]]) -> None:
        """Draw the noise that `sample` will need, while the device works.

        Most of the cost of a sample is its noise, which does not depend on what is learned. Noise
        of an earlier call is dropped. `sample` draws the noise that was not drawn ahead.

        Args:
            seed: the run's seed.
            step: training step, from 0.
            kinds: kinds of mask to be sampled, by noise stream.
        """
        self._ahead = {
            (seed, step, stream, kind): self._noise(kind, seed=seed, step=step, stream=stream)
            for stream, wanted in kinds.items()
            for kind in self.parts
            if kind in wanted
        }

    def sample(
        self, *, seed: int, step: int, stream: int, kinds: Collection[str] = KINDS
    ) -> dict[str, Tensor]:
        """Sample the gates of one noise stream at one step, differentiable.

        Args:
            seed: the run's seed.
            step: training step, from 0.
            stream: noise stream, from 0.
            kinds: kinds of mask to sample.

        Returns:
            z by kind, [own rows, own units]. Every layout samples the same gates.
        """
        gates = {}
        for kind, log_alpha in self.log_alpha.items():
            if kind not in kinds:
                continue
            noise = self._ahead.get((seed, step, stream, kind))
            if noise is None:
                noise = self._noise(kind, seed=seed, step=step, stream=stream)
            gates[kind] = sample_gates(log_alpha, noise)
        return gates

    def _noise(self, kind: str, *, seed: int, step: int, stream: int) -> Tensor:
        """Draw the logistic noise of a kind, float32 [own rows, own units]."""
        part, key = self.parts[kind], {"seed": seed, "step": step, "stream": stream}
        own = _index(part.units)
        rows = [uniform_noise(part.num_units, kind=kind, row=row, **key)[own] for row in part.rows]
        return logistic_noise(torch.stack(rows) if rows else torch.empty(0, len(part.units)))

    def closed_sums(self) -> dict[str, Tensor]:
        """Return the expected number of closed units among those held here, differentiable.

        Returns:
            Sums by kind, float64 [own rows]. Their sum over the shards of a row is the number of
            the whole row; `SparsityConstraint.penalty` takes both.
        """
        return {kind: closed_sums(log_alpha) for kind, log_alpha in self.log_alpha.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield log_alpha of every kind, in the order of ``KINDS``."""
        return iter(self.log_alpha.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return log_alpha by kind, [own rows, own units]: the live tensors, not copies."""
        return {kind: log_alpha.detach() for kind, log_alpha in self.log_alpha.items()}


def exact_gates(
    whole_log_alpha: Mapping[str, Tensor], targets: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return deterministic gates with exactly the target number of open units in every row.

    Args:
        whole_log_alpha: **whole** masks by kind, [num_rows, num_units].
        targets: units to leave open in a row, by kind, from `targets.target_units`.

    Returns:
        Gates by kind, [num_rows, num_units].
    """
    assert whole_log_alpha.keys() == targets.keys(), f"{[*whole_log_alpha]} for {[*targets]}"
    return {
        kind: deterministic_gates(
            log_alpha, [log_alpha.shape[1] - targets[kind]] * log_alpha.shape[0]
        )
        for kind, log_alpha in whole_log_alpha.items()
    }


def expected_gates(whole_log_alpha: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return deterministic gates that close as many units of a row as it is expected to close.

    Args:
        whole_log_alpha: **whole** masks by kind, [num_rows, num_units].

    Returns:
        Gates by kind, [num_rows, num_units]; rows may differ in the number of open units.
    """
    return {
        kind: deterministic_gates(log_alpha, [num_closed_expected(row) for row in log_alpha])
        for kind, log_alpha in whole_log_alpha.items()
    }


def _index(units: tuple[int, ...] | range) -> slice | Tensor:
    if isinstance(units, range) and units.step == 1:
        return slice(units.start, units.stop)
    return torch.tensor(units, dtype=torch.long)
