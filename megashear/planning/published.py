"""Shapes that others chose for models which they pruned from larger ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megashear.shape import PRESETS, ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A released model that was pruned from a larger one."""

    name: str
    source: str
    """Model that it was pruned from."""
    shape: ModelShape


_EIGHT = PRESETS["llama3.1-8b"]

PUBLISHED = (
    Published(name="Sheared-LLaMA-1.3B", source="LLaMA-2-7B", shape=PRESETS["llama2-1.3b"]),
    Published(name="Sheared-LLaMA-2.7B", source="LLaMA-2-7B", shape=PRESETS["llama2-2.7b"]),
    Published(name="Llama-3.2-1B", source="Llama-3.1-8B", shape=PRESETS["llama3.2-1b"]),
    Published(name="Llama-3.2-3B", source="Llama-3.1-8B", shape=PRESETS["llama3.2-3b"]),
    Published(
        name="Llama-3.1-Minitron-4B-Width",
        source="Llama-3.1-8B",
        shape=replace(_EIGHT, hidden_size=3072, ffn_hidden_size=9216),
    ),
    Published(
        name="Llama-3.1-Minitron-4B-Depth",
        source="Llama-3.1-8B",
        shape=replace(_EIGHT, num_layers=16),
    ),
)
"""Pruned models whose shapes are published.

Source: Sheared LLaMA, arXiv:2310.06694, table 1; the config.json of Llama 3.2 as released (their
model card says that they were pruned from Llama 3.1 8B); Llama-3.1-Minitron, arXiv:2408.11796."""
NEAR = 1.5
"""Factor of parameters within which a published model is shown beside proposals."""


def published_near(num_params: float) -> list[Published]:
    """Return the published models of about this many parameters, smallest first."""
    near = [one for one in PUBLISHED if 1 / NEAR < one.shape.num_params() / num_params < NEAR]
    return sorted(near, key=lambda one: one.shape.num_params())
