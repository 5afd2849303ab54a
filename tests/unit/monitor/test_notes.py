"""The text tab explains every tag that the docs explain, and repeats settings as they are."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megashear.monitor.notes import ENVIRONMENT, HINTS, SETTINGS, TAGS, notes
from megashear.monitor.tags import MEANINGS
from megashear.monitor.tensorboard_sink import TensorBoardSink

DOCS = Path(__file__).parents[3] / "docs" / "monitoring.md"
CONFIG = {"train": {"lr": 1e-4, "data_path": ("a b", "c")}, "then_pretrain": None}
STARTED = {"torch": "2.11", "command": ["prune", "--save", "a b"]}


def test_every_tag_of_the_docs_has_a_meaning_and_no_other() -> None:
    table = DOCS.read_text(encoding="utf-8").split("## Tags")[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {tag for row in rows for tag in re.findall(r"`([^`]+)`", row)} == MEANINGS.keys()


def test_settings_are_a_file_for_config() -> None:
    texts = notes(CONFIG, STARTED, sections=("prune", "train"))
    settings = yaml.safe_load(textwrap.dedent(texts[SETTINGS]))
    assert settings == {"lr": 1e-4, "data_path": ["a b", "c"], "then_pretrain": None}
    assert "command: prune --save 'a b'" in texts[ENVIRONMENT]
    assert "Smoothing" in HINTS
    assert "Colours" in HINTS
    assert ENVIRONMENT not in notes(CONFIG, {}, sections=("prune", "train"))


def test_only_tags_of_the_run_are_told_of() -> None:
    assert "`prune/churn/<kind>`" in notes(CONFIG, {}, sections=("prune", "train"))[TAGS]
    assert "prune/" not in notes(CONFIG, {}, sections=("train",))[TAGS]


def test_texts_are_read_back_and_those_of_a_second_start_beside_them(tmp_path: Path) -> None:
    for purge_step, text in ((0, "first"), (11, "second")):
        sink = TensorBoardSink(tmp_path, purge_step=purge_step, texts={SETTINGS: text})
        sink.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    found = reader.Tensors(f"{SETTINGS}/text_summary")
    assert [(event.step, event.tensor_proto.string_val[0]) for event in found] == [
        (0, b"first"),
        (10, b"second"),
    ]
