"""transformers loads exactly the shapes that `why_refused` allows."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from megashear.checkpoint import shear
from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import write_weights
from megashear.commands.settings import build
from megashear.config import PretrainRun
from megashear.conversion import hf
from megashear.conversion.hf_config import config_of_shape
from megashear.masks.targets import whole_parts
from megashear.models.loadable import check_target, warn, why_refused
from megashear.shape import PRESETS, Family, ModelShape
from megashear.train.prepare import prepare
from tests.reference_llama import random_weights

SHAPE = ModelShape(
    num_layers=1,
    hidden_size=40,
    num_attention_heads=8,
    num_query_groups=8,
    head_dim=8,
    ffn_hidden_size=24,
    vocab_size=32,
)
EXTENTS = [(40, 4, 2), (40, 6, 3), (40, 6, 6), (40, 5, 5), (42, 4, 4), (40, 3, 1)]
"""Shapes: hidden size, heads, key/value heads."""
GROUPED = replace(SHAPE, num_query_groups=4)
WIDE = replace(SHAPE, hidden_size=120, num_attention_heads=12, num_query_groups=12)


def of_family(family: Family, shape: ModelShape = SHAPE) -> ModelShape:
    return replace(shape, family=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")


def is_loaded(shape: ModelShape) -> bool:
    """Return whether transformers makes a model of the config.json that we write, and runs it."""
    transformers = pytest.importorskip("transformers")
    fields = config_of_shape(shape, dtype="float32")
    try:
        config = transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # of huggingface_hub's making; it has changed its class before
        if "multiple of the number of attention heads" not in str(error):
            raise
        return False
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, shape.vocab_size)


@pytest.mark.parametrize("family", get_args(Family))
def test_transformers_loads_what_we_say_it_loads(family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers before release 5 refuses none")
    found = {}
    for hidden, heads, groups in EXTENTS:
        shape = of_family(family, replace(SHAPE, hidden_size=hidden))
        shape = replace(shape, num_attention_heads=heads, num_query_groups=groups)
        found[hidden, heads] = is_loaded(shape)
        assert found[hidden, heads] is (why_refused(shape) is None), shape
    # the twin: both answers are met where there are two
    assert set(found.values()) == ({True, False} if family == "llama" else {True})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name: str) -> None:
    assert why_refused(PRESETS[name]) is None


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            WIDE,
            {"hidden_size": 64, "num_attention_heads": 6, "num_query_groups": 6},
            r"^target hidden_size 64 is not a multiple of num_attention_heads 6: transformers from "
            r"release 5 refuses such a llama model, although head_dim is given; the nearest that "
            r"it loads: --target-hidden-size 60 or 66, or --target-num-attention-heads 4 or 8; or "
            r"add --force-unloadable-target, for a runtime of your own$",
        ),
        # neither may grow beyond the source
        (
            WIDE,
            {"hidden_size": 119, "num_attention_heads": 12},
            r"--target-hidden-size 108 or 120, or --target-num-attention-heads 7; or add",
        ),
        # every key/value head keeps as many query heads
        (
            replace(WIDE, num_query_groups=3),
            {"hidden_size": 80, "num_attention_heads": 9},
            r"--target-hidden-size 72 or 81; or add",
        ),
        (
            replace(WIDE, num_query_groups=3),
            {"hidden_size": 90, "num_attention_heads": 12},
            r"--target-hidden-size 84 or 96, or --target-num-attention-heads 9; or add",
        ),
    ],
)
def test_a_target_that_no_runtime_loads_is_refused_with_the_nearest(
    source: ModelShape,
    target: dict[str, int],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = replace(source, **target)
    with pytest.raises(ValueError, match=message):
        check_target(wanted, source, force=False)
    assert caplog.records == []
    check_target(wanted, source, force=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("target hidden_size ")


def test_the_nearest_targets_are_taken() -> None:
    for extents in ({"hidden_size": 60}, {"hidden_size": 66}, {"hidden_size": 64, "heads": 4}):
        heads = extents.pop("heads", 6)
        target = replace(WIDE, num_attention_heads=heads, num_query_groups=heads, **extents)
        check_target(target, WIDE, force=False)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_are_not_refused(family: Family) -> None:
    source = of_family(family)
    check_target(replace(source, hidden_size=30), source, force=False)


def test_a_qwen2_whose_heads_do_not_fill_its_width_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn(of_family("qwen2"))  # 8 heads of 8 in a width of 40
    assert "vLLM may take the width of a Qwen2's heads" in caplog.text
    caplog.clear()
    warn(of_family("qwen2", replace(SHAPE, hidden_size=64)))
    warn(of_family("qwen3"))
    assert caplog.records == []


def test_a_hugging_face_directory_is_warned_of_before_it_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = replace(SHAPE, num_attention_heads=6, num_query_groups=6)
    there: list[bool] = []
    handler = logging.Handler()
    handler.emit = lambda record: there.append(  # type: ignore[method-assign]
        any(path.is_file() for path in tmp_path.rglob("*"))
    )
    logger = logging.getLogger("megashear.models.loadable")
    logger.addHandler(handler)
    try:
        hf.write_directory(tmp_path / "model", random_weights(shape), shape)
    finally:
        logger.removeHandler(handler)
    assert "hidden_size 40 is not a multiple of num_attention_heads 6" in caplog.text
    assert there == [False]
    assert (tmp_path / "model/config.json").is_file()


@pytest.mark.parametrize("heads", [6, 8])
def test_pretraining_such_a_model_is_warned_of(
    heads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = replace(SHAPE, num_attention_heads=heads, num_query_groups=heads)
    (tmp_path / "shape.json").write_text(json.dumps(shape.to_dict()))
    values = {"init_shape": str(tmp_path / "shape.json"), "data_path": str(tmp_path / "data")}
    with pytest.raises(ValueError, match="data"):  # which is not there
        prepare(build(PretrainRun, values), is_dry_run=True)
    said = "hidden_size 40 is not a multiple of num_attention_heads 6: transformers from"
    assert (said in caplog.text) is (heads == 6)


def test_an_odd_width_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim is 7; rotary positions .* it must be even"):
        replace(SHAPE, head_dim=7)


@pytest.mark.parametrize("heads", [5, 4])
def test_a_cut_to_such_a_model_is_warned_of_with_the_nearest(
    heads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replace(SHAPE, hidden_size=24, num_attention_heads=heads, num_query_groups=heads)
    parts = whole_parts(SHAPE, target)
    details = {
        "target_shape": target.to_dict(),
        "mask_extents": {kind: list(part.extents) for kind, part in parts.items()},
    }
    description = Description(shape=SHAPE, iteration=4, stage="prune", details=details)
    write_weights(tmp_path / "run", random_weights(SHAPE), description)
    masks = {kind: torch.rand(part.num_rows, part.num_units) for kind, part in parts.items()}
    # gates are tensors of a run of several ranks, which are not what this is about
    monkeypatch.setattr(shear, "read_log_alpha", lambda directory: masks)
    said = (
        "target hidden_size 24 is not a multiple of num_attention_heads 5: transformers from "
        "release 5 refuses such a llama model, although head_dim is given; the nearest that it "
        "loads: --target-hidden-size 20 or 25, or --target-num-attention-heads 4 or 6"
    )
    for begin in (
        lambda: shear.check_cut(tmp_path / "run"),
        lambda: shear.cut_checkpoint(tmp_path / "run", tmp_path / "cut", exact_target=True),
    ):
        caplog.clear()
        begin()
        found = [record.getMessage() for record in caplog.records]
        assert found == ([said] if heads == 5 else [])
