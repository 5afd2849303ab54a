"""Details of a checkpoint are read with their types; older checkpoints lack keys."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint import details
from megashear.checkpoint.description import Description, read_description
from megashear.checkpoint.details import RunDetails, SavedFlags
from megashear.config import DataConfig, PruneRun
from megashear.files.integrity import DamagedError
from megashear.shape import ModelShape
from tests.unit.checkpoint.shapes import GROUPED

SHAPE = GROUPED.to_dict()
CONFIG = PruneRun(data=DataConfig(data_path="text"))


def test_every_key_names_a_field() -> None:
    keys = {value for name, value in vars(details).items() if name.isupper() and name[0] != "_"}
    keys -= {details.BEFORE, details.LINEAGE, details.PASSING}
    fields = {field.name for field in dataclasses.fields(RunDetails)}
    assert keys == fields - {"flags", "device"}


def test_a_checkpoint_without_keys_has_no_values() -> None:
    known = Description(shape=GROUPED, iteration=3, stage="converted").known
    assert known == RunDetails()
    assert known.flags == SavedFlags()
    assert known.mask_extents is None


def test_values_come_with_their_types() -> None:
    known = RunDetails.of(
        {
            "run": json.loads(json.dumps(dataclasses.asdict(CONFIG))),
            "target_shape": SHAPE,
            "held_out_loss": {"loss": {"c": 2.0}},
            "of a later release": [1],
        }
    )
    assert known.target == ModelShape(**SHAPE)
    assert known.flags.train_iters == CONFIG.train.train_iters
    assert known.held_out_loss == {"loss": {"c": 2.0}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pruned_for": "3"}, "pruned_for is '3'; wanted int"),
        ({"run": [1]}, r"run is \[1\]; wanted dict"),
        ({"run": {"train": 3}}, "train is 3; wanted an object"),
        ({"run": {"train": {"seq_length": "8"}}}, "seq_length is '8'; wanted int"),
        ({"held_out_loss": {"loss": 1.5}}, "loss is 1.5; wanted an object"),
        ({"source_shape": 3}, "source_shape is 3; wanted an object"),
        ({"source_shape": SHAPE | {"num_layers": 0}}, "source_shape: .*num_layers"),
        ({"source_shape": SHAPE | {"other": 1}}, "other"),
        ({"mask_extents": {"hidden": [1, 8]}}, "target_shape is missing, which mask_extents needs"),
    ],
)
def test_a_value_of_another_type_is_refused_by_file_and_key(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    file = {"format": 2, "iteration": 3, "stage": "prune", "shape": SHAPE, "details": values}
    (tmp_path / "megashear.json").write_text(json.dumps(file))
    with pytest.raises(DamagedError, match=f"megashear.json: in its details, .*{message}"):
        read_description(tmp_path)
