"""Tiny models of the checkpoint tests: unequal extents that hide no swapped axis."""

import torch
from torch import Tensor

from megashear.shape import ModelShape

GROUPED = ModelShape(
    num_layers=4,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=64,
)
MULTI_HEAD = ModelShape(**{**GROUPED.to_dict(), "num_query_groups": 8})
# head_dim is not hidden_size / num_attention_heads in either
CUT_GROUPED = ModelShape(
    **{
        **GROUPED.to_dict(),
        "num_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "ffn_hidden_size": 56,
    }
)
CUT_MULTI_HEAD = ModelShape(
    **{**CUT_GROUPED.to_dict(), "hidden_size": 30, "num_attention_heads": 5, "num_query_groups": 5}
)
# two of eight groups go, and of the four query heads in each of the others one
WIDE = ModelShape(
    **{**GROUPED.to_dict(), "num_attention_heads": 32, "num_query_groups": 8, "head_dim": 4}
)
CUT_WIDE = ModelShape(
    **{**CUT_GROUPED.to_dict(), "num_attention_heads": 18, "num_query_groups": 6, "head_dim": 4}
)
ONE_GROUP = ModelShape(**{**GROUPED.to_dict(), "num_query_groups": 1})
CUT_ONE_GROUP = ModelShape(
    **{**CUT_GROUPED.to_dict(), "num_attention_heads": 5, "num_query_groups": 1}
)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))


def random_gates(source: ModelShape, target: ModelShape, seed: int = 1) -> dict[str, Tensor]:
    """Deterministic gates that keep the target's counts: soft where open, other units each row."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, units: int, kept: int) -> Tensor:
        gates = 0.3 + 0.69 * torch.rand(count, units, generator=generator)
        order = torch.rand(count, units, generator=generator).argsort(dim=1)
        return gates.scatter(1, order[:, kept:], 0.0)

    layers, groups = source.num_layers, source.num_query_groups
    unit = "head" if source.heads_per_group == 1 else "group"
    gates = {
        "hidden": rows(1, source.hidden_size, target.hidden_size),
        unit: rows(layers, groups, target.num_query_groups),
        "intermediate": rows(layers, source.ffn_hidden_size, target.ffn_hidden_size),
        "layer": rows(1, layers, target.num_layers),
    }
    if target.heads_per_group < source.heads_per_group:
        gates["head"] = rows(layers * groups, source.heads_per_group, target.heads_per_group)
    return gates
