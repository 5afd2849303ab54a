"""Where the iterations of a Megatron checkpoint lie, and what each says of itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megashear.shape import ModelShape

TRACKER = "latest_checkpointed_iteration.txt"
"""Text file that names the newest whole iteration, as Megatron-LM writes it."""
DESCRIPTION = "megashear.json"
TOKENIZER = "tokenizer"
"""Folder of an iteration that carries the tokenizer's files."""
FORMAT = 1
"""Version of the layout of these directories; raised when an older megashear cannot read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What ``megashear.json`` says: all that the tensors of a checkpoint do not."""

    shape: ModelShape
    """Extents of the model."""
    iteration: int
    """Training steps done."""
    stage: str
    """What made it: "converted", "cut", "prune", "pretrain" ..."""
    tokenizer_sha256: str | None = None
    """Fingerprint of the tokenizer (`tokenizer_files.fingerprint`), if one is carried."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """``bos_token_id`` and the like, as Hugging Face's config.json has them."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values that the stage adds."""


def iteration_name(iteration: int) -> str:
    """Name of an iteration's directory, as Megatron-LM spells it."""
    return f"iter_{iteration:07d}"


def find_iteration(checkpoint: Path | str, iteration: int | None = None) -> Path:
    """Directory of one iteration of a checkpoint.

    Args:
        checkpoint: the checkpoint's directory, or directly one iteration's.
        iteration: which one; by default the newest whole one.

    Raises:
        ValueError: there is none, or not this one; those that exist are named.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"no checkpoint at {checkpoint}: it is not a directory")
    if iteration is None:
        if (checkpoint / DESCRIPTION).is_file():
            return checkpoint
        iteration = latest_iteration(checkpoint)
        if iteration is None:
            way_out = (
                "; it is a Hugging Face directory: convert it first"
                if (checkpoint / "config.json").is_file()
                else ", nor is it a Hugging Face directory, with a config.json"
            )
            raise ValueError(f"no checkpoint at {checkpoint}: it has no {TRACKER}{way_out}")
    directory = checkpoint / iteration_name(iteration)
    if not directory.is_dir():
        found = sorted(path.name for path in checkpoint.glob("iter_*") if path.is_dir())
        raise ValueError(
            f"checkpoint {checkpoint} has no {directory.name}; it has {', '.join(found) or 'none'}"
        )
    return directory


def latest_iteration(checkpoint: Path) -> int | None:
    """The newest whole iteration by the tracker file; None where nothing was saved yet.

    Raises:
        ValueError: the tracker holds anything but a number.
    """
    tracker = checkpoint / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{tracker} holds {text!r}, wanted the number of an iteration")
    return int(text)


def write_description(directory: Path, description: Description) -> None:
    """Write ``directory/megashear.json``."""
    values = {"format": FORMAT, **dataclasses.asdict(description)}
    text = json.dumps(values, indent=2) + "\n"
    aside = directory / f".{DESCRIPTION}.partial"
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, directory / DESCRIPTION)  # one step: a reader sees the old or the new


def read_description(directory: Path) -> Description:
    """Read ``directory/megashear.json``.

    Raises:
        ValueError: missing, broken, of a newer format, or not of a model megashear knows.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {DESCRIPTION}: not written by megashear, or not to the end"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} is broken: no JSON object with a format in it") from None
    if found != FORMAT:
        raise ValueError(
            f"{path} is of format {found}, this megashear reads {FORMAT}; use the megashear that "
            f"wrote it"
        )
    try:
        values["shape"] = ModelShape(**values["shape"])
        return Description(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken: {error}") from None
