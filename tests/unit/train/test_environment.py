"""What a run says that it ran on."""

import importlib.metadata

import pytest
from megatron import core

from megashear.train.environment import environment


def test_a_megatron_core_without_metadata_has_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("megatron-core")  # as where it lies on PYTHONPATH
    found = environment(2, ["prune"])
    assert found["megatron-core"] == core.__version__
    assert (found["processes"], found["command"]) == (2, ["prune"])
