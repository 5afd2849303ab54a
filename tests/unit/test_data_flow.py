"""The picture of the README is what its script draws."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from megashear.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]


def test_the_picture_is_fresh_and_names_commands() -> None:
    spec = importlib.util.spec_from_file_location("data_flow", ROOT / "tools/docs/data_flow.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = (ROOT / "docs/images/data_flow.svg").read_text(encoding="utf-8")
    assert found == tool.picture(), "run python tools/docs/data_flow.py"
    ElementTree.fromstring(found)
    commands = re.findall(r'class="command"[^>]*>([^<]+)<', found)
    assert set(commands) == {"preprocess", "convert", "prune", "cut", "pretrain"} <= set(COMMANDS)
