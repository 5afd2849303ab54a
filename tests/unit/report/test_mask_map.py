"""The map shows exactly the gates that are closed, on the figure and on the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megashear.models.kept import KeptUnits
from megashear.monitor.drawing import as_svg, check_image, save
from megashear.report.kept import MaskReading
from megashear.report.mask_map import cells, columns_for, mask_map
from tests.tiny import PAIRS
from tests.unit.report.test_kept import half_open


@pytest.fixture(scope="module")
def reading() -> MaskReading:
    source, target = PAIRS["8-groups-of-4"]
    return MaskReading.of(half_open(source, target), source, target)


def images_in(svg: str) -> list[np.ndarray]:
    """Pixels of the images that lie in a figure, in its order."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA")) for text in found
    ]


def test_every_cell_of_the_page_is_a_gate(reading: MaskReading) -> None:
    kept = reading.exact
    svg = as_svg(mask_map(kept), "masks", "what stays")
    shown = images_in(svg)
    assert len(shown) == 3
    closed_heads = {tuple(at) for at in (~kept.units["head"]).nonzero().tolist()}
    closed_neurons = {tuple(at) for at in (~kept.units["intermediate"]).nonzero().tolist()}
    for image, closed, width in (
        (shown[0], closed_heads, kept.source.num_attention_heads),
        (shown[1], closed_neurons, kept.source.ffn_hidden_size),
    ):
        assert image.shape == (kept.source.num_layers, width, 4)
        assert {*map(tuple, np.argwhere(image[..., 3] == 0).tolist())} == closed | {
            (layer, unit) for layer in kept.removed_layers for unit in range(width)
        }
        assert {*image[..., 3].ravel().tolist()} == {0, 255}
    assert (shown[2][0, :, 3] == 0).nonzero()[0].tolist() == (
        (~kept.units["hidden"][0]).nonzero().flatten().tolist()
    )


def with_units(kept: KeptUnits, kind: str, units: torch.Tensor) -> KeptUnits:
    return dataclasses.replace(kept, units={**kept.units, kind: units})


def test_another_gate_is_another_map(reading: MaskReading) -> None:
    moved = reading.exact.units["head"].clone()
    layer = reading.exact.kept_layers[0]
    moved[layer, 0] = ~moved[layer, 0]
    other = with_units(reading.exact, "head", moved)
    assert (cells(other)[0] != cells(reading.exact)[0]).sum() == 1


def test_cells_of_many_units_are_their_shares() -> None:
    source = dataclasses.replace(PAIRS["multi-head"][0], ffn_hidden_size=1000)
    is_kept = torch.rand(source.num_layers, 1000, generator=torch.Generator().manual_seed(0)) < 0.4
    kept = with_units(KeptUnits.of({}, source), "intermediate", is_kept)
    heads, neurons, hidden = cells(kept)
    assert heads.all()
    assert hidden.all()
    assert neurons.shape == (source.num_layers, 143)  # seven to a cell, or six
    bounds = [1000 * n // 143 for n in range(144)]
    for row in range(source.num_layers):
        parts = [float(is_kept[row, a:b].double().mean()) for a, b in itertools.pairwise(bounds)]
        assert neurons[row] == pytest.approx(parts)
    assert [columns_for(n, 160) for n in (96, 512, 11008, 14336)] == [96, 128, 160, 159]


def test_a_figure_for_a_page_is_xml_without_addresses(reading: MaskReading) -> None:
    svg = as_svg(mask_map(reading.expected), "a", 'heads < "all" & neurons')
    root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))
    assert root.attrib["aria-label"] == 'heads < "all" & neurons'
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    assert ids
    assert all(name.startswith("a-") for name in ids)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert used
    assert {first or second for first, second in used} <= ids
    assert svg == as_svg(mask_map(reading.expected), "a", 'heads < "all" & neurons')


def test_pictures_are_written_once(reading: MaskReading, tmp_path: Path) -> None:
    path = tmp_path / "new" / "masks.png"
    check_image(path, "--image")
    save(mask_map(reading.exact, title="step 3"), path)
    assert np.asarray(Image.open(path).convert("RGB"))[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match=r"--image .*masks.png exists; choose another or remove"):
        check_image(path, "--image")
    with pytest.raises(ValueError, match=r"ends in '.gif'; wanted .png, .svg or .pdf"):
        check_image(tmp_path / "masks.gif", "--image")
