"""What megatron-core itself saves, at any layout, is read by Hugging Face name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megashear.checkpoint.description import Description, write_description
from megashear.checkpoint.weights import CheckpointWeights, without_extra_state, write_weights
from megashear.files import integrity
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.unit.checkpoint.gpt_model import build_gpt_model
from tests.unit.checkpoint.shapes import GROUPED

DESCRIPTION = Description(shape=GROUPED, iteration=5, stage="pretrain")


def resave(source: Path, output: Path, tp: int, pp: int, byte_entries: bool) -> None:
    """Load ``source`` and save it again with megatron-core's own means."""
    model = build_gpt_model(GROUPED, tp, pp)
    from megatron.core import dist_checkpointing

    entries = without_extra_state(model.sharded_state_dict())
    loaded = dist_checkpointing.load(entries, str(source), strict="raise_all")
    model.load_state_dict(loaded, strict=False)
    saved = model.sharded_state_dict()
    saved = saved if byte_entries else without_extra_state(saved)
    dist_checkpointing.save({"model": saved, "iteration": 5}, str(output))


@pytest.mark.parametrize(("tp", "pp", "byte_entries"), [(2, 1, True), (1, 2, False)])
def test_checkpoints_of_megatron_core_are_read(
    tmp_path: Path, tp: int, pp: int, byte_entries: bool
) -> None:
    weights: dict[str, Tensor] = random_weights(GROUPED)
    write_weights(tmp_path / "ours", weights.items(), DESCRIPTION)
    output = tmp_path / "iter_0000005"
    output.mkdir()
    source = tmp_path / "ours" / "iter_0000005"
    run_ranks(tp * pp, lambda rank: resave(source, output, tp, pp, byte_entries))
    write_description(output, DESCRIPTION)
    integrity.write(output)
    read = CheckpointWeights(output)
    assert list(read) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(read[name], weight), name
