"""What megashear asks of megatron-core for a layout."""

import pytest

from megashear.config import ParallelConfig
from megashear.models.llama import pipeline_settings


@pytest.mark.parametrize(
    ("stages", "virtual", "overlap"),
    [(1, 1, False), (2, 1, False), (2, 2, False), (2, 2, True), (4, 2, True)],
)
def test_pipeline_settings_never_corrupt(stages: int, virtual: int, overlap: bool) -> None:
    settings = pipeline_settings(
        ParallelConfig(
            pipeline_model_parallel_size=stages,
            num_virtual_stages_per_pipeline_rank=virtual,
            overlap_p2p_communication=overlap,
        )
    )
    assert not settings["batch_p2p_comm"]
    assert settings["overlap_p2p_comm"] == overlap
    assert not (settings["overlap_p2p_comm"] and settings["deallocate_pipeline_outputs"])
