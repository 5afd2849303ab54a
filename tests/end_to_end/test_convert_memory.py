"""Memory of a conversion is that of a few weights, not of the model."""

import re
from collections.abc import Callable
from pathlib import Path

from megashear.checkpoint import hf
from megashear.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megashear.checkpoint.weights import CheckpointWeights
from megashear.models import layout
from megashear.shape import ModelShape
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

DEEP = ModelShape(
    **{**GROUPED.to_dict(), "num_layers": 12, "hidden_size": 512, "ffn_hidden_size": 1408}
)
MODEL = 4 * DEEP.num_params()  # 112 MB
LARGEST = 4 * 2 * 1408 * 512  # gate and up of a layer, 5.8 MB
FEW = 6 * LARGEST
"""Bytes: one parameter as it was read, fused and taken apart again, and what the allocator keeps."""


def status(field: str) -> int:
    """A size in this process's own accounting, bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 2**10


def growth(work: Callable[[], object]) -> int:
    """How far the resident memory of a process of its own rises above where it began, bytes."""

    def body(rank: int) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begin = status("VmRSS")
        work()
        return status("VmHWM") - begin

    found: int = run_ranks(1, body)[0]
    return found


def test_memory_is_that_of_a_few_weights(tmp_path: Path) -> None:
    assert len(list(layout.tensors(DEEP))) > 50
    hf.write_directory(tmp_path / "hf", random_weights(DEEP), DEEP)
    assert growth(lambda: hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")) < FEW
    assert growth(lambda: megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")) < FEW

    def gathered() -> None:  # the twin: a whole model is seen
        pairs = CheckpointWeights(tmp_path / "checkpoint").items()
        hf.write_directory(tmp_path / "twin", pairs, DEEP)

    assert growth(gathered) > 0.9 * MODEL > 2 * FEW
