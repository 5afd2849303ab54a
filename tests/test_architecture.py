"""Who may import whom, and what may stand in a file of this repository."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "bounds": set(),
    "files": set(),
    "text_table": set(),
    "config": {"bounds"},
    "shape": {"bounds", "files"},
    "tokenizer": {"files"},
    "parallel": {"config", "files"},
    "masks": {"shape", "config"},
    "models": {"masks", "parallel", "shape", "config", "files"},
    "planning": {"models", "masks", "shape", "config", "text_table"},
    "checkpoint": {"models", "masks", "parallel", "shape", "tokenizer", "config", "files"},
    "conversion": {
        *("checkpoint", "models", "masks", "parallel", "shape", "tasks", "tokenizer", "config"),
        "files",
    },
    "tasks": {"text_table"},
    "data": {"parallel", "tokenizer", "config", "files"},
    "preprocessing": {"data", "tokenizer", "config", "files"},
    "monitor": {"masks", "parallel", "config", "files"},
    "report": {
        *("checkpoint", "conversion", "models", "masks", "monitor", "parallel", "shape"),
        *("config", "files", "text_table"),
    },
    "train": {
        *("checkpoint", "conversion", "models", "masks", "data", "monitor", "planning", "parallel"),
        *("shape", "tasks", "tokenizer", "config", "files"),
    },
}
"""Parts of megashear that each part may import besides itself; those on top may import all."""

TOP = {"commands", "quickstart"}

ONLY_IN = {
    "megatron.core.parallel_state": ("parallel/groups.py",),
    "torch.cuda": ("parallel/device.py", "parallel/cpu_megatron.py"),
    "torch.distributed": (
        "parallel/",
        "models/binding.py",
        "models/cross_entropy.py",
        "models/divergence.py",
        "models/next_token.py",
        "conversion/megatron_lm.py",  # names of the file format only
        "checkpoint/pickles.py",  # names of the file format only
        "checkpoint/saver.py",
        "checkpoint/store.py",
        "checkpoint/torch_dist.py",  # names of the file format only
        "checkpoint/weights.py",
        "checkpoint/writer.py",
        "train/",
    ),
}
"""Modules that few files may name, relative to megashear/."""
MAY_PATCH = "parallel/cpu_megatron.py"
"""The file that may set attributes of modules and classes of megatron-core."""


def names_used(source: str) -> set[str]:
    """Dotted names of everything imported, and of every attribute of a name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def patches(source: str) -> set[str]:
    """Attributes of what is imported from megatron-core that ``source`` sets."""
    tree, theirs, found = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron"):
            theirs |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            theirs |= {a.asname for a in node.names if a.asname and a.name.startswith("megatron")}
        elif isinstance(node, ast.Assign | ast.AnnAssign) and "import_module('megatron" in (
            ast.unparse(node)
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            theirs |= {ast.unparse(target) for target in targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {ast.unparse(node)} if ast.unparse(node.value) in theirs else set()
    return found


def violations(file: str, source: str) -> Iterator[str]:
    """Rules that ``source`` would break as ``file``, a path relative to megashear/."""
    names = names_used(source)
    part = file.partition("/")[0].removesuffix(".py")
    allowed = MAY_IMPORT.get(part, {*MAY_IMPORT, *TOP}) | {part, "__version__"}
    for name in names:
        root, _, rest = name.partition(".")
        if root == "megashear" and (other := rest.partition(".")[0]) not in allowed:
            yield f"{file} may not import megashear.{other}"
        if part == "masks" and root == "megatron":
            yield f"{file} may not import megatron"
    for module, places in ONLY_IN.items():
        if any(_is_in(name, module) for name in names) and not file.startswith(places):
            yield f"{file} may not name {module}; only {', '.join(places)} may"
    if file != MAY_PATCH:
        for name in patches(source):
            yield f"{file} may not set {name}; only {MAY_PATCH} patches megatron-core"


def _is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


@pytest.mark.parametrize(
    "file", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("megashear/**/*.py"))
)
def test_imports_keep_the_rules(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert list(violations(file.removeprefix("megashear/"), source)) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("masks/gates.py", "import torch.distributed as dist"),
        ("masks/gates.py", "from megatron.core import tensor_parallel"),
        ("masks/gates.py", "from megashear.parallel.groups import ParallelGroups"),
        ("data/loader.py", "from megashear import models"),
        ("data/loader.py", "def f():\n    import megashear.masks.gates"),
        ("train/loop.py", "from megashear.commands import prune"),
        ("train/loop.py", "from megatron.core import parallel_state"),
        ("parallel/device.py", "import megatron.core.parallel_state as mpu"),
        (
            "models/core.py",
            "from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        ),
        ("train/loop.py", "x.to(torch.cuda.current_device())"),
        ("models/llama.py", "from torch import cuda"),
        ("monitor/console.py", "def f():\n    return torch.distributed.get_rank()"),
        ("conversion/hf.py", "from torch.distributed import all_reduce"),
        ("models/core.py", "from megatron.core import timers\ntimers.torch = None"),
        ("models/core.py", "m = importlib.import_module('megatron.core')\nm.x: int = 1"),
        ("shape.py", "from megashear.config import ModelConfig"),
    ],
)
def test_a_broken_rule_is_noticed(file: str, source: str) -> None:
    assert len(list(violations(file, source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("commands/prune.py", "from megashear.train import run"),
        ("parallel/agree.py", "torch.distributed.all_reduce(x)"),
        ("conversion/hf.py", "from megashear.models import weight_table"),
        ("monitor/console.py", "import torchdistributed, torch.cudagraphs"),
        ("masks/gates.py", "from megashear.masks.kinds import KINDS"),
    ],
)
def test_what_the_rules_allow_passes(file: str, source: str) -> None:
    assert list(violations(file, source)) == []


READERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.SafeLoader"}
"""What reads without bounds whatever a file holds; `megashear.files.structured` has bounds."""
MAY_READ = {
    "megashear/files/structured.py",
    "megashear/preprocessing/documents.py",  # a document's line, whose size is bounded there
    "megashear/preprocessing/journal.py",  # its own settings, as JSON would return them
    "megashear/parallel/launch.py",  # what other ranks of the run say
    "megashear/parallel/watchdog.py",
}


@pytest.mark.parametrize(
    "file", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("megashear/**/*.py"))
)
def test_structured_files_are_read_within_bounds(file: str) -> None:
    found = names_used((ROOT / file).read_text(encoding="utf-8")) & READERS
    assert not found or file in MAY_READ, f"{file} uses {found}, not megashear.files.structured"


TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".cfg", ""}
"""Suffixes of the files people write; "" is Makefile, LICENSE and the like."""
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|scratch|gpfs|lustre)/\w")


def complaints(text: str) -> list[str]:
    """Characters that are not ASCII, and paths that only one machine has."""
    found = sorted({f"not ASCII: {char!r}" for char in text if not char.isascii()})
    return found + [f"machine path: {match}" for match in MACHINE_PATH.findall(text)]


def test_committed_files_are_ascii_and_name_no_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are committed is not known")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = [ROOT / name for name in listed if not name.startswith("tests/data/")]
    bad = {
        file.name: found
        for file in files
        if file.suffix in TEXT
        and file.is_file()
        and (found := complaints(file.read_text(encoding="utf-8")))
    }
    assert bad == {}


@pytest.mark.parametrize("text", ["caf\u00e9", "see " + "/".join(["", "home", "me", "x"])])
def test_a_bad_file_is_noticed(text: str) -> None:
    assert len(complaints(text)) == 1
    assert complaints("see https://example.org/home and ../data/home/x") == []


PAGE = ROOT / "docs/architecture.md"
PATH = re.compile(r"`([\w/]+(?:/|\.(?:py|md)))`")
"""A file, or a folder with a slash at its end, as the page writes it."""


def unknown_paths(text: str) -> list[str]:
    """Paths that a page names and that do not exist, from the root or from megashear/."""
    return [
        name
        for name in PATH.findall(text)
        if not any((root / name).exists() for root in (ROOT, ROOT / "megashear"))
    ]


def imports_of_the_page(text: str) -> dict[str, set[str]]:
    """What each package may import, as the table of the page has it."""
    table = text.partition("<!-- imports")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    return {name.strip(" `"): set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}


def test_every_path_of_the_architecture_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(PATH.findall(text)) > 60
    assert unknown_paths(text) == []
    for package in sorted(path.parent.name for path in ROOT.glob("megashear/*/__init__.py")):
        assert f"| `{package}/` |" in text, f"the tree leaves out {package}/"


def test_the_architecture_page_says_who_may_import_whom() -> None:
    assert imports_of_the_page(PAGE.read_text(encoding="utf-8")) == MAY_IMPORT


def test_a_path_that_is_gone_and_an_import_that_changed_are_noticed() -> None:
    assert unknown_paths("see `train/watch.py`, `train/step.py` and `train/`") == ["train/watch.py"]
    text = PAGE.read_text(encoding="utf-8").replace("| `files` | nothing |", "| `files` | `data` |")
    assert imports_of_the_page(text) != MAY_IMPORT
