"""Tokenise text, one file or folder per domain, into training and held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megashear.commands.outcome import refuse_torchrun, report, user_errors
from megashear.commands.parse import parse
from megashear.commands.paths import check_new, check_there
from megashear.config import PreprocessConfig
from megashear.files.output import check_writable

if TYPE_CHECKING:
    from megashear.data.manifest import DataManifest

PROG = "megashear preprocess"


@user_errors(PROG)
def main(argv: Sequence[str]) -> int:
    """Run the command on the arguments after its name; return the exit status."""
    config = parse(PreprocessConfig, argv, prog=PROG, description=__doc__ or "", check=check)
    refuse_torchrun(PROG)
    check_writable("--output", config.output)
    # Imported here, because numpy and megatron-core take seconds that --help should not.
    from megashear.preprocessing.domains import preprocess
    from megashear.preprocessing.inputs import find_domains

    inputs = find_domains(config.input, config.json_key)
    manifest = preprocess(inputs, config)
    files = [line for line in (inputs.summary(), inputs.unread_summary()) if line]
    report("\n".join([format_manifest(manifest), "; ".join(files)]))
    return 0


def format_manifest(manifest: DataManifest) -> str:
    """Return a line for each domain (documents, tokens, bytes per token, what was skipped), and one
    that says where the domains lie."""
    width = max(len(name) for name in manifest.names)
    lines = []
    for d in manifest.domains:
        parts = [
            f"{d.name:{width}}",
            f"train {d.documents:,} documents, {d.tokens:,} tokens",
            f"held out {d.held_out_documents:,} documents, {d.held_out_tokens:,} tokens",
        ]
        if d.bytes_per_token is not None:
            parts.append(f"{d.bytes_per_token:.2f} bytes/token")
        if d.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in d.skipped.items())
            parts.append(f"skipped {reasons}")
        if d.lone_surrogates:
            parts.append(f"{d.lone_surrogates:,} halves of surrogate pairs replaced")
        lines.append(" | ".join(parts))
    total = sum(d.tokens for d in manifest.domains)
    return "\n".join(
        [*lines, f"wrote {manifest.directory}: {len(lines)} domains, {total:,} training tokens"]
    )


def check(config: PreprocessConfig) -> None:
    """Refuse what the command would refuse before it starts.

    Raises:
        ValueError: anything a user can correct.
    """
    check_there(config, "input", "tokenizer_model")
    check_new(config, "output")
    from megashear.preprocessing.conversations import template_for
    from megashear.preprocessing.inputs import find_domains
    from megashear.tokenizer.choice import load_tokenizer

    find_domains(config.input, config.json_key)
    template_for(config.chat_format, load_tokenizer(config.tokenizer_model))
