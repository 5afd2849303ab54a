from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from megashear.masks import mask_set
from megashear.masks.gates import logistic_noise, sample_gates, uniform_noise
from megashear.masks.kinds import KINDS
from megashear.masks.mask_set import MaskSet
from megashear.masks.targets import MaskPart

KEY = {"seed": 7, "step": 3, "stream": 1, "kind": "head", "row": 2}


def noise(num_units: int = 96, **changed: object) -> Tensor:
    return uniform_noise(num_units, **(KEY | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed", [{"seed": 8}, {"step": 4}, {"stream": 0}, {"kind": "group"}, {"row": 3}]
)
def test_noise_differs_across_every_part_of_its_key(changed: dict[str, object]) -> None:
    assert torch.equal(noise(), noise())
    assert (noise() != noise(**changed)).float().mean() > 0.99


def test_noise_does_not_confuse_neighbouring_numbers() -> None:
    keys = [(step, stream) for step in range(12) for stream in range(12)]
    first = {float(noise(1, step=step, stream=stream)) for step, stream in keys}
    assert len(first) == len(keys)  # 12|1 is not 1|21


def test_noise_is_uniform_float32() -> None:
    draws = torch.cat([noise(10_000, row=row) for row in range(10)])
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    chi_square = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, 0.1 % point


def test_noise_ignores_global_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = noise()
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, noise())


def test_noise_is_the_documented_function() -> None:
    """Philox4x64-10 written out from its paper (Salmon et al. 2011), so that no library moves it.

    A run that resumes after an update must sample the masks it would have sampled before.
    """
    text = b"megashear mask noise 1|7|3|1|head|2"
    key = hashlib.blake2b(text, digest_size=16).digest()
    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    words = [word for block in (1, 2) for word in philox((block, 0, 0, 0), (k0, k1))]
    assert noise(8).tolist() == [(word >> 40) / 2**24 for word in words]


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    mask = 2**64 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (
            (second >> 64) ^ c1 ^ k0,
            second & mask,
            (first >> 64) ^ c3 ^ k1,
            first & mask,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def part(kind: str, rows: tuple[int, ...], units: tuple[int, ...] | range) -> MaskPart:
    return MaskPart(kind=kind, num_rows=4, num_units=6, rows=rows, units=units)


@pytest.mark.parametrize(
    ("rows", "units"),
    [((0, 2), range(0, 3)), ((1, 3), range(3, 6)), ((3,), (0, 2, 5)), ((), range(6))],
)
def test_every_shard_samples_its_slice_of_the_whole(
    rows: tuple[int, ...], units: tuple[int, ...] | range
) -> None:
    whole = MaskSet({"head": part("head", (0, 1, 2, 3), range(6))})
    shard = MaskSet({"head": part("head", rows, units)})
    with torch.no_grad():
        for masks in (whole, shard):
            masks.log_alpha["head"].zero_()  # in the middle, where gates follow the noise
    key = {"seed": 5, "step": 9, "stream": 0}
    wanted = whole.sample(**key)["head"][list(rows)][:, list(units)]
    assert torch.equal(shard.sample(**key)["head"], wanted)
    if rows:
        other = MaskSet({"head": part("head", rows, tuple((unit + 1) % 6 for unit in units)[:1])})
        with torch.no_grad():
            other.log_alpha["head"].zero_()
        assert not torch.equal(other.sample(**key)["head"], wanted[:, :1])  # a shifted slice


AHEAD = {"seed": 5, "step": 9}
PARTS = {
    "hidden": MaskPart(kind="hidden", num_rows=1, num_units=40, rows=(0,), units=range(40)),
    # the second of two tensor ranks; layers 1 and 3 of four
    "head": MaskPart(
        kind="head", num_rows=8, num_units=3, rows=(3, 7), units=range(3), rows_per_layer=2
    ),
    "group": MaskPart(kind="group", num_rows=4, num_units=2, rows=(1, 3), units=range(1, 2)),
    "intermediate": MaskPart(
        kind="intermediate", num_rows=4, num_units=96, rows=(1, 3), units=range(48, 96)
    ),
    "layer": MaskPart(kind="layer", num_rows=1, num_units=4, rows=(0,), units=(1, 3)),
}
"""Parts of a rank with two tensor ranks and two stages of two chunks."""


def drawn_ahead() -> MaskSet:
    masks = MaskSet(PARTS)
    for log_alpha in masks.parameters():
        log_alpha.data.fill_(0.3)  # where gates follow the noise
    masks.draw_ahead(**AHEAD, kinds={0: KINDS, 2: ("hidden",)})
    return masks


def row_by_row(masks: MaskSet, kind: str, **key: int) -> Tensor:
    part = masks.parts[kind]
    rows = [uniform_noise(part.num_units, kind=kind, row=row, **key) for row in part.rows]
    uniform = torch.stack(rows)[:, list(part.units)]
    return sample_gates(masks.log_alpha[kind], logistic_noise(uniform))


def test_noise_drawn_ahead_is_the_noise_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = drawn_ahead()
    monkeypatch.setattr(mask_set, "uniform_noise", None)  # nothing is left to draw
    for _ in range(2):  # and what was drawn is not used up
        found = masks.sample(**AHEAD, stream=0)
        assert list(found) == list(KINDS)
        for kind, z in found.items():
            assert torch.equal(z, row_by_row(masks, kind, **AHEAD, stream=0)), kind
        (hidden,) = masks.sample(**AHEAD, stream=2, kinds=("hidden",)).values()
        assert torch.equal(hidden, row_by_row(masks, "hidden", **AHEAD, stream=2))


@pytest.mark.parametrize("changed", [{"seed": 6}, {"step": 10}, {"step": -1}, {"stream": 1}])
def test_other_noise_than_was_drawn_ahead_is_drawn_when_asked_for(changed: dict[str, int]) -> None:
    masks, key = drawn_ahead(), AHEAD | {"stream": 0} | changed
    for kind, z in masks.sample(**key).items():
        assert torch.equal(z, row_by_row(masks, kind, **key)), kind
        assert not torch.equal(z, row_by_row(masks, kind, **AHEAD, stream=0)), kind
