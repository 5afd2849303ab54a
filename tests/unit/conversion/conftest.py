"""Checkpoints written in the test process itself, as for the tests of `megashear.checkpoint`."""

from tests.unit.checkpoint.conftest import checkpoints, harmed

__all__ = ["checkpoints", "harmed"]
