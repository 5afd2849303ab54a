"""Flags that messages and docstrings of the code name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megashear.commands.completion import configurations
from megashear.commands.parse import CONFIG, DRY_RUN, HELP_ALL
from megashear.commands.settings import settings_of

ROOT = Path(__file__).parents[2]
TOOLS = sorted({*ROOT.glob("tools/**/*.py")} - {ROOT / "tools/docs/screenshot.py"})
"""All but one, which starts a browser with flags of the browser."""
FILES = [*sorted(ROOT.glob("megashear/**/*.py")), *TOOLS]
OTHERS = {
    "--version": "of megashear itself, as is --help",
    "--help": "of every command",
    "--nproc-per-node": "torchrun",
    "--standalone": "torchrun",
    "--nnodes": "torchrun",
    "--logdir": "tensorboard",
    "--max-restarts": "torchrun",
    "--key": "stands for any flag",
    "--num-layers": "of benchmarks, made from the extents of a shape, as are the next four",
    "--hidden-size": "of benchmarks",
    "--num-attention-heads": "of benchmarks",
    "--num-query-groups": "of benchmarks",
    "--ffn-hidden-size": "of benchmarks",
    "--always": "git describe",
    "--dirty": "git describe",
    "--ckpt-format": "Megatron-LM, whose checkpoints are converted, as are all below",
    "--ckpt-convert-format": "Megatron-LM",
    "--use-checkpoint-args": "Megatron-LM",
    "--qk-layernorm": "Megatron-LM",
    "--add-qkv-bias": "Megatron-LM",
    "--use-rope-scaling": "Megatron-LM",
    "--rope-scaling-factor": "Megatron-LM",
    "--rotary-seq-len-interpolation-factor": "Megatron-LM",
}
"""Flags of other programs that messages name, and of which."""


@pytest.fixture(scope="module")
def known() -> set[str]:
    settings = [s for owner in configurations().values() for s in settings_of(owner).values()]
    names = [key for s in (CONFIG, DRY_RUN, *settings) for key in (s.key, *s.aliases)]
    flags = {"--" + name.replace("_", "-") for name in names}
    return {*flags, *("--no-" + flag[2:] for flag in flags), HELP_ALL, *OTHERS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_text_is_one_of_a_command(path: Path, known: set[str]) -> None:
    if path.is_relative_to(ROOT / "tools"):
        known = known.union(*(own_flags(tool.read_text(encoding="utf-8")) for tool in TOOLS))
    named = flags_named(path.read_text(encoding="utf-8"))
    assert {flag for flag in named if not is_known(flag, known)} == set()


def test_an_invented_flag_is_noticed(known: set[str]) -> None:
    source = (
        'raise ValueError(f"--lr {lr} and --lrr {x}; --no-resume, --{name}, --no-{name}, "\n'
        '    f"--target-*, --targ-*, give --gone-" "by or --wandb-{name}")\n'
    )
    found = {flag for flag in flags_named(source) if not is_known(flag, known)}
    assert found == {"--lrr", "--targ-", "--gone-by"}
    assert own_flags("p.add_argument('--seeds', '-s')\n@dataclass\nclass A:\n  b_c: int\n") == {
        *("--seeds", "--b-c", "--no-b-c")
    }


def is_known(flag: str, known: set[str]) -> bool:
    """Say whether a flag exists, or one that begins so where its end is open."""
    return any(k.startswith(flag) for k in known) if flag.endswith("-") else flag in known


def flags_named(source: str) -> Iterator[str]:
    """Yield the flags in string literals; one whose end is filled in later ends with a dash."""
    for text in texts(ast.parse(source)):
        if "var(--" in text:  # a style sheet, whose variables begin so too
            continue
        for flag, end in re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)([\w*{]?)", text):
            if not end or end == "*" or flag.endswith("-"):
                yield flag


def texts(node: ast.AST) -> Iterator[str]:
    """Yield string literals, an f-string whole with a brace for each value."""
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "{" for p in node.values]
        yield "".join(map(str, parts))
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


def own_flags(source: str) -> set[str]:
    """Return the flags of a tool: arguments of its parser, fields of its dataclass."""
    fields = re.findall(r"^ {2,4}([a-z_]+): ", source, re.MULTILINE)
    flags = {"--" + name.replace("_", "-") for name in fields}
    flags |= {"--no-" + flag[2:] for flag in flags}
    return flags | set(re.findall(r"add_argument\(\s*['\"](--[a-z-]+)", source))
