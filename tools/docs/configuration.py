"""Write docs/configuration.md, every key of every command, from the dataclasses of a run.

Usage: python tools/docs/configuration.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megashear import config
from megashear.__main__ import COMMANDS
from megashear.commands import completion
from megashear.commands.settings import Setting, groups_of, settings_of, type_name

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Configuration

Every key of every command. `python tools/docs/configuration.py` writes this page from
`megashear/config/`; change the help texts there, not this page.

A key is a flag, `--global-batch-size 256`, and a line of the YAML file that `--config` names,
`global_batch_size: 256`; flags override the file. Dashes and underscores are the same. A key that
is on or off is turned off by its negation, `--no-bf16`, and is `true` or `false` in YAML. A list is
several words, or a YAML list. If the default is `-`, nothing is set, and the last column says what
that means.

`--help` of a command shows the keys that most calls need, `--help-all` shows all. Every command
takes `--config` and `--dry-run`. `--dry-run` prints the run as a file for `--config`, then checks
everything that needs no device: paths, layout, batches, targets, references. It writes nothing and
exits with 2 if something is wrong, or with 3 if an output cannot be written. The source of a run
that is resumed need not exist any more. A run of several processes is checked for one replica, or
for as many processes as the environment variable `WORLD_SIZE` says:
`WORLD_SIZE=64 megashear prune --config prune.yaml --dry-run`.

"""
_COMMAND = re.compile(r"`megashear ([\w-]+)`: ")


def configurations() -> dict[str, type]:
    """Return the dataclass of each command, in the order of `COMMANDS`.

    Raises:
        ValueError: a command has none.
    """
    found = completion.configurations()
    if missing := COMMANDS.keys() - found.keys():
        raise ValueError(
            f"no dataclass of megashear/config is of {', '.join(sorted(missing))}; begin its "
            f"docstring with `megashear COMMAND`: "
        )
    return {command: found[command] for command in COMMANDS}


def page() -> str:
    """Return the page as it should be."""
    owners = configurations()
    shared: dict[type, list[str]] = {}
    for command, owner in owners.items():
        for group in groups_of(owner).values():
            shared.setdefault(group, []).append(command)
    parts = [HEAD]
    for command, owner in owners.items():
        groups = groups_of(owner).values()
        line = f"## megashear {command}\n\n{_first_line(owner)}\n\n"
        if groups:
            line += f"Takes the keys of {_links(groups)}"
            line += ", and its own:\n\n" if any(_own(owner)) else ".\n\n"
        parts.append(line + _table(_own(owner)))
    for group, commands in shared.items():
        settings = list(settings_of(group).values())
        of = ", ".join(f"`{command}`" for command in commands)
        parts.append(f"## {group.__name__}\n\n{_first_line(group)} Of {of}.\n\n{_table(settings)}")
    return "".join(parts).rstrip("\n") + "\n"


def _own(owner: type) -> list[Setting]:
    return [setting for setting in settings_of(owner).values() if not setting.group]


def _links(groups: Sequence[type] | Any) -> str:
    links = [f"[{group.__name__}](#{group.__name__.lower()})" for group in groups]
    return " and ".join(filter(None, [", ".join(links[:-1]), links[-1]]))


def _first_line(owner: type) -> str:
    text = " ".join((owner.__doc__ or "").split("\n\n")[0].split())
    text = _COMMAND.sub("", text)
    return text[0].upper() + text[1:]


def _table(settings: Sequence[Setting]) -> str:
    if not settings:
        return ""
    lines = ["| key | value | default | what |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(map(_cell, _row(setting))) + " |" for setting in settings]
    return "\n".join(lines) + "\n\n"


def _row(setting: Setting) -> Iterator[str]:
    yield f"`{setting.flag}`"
    bounds = "" if setting.range is None else f", {setting.range}"
    yield _values(setting.wanted) + bounds
    yield "**required**" if setting.is_needed else _default(setting)
    yield setting.help


def _values(wanted: Any) -> str:
    choices = [choice for choice in get_args(wanted) if choice is not type(None)]
    if get_origin(wanted) is Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    if wanted == config.NamedNumbers:
        return "numbers, or `name=number`"
    if get_origin(wanted) is tuple:
        return f"list: {type_name(choices[0])}"
    if choices:  # or null, which is no value to give
        return " or ".join(_values(choice) for choice in choices)
    return "on or off" if wanted is bool else type_name(wanted)


def _default(setting: Setting) -> str:
    if setting.default_text is None:
        return "-"
    is_switch = isinstance(setting.default, bool)
    return setting.default_text if is_switch else f"`{setting.default_text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or with --check only report whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args(argv).check
    wanted = page()
    is_fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted
    if check:
        if not is_fresh:
            print(f"{PAGE} is stale; run python tools/docs/configuration.py", file=sys.stderr)
        return 0 if is_fresh else 1
    PAGE.write_text(wanted, encoding="utf-8")
    print(f"{PAGE}: {wanted.count(chr(10))} lines, {'as it was' if is_fresh else 'new'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
