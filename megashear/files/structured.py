"""Read JSON and YAML whole, bounded in size, depth, aliases and numbers, no key twice."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megashear.files.regular import read_bytes

JSON_BYTES = 16 * 2**20
"""Largest JSON file that is read unless the caller knows of larger ones, bytes."""
LARGE_JSON_BYTES = 100 * 2**20
"""The same for lists that grow with the data, and for tokenizers (Gemma's has 33 MB), bytes."""
YAML_BYTES = 2**20
"""Largest YAML file, bytes; people write them, and a megabyte takes seconds."""
MAX_DEPTH = 64
"""Lists and mappings inside of each other; tokenizer.json has some 8."""
MAX_NODES = 100_000
"""Values of a YAML file with all its aliases written out."""
_DIGITS = 40
"""Most characters of a number where more than 64 bits are let pass."""
_REAL_DIGITS = 1000
"""Most characters of a number with a fraction."""


_UNFINISHED = (0, 0)


class _RefusedError(ValueError):
    """Why a document is not taken though its syntax is right."""


class _RangeError(_RefusedError):
    """A number that is out of range."""

    def __init__(self, digits: str) -> None:
        super().__init__(f"the number {_short(digits)} is out of range")
        self.digits = digits


def read_json(
    path: Path | str,
    name: str | None = None,
    *,
    max_bytes: int = JSON_BYTES,
    wide_integers: bool = False,
) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        name: what messages call it; by default the path.
        max_bytes: size of the largest that is read.
        wide_integers: let whole numbers beyond 64 bits pass, which transformers writes for "no
            limit".

    Raises:
        ValueError: it is not there, no regular file, too large, no JSON, nested deeper than
            `MAX_DEPTH`, or has a key twice in one object, or a number that is out of range.
    """
    name = name or str(path)
    return parse_json(read_bytes(path, max_bytes, name), name, wide_integers=wide_integers)


def read_json_object(
    path: Path | str,
    name: str | None = None,
    *,
    max_bytes: int = JSON_BYTES,
    wide_integers: bool = False,
) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it holds something else; see `read_json`.
    """
    found = read_json(path, name, max_bytes=max_bytes, wide_integers=wide_integers)
    if not isinstance(found, dict):
        raise ValueError(f"{name or path} holds a {type(found).__name__}, not a JSON object")
    return found


def parse_json(text: bytes | str, name: str, *, wide_integers: bool = False) -> Any:
    """Return what a JSON text says; ``name`` is what messages call it.

    Raises:
        ValueError: see `read_json`.
    """

    def integer(digits: str) -> int:
        if len(digits) <= _DIGITS:
            value = int(digits)
            if wide_integers or -(2**63) <= value < 2**64:
                return value
        raise _RangeError(digits)

    def real(digits: str) -> float:
        if len(digits) > _REAL_DIGITS or math.isinf(value := float(digits)):
            raise _RangeError(digits)
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        found = json.loads(
            text, parse_int=integer, parse_float=real, object_pairs_hook=_without_twice
        )
    except RecursionError:
        raise ValueError(f"{name} {_too_deep()}") from None
    except _RangeError as error:
        raise ValueError(f"{name}: {error}{_owner(str(text), error.digits)}") from None
    except _RefusedError as error:
        raise ValueError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    _check_depth(found, name)
    return found


def check_fields(kind: type, values: object) -> None:
    """Hold what a file says to the types of a dataclass's fields; unknown types may be anything.

    Args:
        kind: the dataclass, in a module that postpones the evaluation of annotations.
        values: by name of field.

    Raises:
        TypeError: it is no mapping, or a value is of another type; it is named.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{_short(repr(values))} stands where an object is wanted")
    for field in dataclasses.fields(kind):
        names = [option.strip().partition("[")[0] for option in str(field.type).split("|")]
        if field.name not in values or not _TYPES.keys() >= set(names):
            continue
        value = values[field.name]
        if not any(
            isinstance(value, _TYPES[name]) and (name == "bool" or not isinstance(value, bool))
            for name in names
        ):
            raise TypeError(f"{field.name} is {_short(repr(value))}; wanted {field.type}")


_TYPES: dict[str, Any] = {
    **{"int": int, "float": (int, float), "str": str, "bool": bool, "dict": dict},
    **{"None": type(None), "tuple": list},
}
"""What JSON makes of the types of fields, by their names."""


def read_yaml(path: Path | str, name: str | None = None) -> Any:
    """Read a YAML file, of which JSON is a part; None where it is empty.

    Args:
        path: of the file.
        name: what messages call it; by default the path.

    Raises:
        ValueError: it is not there, no regular file, too large, no YAML, nested deeper than
            `MAX_DEPTH`, its aliases unfold to more than `MAX_NODES` values, or it has a key twice
            in one mapping, or a number that is out of range; with the line.
    """
    name = name or str(path)
    loader, root = _compose(path, name)
    return None if root is None else _construct(loader, root, name)


def read_yaml_text(text: str, name: str) -> Any:
    """Return what a text of YAML holds; None where it is empty.

    Raises:
        ValueError: as `read_yaml`; messages call the text ``name``.
    """
    loader, root = _compose_text(text, name)
    return None if root is None else _construct(loader, root, name)


def read_yaml_pairs(path: Path | str, name: str | None = None) -> list[tuple[int, Any, Any]]:
    """Read a YAML file that holds a mapping, as lines, keys and values; empty where it is.

    Raises:
        ValueError: it holds something else; see `read_yaml`.
    """
    name = name or str(path)
    loader, root = _compose(path, name)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{name} does not hold a mapping of `key: value` lines")
    return [
        (
            key.start_mark.line + 1,
            _construct(loader, key, name),
            _construct(loader, value, name),
        )
        for key, value in root.value
    ]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, that counts how deep it is and what numbers come to."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _RefusedError(_too_deep())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def bounded_integer(self, node: yaml.ScalarNode) -> int:
        value = 2**64 if len(node.value) > _DIGITS else self.construct_yaml_int(node)
        if not -(2**63) <= value < 2**64:
            raise _RefusedError(f"line {_line(node)}: {_short(node.value)} is out of range")
        return value

    def bounded_real(self, node: yaml.ScalarNode) -> float:
        # 1:30 is 90 in YAML, so that a long row of these takes long
        if node.value.count(":") > _DIGITS:
            raise _RefusedError(f"line {_line(node)}: {_short(node.value)} is out of range")
        value = self.construct_yaml_float(node)
        if math.isinf(value) and "inf" not in node.value.lower():
            raise _RefusedError(f"line {_line(node)}: {_short(node.value)} is out of range")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.bounded_integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.bounded_real)


def _compose(path: Path | str, name: str) -> tuple[_Loader, yaml.Node | None]:
    try:
        text = read_bytes(path, YAML_BYTES, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not YAML: {error}") from None
    return _compose_text(text, name)


def _compose_text(text: str, name: str) -> tuple[_Loader, yaml.Node | None]:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None:
            _check_node(root)
    except _RefusedError as error:
        raise ValueError(f"{name} {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    return loader, root


def _construct(loader: _Loader, node: yaml.Node, name: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except _RefusedError as error:
        raise ValueError(f"{name} {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's own ways to say that a value is not of the type its tag names
        raise ValueError(f"{name} is not YAML: line {_line(node)}: {error}") from None


def _check_node(root: yaml.Node) -> None:
    """Refuse aliases that unfold without end or to too much, and keys that are there twice."""
    known: dict[int, tuple[int, int]] = {}

    def size_and_depth(node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        if id(node) in known:
            if known[id(node)] == _UNFINISHED:
                raise _RefusedError(f"line {_line(node)}: an alias stands inside of what it names")
            return known[id(node)]
        known[id(node)] = _UNFINISHED
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        size, depth = 1, 1
        # An alias names what stands before it, which is known by now: this goes no deeper than
        # the text does.
        for below in map(size_and_depth, children):
            size, depth = size + below[0], max(depth, 1 + below[1])
        if size > MAX_NODES:
            raise _RefusedError(
                f"unfolds to more than {MAX_NODES:,} values; write fewer, or no aliases"
            )
        if depth > MAX_DEPTH:
            raise _RefusedError(_too_deep())
        known[id(node)] = size, depth
        return size, depth

    size_and_depth(root)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise _RefusedError(
                    f"line {_line(key)}: {_short(key.value)} is there twice; keep one"
                )
            seen.add((key.tag, key.value))


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _owner(text: str, digits: str) -> str:
    """Name the key of a number, for messages, where it is easily found."""
    found = re.search(r'"([^"\\\n]{1,99})"\s*:[\s\[]*' + re.escape(digits), text)
    return "" if found is None else f" ({found[1]})"


def _without_twice(pairs: list[tuple[Hashable, Any]]) -> Mapping[Hashable, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _RefusedError(f"{_short(str(twice))!r} is there twice in one object; keep one")
    return found


def _check_depth(value: Any, name: str) -> None:
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{name} {_too_deep()}")
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]


def _too_deep() -> str:
    return f"is nested deeper than {MAX_DEPTH} lists and mappings; no file of its kind is"


def _short(text: str) -> str:
    return text if len(text) <= _DIGITS else f"{text[:20]}... ({len(text):,} characters)"
