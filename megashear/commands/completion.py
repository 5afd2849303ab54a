"""Completion of commands, flags and choices for bash and zsh: megashear completion bash."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal, get_args, get_origin

from megashear import config
from megashear.commands.parse import CONFIG, DRY_RUN, HELP_ALL
from megashear.commands.settings import Setting, settings_of

SHELLS = ("bash", "zsh")
"""Shells for which there is a script."""
_COMMAND = re.compile(r"`megashear ([\w-]+)`: ")


def configurations() -> dict[str, type]:
    """Return the dataclass of each command, by the command that its docstring names."""
    return {
        name[1]: owner
        for owner in vars(config).values()
        if isinstance(owner, type)
        and dataclasses.is_dataclass(owner)
        and (name := _COMMAND.match(owner.__doc__ or ""))
    }


def script(shell: str, commands: Iterable[str]) -> str:
    """Return a script that the shell sources.

    Args:
        shell: one of ``SHELLS``.
        commands: names of the commands of ``megashear``.
    """
    settings = {name: settings_of(owner) for name, owner in configurations().items()}
    flags = [f"{name}) words='{' '.join(_flags(found))}' ;;" for name, found in settings.items()]
    choices = {
        setting.flag: _choices(setting)
        for found in settings.values()
        for setting in found.values()
        if _choices(setting)
    }
    given = [f"{flag}) words='{' '.join(words)}' ;;" for flag, words in choices.items()]
    names = " ".join([*commands, "help", "completion"])
    head = ["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []
    return "\n".join(
        [
            *head,
            "_megashear() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" words=""',
            '  local before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"',
            '  if [ $COMP_CWORD -eq 1 ] || [ $COMP_CWORD -eq 2 -a "$command" = help ]; then',
            f"    words='{names}'",
            '  elif [ "$command" = completion ]; then',
            f"    words='{' '.join(SHELLS)}'",
            "  else",
            '    case "$current" in -*) case "$command" in',
            *(f"      {line}" for line in flags),
            '    esac ;; *) case "$before" in',
            *(f"      {line}" for line in given),
            "    esac ;; esac",
            "  fi",
            '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _megashear megashear",
        ]
    )


def _flags(settings: Mapping[str, Setting]) -> list[str]:
    return [setting.flag for setting in [*settings.values(), CONFIG, DRY_RUN]] + [
        "--help",
        HELP_ALL,
    ]


def _choices(setting: Setting) -> list[str]:
    wanted = [setting.wanted, *get_args(setting.wanted)]
    return [word for kind in wanted if get_origin(kind) is Literal for word in get_args(kind)]
