"""Microbatches as a GPU wants them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megashear.data.batch import DocumentBorders, MicroBatch, micro_batch
from megashear.parallel import device


def made() -> MicroBatch:
    text = torch.arange(12).view(2, 6)
    return micro_batch(
        text[:, :-1],
        text[:, 1:],
        [0, 1],
        [0, 1],
        2,
        borders=DocumentBorders(part_attention=True),
        documents=(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)),
    )


def test_what_goes_to_a_gpu_is_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    batch = made()
    assert batch.documents is not None
    for sent in (batch.tokens, batch.labels, batch.loss_mask, batch.documents):
        assert sent.data_ptr() in pinned
        assert device.pinned(sent) is sent
    assert batch.domains.data_ptr() not in pinned  # which stays on the host
    assert torch.equal(batch.labels, batch.tokens + 1)


def test_a_cpu_needs_no_copy() -> None:
    text = torch.arange(6)
    if not device.has_cuda():
        assert device.pinned(text) is text
