"""Where a model came from before megashear: its name and licence, for those it is handed to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megashear.files.regular import read_bytes
from megashear.files.structured import read_yaml_text

README = "README.md"
README_BYTES = 2**22
"""Largest README.md that is read, bytes."""
LICENCE_FIELDS = ("license", "license_name", "license_link")
"""Fields of a model card that say under which licence a model is; they travel unchanged."""
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*?(?:\r?\n|\Z)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def origin_of(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return name and licence of the model in a Hugging Face directory, as far as it says them.

    The name is that of the hub if config.json or a cache's path has one, or else the directory's.

    Args:
        directory: the directory.
        config: its config.json.
    """
    front = front_matter(directory / README)
    licence = {
        name: str(front[name])
        for name in LICENCE_FIELDS
        if isinstance(front.get(name), str) and front[name].strip()
    }
    return {"name": _name(directory, config), **licence}


def front_matter(readme: Path) -> dict[str, Any]:
    """Return the YAML at the head of a model card; nothing where there is none that can be read.

    A card is written by people and decides nothing, so a broken one stops no conversion.
    """
    if not readme.is_file():
        return {}
    try:
        text = read_bytes(readme, README_BYTES).decode("utf-8")
        found = _FRONT.match(text)
        values = read_yaml_text(found[1], str(readme)) if found else None
    except (ValueError, OSError):
        return {}
    return values if isinstance(values, dict) else {}


def is_hub_name(name: str) -> bool:
    """Return whether a name is of the form ORGANISATION/NAME, as the hub's repositories are."""
    return _HUB_NAME.fullmatch(name) is not None


def _name(directory: Path, config: Mapping[str, Any]) -> str:
    named = config.get("_name_or_path")
    if isinstance(named, str) and is_hub_name(named):
        return named
    for part in reversed(directory.resolve().parts):
        if found := _CACHED.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    return directory.resolve().name
