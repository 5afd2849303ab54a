"""Law 3: from Hugging Face to Megatron and back every bit is the same, and no name is left over."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.description import read_description
from megashear.checkpoint.weights import CheckpointWeights
from megashear.conversion import hf
from megashear.models import weight_table
from megashear.shape import ModelShape
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import CUT_GROUPED, GROUPED, MULTI_HEAD


def write_hf(directory: Path, shape: ModelShape, dtype: str | None = None) -> dict[str, Tensor]:
    hf.write_directory(
        directory,
        random_weights(shape).items(),
        shape,
        dtype=dtype,
        token_ids={"bos_token_id": 11, "eos_token_id": [12, 13]},
    )
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    return dict(hf.HfWeights(directory))


@pytest.mark.parametrize("shape", [GROUPED, MULTI_HEAD, CUT_GROUPED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_every_bit_is_the_same(
    tmp_path: Path, shape: ModelShape, dtype: str
) -> None:
    weights = write_hf(tmp_path / "hf", shape, dtype)
    size = 4 if dtype == "float32" else 2
    done = {"bytes": size * shape.num_params(), "dtypes": [dtype], "logits": None}
    assert hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint") == done
    assert megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back") == done
    back = hf.HfWeights(tmp_path / "back")
    assert list(back) == list(weights)
    for name, weight in weights.items():
        assert back[name].dtype == weight.dtype
        assert torch.equal(back[name], weight), name
    # what is carried says where text ends, if only config.json said it before
    said = {"temperature": 0.6, "eos_token_id": [12, 13]}
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(said))
    for name in ("config.json", "generation_config.json"):  # shape, ids and carried files
        found, wanted = (
            json.loads((tmp_path / directory / name).read_text()) for directory in ("back", "hf")
        )
        assert found == wanted


def test_the_round_trip_notices_another_order_on_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_hf(tmp_path / "hf", GROUPED)
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")

    def stacked(
        row: weight_table.MegatronTensor, whole: Tensor, shape: ModelShape
    ) -> tuple[Tensor, ...]:
        return whole.split([part.extents(shape)[0] for part in row.parts])

    monkeypatch.setattr(weight_table, "split", stacked)
    read = CheckpointWeights(tmp_path / "checkpoint")
    changed = [name for name, weight in weights.items() if not torch.equal(read[name], weight)]
    assert len(changed) == 3 * GROUPED.num_layers  # q, k, v of every layer


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", GROUPED)
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint", dtype="bfloat16")
    description = read_description(tmp_path / "checkpoint" / "iter_0000000")
    assert (description.shape, description.stage) == (GROUPED, "converted")
    assert description.token_ids == {"bos_token_id": 11, "eos_token_id": [12, 13]}
    tracker = tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "0"


def test_formats_are_chosen_on_either_way(tmp_path: Path) -> None:
    weights = write_hf(tmp_path / "hf", GROUPED)
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint", dtype="bfloat16")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", dtype="float32")
    for name, weight in hf.HfWeights(tmp_path / "back").items():
        assert torch.equal(weight, weights[name].bfloat16().float()), name


def test_a_bar_is_shown_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", GROUPED)
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")  # not on a terminal: silent
    assert "converting" not in capsys.readouterr().err
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", progress=True)
    assert "converting: 100%" in capsys.readouterr().err


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", GROUPED)
    with pytest.raises(ValueError, match="dtype is 'int8', wanted one of float32"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint", dtype="int8")
    with pytest.raises(ValueError, match="no Hugging Face checkpoint at"):
        hf_to_megatron(tmp_path / "nowhere", tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="it is a Hugging Face directory: convert it first"):
        megatron_to_hf(tmp_path / "hf", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
