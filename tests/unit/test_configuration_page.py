"""docs/configuration.md is what the dataclasses say."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from megashear import config
from megashear.__main__ import COMMANDS
from megashear.commands.settings import settings_of

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/docs/configuration.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration_page", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh(tool: ModuleType) -> None:
    found = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert found == tool.page(), "run python tools/docs/configuration.py"


def test_every_key_of_every_command_is_there_with_its_help(tool: ModuleType) -> None:
    text = tool.page()
    for command, owner in tool.configurations().items():
        assert f"\n## megashear {command}\n" in text
        for setting in settings_of(owner).values():
            assert f"| `{setting.flag}` | " in text
            assert f" | {setting.help} |" in text.replace("\\|", "|")
    assert list(tool.configurations()) == list(COMMANDS)


def test_values_and_defaults_are_said_as_a_user_types_them(tool: ModuleType) -> None:
    text = tool.page()
    assert "| `--lr` | a number, 1e-30 to 10000 | `0.0001` | Peak learning rate" in text
    assert "| `--bf16` | on or off | off |" in text
    assert "| `--data-path` | text | **required** |" in text
    assert "| `--min-lr` | a number, 0 to 10000 | - |" in text
    assert "| `--lr-decay-style` | `cosine`, `linear`, `constant` | `cosine` |" in text
    assert "| `--domain-floor` | numbers, or `name=number`, 0 to 1 | - |" in text


def test_a_stale_page_is_noticed(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "PAGE", tmp_path / "page.md")
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    tool.PAGE.write_text(tool.page().replace("`0.0001`", "`0.0002`", 1), encoding="utf-8")
    assert tool.main(["--check"]) == 1
    assert "is stale; run python tools/docs/configuration.py" in capsys.readouterr().err


def test_a_command_without_a_configuration_is_noticed(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = dataclasses.make_dataclass("CutConfig", [])
    monkeypatch.setattr(config, "CutConfig", nameless)
    with pytest.raises(ValueError, match=r"no dataclass of megashear/config is of cut"):
        tool.configurations()
