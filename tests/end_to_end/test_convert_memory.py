"""Memory of a conversion is that of a few weights, not of the model."""

import ctypes
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megashear.conversion import hf
from megashear.shape import ModelShape
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

WIDTHS = {**GROUPED.to_dict(), "hidden_size": 512, "ffn_hidden_size": 1408}
SHALLOW, DEEP = (ModelShape(**{**WIDTHS, "num_layers": layers}) for layers in (2, 14))
GROWN = 4 * (DEEP.num_params() - SHALLOW.num_params())
"""Bytes that twelve layers take, 127 MB."""
LARGEST = 4 * 2 * 1408 * 512
"""Bytes of gate and up of a layer, the largest parameter, 5.8 MB."""


def status(field: str) -> int:
    """A size in this process's own accounting, bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 2**10


def growth(work: Callable[[], object]) -> int:
    """How far the resident memory of a process of its own rises above where it began, bytes."""

    def body(rank: int) -> int:
        # what the process that forked this one has freed and kept would hide as much growth
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begin = status("VmRSS")
        work()
        return status("VmHWM") - begin

    found: int = run_ranks(1, body)[0]
    return found


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    there, back, gathered = [], [], []
    for name, shape in (("shallow", SHALLOW), ("deep", DEEP)):
        folder = tmp_path / name
        hf.write_directory(folder / "hf", random_weights(shape), shape)
        there.append(growth(partial(hf_to_megatron, folder / "hf", folder / "checkpoint")))
        back.append(growth(partial(megatron_to_hf, folder / "checkpoint", folder / "back")))

        def gather(folder: Path = folder, shape: ModelShape = shape) -> None:
            pairs = hf.HfWeights(folder / "hf").items()  # the twin: pairs are gathered first
            hf.write_directory(folder / "twin", pairs, shape)

        gathered.append(growth(gather))
    for shallow, deep in (there, back):
        # half of what the twin must grow by; a busy machine gives memory back late
        assert deep - shallow < 4 * LARGEST
    assert gathered[1] - gathered[0] > 0.5 * GROWN > 8 * LARGEST
