"""What README and docs name exists: flags, files, tests, tags, sections."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import megashear
from megashear import config
from megashear.__main__ import main
from megashear.commands.parse import CONFIG, DRY_RUN
from megashear.commands.settings import settings_of
from megashear.monitor import tags
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)

ROOT = Path(__file__).parents[2]
TEXTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")],
)
RUNS = [
    config.PruneRun,
    config.PretrainRun,
    config.FinetuneRun,
    config.EvaluateRun,
    config.GenerateRun,
    config.ScoreRun,
    config.ReferenceLossRun,
    config.InspectConfig,
    config.ReportConfig,
    config.PlotMixtureConfig,
    config.PreprocessConfig,
    config.ConvertConfig,
    config.CutConfig,
    config.QuickstartConfig,
    config.PlanConfig,
]
OTHERS_FLAGS = {
    "--slow",  # of tests/conftest.py
    # chromium
    *("--headless", "--hide-scrollbars", "--window-size", "--screenshot", "--blink-settings"),
    # torchrun, pip, tensorboard
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"),
    *("--max-restarts", "--work", "--quickstart", "--steps", "--seeds", "--warmups"),
    # tools/crash_test.py; Slurm
    *("--seed", "--kill-on-bad-exit", "--requeue", "--signal", "--nodes"),
    # tools/benchmarks
    *("--rounds", "--copies", "--shape", "--target-shape", "--work", "--step-seconds"),
    "--size",  # tools/docs/screenshot.py
    *("--threads", "--preset", "--json", "--ranks", "--turns", "--no-transformers"),
    *("--only", "--arms", "--budget", "--minutes"),
    *("--hidden-size", "--num-attention-heads", "--ffn-hidden-size", "--vocab-size"),
    "--json-keys",  # Megatron-LM's name of --json-key
    # what Megatron-LM is started with on a checkpoint of ours
    *("--use-checkpoint-args", "--ckpt-format", "--no-load-optim", "--no-load-rng"),
    "--ckpt-convert-format",
    *("--qk-layernorm", "--use-rope-scaling", "--rope-scaling-factor"),
    "--rotary-seq-len-interpolation-factor",
    *(
        "--standalone",
        "--index-url",
        "--extra-index-url",
        "--logdir",
        "--help",
        "--help-all",
        "--version",
    ),
}
"""Flags in the texts that are not megashear's."""


def in_repository(path: Path) -> str:
    return str(path.relative_to(ROOT))


def known_flags() -> set[str]:
    settings = [CONFIG, DRY_RUN, *(s for run in RUNS for s in settings_of(run).values())]
    negated = {"--no-" + s.flag[2:] for s in settings if s.wanted is bool}
    return {s.flag for s in settings} | negated | OTHERS_FLAGS


def unknown_flags(text: str) -> set[str]:
    # `--target-*` names all flags that begin so
    found = re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*?)(-\*)?(?![\w-])", text)
    known = known_flags()
    return {
        flag
        for flag, family in found
        if not (any(k.startswith(flag + "-") for k in known) if family else flag in known)
    }


def broken_links(text: str, folder: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        page = folder / file
        if not page.exists():
            yield link
        elif anchor:
            inside = page.read_text(encoding="utf-8") if file else text
            if anchor not in anchors(inside):
                yield link


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def command_lines(text: str) -> list[list[str]]:
    """Arguments of every megashear command in the text's code blocks."""
    # those with a language, such as bash, have variables; a test of their own runs them
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    found = [re.match(r"(?:torchrun .*? -m )?megashear (.+)", line) for line in lines.splitlines()]
    return [shlex.split(line[1]) for line in found if line is not None]


def missing_tests(text: str) -> list[str]:
    return [name for name in re.findall(r"\btests/[\w/]+\.py", text) if not (ROOT / name).is_file()]


@pytest.mark.parametrize("path", TEXTS, ids=in_repository)
def test_every_flag_is_known(path: Path) -> None:
    assert unknown_flags(path.read_text(encoding="utf-8")) == set()


def test_an_unknown_flag_is_noticed() -> None:
    text = "use `--mask-lr` and `--target-*`, not `--masks-lr`, --no-resum or `--goal-*`"
    assert unknown_flags(text) == {"--masks-lr", "--no-resum", "--goal"}


@pytest.mark.parametrize("path", TEXTS, ids=in_repository)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert list(broken_links(path.read_text(encoding="utf-8"), path.parent)) == []


def test_a_broken_link_is_noticed() -> None:
    text = (
        "[a](README.md) [b](docs/nothing.md#part) [c](https://example.org/nothing) "
        "[d](docs/data.md#mixture) [e](docs/data.md#mixtures)"
    )
    assert list(broken_links(text, ROOT)) == ["docs/nothing.md#part", "docs/data.md#mixtures"]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_the_changelog_has_the_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{megashear.__version__}]" in changes


@pytest.mark.parametrize("path", TEXTS, ids=in_repository)
def test_every_test_file_that_is_named_exists(path: Path) -> None:
    assert missing_tests(path.read_text(encoding="utf-8")) == []


def test_a_missing_test_file_is_noticed() -> None:
    assert missing_tests("`tests/unit/test_docs.py`, `tests/nothing.py`") == ["tests/nothing.py"]


@pytest.mark.parametrize("path", TEXTS, ids=in_repository)
def test_every_command_is_accepted(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "examples/llama2_7b_to_1.3b")  # prune.yaml and pretrain.yaml
    for line in command_lines(path.read_text(encoding="utf-8")):
        with contextlib.suppress(SystemExit):
            main([*line, "--dry-run"])
        printed = capsys.readouterr()
        # the run was understood, and printed; what it reads may not be there
        assert printed.out.startswith(f"# megashear {line[0]} --config"), (line, printed.err)


def test_the_commands_of_the_readme_are_found() -> None:
    lines = command_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [line[0] for line in lines] == [
        *("preprocess", "convert", "score", "cut", "pretrain", "convert", "report", "prune", "cut")
    ]
    assert "--tensorboard-dir" in lines[4]


def test_a_wrong_command_is_noticed() -> None:
    (line,) = command_lines(
        "```\ntorchrun --nnodes 1 -m megashear cut --load a \\\n  --outptu b\n```\n"
    )
    assert line == ["cut", "--load", "a", "--outptu", "b"]
    assert main([*line, "--dry-run"]) == 2


def measured(page: str, heading: str) -> tuple[list[str], set[str]]:
    """Return the losses in a section, row by row, and the code that they are of."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    losses = re.findall(r"(\d\.\d{3} \+- \.\d{3})\W*$", section, flags=re.MULTILINE)
    line = " ".join(section.split())
    code = re.findall(r"`--seed .*?`(?=[;)])|(?:CPython|torch) [\d.]+\d|\b[0-9a-f]{7}\b", line)
    return losses, {*code}


def test_the_quickstarts_table_is_of_the_code_that_it_names() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    losses, code = measured(readme, "Quickstart")
    everywhere = measured(page, "Measured results")
    assert len(losses) == 5
    assert losses == everywhere[0]
    assert code <= everywhere[1]
    # seeds, Python, torch and at least one commit
    assert len(code) >= 4
    # the twins: another loss and another commit
    other = readme.replace(losses[2], "3.000 +- .032")
    assert measured(other, "Quickstart")[0] != losses
    (commit, *_) = (words for words in code if re.fullmatch("[0-9a-f]{7}", words))
    other = readme.replace(commit, "0123456")
    assert not measured(other, "Quickstart")[1] <= everywhere[1]


@pytest.mark.parametrize("path", TEXTS, ids=in_repository)
def test_texts_are_ascii(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()


def test_every_tag_of_tensorboard_is_explained() -> None:
    text = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert [tag for tag in tags.MEANINGS if f"`{tag}`" not in text] == []


def test_sections_that_the_code_names_exist() -> None:
    named = {
        (found[1], found[2])
        for path in [*ROOT.glob("megashear/**/*.py"), *ROOT.glob("tests/**/*.py")]
        for found in re.finditer(r"(docs/\w+\.md),? section (\d+)", path.read_text())
    }
    assert named
    for file, section in named:
        assert f"\n## {section}. " in (ROOT / file).read_text(encoding="utf-8"), (file, section)
