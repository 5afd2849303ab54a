"""Noise streams of a replica."""

from __future__ import annotations

import pytest

from megashear.config import ModelConfig
from megashear.planning.work import Work
from megashear.shape import PRESETS
from tests.tiny import layout


def met(streams: int, replicas: int) -> int:
    """Return the most noise streams to which sequences of one replica belong."""
    batch = streams * replicas  # least common multiple
    each = batch // replicas
    return max(
        len({place * streams // batch for place in range(first, first + each)})
        for first in range(0, batch, each)
    )


@pytest.mark.parametrize("replicas", range(1, 13))
def test_streams_of_a_replica_are_those_that_its_sequences_meet(replicas: int) -> None:
    for streams in range(1, 13):
        work = Work(
            shape=PRESETS["llama2-7b"],
            parallel=layout(),
            model=ModelConfig(),
            seq_length=1,
            micro_batch_size=1,
            num_microbatches=1,
            data_size=replicas,
            noise_streams=streams,
        )
        assert work.own_streams == met(streams, replicas), streams
