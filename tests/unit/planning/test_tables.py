"""A plan prints of masks what its layout holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megashear.planning.hardware import GPUS
from megashear.planning.layouts import Candidate
from megashear.planning.memory import rank_memory
from megashear.planning.tables import _memory
from megashear.planning.time import Cluster, step_time
from megashear.planning.work import Work
from tests.tiny import layout
from tests.unit.planning.test_planning_doc import SEVEN

CLUSTER = Cluster(gpu=GPUS["H200-141G"], num_gpus=8, gpus_per_node=8, network=50e9)


def printed(work: Work) -> dict[str, str]:
    """Return the text after the number of each part, for a rank of the first stage."""
    time = step_time(work, CLUSTER, mfu=0.3)
    found = Candidate(work=work, stage=0, memory=rank_memory(work, 0), time=time)
    parts = (line.split(maxsplit=2) for line in _memory(found, CLUSTER))
    return {name: what for name, _, what in parts}


@pytest.mark.parametrize(
    ("streams", "stages", "virtual", "wanted"),
    [
        (8, 1, 1, "one copy of the weights that masks act on, bfloat16"),
        (16, 1, 1, "one copy of"),
        (16, 4, 1, "2 copies at once of"),
        (16, 2, 4, "1 to 2 copies at once of"),
    ],
)
def test_copies_of_weights_are_counted(
    streams: int, stages: int, virtual: int, wanted: str
) -> None:
    work = replace(
        SEVEN, parallel=layout(pp=stages, vpp=virtual), num_microbatches=4, noise_streams=streams
    )
    said = printed(work)["folded"]
    assert said.startswith(wanted)
    assert said.endswith("; one gradient of each, float32") == (streams == 16)


def test_without_masks_nothing_is_said_of_them() -> None:
    with_masks, without = printed(SEVEN), printed(replace(SEVEN, masks=frozenset()))
    assert with_masks.keys() - without.keys() == {"folded", "masks"}
