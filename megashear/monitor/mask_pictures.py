"""Masks as pictures: which units are kept, which are pruned, and how sure that is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from megashear.masks.kinds import KINDS, LAYER

Floats = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

STAYS, GOES = (0, 114, 178), (213, 94, 0)
"""Colours of open and closed gates: blue has more blue than red, vermilion more red than blue.
People with any colour vision tell them apart. Source: Okabe and Ito 2008, "Color Universal
Design"."""
PAPER, INK, GRID = (255, 255, 255), (51, 51, 51), (190, 190, 190)
FAINTEST = 0.2
"""Least strength of a gate's colour, so that the side of an undecided one can still be seen."""
MAP_WIDTH, MAP_HEIGHT = 480, 360
"""About how large the field of a picture becomes, pixels: letters can still be read where
TensorBoard shows it at the width of a card."""
CELL = (3, 24)
"""Least and largest side of a cell, pixels."""
MAX_COLUMNS = MAP_WIDTH // CELL[0]
"""Columns from which on several units share one."""
PROFILE_HEIGHT = 120
"""Height of the field where a row is drawn as bars, pixels."""
MARGIN, TEXT = 12, 13
"""Space around a field and height of letters, pixels."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """Pixels, and where on them the gates are."""

    pixels: Pixels
    """Red, green and blue, [height, width, 3]."""
    rows: tuple[int, ...]
    """Middle of every row of cells, pixels from the top; of bars the foot."""
    columns: tuple[int, ...]
    """Middle of every column, pixels from the left."""

    def cells(self) -> Pixels:
        """Colour of every cell, [rows, columns, 3]."""
        return self.pixels[np.ix_(self.rows, self.columns)]

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def mask_pictures(
    gates: Mapping[str, Floats],
    open_probability: Mapping[str, Floats],
    *,
    rows_per_layer: Mapping[str, int] | None = None,
    targets: Mapping[str, int] | None = None,
) -> dict[str, Picture]:
    """Draw a picture of every kind of mask.

    Heads, key/value heads and layers have a cell for each unit: blue if it is kept, vermilion if it
    is pruned, the paler the less sure. Of a kind with thousands of units (`Kind.crowded`) a layer's
    cells are neighbours: blue if all of them are kept, vermilion if none is, pale if half of them
    are; and the one row of such a kind is bars, sorted, as high as the gate's chance to be open.

    Args:
        gates: what is kept by kind, **whole** masks, [num_rows, num_units], 0 for what is pruned;
            units of a layer that is pruned are pruned (`models.kept.KeptUnits`).
        open_probability: chance to be kept by kind, of the same shapes.
        rows_per_layer: rows of a layer where they are not one: of heads with grouped queries
            the key/value heads G, whose cells are then set apart.
        targets: units that shall stay in every row, for the mark among bars.

    Returns:
        Pictures by kind, in the order of ``gates``.
    """
    pictures = {}
    for name, values in gates.items():
        kind = KINDS[name]
        is_open, chance = np.asarray(values) != 0, np.asarray(open_probability[name])
        assert is_open.shape == chance.shape, f"{name}: {is_open.shape} gates, {chance.shape}"
        title = f"{name}: {int(is_open.sum()):,} of {is_open.size:,} kept in evaluation"
        if kind.crowded and not kind.per_layer:
            wanted = None if targets is None else targets.get(name)
            pictures[name] = profile(
                is_open[0], chance[0], title=title, columns=kind.unit, wanted=wanted
            )
            continue
        each = 1 if rows_per_layer is None else rows_per_layer.get(name, 1)
        if kind.crowded:
            sides = shares(is_open, MAX_COLUMNS) * 2 - 1
        else:
            sides = signed_certainty(is_open, chance)
        sides = sides.reshape(len(sides) // each, -1)  # [L, G * H/G] where rows are groups
        outer = kind.within if each > 1 else None
        pictures[name] = grid(
            sides,
            title=title,
            columns=kind.unit if outer is None else f"{kind.unit}, by {KINDS[outer].unit}",
            rows=KINDS[LAYER].unit if kind.per_layer else "",
            set_apart=is_open.shape[1] if each > 1 else 0,
            num_units=is_open.shape[1] * each,
            ends=("all pruned", "all kept") if kind.crowded else ("pruned", "kept"),
        )
    return pictures


def signed_certainty(is_open: npt.NDArray[np.bool_], chance: Floats) -> Floats:
    """Return how sure a gate's side is: 0 to 1 for a kept one, 0 to -1 for a pruned one.

    Args:
        is_open: whether a deterministic gate is not 0, any shape.
        chance: its probability to be open.

    Returns:
        |P(open) - P(closed)|, at least ``FAINTEST``, with the side's sign; ``FAINTEST`` where the
        two disagree, as for a gate that stays although it is more likely closed.
    """
    sign = np.where(is_open, 1.0, -1.0)
    return sign * np.clip(sign * (2.0 * chance - 1.0), FAINTEST, 1.0)


def shares(is_open: npt.NDArray[np.bool_], max_columns: int) -> Floats:
    """Return the share of open gates among neighbours, [rows, columns].

    A column stands for as many units as the others, or one more or less.
    """
    num_units = is_open.shape[1]
    num_columns = min(num_units, max_columns)
    bounds = np.arange(num_columns + 1) * num_units // num_columns
    counts = np.diff(np.pad(np.cumsum(is_open, axis=1), ((0, 0), (1, 0)))[:, bounds], axis=1)
    return counts / np.diff(bounds)


def colours(sides: Floats) -> Pixels:
    """Colours of values from -1 (vermilion) over 0 (paper) to 1 (blue), [..., 3]."""
    ends = np.where((np.asarray(sides) >= 0)[..., None], STAYS, GOES)
    strength = np.abs(sides)[..., None]
    return np.round(np.asarray(PAPER) + (ends - np.asarray(PAPER)) * strength).astype(np.uint8)


def grid(
    sides: Floats,
    *,
    title: str,
    columns: str,
    rows: str = "",
    set_apart: int = 0,
    num_units: int | None = None,
    ends: tuple[str, str] = ("pruned", "kept"),
) -> Picture:
    """Cells in rows and columns, numbered from 0, with a legend.

    Args:
        sides: from -1 to 1, [rows, columns].
        title: above.
        columns: what a column is, below.
        rows: what a row is, on the left; rows are not numbered without.
        set_apart: columns after which there is a gap; 0 for none.
        num_units: units of a row, where a column is several of them.
        ends: what the ends of the colours mean.
    """
    num_rows, num_columns = sides.shape
    width = int(np.clip(MAP_WIDTH // num_columns, *CELL))
    height = int(np.clip(MAP_HEIGHT // num_rows, max(CELL[0], 6), CELL[1]))
    line = 1 if width > 6 and height > 6 else 0  # between cells
    gaps = np.arange(num_columns) // set_apart * max(4, width // 3) if set_apart else 0
    lefts = np.arange(num_columns) * width + gaps  # [columns]
    field_width, field_height = int(lefts[-1]) + width, num_rows * height
    left = MARGIN + (_width(f"{num_rows - 1}") + 6 + TEXT + 6 if rows else 0)
    top = MARGIN + TEXT + 10
    canvas = _Canvas(
        max(left + field_width, left + _LEGEND) + MARGIN,
        top + field_height + 2 * (TEXT + 8) + TEXT + 16 + MARGIN,
    )
    canvas.text(left, MARGIN, title)
    painted = colours(sides)
    for row in range(num_rows):
        for column, x in enumerate(lefts):
            y = top + row * height
            canvas.box(
                (left + int(x), y, left + int(x) + width - line, y + height - line),
                painted[row, column],
            )
    middles = [int(x) + width // 2 for x in lefts]
    canvas.numbers_below(left, top + field_height, middles, num_units or num_columns)
    canvas.text(left, top + field_height + TEXT + 12, columns)
    if rows:
        canvas.numbers_beside(left - 6, top, num_rows, height)
        canvas.sideways(MARGIN, top, field_height, rows)
    canvas.legend(left, top + field_height + 2 * (TEXT + 10) + 4, ends)
    return Picture(
        pixels=canvas.pixels(),
        rows=tuple(top + row * height + (height - line) // 2 for row in range(num_rows)),
        columns=tuple(left + int(x) + (width - line) // 2 for x in lefts),
    )


def profile(
    is_open: npt.NDArray[np.bool_],
    chance: Floats,
    *,
    title: str,
    columns: str,
    wanted: int | None = None,
) -> Picture:
    """Draw one row of gates as sorted bars: height is the chance to be open, colour the side.

    Where there are more gates than columns, neighbours share a bar, of their mean height; it is
    of the side that most of them are on.

    Args:
        is_open: whether a gate stays, [units].
        chance: its probability to be open, [units].
        title: above.
        columns: what a gate is of, below.
        wanted: units that shall stay; a line is drawn after them.
    """
    # open gates first, so that the border between the sides is one place
    order = np.lexsort((-chance, ~is_open))
    num_units = len(order)
    num_columns = min(num_units, MAX_COLUMNS)
    bounds = np.arange(num_columns + 1) * num_units // num_columns
    sizes = np.diff(bounds)
    heights = np.add.reduceat(chance[order], bounds[:-1]) / sizes
    stays = np.add.reduceat(is_open[order].astype(float), bounds[:-1]) / sizes >= 0.5
    width = int(np.clip(MAP_WIDTH // num_columns, *CELL))
    left, top = MARGIN + _width("1.0") + 6, MARGIN + TEXT + 10
    foot, field_width = top + PROFILE_HEIGHT, num_columns * width
    canvas = _Canvas(
        max(left + field_width, left + _LEGEND) + MARGIN, foot + 2 * (TEXT + 8) + TEXT + 16 + MARGIN
    )
    canvas.text(left, MARGIN, title)
    for value in (0.0, 0.5, 1.0):
        y = foot - round(value * PROFILE_HEIGHT)
        canvas.box((left, y, left + field_width, y + 1), np.array(GRID))
        canvas.text(MARGIN, y - TEXT // 2, f"{value:.1f}")
    for column in range(num_columns):
        x = left + column * width
        y = foot - max(2, round(float(heights[column]) * PROFILE_HEIGHT))
        painted = np.array(STAYS if stays[column] else GOES)
        canvas.box((x, y, x + width - (width > 6), foot), painted)
    if wanted is not None:
        x = left + round(wanted / num_units * field_width)
        canvas.box((x - 1, top - 4, x + 1, foot + 5), np.array(INK))
        label = f"target {wanted}"
        canvas.text(min(x + 5, left + field_width - _width(label)), top - 4, label)
    middles = [column * width + width // 2 for column in range(num_columns)]
    canvas.numbers_below(left, foot, middles, num_units)
    canvas.text(left, foot + TEXT + 12, f"{columns}, most open first; height: chance to be open")
    canvas.legend(left, foot + 2 * (TEXT + 10) + 4, ("pruned", "kept"), shades=False)
    return Picture(
        pixels=canvas.pixels(),
        rows=(foot - 1,),
        columns=tuple(left + middle for middle in middles),
    )


_LEGEND = 240
"""Width that a legend needs, pixels."""


class _Canvas:
    """A drawing with letters."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def box(self, corners: tuple[int, int, int, int], colour: npt.NDArray[np.integer]) -> None:
        """Fill left, top to right, bottom, these two not included."""
        left, top, right, bottom = corners
        fill = (int(colour[0]), int(colour[1]), int(colour[2]))
        self._draw.rectangle((left, top, right - 1, bottom - 1), fill=fill)

    def text(self, x: int, y: int, text: str) -> None:
        self._draw.text((x, y), text, fill=INK, font=_font())

    def numbers_below(self, left: int, y: int, middles: Sequence[int], num_units: int) -> None:
        """Numbers of units from 0 below their columns, round ones, as many as have room."""
        room = (_width(f"{num_units - 1}") + 8) * num_units  # pixels, in all units' numbers
        field = middles[-1] - middles[0] + 1
        steps = (m * 10**e for e in range(len(str(num_units))) for m in (1, 2, 5))
        every = next((step for step in steps if step * field >= room), num_units)
        for unit in range(0, num_units, every):
            number = f"{unit}"
            x = left + middles[unit * len(middles) // num_units]
            self.text(x - _width(number) // 2, y + 4, number)

    def numbers_beside(self, right: int, top: int, num_rows: int, height: int) -> None:
        """Numbers of rows from 0, as many as have room."""
        every = max(1, -(-(TEXT + 2) // height))
        for row in range(0, num_rows, every):
            number = f"{row}"
            y = top + row * height + (height - TEXT) // 2 - 1
            self.text(right - _width(number), y, number)

    def sideways(self, x: int, top: int, height: int, text: str) -> None:
        """Draw text that reads upwards, in the middle of ``height`` pixels."""
        layer = Image.new("RGB", (_width(text) + 2, TEXT + 4), PAPER)
        ImageDraw.Draw(layer).text((0, 0), text, fill=INK, font=_font())
        turned = layer.rotate(90, expand=True)
        self._image.paste(turned, (x - 2, max(0, top + (height - turned.height) // 2)))

    def legend(self, x: int, y: int, ends: tuple[str, str], *, shades: bool = True) -> None:
        steps = np.linspace(-1, 1, 61) if shades else np.repeat([-1.0, 1.0], 30)
        self.text(x, y, ends[0])
        x += _width(ends[0]) + 8
        for number, colour in enumerate(colours(steps)):
            self.box((x + 2 * number, y + 2, x + 2 * number + 2, y + TEXT), colour)
        self.text(x + 2 * len(steps) + 8, y, ends[1])

    def pixels(self) -> Pixels:
        return np.asarray(self._image, dtype=np.uint8).copy()


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT)


def _width(text: str) -> int:
    left, _, right, _ = _font().getbbox(text)
    return int(right - left)
