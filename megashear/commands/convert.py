"""Turn a Hugging Face directory into a Megatron checkpoint, or such a checkpoint back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megashear.commands.parse import parse
from megashear.commands.report import refuse_torchrun, report, user_errors
from megashear.config import ConvertConfig

PROG = "megashear convert"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    config = parse(ConvertConfig, argv, prog=PROG, description=__doc__ or "")
    refuse_torchrun(PROG)
    if not Path(config.input).is_dir():
        raise ValueError(f"--input {config.input} is not a directory")
    # Here, not above: torch and megatron-core take seconds that --help should not.
    from megashear.checkpoint.convert import hf_to_megatron, megatron_to_hf

    dtype = None if config.dtype == "as-is" else config.dtype
    source, output, tokenizer = config.input, config.output, config.tokenizer
    if (Path(source) / "config.json").is_file():  # every Hugging Face model has one
        written = hf_to_megatron(source, output, dtype=dtype, tokenizer=tokenizer)
        kind = "checkpoint"
    else:
        written = megatron_to_hf(source, output, dtype=dtype, tokenizer=tokenizer)
        kind = "Hugging Face directory"
    report(f"wrote {config.output}: {kind}, {written / 2**30:.2f} GiB of weights")
    return 0
