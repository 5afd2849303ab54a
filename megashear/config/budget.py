"""What a pruned model may cost, for `megashear plan` to propose shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megashear.bounds import COMMON, Between, Sequences, check_bounds

_Amount = Annotated[float, Between(1e-6, 1e18)]


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """What the pruned model may cost. With any of these budgets shapes are proposed, ranked."""

    budget_params: Annotated[_Amount | None, COMMON] = None
    """Parameters that the pruned model should have, with embeddings; shapes within 5 % of it are
    proposed."""
    budget_weights_gb: Annotated[_Amount | None, COMMON] = None
    """Most GB (10^9 bytes) that the weights of the pruned model may take in bfloat16."""
    budget_kv_bytes: Annotated[_Amount | None, COMMON] = None
    """Most bytes of KV cache for a token of the pruned model, in bfloat16. For GB at a length and a
    batch, divide by their product."""
    budget_forward_ms: Annotated[_Amount | None, COMMON] = None
    """Most milliseconds of a forward pass of the pruned model: --budget-batch-size sequences of
    --seq-length tokens on one --gpu."""
    budget_batch_size: Sequences = 1
    """Sequences of the forward pass that --budget-forward-ms and the table of shapes count."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.budget_batch_size != 1 and not self.flags:
            raise ValueError(
                f"--budget-batch-size {self.budget_batch_size} is for a budget, and none is given; "
                f"add one, say --budget-forward-ms, or leave it out"
            )

    @property
    def flags(self) -> str:
        """Return the budgets that are given, as they are typed; empty where there is none."""
        return " ".join(
            f"--{name.replace('_', '-')} {_plain(value)}"
            for name in _BUDGETS
            if (value := getattr(self, name)) is not None
        )


def _plain(number: float) -> str:
    """Return a number as a person would type it."""
    return f"{number:g}".replace("e+0", "e").replace("e+", "e")


_BUDGETS = ("budget_params", "budget_weights_gb", "budget_kv_bytes", "budget_forward_ms")
