import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megashear.data.batch import DocumentBorders
from megashear.data.held_out import HeldOutSet

LENGTH = 16


@pytest.fixture(scope="module")
def held_out(data) -> HeldOutSet:
    return HeldOutSet(data.held_out_prefix("words"), LENGTH, domain_index=2)


def test_sequences_are_the_text_cut_in_its_order(held_out: HeldOutSet, data) -> None:
    text = IndexedDataset(str(data.held_out_prefix("words")))
    flat = np.concatenate([text[i] for i in range(len(text))]).tolist()
    assert len(held_out) == (len(flat) - 1) // LENGTH > 12
    for index in range(len(held_out)):
        start = index * LENGTH
        assert held_out[index].tolist() == flat[start : start + LENGTH + 1]
    with pytest.raises(IndexError, match=f"sequence {len(held_out)} of {len(held_out)}"):
        held_out[len(held_out)]


def test_subsample_is_fixed_by_its_seed(held_out: HeldOutSet) -> None:
    chosen = held_out.subsample(7, seed=3)
    assert chosen == held_out.subsample(7, seed=3) == sorted(set(chosen))
    assert len(chosen) == 7
    assert chosen != held_out.subsample(7, seed=4)
    assert held_out.subsample(10**6, seed=3) == list(range(len(held_out)))
    with pytest.raises(ValueError, match="0 held-out sequences asked for"):
        held_out.subsample(0, seed=3)


@pytest.mark.parametrize("num_chosen", [1, 7, 8, 12])
@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (3, 1), (2, 2), (3, 4)])
def test_replicas_share_the_chosen_and_run_in_step(
    held_out: HeldOutSet, num_chosen: int, micro: int, dp: int
) -> None:
    indices = held_out.subsample(num_chosen, seed=0)
    ranks = [list(held_out.batches(indices, micro, rank, dp)) for rank in range(dp)]
    assert {len(batches) for batches in ranks} == {-(-num_chosen // (micro * dp))}
    counted = {}
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape
        assert batch.tokens.shape == (micro, LENGTH)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.float32
        assert batch.domains.tolist() == [2] * micro
        for row, position in enumerate(batch.positions.tolist()):
            if batch.loss_mask[row].all():
                counted[position] = [*batch.tokens[row].tolist(), batch.labels[row, -1].item()]
            else:
                assert not batch.loss_mask[row].any()
                assert position >= num_chosen
    assert {p: held_out[i].tolist() for p, i in enumerate(indices)} == counted


def test_borders_are_those_of_the_index(data) -> None:
    text = IndexedDataset(str(data.held_out_prefix("words")))
    of_token = np.concatenate([np.full(len(text[i]), i) for i in range(len(text))])
    borders = DocumentBorders(part_attention=True, mask_loss=True)
    held_out = HeldOutSet(data.held_out_prefix("words"), LENGTH, borders=borders)
    crossing = 0
    for index in range(len(held_out)):
        numbers = of_token[index * LENGTH : (index + 1) * LENGTH + 1]
        assert held_out.documents(index).tolist() == (numbers - numbers[0]).tolist()
        crossing += len(set(numbers)) > 1
    assert crossing >= 2
    indices = list(range(len(held_out)))
    for batch in held_out.batches(indices, 5, 0, 1):
        for row, index in enumerate(batch.positions.tolist()):
            if index >= len(held_out):
                assert not batch.loss_mask[row].any()
                continue
            documents = held_out.documents(index)
            assert torch.equal(batch.documents[row], documents[:-1])
            same = (documents[1:] == documents[:-1]).float()
            assert torch.equal(batch.loss_mask[row], same)


def test_text_shorter_than_a_sequence_is_refused(held_out: HeldOutSet, data) -> None:
    with pytest.raises(ValueError, match=r"heldout\.bin has \d+ tokens.*--held-out-fraction"):
        HeldOutSet(data.held_out_prefix("words"), held_out.num_tokens)
