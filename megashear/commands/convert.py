"""Turn a model of Hugging Face, Megatron-LM or LLM-Shearing into a checkpoint, or one back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import ConvertConfig
from megashear.files.output import check_writable

if TYPE_CHECKING:
    from megashear.conversion.task_results import TaskResults

PROG = "megashear convert"


@user_errors(PROG, interrupted="nothing of --output is left; the same command starts anew")
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(ConvertConfig, argv, prog=PROG, description=__doc__ or "", check=check)
    refuse_torchrun(PROG)
    # Imported here, because torch takes seconds that --help should not.
    from megashear.conversion import certificate
    from megashear.conversion.convert import to_checkpoint, to_hf
    from megashear.conversion.sources import SAYABLE, open_source
    from megashear.files.aside import check_absent
    from megashear.files.workers import default_workers

    workers = default_workers() if config.workers is None else config.workers
    if config.check is not None:
        report(certificate.check(config.check, workers=workers))
        return 0
    assert config.input is not None, "held by the configuration"
    assert config.output is not None, "held by the configuration"
    check_absent(config.output)
    check_writable("--output", config.output)
    source = open_source(config.input, **{name: getattr(config, name) for name in SAYABLE})
    wanted = _format(config, source.kind)
    results = _results(config, wanted)
    source = source.of(name=config.base_model, licence=config.license)
    more: dict[str, Any] = {"card": config.model_card, "results": results} if wanted == "hf" else {}
    done = (to_hf if wanted == "hf" else to_checkpoint)(
        source,
        config.output,
        dtype=None if config.dtype == "as-is" else config.dtype,
        tokenizer=config.tokenizer,
        workers=workers,
        verify=config.verify_tokens if config.verify else None,
        **more,
    )
    kind = "Hugging Face directory" if wanted == "hf" else "checkpoint"
    masters = ""
    if source.trained_in is not None and config.dtype == "as-is":
        masters = (
            " (what the --bf16 run computed with; --dtype float32 writes its float32 masters)"
            if wanted == "hf"
            else " (the --bf16 run's masters, to train from; --dtype bfloat16 rounds them)"
        )
    report(
        f"wrote {config.output}: {kind} of the {source.kind} {config.input}, "
        f"{done['bytes'] / 2**30:.2f} GiB of weights in {' and '.join(done['dtypes'])}{masters}"
    )
    if (logits := done["logits"]) is not None:
        report(
            f"logits of megatron-core and transformers differ by {logits['relative_error']:.2g} "
            f"of their norm, at most {logits['bound']:g} is right"
        )
    return 0


def _format(config: ConvertConfig, kind: str) -> str:
    """Return what to write of a source of a kind."""
    from megashear.conversion.sources import CHECKPOINT

    if config.output_format != "auto":
        return config.output_format
    return "hf" if kind == CHECKPOINT else "checkpoint"


def _results(config: ConvertConfig, wanted: str) -> TaskResults | None:
    """Return the scores for the card.

    Raises:
        ValueError: no results file, or no card to be written for what it alone would say.
    """
    if wanted == "hf" and not config.model_card:
        _check_unnamed(config)
    if config.task_results is None:
        return None
    from megashear.conversion.task_results import read_results

    if wanted != "hf" or not config.model_card:
        raise ValueError(
            f"--task-results {config.task_results} is for the card of a Hugging Face directory, "
            f"which is not written; leave it out, or convert with --output-format hf and "
            f"--model-card"
        )
    return read_results(config.task_results, "--task-results")


def _check_unnamed(config: ConvertConfig) -> None:
    """Refuse names that only a card would hold."""
    given = [
        f"--{name.replace('_', '-')} {value}"
        for name in ("base_model", "license")
        if (value := getattr(config, name)) is not None
    ]
    if given:
        raise ValueError(
            f"{' and '.join(given)} would stand in the card of the Hugging Face directory, which "
            f"--no-model-card leaves out; leave out one or the other"
        )


def check(config: ConvertConfig) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "input", "tokenizer", "check", "task_results")
    check_new(config, "output")
    if config.input is not None:
        from megashear.conversion.sources import SAYABLE, open_source

        source = open_source(config.input, **{name: getattr(config, name) for name in SAYABLE})
        _results(config, _format(config, source.kind))
