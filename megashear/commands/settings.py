"""The flat list of keys of a configuration, and the values that each key takes."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megashear.bounds import Between, common_of, ranges_of
from megashear.config import NamedNumbers

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key of a run: a field of a configuration, wherever in the tree it sits."""

    key: str
    """Name of the field, with underscores; also the key in YAML."""
    group: str
    """Field of the run that holds the key (``train``), or "" for a key of the run itself."""
    wanted: Any
    """Type of the value."""
    help: str
    """The string under the field, on one line."""
    default: Any
    """Value unless another is given; ``dataclasses.MISSING`` if a value is needed."""
    aliases: tuple[str, ...] = ()
    """Other names of the key that users know from elsewhere."""
    range: Between | None = None
    """Range of the numbers; None for a value without numbers."""
    is_common: bool = False
    """Whether the short help shows the key."""

    @property
    def is_needed(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The name as typed: ``--tensor-model-parallel-size``."""
        return flag_of(self.key)

    def accepts(self, value: object) -> bool:
        """Return whether a value that YAML read fits the type."""
        return _fits(self.wanted, value)

    @property
    def is_list(self) -> bool:
        """Whether the flag takes several words."""
        return get_origin(self.wanted) is tuple

    @property
    def default_text(self) -> str | None:
        """The default in words; None if nothing is set."""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return None if self.default in (None, (), "") else str(self.default)

    @property
    def metavar(self) -> str:
        """Placeholder of the value in the help."""
        return _metavar(self.wanted)

    def read(self, value: object) -> Any:
        """Return the value of a word, of a list of words, or of a YAML value that `accepts` takes.

        Raises:
            ValueError: a word is no value of the type.
        """
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, list):
            return tuple(_read(get_args(self.wanted)[0], str(item)) for item in value)
        return _read(self.wanted, str(value))

    def as_list(self, value: object) -> object:
        """Return numbers by name, or one number, as the list they mean; other values unchanged."""
        if self.wanted != NamedNumbers:
            return value
        if isinstance(value, Mapping):
            return [f"{name}={number}" for name, number in value.items()]
        return [value] if isinstance(value, int | float) else value


def flag_of(key: str) -> str:
    """Return a key as a flag."""
    return "--" + key.replace("_", "-")


def settings_of(config_type: type) -> dict[str, Setting]:
    """Return every setting of a run by its key, in the order of the configuration.

    Args:
        config_type: a dataclass whose fields are plain values or dataclasses of plain values.
    """
    found: dict[str, Setting] = {}
    for group, owner in [("", config_type), *groups_of(config_type).items()]:
        hints, notes = get_type_hints(owner), _field_notes(owner)
        for field in dataclasses.fields(owner):
            if dataclasses.is_dataclass(hints[field.name]):
                continue
            # The name of a flag has no group, so a second owner would hide the first.
            assert field.name not in found, f"two groups of {config_type.__name__}: {field.name}"
            found[field.name] = Setting(
                key=field.name,
                group=group,
                wanted=hints[field.name],
                help=notes.get(field.name, ""),
                default=field.default,
                aliases=field.metadata.get("aliases", ()),
                range=ranges_of(owner).get(field.name),
                is_common=field.name in common_of(owner),
            )
            assert (found[field.name].range is not None) is _is_number_type(hints[field.name]), (
                f"{owner.__name__}.{field.name}: a number has a range, megashear.bounds.Between"
            )
    return found


def groups_of(config_type: type) -> dict[str, type]:
    """Return the dataclasses that a run consists of, by field name; none if it is flat."""
    hints = get_type_hints(config_type)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(config_type)
        if dataclasses.is_dataclass(hints[field.name])
    }


def build(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from flat values; absent keys take their defaults.

    Raises:
        ValueError: a configuration refuses its values.
    """
    nested: dict[str, Any] = {
        name: build(owner, values) for name, owner in groups_of(config_type).items()
    }
    fields = dataclasses.fields(config_type)  # type: ignore[arg-type]  # a dataclass, by contract
    own = {field.name: values[field.name] for field in fields if field.name in values}
    return config_type(**nested, **own)


def check_values(config_type: type, values: Mapping[str, Any]) -> None:
    """Refuse numbers out of their ranges, even if other values are missing or wrong.

    Raises:
        ValueError: with the flag, the number and the range.
    """
    for key, setting in settings_of(config_type).items():
        if setting.range is not None and key in values:
            setting.range.check(values[key], setting.flag)


def flatten(config: Any) -> dict[str, Any]:
    """Return the flat values of a configuration, the inverse of ``build``."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """Return up to three known names that look like ``name``, best first; at least one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    return " or ".join(close or difflib.get_close_matches(name, known, n=1, cutoff=0.0))


def type_name(wanted: Any) -> str:
    """Return a type in words, for messages: "a whole number or null"."""
    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(type_name(choice) for choice in get_args(wanted))
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(get_args(wanted))
    if get_origin(wanted) is tuple:
        return f"a list, each item {type_name(get_args(wanted)[0])}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "null",
    }[wanted]


def _fits(wanted: Any, value: object) -> bool:
    if get_origin(wanted) in (Union, types.UnionType):
        return any(_fits(choice, value) for choice in get_args(wanted))
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if get_origin(wanted) is tuple:
        return isinstance(value, list) and all(_fits(get_args(wanted)[0], v) for v in value)
    if wanted is float and isinstance(value, str):
        return _is_number(value)
    if wanted in (int, float) and isinstance(value, bool):  # a bool is an int to Python
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def _read(wanted: Any, word: str) -> Any:
    """Return a word as a value of a type; of a union None first, then in its order."""
    if get_origin(wanted) in (Union, types.UnionType):
        if types.NoneType in get_args(wanted) and word == "None":
            return None
        for choice in get_args(wanted):
            with contextlib.suppress(ValueError):
                return _read(choice, word)
    elif get_origin(wanted) is Literal:
        if word in get_args(wanted):
            return word
    elif wanted is not types.NoneType:
        return wanted(word)
    raise ValueError(f"{word!r} is no {type_name(wanted)}")


def _metavar(wanted: Any) -> str:
    choices = [choice for choice in get_args(wanted) if choice not in (types.NoneType, ...)]
    if get_origin(wanted) is Literal:
        return "{" + ",".join(choices) + "}"
    if get_origin(wanted) is tuple:
        return f"[{_metavar(choices[0])} ...]"
    return "|".join(map(_metavar, choices)) or wanted.__name__.upper()


def _is_number(text: str) -> bool:
    """Return whether text is a number; YAML 1.1 reads 1e-4, without a point, as text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_number_type(wanted: Any) -> bool:
    return wanted in (int, float) or any(map(_is_number_type, get_args(wanted)))


@functools.cache  # reads the source, which takes longer than all the rest
def _field_notes(owner: type) -> dict[str, str]:
    """Return the string under each field, which Python keeps only in the source."""
    notes = {}
    for part in filter(dataclasses.is_dataclass, reversed(owner.__mro__)):  # what it inherits too
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for field, note in zip(definition.body, definition.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match note:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        notes[field.target.id] = " ".join(text.split())
    return notes
