"""The manifest of a directory of tokenised domains."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megashear.data.indexed import check_pair
from megashear.files import durable
from megashear.files.regular import inside
from megashear.files.structured import check_fields, read_json_object

FORMAT = "megashear-data-1"
"""Name of the directory's format; a changed format gets another name."""
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
HELD_OUT_SUFFIX = "_heldout"


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainCounts:
    """Size of one domain."""

    name: str
    """Name of the domain and of its files."""
    documents: int
    """Training documents."""
    tokens: int
    """Training tokens, BOS and EOS included."""
    held_out_documents: int
    """Held-out documents."""
    held_out_tokens: int
    """Held-out tokens, BOS and EOS included."""
    source_bytes: int
    """Size of the input files as they lay on the disk, bytes."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of documents left out, by reason."""
    text_bytes: int = 0
    """Size of the texts that were tokenised, bytes of UTF-8; 0 where the input was tokens."""
    pretokenised_documents: int = 0
    """Documents, or chunks of fixed size, that came as tokens; no BOS or EOS was added to them."""
    lone_surrogates: int = 0
    """Halves of surrogate pairs in the texts; each was replaced by U+FFFD."""
    largest_id: int | None = None
    """Largest id in training and held-out text; None in manifests of earlier versions."""
    largest_id_at: str = ""
    """File and number of the token, from 0, where the largest id is first."""

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of UTF-8 text per token; None where the input was tokens."""
        if not self.text_bytes or self.pretokenised_documents:
            return None
        return self.text_bytes / (self.tokens + self.held_out_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataManifest:
    """Tokenised domains in a directory: one ``.bin/.idx`` to train on and one held out for each."""

    directory: Path
    """Directory that holds the files."""
    domains: tuple[DomainCounts, ...]
    """Domains in the order of every vector over domains: weights, losses, references."""
    vocab_size: int
    """Number of ids of the tokenizer; every id is below it."""
    bos_id: int | None
    """Id that begins every document if ``prepend_bos``."""
    eos_id: int | None
    """Id that ends every document if ``append_eod``."""
    prepend_bos: bool
    """Whether documents begin with BOS."""
    append_eod: bool
    """Whether documents end with EOS."""
    held_out_fraction: float
    """Share of documents to hold out, as asked for."""
    json_key: str
    """Key of the text in the input."""
    dtype: str
    """Numpy type of the stored tokens."""
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's model file, hex."""
    chat_format: str | None = None
    """What wrote the conversations, as --chat-format names it; None where documents are text. The
    template is in the tokenizer's directory."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return tuple(domain.name for domain in self.domains)

    @property
    def tokenizer_directory(self) -> Path:
        """Directory of the tokenizer's copy, for ``load_tokenizer`` and for exported models."""
        return self.directory / TOKENIZER_FOLDER

    def prefix(self, name: str) -> Path:
        """Return the path of a domain's training text, without ``.bin`` and ``.idx``."""
        return self.directory / name

    def held_out_prefix(self, name: str) -> Path:
        """Return the path of a domain's held-out text, without ``.bin`` and ``.idx``."""
        return self.directory / f"{name}{HELD_OUT_SUFFIX}"

    def moved(self, directory: Path) -> DataManifest:
        """Return a manifest of the same data after a move to ``directory``."""
        return replace(self, directory=directory)

    def check_text(self) -> None:
        """Refuse conversations, for whoever learns from every token.

        Raises:
            ValueError: documents are conversations.
        """
        if self.chat_format is not None:
            raise ValueError(
                f"{self.directory} holds conversations (--chat-format {self.chat_format}), of "
                f"which the assistant's words alone are learned: use `megashear finetune`, or "
                f"preprocess text"
            )

    def check_chat(self) -> None:
        """Refuse text, for whoever learns from conversations.

        Raises:
            ValueError: documents are text.
        """
        if self.chat_format is None:
            raise ValueError(
                f"{self.directory} holds text and no conversations: preprocess conversations with "
                f"--chat-format, or use `megashear pretrain`"
            )

    def check_vocab(self, model_vocab_size: int) -> None:
        """Refuse a model that has no embedding for some of the ids.

        Preprocessing noted the largest id, so the files need not be read.

        Raises:
            ValueError: an id of the data is beyond the model's vocabulary, or, where the manifest
                has no largest id, the tokenizer's vocabulary is larger than the model's.
        """
        for domain in self.domains:
            if domain.largest_id is not None and domain.largest_id >= model_vocab_size:
                file, _, token = domain.largest_id_at.rpartition(", token ")
                place = f"{self.directory / file}, token {int(token) + 1}"
                raise ValueError(
                    f"{place} is id {domain.largest_id}, but the model has {model_vocab_size} "
                    f"ids ({self.directory} was tokenised with {self.vocab_size}); preprocess "
                    f"again with the tokenizer of the model"
                )
        if self.vocab_size > model_vocab_size and any(d.largest_id is None for d in self.domains):
            raise ValueError(
                f"{self.directory} was tokenised with {self.vocab_size} ids but the model has "
                f"{model_vocab_size}; preprocess again with the tokenizer of the model"
            )

    def write(self) -> None:
        """Write manifest.json into the directory."""
        content: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        del content["directory"]  # so that the directory can move
        durable.replace(self.directory / MANIFEST_NAME, json.dumps(content, indent=2) + "\n")


def read_manifest(directory: str | Path) -> DataManifest:
    """Read the manifest of a directory that ``megashear preprocess`` wrote.

    Raises:
        ValueError: the directory has no manifest of this format, or a domain's file is missing
            or shorter or longer than the manifest says.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} is not a megashear data directory: {_what_is_there(directory)}"
        )
    try:
        content = read_json_object(path, "it")
        found = content.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, wanted {FORMAT!r}")
        domains = tuple(_domain_counts(domain) for domain in content.pop("domains"))
        for domain in domains:
            inside(directory, domain.name, path)
        check_fields(DataManifest, content)
        np.dtype(content.get("dtype"))
        manifest = DataManifest(directory=directory, domains=domains, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a manifest this version reads: {error}; preprocess again"
        ) from error
    _check_sizes(manifest)
    return manifest


def _domain_counts(content: dict[str, Any]) -> DomainCounts:
    if (skipped := content.pop("skipped_documents", None)) is not None:  # before there were reasons
        content["skipped"] = {"empty": skipped} if skipped else {}
    check_fields(DomainCounts, content)
    return DomainCounts(**content)


def _what_is_there(directory: Path) -> str:
    """Return why a directory has no manifest, and what to do."""
    unfinished = Path(f"{directory}.tmp")  # `.` and `/` have no name to change
    if not directory.exists() and unfinished.is_dir():
        return (
            f"it does not exist, but {unfinished} does: preprocessing was interrupted; give the "
            f"same `megashear preprocess` again, which resumes there"
        )
    if any(directory.glob("*.bin")):
        return (
            f"it has no {MANIFEST_NAME}, though it has .bin files; data that Megatron-LM "
            f"tokenised are imported with `megashear preprocess --input {directory}`, which checks "
            f"the ids and splits off held-out sets"
        )
    return f"it has no {MANIFEST_NAME}; make one with `megashear preprocess`"


def _check_sizes(manifest: DataManifest) -> None:
    """Refuse files of another size than noted.

    A copy that was cut short reads as text up to the cut, so it is found here or never.
    """
    for domain in manifest.domains:
        for prefix, tokens in (
            (manifest.prefix(domain.name), domain.tokens),
            (manifest.held_out_prefix(domain.name), domain.held_out_tokens),
        ):
            found = check_pair(prefix)
            if found.num_tokens != tokens or found.dtype != np.dtype(manifest.dtype).type:
                raise ValueError(
                    f"{prefix}.bin and .idx hold {found.num_tokens} tokens of "
                    f"{found.dtype.__name__}, but {MANIFEST_NAME} says {tokens} of "
                    f"{manifest.dtype}; the files are of different runs: copy the data again"
                )
