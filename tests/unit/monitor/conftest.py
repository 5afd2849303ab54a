"""What tests that write event files need."""

import pytest
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def _event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number each test's event files from 0.

    A process counts its files in their names, after the second of their making, and TensorBoard
    reads them by name: of two files of one second, 10 would be read before 9.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
