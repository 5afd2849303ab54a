"""Open a checkpoint of any stage, or a Hugging Face directory, to inspect it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megashear.checkpoint.description import Description, find_iteration
from megashear.checkpoint.store import read_log_alpha
from megashear.checkpoint.weights import CheckpointWeights
from megashear.conversion.composer import SUFFIXES
from megashear.conversion.megatron_lm import find_megatron_lm
from megashear.conversion.sources import CHECKPOINT, open_source
from megashear.report.kept import MaskReading
from megashear.shape import ModelShape

STAGES = {
    "converted": "converted",
    "prune": "pruning run",
    "cut": "cut, before recovery",
    "pretrain": "continued pretraining",
    "finetune": "instruction tuning",
}
"""What the stages of a checkpoint are called."""


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model to inspect. No weight is read before it is asked for."""

    path: Path
    """Its directory; of a checkpoint, one iteration's."""
    kind: str
    """What it is: one of `sources`' kinds."""
    shape: ModelShape
    weights: Mapping[str, Tensor]
    """By Hugging Face name."""
    description: Description | None
    """Description of a checkpoint of ours; None for foreign formats."""
    masks: MaskReading | None
    """Masks of a pruning run; None for other models."""

    @property
    def title(self) -> str:
        """Return what the model is, in words."""
        if self.description is None:
            return self.kind
        stage = STAGES.get(self.description.stage, self.description.stage)
        if self.description.stage in ("prune", "pretrain", "finetune"):
            return f"checkpoint, {stage}, step {self.description.iteration:,}"
        return f"checkpoint, {stage}"


def open_model(path: Path | str, *, contents: bool = False) -> OpenModel:
    """Open whatever lies at ``path``.

    Args:
        path: a checkpoint's directory (its newest whole iteration is taken) or one iteration's, a
            Hugging Face directory, a Megatron-LM checkpoint, or a file of LLM-Shearing.
        contents: compare every file of a checkpoint of ours with its checksum first.

    Raises:
        ValueError: nothing that is known, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"nothing at {path}; name a checkpoint or a Hugging Face directory")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} is a file; megashear reads directories, and {' or '.join(SUFFIXES)} files of "
            f"LLM-Shearing"
        )
    ours = path.is_dir() and not (path / "config.json").is_file()
    if not ours or find_megatron_lm(path) is not None:
        source = open_source(path)
        assert source.kind != CHECKPOINT, "ours are opened below"
        return OpenModel(
            path=path,
            kind=source.kind,
            shape=source.shape,
            weights=source.weights,
            description=None,
            masks=None,
        )
    directory = find_iteration(path, contents=contents)
    weights = CheckpointWeights(directory)
    known, masks = weights.description.known, None
    if known.mask_extents is not None:
        masks = MaskReading.of(read_log_alpha(directory), weights.shape, known.target)
    return OpenModel(
        path=directory,
        kind=CHECKPOINT,
        shape=weights.shape,
        weights=weights,
        description=weights.description,
        masks=masks,
    )
