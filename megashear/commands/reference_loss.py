"""Find the loss each domain should reach: by a law through several models, or one model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megashear.commands.outcome import is_first_rank, refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import ReferenceLossRun
from megashear.files import durable
from megashear.files.output import check_writable, writing

PROG = "megashear reference-loss"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name and return the exit status."""
    config = parse(ReferenceLossRun, argv, prog=PROG, description=__doc__ or "", check=check)
    if not config.load:
        refuse_torchrun(PROG)
    check_new(config, "output")
    check_writable("--output", config.output)
    # Imported here, because torch and megatron-core take seconds that --help should not.
    import yaml

    from megashear.data.reference_loss import REFERENCE, find_references
    from megashear.train.measure import measure_models

    models, params = measure_models(config)
    found = find_references(models, method=config.method, params=params)
    if is_first_rank():
        text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
        head = f"# {PROG}; for --reference-loss of megashear prune and megashear pretrain\n"
        with writing("--output", config.output):
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)
            durable.replace(Path(config.output), head + text)
    losses = "  ".join(f"{name} {loss:.4f}" for name, loss in found[REFERENCE].items())
    report(f"{found['method']}: {found['meaning']}\n{losses}\nwrote {config.output}")
    return 0


def check(config: ReferenceLossRun) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "load", "losses", "data_path")
    check_new(config, "output")
    from megashear.data.reference_loss import find_references
    from megashear.train.measure import prepare_models

    known, runs, params = prepare_models(config)
    if not runs:  # nothing is left to measure
        find_references(known, method=config.method, params=params)
