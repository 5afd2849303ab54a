"""Real text for tests, and preprocessing of it: docstrings of the standard library by domain."""

import email
import inspect
import json
import pathlib
import shutil
import statistics
import string
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megashear.config import PreprocessConfig
from megashear.data.manifest import DataManifest
from megashear.preprocessing import domains
from megashear.preprocessing.text_files import CHUNK_BYTES

DOMAIN_MODULES: dict[str, list[ModuleType]] = {
    "words": [string, textwrap, email],
    "paths": [pathlib, shutil],
    "numbers": [statistics],
}


def docstrings(*modules: ModuleType) -> list[str]:
    """Docstrings of the modules and of what they define, in a fixed order, without repeats."""
    texts = []
    for module in modules:
        members = [value for _, value in inspect.getmembers(module)]
        classes = [m for m in members if inspect.isclass(m) and m.__module__ == module.__name__]
        for value in [module, *members, *(m for c in classes for _, m in inspect.getmembers(c))]:
            if callable(value) or value is module:
                texts.append(inspect.getdoc(value) or "")
    return [text for text in dict.fromkeys(texts) if len(text) > 40]


def write_jsonl(path: Path, texts: list[Any], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def preprocess(
    inputs: Mapping[str, Sequence[Path]],
    output: Path,
    tokenizer: Path,
    *,
    progress: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    **flags: Any,
) -> DataManifest:
    """Preprocess files with flags of the command, by their names; others have their defaults."""
    config = PreprocessConfig(input="", output=str(output), tokenizer_model=str(tokenizer), **flags)
    return domains.preprocess(inputs, config, progress=progress, chunk_bytes=chunk_bytes)
