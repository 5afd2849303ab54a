"""Tokenise jsonl text, one file or folder a domain, into training and held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megashear.commands.parse import parse
from megashear.commands.report import refuse_torchrun, report, user_errors
from megashear.config import PreprocessConfig

if TYPE_CHECKING:
    from megashear.data.manifest import DataManifest

PROG = "megashear preprocess"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    config = parse(PreprocessConfig, argv, prog=PROG, description=__doc__ or "")
    refuse_torchrun(PROG)
    # Here, not above: numpy and megatron-core take seconds that --help should not.
    from megashear.data.documents import find_domains
    from megashear.data.domains import preprocess

    manifest = preprocess(
        find_domains(config.input),
        config.output,
        config.tokenizer_model,
        json_key=config.json_key,
        append_eod=config.append_eod,
        prepend_bos=config.prepend_bos,
        held_out_fraction=config.held_out_fraction,
        workers=config.workers,
    )
    report(format_manifest(manifest))
    return 0


def format_manifest(manifest: DataManifest) -> str:
    """One line a domain: documents and tokens to train on and held out; then where they lie."""
    width = max(len(name) for name in manifest.names)
    lines = [
        f"{d.name:{width}} | train {d.documents:,} documents, {d.tokens:,} tokens | held out "
        f"{d.held_out_documents:,} documents, {d.held_out_tokens:,} tokens"
        + (f" | {d.skipped_documents:,} without text skipped" if d.skipped_documents else "")
        for d in manifest.domains
    ]
    total = sum(d.tokens for d in manifest.domains)
    return "\n".join(
        [*lines, f"wrote {manifest.directory}: {len(lines)} domains, {total:,} training tokens"]
    )
