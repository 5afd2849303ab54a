"""A picture of a mask shows exactly which gates are closed."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from megashear.monitor import mask_pictures as pictures_of
from megashear.monitor.mask_pictures import Picture, mask_pictures, shares, signed_certainty

LAYERS, HEADS, GROUPS, EACH = 5, 8, 4, 3


def drawn(kind: str, is_open: np.ndarray, chance: np.ndarray | None = None, **more) -> Picture:
    chance = np.where(is_open, 0.9, 0.1) if chance is None else chance
    return mask_pictures({kind: is_open * 0.5}, {kind: chance}, **more)[kind]


def from_png(picture: Picture) -> np.ndarray:
    """Colours of the cells as whoever opens the file has them."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png())).convert("RGB"))
    return pixels[np.ix_(picture.rows, picture.columns)].astype(int)


def is_blue(cells: np.ndarray) -> np.ndarray:
    return cells[..., 2] > cells[..., 0]


def some(rows: int, units: int) -> np.ndarray:
    return np.random.default_rng(rows * units).random((rows, units)) < 0.6


@pytest.mark.parametrize(
    ("kind", "rows", "units"), [("head", LAYERS, HEADS), ("group", 80, 8), ("layer", 1, 80)]
)
def test_every_cell_is_the_side_of_its_gate(kind: str, rows: int, units: int) -> None:
    is_open = some(rows, units)
    assert (is_blue(from_png(drawn(kind, is_open))) == is_open).all()


def test_one_other_gate_is_one_other_cell() -> None:
    is_open = some(LAYERS, HEADS)
    other = is_open.copy()
    other[3, 5] = not other[3, 5]
    changed = (from_png(drawn("head", is_open)) != from_png(drawn("head", other))).any(axis=-1)
    assert np.argwhere(changed).tolist() == [[3, 5]]


def test_heads_of_a_group_stand_together_in_their_layer() -> None:
    is_open = some(LAYERS * GROUPS, EACH)  # rows are groups, layer by layer
    picture = drawn("head", is_open, rows_per_layer={"head": GROUPS})
    assert (is_blue(from_png(picture)) == is_open.reshape(LAYERS, GROUPS * EACH)).all()
    steps = np.diff(picture.columns).reshape(-1)
    wider = np.flatnonzero(steps > steps.min()) + 1
    assert wider.tolist() == [EACH, 2 * EACH, 3 * EACH]


def test_neurons_share_cells_that_show_how_many_stay() -> None:
    is_open = some(LAYERS, 1000)
    cells = from_png(drawn("intermediate", is_open))
    assert cells.shape[1] == pictures_of.MAX_COLUMNS
    bounds = [column * 1000 // cells.shape[1] for column in range(cells.shape[1] + 1)]
    for row in range(LAYERS):
        for column, (first, end) in enumerate(itertools.pairwise(bounds)):
            share = is_open[row, first:end].mean()
            end_colour = pictures_of.STAYS if share >= 0.5 else pictures_of.GOES
            strength = abs(2 * share - 1)
            wanted = [round(255 + (c - 255) * strength) for c in end_colour]
            assert cells[row, column].tolist() == pytest.approx(wanted, abs=1), (row, column)


def test_shares_count_every_unit_once() -> None:
    is_open = some(3, 11)
    found = shares(is_open, 4)
    sizes = np.array([2, 3, 3, 3])  # 0, 2, 5, 8, 11
    assert (found * sizes).sum(axis=1) == pytest.approx(is_open.sum(axis=1))
    assert found[:, 0] == pytest.approx(is_open[:, :2].mean(axis=1))
    assert (shares(is_open, 100) == is_open).all()


def test_hidden_dimensions_are_sorted_bars_as_high_as_their_chance() -> None:
    chance = np.array([[0.25, 1.0, 0.5, 0.1, 0.75]])
    is_open = chance >= 0.5
    picture = drawn("hidden", is_open, chance, targets={"hidden": 2})
    assert is_blue(from_png(picture))[0].tolist() == [True, True, True, False, False]
    pixels = picture.pixels.astype(int)
    heights = [
        int(
            (
                np.abs(pixels[: picture.rows[0] + 1, x] - pixels[picture.rows[0], x]).sum(1) == 0
            ).sum()
        )
        for x in picture.columns
    ]
    wanted = [round(value * pictures_of.PROFILE_HEIGHT) for value in (1, 0.75, 0.5, 0.25, 0.1)]
    assert heights == pytest.approx(wanted, abs=1)


def test_the_mark_of_the_target_stands_after_its_units() -> None:
    is_open = some(1, 40)
    marked, plain = (drawn("hidden", is_open, targets=t) for t in ({"hidden": 10}, None))
    differs = (marked.pixels != plain.pixels).any(axis=(0, 2))
    first = int(np.flatnonzero(differs)[0])
    assert plain.columns[9] < first < plain.columns[10]


def test_colours_are_pale_where_the_side_is_not_sure() -> None:
    chance = np.array([[1.0, 0.75, 0.5, 0.5, 0.25, 0.0, 0.3]])
    is_open = np.array([[True, True, True, False, False, False, True]])
    found = signed_certainty(is_open, chance)
    faint = pictures_of.FAINTEST
    assert found[0].tolist() == pytest.approx([1, 0.5, faint, -faint, -0.5, -1, faint])


def test_thousands_of_dimensions_have_room() -> None:
    is_open = some(1, 8192)
    picture = drawn("hidden", is_open)
    assert picture.pixels.shape[1] < 900
    blue = is_blue(from_png(picture))[0]
    assert blue.mean() == pytest.approx(is_open.mean(), abs=1 / pictures_of.MAX_COLUMNS)
    assert not np.any(np.diff(blue.astype(int)) > 0)  # the sides are apart
