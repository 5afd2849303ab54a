"""Conversion of a directory by its path, whichever way."""

from pathlib import Path
from typing import Any

from megashear.conversion.convert import to_checkpoint, to_hf
from megashear.conversion.sources import open_checkpoint, open_hf
from megashear.files.aside import check_absent


def hf_to_megatron(hf_dir: Path | str, output: Path | str, **options: Any) -> dict[str, Any]:
    """Write a checkpoint of a Hugging Face directory."""
    check_absent(output)
    return to_checkpoint(open_hf(hf_dir), output, **options)


def megatron_to_hf(
    checkpoint: Path | str, output: Path | str, *, iteration: int | None = None, **options: Any
) -> dict[str, Any]:
    """Write a Hugging Face directory of a checkpoint, by default of its newest iteration."""
    check_absent(output)
    return to_hf(open_checkpoint(checkpoint, iteration), output, **options)
