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
    # Here, not above: torch takes seconds that --help should not.
    from megashear.checkpoint import certificate
    from megashear.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from megashear.checkpoint.workers import default_workers

    workers = default_workers() if config.workers is None else config.workers
    if config.check is not None:
        report(certificate.check(config.check, workers=workers))
        return 0
    assert config.input is not None, "held by the configuration"
    assert config.output is not None, "held by the configuration"
    if not Path(config.input).is_dir():
        raise ValueError(f"--input {config.input} is not a directory")
    is_hf = (Path(config.input) / "config.json").is_file()  # every Hugging Face model has one
    done = (hf_to_megatron if is_hf else megatron_to_hf)(
        config.input,
        config.output,
        dtype=None if config.dtype == "as-is" else config.dtype,
        tokenizer=config.tokenizer,
        workers=workers,
        verify=config.verify_tokens if config.verify else None,
    )
    kind = "checkpoint" if is_hf else "Hugging Face directory"
    report(f"wrote {config.output}: {kind}, {done['bytes'] / 2**30:.2f} GiB of weights")
    if (logits := done["logits"]) is not None:
        report(
            f"logits of megatron-core and transformers differ by {logits['relative_error']:.2g} "
            f"of their norm, at most {logits['bound']:g} is right"
        )
    return 0
