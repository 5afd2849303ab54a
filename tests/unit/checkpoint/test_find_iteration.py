"""The newest whole iteration is found, whatever the tracker and the files look like."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megashear.checkpoint.description import (
    TRACKER,
    candidates,
    find_iteration,
    read_description,
    write_description,
)
from megashear.files.integrity import CHECKSUMS, DamagedError
from tests.iterations import copy_iteration
from tests.unit.files.test_integrity import flip

Harm = Callable[[Path], object]


@pytest.fixture
def saved(tmp_path: Path, checkpoints: dict) -> Path:
    """Two iterations, both whole, the tracker at the newer one."""
    root = tmp_path / "saved"
    for number in (4, 5):
        copy_iteration(checkpoints["grouped"][0] / "iter_0000120", number, root)
    (root / TRACKER).write_text("5")
    return root


def test_the_one_that_is_named_is_found(saved: Path) -> None:
    assert find_iteration(saved).name == "iter_0000005"
    (saved / TRACKER).write_text("4\n")  # rolled back, as users of Megatron-LM do
    assert find_iteration(saved).name == "iter_0000004"
    assert find_iteration(saved, 5).name == "iter_0000005"


def bit(path: Path) -> None:
    flip(path, random.Random(path.name).randrange(path.stat().st_size * 8))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    other = next(
        other
        for other in sorted(path.parent.iterdir())
        if other.is_file() and other.read_bytes() != path.read_bytes()
    )
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("harm", [bit, cut_short, empty, swap, Path.unlink])
def test_damage_to_any_file_is_skipped_with_a_warning_that_names_it(
    saved: Path, caplog: pytest.LogCaptureFixture, harm: Harm
) -> None:
    caplog.set_level(logging.WARNING, "megashear")
    files = sorted(path for path in (saved / "iter_0000005").rglob("*") if path.is_file())
    assert len(files) >= 6
    for path in files:
        caplog.clear()
        before = {other: other.read_bytes() for other in files}
        harm(path)
        assert find_iteration(saved, contents=True).name == "iter_0000004", path
        (warning,) = caplog.messages
        assert "skipping iter_0000005: " in warning
        assert str(saved / "iter_0000005") in warning
        if harm is not swap and path.name not in ("megashear.json", CHECKSUMS):
            assert str(path) in warning
        with pytest.raises(DamagedError, match="iter_0000005"):  # asked for by name: no other
            find_iteration(saved / "iter_0000005", contents=True)
        with pytest.raises(DamagedError, match="iter_0000005"):
            find_iteration(saved, 5, contents=True)
        for other, data in before.items():
            other.write_bytes(data)
    assert find_iteration(saved, contents=True).name == "iter_0000005"


def test_without_contents_a_flipped_bit_of_a_tensor_is_not_seen(saved: Path) -> None:
    bit(saved / "iter_0000005" / "__0_0.distcp")
    assert find_iteration(saved).name == "iter_0000005"
    bit(saved / "iter_0000005" / ".metadata")  # read by everybody, and small
    assert find_iteration(saved).name == "iter_0000004"


def test_where_none_is_whole_all_that_were_tried_are_named(saved: Path) -> None:
    (saved / "iter_0000005" / "common.pt").unlink()
    empty(saved / "iter_0000004" / "__0_0.distcp")
    with pytest.raises(
        DamagedError,
        match=r"no whole checkpoint in .*iter_0000005/common\.pt is missing.*; .*iter_0000004/"
        r"__0_0\.distcp is 0 bytes; [0-9,]+ were written; copy one there again",
    ):
        find_iteration(saved)


@pytest.mark.parametrize(
    ("text", "found", "warning"),
    [
        ("6", "iter_0000005", "names iter_0000006, which is missing"),
        ("release", "iter_0000005", "holds 'release', wanted the number"),
        ("\udcff", "iter_0000005", "wanted the number"),
        ("", "iter_0000005", "holds '', wanted the number"),
        ("1", "iter_0000005", "names iter_0000001, which is missing"),
        (None, "iter_0000005", None),
    ],
)
def test_a_damaged_tracker_costs_nothing(
    saved: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
    found: str,
    warning: str | None,
) -> None:
    if text is None:
        (saved / TRACKER).unlink()
    else:
        (saved / TRACKER).write_bytes(text.encode(errors="surrogateescape"))
    assert find_iteration(saved, contents=True).name == found
    assert warning is None or warning in caplog.text


def test_flipped_bits_of_the_tracker_lead_to_a_whole_iteration(saved: Path) -> None:
    for number in range(8):
        flip(saved / TRACKER, number)
        assert find_iteration(saved).name in ("iter_0000004", "iter_0000005")
        flip(saved / TRACKER, number)


def test_what_is_no_iteration_is_not_taken_for_one(saved: Path) -> None:
    shutil.copytree(saved / "iter_0000005", saved / ".iter_0000009.abc.partial")
    shutil.copytree(saved / "iter_0000005", saved / "iter_0000008_copy")
    (saved / "iter_0000007").write_text("a file")
    assert [path.name for path in candidates(saved)] == ["iter_0000005", "iter_0000004"]


@pytest.mark.parametrize("linked", [False, True])
def test_one_that_was_renamed_is_not_taken_for_another(
    saved: Path, linked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    five, wrong = saved / "iter_0000005", saved / "iter_0000009"
    if linked:
        wrong.symlink_to(five)
    else:
        five.rename(wrong)
    (saved / TRACKER).write_text("9")
    assert find_iteration(saved).name == ("iter_0000005" if linked else "iter_0000004")
    assert "skipping iter_0000009: " in caplog.text
    wanted = r"iter_0000009 is of step 5, .* renamed, or is a link; name it iter_0000005, or"
    with pytest.raises(DamagedError, match=wanted):
        find_iteration(wrong)
    wrong.rename(saved / "best")  # a name that says no step contradicts none
    assert find_iteration(saved / "best").name == "best"


def test_missing_ones_are_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"has no iter_0000200; it has iter_0000005, iter_0000004"):
        find_iteration(saved, 200)
    shutil.rmtree(saved / "iter_0000004")
    shutil.rmtree(saved / "iter_0000005")
    with pytest.raises(ValueError, match=r"names iter_0000005, which is missing"):
        find_iteration(saved)
    (saved / TRACKER).write_text("release")
    with pytest.raises(ValueError, match="holds 'release', wanted the number"):
        find_iteration(saved)
    (saved / TRACKER).unlink()
    with pytest.raises(ValueError, match=r"it has no latest_checkpointed_iteration\.txt, nor is"):
        find_iteration(saved)


def test_a_checkpoint_of_an_older_megashear_is_read_with_a_warning(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = saved / "iter_0000005"
    (directory / CHECKSUMS).unlink()
    with pytest.raises(DamagedError, match=r"checksums\.txt is missing"):
        find_iteration(directory)
    text = (directory / "megashear.json").read_text()
    (directory / "megashear.json").write_text(text.replace('"format": 2', '"format": 1'))
    assert find_iteration(saved, contents=True) == directory
    assert "has no checksums, for an older megashear wrote it" in caplog.text
    assert read_description(directory).iteration == 5


def test_values_whose_listing_was_cut_short_do_not_count(saved: Path) -> None:
    directory = saved / "iter_0000005"
    (directory / "evaluation.json").write_text('{"held_out_loss": 1.0}')
    assert read_description(directory).details == {}


def test_a_description_is_replaced_in_one_step(saved: Path) -> None:
    directory = saved / "iter_0000005"
    before = read_description(directory)
    write_description(directory, before)
    assert read_description(directory) == before
    assert not list(directory.glob(".megashear.json*"))
