"""Checkpoints written in the test process itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from megashear.checkpoint.description import Description
from megashear.checkpoint.weights import write_weights
from megashear.files import integrity
from megashear.shape import ModelShape
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED, MULTI_HEAD


@pytest.fixture(scope="package")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, ModelShape, dict[str, Tensor]]]:
    """Directory, shape and weights of a grouped and a multi-head checkpoint; do not change them."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for name, shape in (("grouped", GROUPED), ("multi-head", MULTI_HEAD)):
        weights = random_weights(shape)
        description = Description(
            shape=shape, iteration=120, stage="pretrain", token_ids={"bos_token_id": 7}
        )
        write_weights(folder / name, weights, description)
        made[name] = (folder / name, shape, weights)
    return made


@pytest.fixture
def harmed(
    tmp_path: Path, checkpoints: dict[str, tuple[Path, ModelShape, dict[str, Tensor]]]
) -> Callable[[Callable[[Path], object]], Path]:
    """Copies the grouped checkpoint, changes the copy's iteration, and gives the copy."""

    def copy(harm: Callable[[Path], object]) -> Path:
        shutil.copytree(checkpoints["grouped"][0], tmp_path / "copy")
        harm(tmp_path / "copy" / "iter_0000120")
        if (tmp_path / "copy" / "iter_0000120" / integrity.CHECKSUMS).exists():
            # whoever means harm lists it as well
            integrity.write(tmp_path / "copy" / "iter_0000120")
        return tmp_path / "copy"

    return copy
