"""Read flags and YAML into a typed configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megashear.commands.outcome import UsageError, is_first_rank
from megashear.commands.settings import (
    Setting,
    build,
    check_values,
    flag_of,
    flatten,
    groups_of,
    nearest,
    settings_of,
    type_name,
)
from megashear.files.structured import read_yaml_pairs

Config = TypeVar("Config")

CONFIG = Setting(
    key="config",
    group="",
    wanted=str | None,
    help="YAML file of the keys below, with dashes or underscores; flags override it.",
    default=None,
)
DRY_RUN = Setting(
    key="dry_run",
    group="",
    wanted=bool,
    help="Print the run as YAML for --config, check what needs no device (paths, layout, batches, "
    "targets, references) and exit. Nothing is started or written.",
    default=False,
)


def parse(
    config_type: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: Sequence[str] = (),
    check: Callable[[Config], object] | None = None,
) -> Config:
    """Read a run from flags and from the YAML file that ``--config`` names.

    Flags are flat, dashes and underscores are the same, the last one given wins. ``--help``,
    ``--help-all`` and ``--dry-run`` print on rank 0 and end the process.

    Args:
        config_type: dataclass of the run, see ``megashear.config``.
        argv: arguments after the command's name.
        prog: the command as the user typed it, for help and errors.
        description: first lines of the help.
        positional: keys that words before the first flag stand for, in this order; if the last key
            is a list, it takes all words that are left.
        check: checks of the command that need no device; ``--dry-run`` calls it after printing the
            run.

    Raises:
        UsageError: too many words before the first flag, an unknown flag or key (names the
            nearest), a value of another type, a number out of its range, empty text, a needed flag
            that is not given, or values that the configuration refuses. Checked in this order, so
            that a wrong value is reported even if another flag is missing.
        ValueError: of ``check``, with --dry-run.
        SystemExit: 0 after --help and --dry-run.
    """
    settings = settings_of(config_type)
    if not {"-h", "--help", HELP_ALL}.isdisjoint(argv):
        if is_first_rank():
            print(_help(config_type, prog, description, shows_all=HELP_ALL in argv))
        raise SystemExit(0)
    words = _named(argv, [settings[key] for key in positional], prog)
    flags = _read_flags(words, [CONFIG, DRY_RUN, *settings.values()])
    file, dry_run = flags.pop(CONFIG.key, None), flags.pop(DRY_RUN.key, False)
    values = {**_read_file(file, settings), **flags}
    try:
        check_values(config_type, values)
        _check_texts(values, settings)
        _check_needed(values, settings, prog)
        config = build(config_type, values)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if dry_run:
        if is_first_rank():
            print(to_yaml(config, prog=prog), end="", flush=True)
        if check is not None:
            check(config)
        raise SystemExit(0)
    return config


def to_yaml(config: object, *, prog: str) -> str:
    """Return a configuration as the flat YAML that ``--config`` reads.

    Args:
        config: dataclass of a run.
        prog: the command, named in the first line.
    """
    values = flatten(config)
    lines, group = [f"# {prog} --config <this file>\n"], ""
    # Groups first: a key after the last group's heading would seem to belong to it.
    for setting in settings_of(type(config)).values():
        if setting.group != group:
            group = setting.group
            lines.append(f"# {group}\n")
        value = values[setting.key]
        plain = {setting.key: list(value) if isinstance(value, tuple) else value}
        lines.append(yaml.safe_dump(plain, allow_unicode=True, width=2**16))
    return "".join(lines)


def _read_flags(words: Sequence[str], settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the value of each flag by its key; the last one given wins."""
    flags = {flag_of(name): s for s in settings for name in (s.key, *s.aliases)}
    negations = {"--no-" + s.flag[2:]: s for s in settings if s.wanted is bool}
    values: dict[str, Any] = {}
    words = list(words)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UsageError(
                f"{flag + equals + value!r} follows no flag that takes it; flags begin with --"
            )
        flag = flag.replace("_", "-")
        setting = flags.get(flag) or negations.get(flag)
        if setting is None:
            known = nearest(flag, [*flags, *negations])
            raise UsageError(f"unknown flag {flag}; nearest known: {known}; --help lists all")
        if setting.wanted is bool:
            if equals:
                raise UsageError(
                    f"{flag} takes no value and has {value!r}; give {setting.flag} to turn it on, "
                    f"--no-{setting.flag[2:]} to turn it off"
                )
            values[setting.key] = flag in flags
            continue
        given = [value] if equals else []
        while words and not words[0].startswith("--") and (setting.is_list or not given):
            given.append(words.pop(0))
        wanted = type_name(setting.wanted).removesuffix(" or null")
        if not given and not setting.is_list:
            raise UsageError(f"{flag} has no value; wanted {wanted}")
        try:
            values[setting.key] = setting.read(given if setting.is_list else given[0])
        except ValueError:
            found = f"has {' '.join(given)}" if setting.is_list else f"is {given[0]!r}"
            raise UsageError(f"{flag} {found}; wanted {wanted}") from None
    return values


def _named(argv: Sequence[str], positional: Sequence[Setting], prog: str) -> list[str]:
    """Return the arguments with each word before the first flag after the flag it stands for."""
    first_flag = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, rest = argv[:first_flag], argv[first_flag:]
    if not positional or not words:
        return list(argv)
    if len(words) > len(positional) and not positional[-1].is_list:
        raise UsageError(
            f"{len(words)} words before the first flag ({' '.join(words)}); {prog} takes at most "
            f"{len(positional)}: {', '.join(setting.flag for setting in positional)}"
        )
    named = []
    for number, setting in enumerate(positional[: len(words)]):
        last = number == len(positional) - 1
        named += [setting.flag, *(words[number:] if last else words[number : number + 1])]
    return [*named, *rest]


def _read_file(file: str | None, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the values by key of a YAML file's flat mapping; none where no file is named."""
    if file is None:
        return {}
    _check_texts({CONFIG.key: file}, {CONFIG.key: CONFIG})
    try:
        # Pairs, not the mapping: they know their lines, and keys that are there twice.
        pairs = read_yaml_pairs(Path(file), f"--config {file}")
    except ValueError as error:
        raise UsageError(str(error)) from None
    values: dict[str, Any] = {}
    aliases = {alias: setting.key for setting in settings.values() for alias in setting.aliases}
    for line, name, value in pairs:
        place, key = f"{file} line {line}", str(name).replace("-", "_")
        key = aliases.get(key, key)
        if key not in settings:
            known = nearest(key, settings)
            raise UsageError(
                f"{place}: unknown key {name}; nearest known: {known}; --help lists all"
            )
        if key in values:
            raise UsageError(f"{place}: {key} is there twice; keep one")
        value = settings[key].as_list(value)
        if not settings[key].accepts(value):
            wanted = type_name(settings[key].wanted)
            raise UsageError(f"{place}: {key} is {value!r}; wanted {wanted}")
        values[key] = settings[key].read(value)
    return values


def _check_texts(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> None:
    """Refuse empty text: as a path it would be the working directory."""
    for key, value in values.items():
        setting = settings[key]
        for text in value if isinstance(value, tuple) else [value]:
            if not isinstance(text, str) or value == setting.default:
                continue
            if not text.strip():
                raise UsageError(
                    f"{setting.flag} is {text!r}, wanted text that is not empty; a variable of the "
                    f"shell that is not set, perhaps: give a value, or leave the flag out"
                )
            if "\0" in text:
                raise UsageError(f"{setting.flag} is {text!r}; no name holds the character 0")


def _check_needed(values: Mapping[str, Any], settings: Mapping[str, Setting], prog: str) -> None:
    missing = [s.flag for s in settings.values() if s.is_needed and values.get(s.key) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed and not given; "
            f"`{prog} --help` says what to give"
        )


HELP_ALL = "--help-all"
"""Flag for a help with every key, where ``--help`` shows those that most calls need."""


def _help(config_type: type, prog: str, description: str, *, shows_all: bool) -> str:
    """Return the help of a command, a section for each group of its keys."""
    settings = list(settings_of(config_type).values())
    shown = settings
    if not shows_all and any(s.is_common for s in settings):
        shown = [s for s in settings if s.is_common or s.is_needed]
        description += (
            f"\n\nThe {len(shown)} keys that most calls need; {HELP_ALL} lists all {len(settings)}."
        )
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [OPTIONS]",
        description=description,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26
        ),
    )
    for name, owner in {"": config_type, **groups_of(config_type)}.items():
        keys = [setting for setting in shown if setting.group == name]
        if not name:
            keys = [CONFIG, DRY_RUN, *keys]
        if keys:
            about = " ".join((owner.__doc__ or "").split()) if name else None
            section = parser.add_argument_group(f"{name} options".strip(), about)
            for setting in keys:
                _describe(setting, section)
    return parser.format_help().rstrip("\n")


def _describe(setting: Setting, section: argparse._ArgumentGroup) -> None:
    """Add a setting to a section of the help."""
    parts = [setting.help]
    if setting.range is not None:
        parts.append(f"Takes {setting.range}.")
    if setting.is_needed:
        parts.append("(required)")
    elif setting.default_text is not None:
        parts.append(f"(default: {setting.default_text})")
    text = " ".join(parts).replace("%", "%%")
    if setting.wanted is bool:
        section.add_argument(
            setting.flag, f"--no-{setting.flag[2:]}", action="store_true", help=text
        )
    else:
        section.add_argument(setting.flag, metavar=setting.metavar, help=text)
