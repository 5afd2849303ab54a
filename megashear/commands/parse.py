"""YAML and flags to a typed configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import tyro
import yaml

from megashear.checkpoint.description import holds_iterations
from megashear.commands.outcome import UsageError, is_first_rank
from megashear.commands.settings import (
    Setting,
    build,
    check_values,
    flatten,
    groups_of,
    nearest,
    settings_of,
    type_name,
)
from megashear.config import PretrainRun, PruneRun, TrainConfig
from megashear.files.output import check_writable
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
    help="Print the resolved run as YAML for --config, check all that needs no device (paths, "
    "layout, batches, targets, references) and exit; nothing is started or written.",
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
        positional: keys that words before the first flag stand for, in this order; the last one
            takes all words left where it is a list.
        check: what the command itself looks at before it starts and no device is needed for;
            ``--dry-run`` calls it once the run is printed.

    Raises:
        UsageError: too many words before the first flag, an unknown key or flag (names the
            nearest), a value of another type in the file, a number out of its range, empty text, a
            flag that is needed and not given, or values that the configuration refuses; looked at
            in this order, so that a wrong value is reported whatever else is missing.
        ValueError: of ``check``, with --dry-run.
        SystemExit: 0 after --help and --dry-run; 2 where tyro refused the words, and has said so
            on stderr.
    """
    settings = settings_of(config_type)
    assert not {"config", "dry_run"} & settings.keys()
    asks_help = not {"-h", "--help", HELP_ALL}.isdisjoint(argv)
    if asks_help and HELP_ALL not in argv:
        settings, description = _short_help(settings, description)
    argv = _named(argv, [settings[key] for key in positional], prog)
    argv = _without_aliases(argv, settings)
    if not asks_help:
        _check_flags(argv, settings)
        argv = [*_read_config(argv, settings), *argv]
    shown = frozenset(settings) if asks_help else None
    given = _parse_flags(
        config_type, ["--help"] if asks_help else argv, prog, description, shown=shown
    )
    values = flatten(given)
    dry_run = values.pop(DRY_RUN.key)
    del values[CONFIG.key]
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


def check_there(config: object, *keys: str) -> None:
    """Refuse paths that lead nowhere, without the import of anything that could open them.

    Args:
        config: the run.
        keys: its settings that name what is read: a path, several, or None.

    Raises:
        ValueError: with the flag and the path.
    """
    values = flatten(config)
    for key in keys:
        named = values[key]
        for path in named if isinstance(named, tuple) else (named,):
            if path is not None and not Path(path).exists():
                raise ValueError(f"{_flag(key)} {path} does not exist")


def check_run_paths(config: PruneRun | PretrainRun) -> None:
    """Refuse paths of a run that lead nowhere, and outputs that cannot be written.

    A run that is resumed reads nothing of its source, which may be gone.

    Args:
        config: the run.

    Raises:
        ValueError: with the flag and the path.
    """
    train = config.train
    resumed = train.resume and holds_iterations(train.save)
    source = () if resumed else ("load", "load_hf")
    check_there(config, *source, "data_path", "reference_loss", "domain_phases")
    check_outputs(train)


def check_outputs(train: TrainConfig, of: str = "") -> None:
    """Refuse outputs of a run that cannot be written.

    Args:
        train: whose flags they are.
        of: what to say behind a flag of a run that is not the command's own.

    Raises:
        UnwritableError: with the flag, the path and the way out.
    """
    for key in ("save", "tensorboard_dir"):
        if (path := getattr(train, key)) is not None:
            check_writable(_flag(key) + of, path, into=True)
    if train.jsonl_log is not None:
        check_writable("--jsonl-log" + of, train.jsonl_log)


def check_new(config: object, *keys: str) -> None:
    """Refuse outputs that are there already.

    Raises:
        ValueError: with the flag and the path.
    """
    for key in keys:
        path = getattr(config, key)
        if path is not None and Path(path).exists():
            raise ValueError(f"{_flag(key)} {path} exists; choose another or remove it first")


def to_yaml(config: object, *, prog: str) -> str:
    """A configuration as the flat YAML that ``--config`` reads.

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


def _check_texts(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> None:
    """Refuse empty text: as a path it would be the working directory."""
    for setting in settings.values():
        value = values[setting.key]
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


def _short_help(
    settings: Mapping[str, Setting], description: str
) -> tuple[dict[str, Setting], str]:
    """Return the settings that the short help shows, and what stands above them."""
    some = {key: s for key, s in settings.items() if s.is_common or s.is_needed}
    if not any(s.is_common for s in some.values()):
        return dict(settings), description
    return some, (
        f"{description}\n\nThe {len(some)} keys that most calls need; {HELP_ALL} lists all "
        f"{len(settings)}."
    )


HELP_ALL = "--help-all"
"""Flag for a help with every key, where ``--help`` shows those that most calls need."""


def _check_needed(values: Mapping[str, Any], settings: Mapping[str, Setting], prog: str) -> None:
    missing = [s.flag for s in settings.values() if s.is_needed and values[s.key] is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed and not given; "
            f"`{prog} --help` says what to give"
        )


def _parse_flags(
    config_type: type,
    argv: Sequence[str],
    prog: str,
    description: str,
    *,
    shown: frozenset[str] | None,
) -> object:
    """Let tyro read the flags; ranks other than 0 stay silent."""
    with contextlib.ExitStack() as stack:
        if not is_first_rank():
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        return tyro.cli(
            _unchecked(config_type, [CONFIG, DRY_RUN], shown=shown),
            args=[_with_dashes(word) for word in argv],
            prog=prog,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
        )


def _unchecked(
    config_type: type, extra: Sequence[Setting] = (), *, shown: frozenset[str] | None
) -> type:
    """A twin of a configuration for tyro, with the same fields and groups but no checks.

    Without it tyro would frame the messages of ``__post_init__`` like its own, and would need a
    valid configuration of the file alone where only file and flags together make one. Only the
    help (of the keys ``shown``) says what is needed: else tyro would miss it before anyone looked
    at what is given.
    """
    fields: list[Any] = []
    for setting in [*extra, *settings_of(config_type).values()]:
        if setting.group:
            continue
        bounds = "" if setting.range is None else f" Takes {setting.range}."
        note = tyro.conf.arg(help=setting.help + bounds)
        if shown is not None and setting not in extra and setting.key not in shown:
            continue
        if not setting.is_needed:
            fields.append((setting.key, Annotated[setting.wanted, note], setting.default))
        elif shown is not None:
            fields.append((setting.key, Annotated[setting.wanted, note]))
        else:
            fields.append((setting.key, Annotated[setting.wanted | None, note], None))
    fields += [
        (name, _unchecked(owner, shown=shown))
        for name, owner in groups_of(config_type).items()
        if shown is None or shown & settings_of(owner).keys()
    ]
    twin = dataclasses.make_dataclass(config_type.__name__, fields, frozen=True, kw_only=True)
    twin.__doc__ = config_type.__doc__
    return twin


def _check_flags(argv: Sequence[str], settings: Mapping[str, Setting]) -> None:
    known = {setting.flag for setting in [*settings.values(), CONFIG, DRY_RUN]}
    known |= {"--no-" + s.flag[2:] for s in [*settings.values(), DRY_RUN] if s.wanted is bool}
    for word in argv:
        flag = _with_dashes(word).partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise UsageError(
                f"unknown flag {flag}; nearest known: {nearest(flag, known)}; --help lists all"
            )
    by_flag = {setting.flag: setting for setting in settings.values()}
    for word, following in zip(argv, [*argv[1:], "--"]):
        flag, equals, value = _with_dashes(word).partition("=")
        setting = by_flag.get(flag)
        if setting is None or setting.wanted is bool or get_origin(setting.wanted) is tuple:
            continue  # a word of its own, or several, which tyro counts
        wanted = type_name(setting.wanted).removesuffix(" or null")
        if not equals and following.startswith("--"):
            raise UsageError(f"{flag} has no value; wanted {wanted}")
        if not setting.reads(value if equals else following):
            raise UsageError(f"{flag} is {value if equals else following!r}; wanted {wanted}")


def _named(argv: Sequence[str], positional: Sequence[Setting], prog: str) -> list[str]:
    """The same arguments, with each word before the first flag behind the flag it stands for."""
    first_flag = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, rest = argv[:first_flag], argv[first_flag:]
    if not positional or not words:
        return list(argv)
    takes_all = get_origin(positional[-1].wanted) is tuple
    if len(words) > len(positional) and not takes_all:
        raise UsageError(
            f"{len(words)} words before the first flag ({' '.join(words)}); {prog} takes at most "
            f"{len(positional)}: {', '.join(setting.flag for setting in positional)}"
        )
    named = []
    for number, setting in enumerate(positional[: len(words)]):
        last = number == len(positional) - 1
        named += [setting.flag, *(words[number:] if last else words[number : number + 1])]
    return [*named, *rest]


def _without_aliases(argv: Sequence[str], settings: Mapping[str, Setting]) -> list[str]:
    """The same words, with each flag under its own name."""
    names = {_flag(alias): s.flag for s in settings.values() for alias in s.aliases}
    words = []
    for word in argv:
        flag, equals, value = _with_dashes(word).partition("=")
        words.append(names[flag] + equals + value if flag in names else word)
    return words


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _read_config(argv: Sequence[str], settings: Mapping[str, Setting]) -> list[str]:
    """Flags that say what the file of ``--config`` says; none where no file is named."""
    file: str | None = None
    for word, following in zip(argv, [*argv[1:], None]):
        if word == CONFIG.flag:
            file = following
        elif word.startswith(CONFIG.flag + "="):
            file = word.partition("=")[2]
    if file is None:  # not given, or without a name, which tyro says
        return []
    _check_texts({CONFIG.key: file}, {CONFIG.key: CONFIG})
    words = []
    for key, value in _read_yaml(Path(file), settings).items():
        if isinstance(value, bool):
            words.append(settings[key].flag if value else "--no-" + settings[key].flag[2:])
        elif isinstance(value, list):
            words += [settings[key].flag, *map(str, value)]
        else:  # one word, so that a value may begin with a dash
            words.append(f"{settings[key].flag}={value}")
    return words


def _read_yaml(file: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Values of a flat YAML mapping by key, each of the type its key wants."""
    try:
        # Pairs, not the mapping: they know their lines, and keys that are there twice.
        pairs = read_yaml_pairs(file, f"--config {file}")
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
        values[key] = value
    return values
