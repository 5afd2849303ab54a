"""Conversion that is killed, fills the disk or meets bad input: a clear error, and no output that
loads but is wrong."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megashear.__main__ import main
from megashear.checkpoint import weights
from megashear.checkpoint.pickles import check_pickles
from megashear.conversion import certificate, hf
from megashear.files import aside as aside_module
from megashear.files import integrity
from megashear.files.aside import written_aside
from megashear.shape import ModelShape
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.ranks import run_ranks
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

Convert = Callable[..., dict[str, Any]]
DIRECTIONS: dict[str, Convert] = {"hf": hf_to_megatron, "checkpoint": megatron_to_hf}
"""What converts each kind of directory."""
KILLS = 12
FIRST = "model.embed_tokens.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
MIDDLE = ModelShape(
    **{**GROUPED.to_dict(), "hidden_size": 256, "ffn_hidden_size": 704, "vocab_size": 4000}
)
"""A model that takes long enough to be killed in: 19 MB."""


def make(folder: Path, shape: ModelShape, max_shard_bytes: int) -> Path:
    """A model as a Hugging Face directory and as a checkpoint."""
    weights = random_weights(shape)
    hf.write_directory(folder / "hf", weights, shape, max_shard_bytes=max_shard_bytes)
    hf_to_megatron(folder / "hf", folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("middle"), MIDDLE, 8_000_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small"), GROUPED, 100_000)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def killed_after(seconds: float, convert: Convert, source: Path, output: Path) -> bool:
    """Convert in a process of its own and kill it; whether it was still at work."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: convert(source, output, workers=2)
    )
    process.start()
    process.join(seconds)
    at_work = process.is_alive()
    if at_work:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return at_work


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_a_killed_conversion_leaves_nothing_that_loads_and_can_be_repeated(
    middle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 2_000_000)
    convert, source, output = DIRECTIONS[kind], middle / kind, tmp_path / "out"
    # of the same name, which a model card has as its title
    first = tmp_path / "whole" / output.name
    first.parent.mkdir()
    begin = time.perf_counter()
    assert not killed_after(60.0, convert, source, first)
    takes = time.perf_counter() - begin
    whole = contents(first)
    chance, killed, left = random.Random(7), 0, 0
    for _ in range(KILLS):
        killed += killed_after(chance.uniform(0.0, 1.1 * takes), convert, source, output)
        left += (tmp_path / ".out.partial").exists()
        if output.exists():  # then all of it, although its writer may have been killed since
            certificate.check(output)
            assert contents(output) == whole
            shutil.rmtree(output)
    assert killed >= KILLS // 2, "kills came too late to show anything"
    assert left >= KILLS // 4, "kills came too early to show anything"
    convert(source, output, workers=2)
    assert contents(output) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_what_a_killed_conversion_leaves_is_refused_by_readers(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also when a person renames it: at no moment before the end is it a whole model."""
    monkeypatch.setattr(weights, "FILE_BYTES", 20_000)
    moments: list[Path] = []
    real = certificate.Witness.__call__

    def keep(self: certificate.Witness, *weight: Any) -> None:
        moments.append(tmp_path / f"moment{len(moments)}")
        shutil.copytree(tmp_path / ".out.partial", moments[-1])
        real(self, *weight)

    monkeypatch.setattr(certificate.Witness, "__call__", keep)
    DIRECTIONS[kind](small / kind, tmp_path / "out")
    assert len(moments) == 39  # all weights: the last one is written in the last
    for moment in moments:
        with pytest.raises(ValueError, match=r"has no certificate\.json"):
            certificate.check(moment)
        read: Callable[[Path], object] = weights.CheckpointWeights if kind == "hf" else hf.HfWeights
        with pytest.raises(ValueError, match=r"has no (megashear|config)\.json"):
            read(moment)


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_ctrl_c_in_a_conversion_is_one_line_and_leaves_nothing(
    small: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["convert", "--input", str(small / kind), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        # all is written and nothing has its name yet
        patch.setattr(aside_module, "_sync", lambda aside: os.kill(os.getpid(), signal.SIGINT))
        assert main(flags) == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("megashear convert: interrupted; nothing of --output")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    assert main(flags) == 0


def test_a_second_writer_of_an_output_is_refused(small: Path, tmp_path: Path) -> None:
    with written_aside(tmp_path / "out") as aside:
        (aside / "x").write_text("x")
        with pytest.raises(ValueError, match=r"another process is writing .*\.out\.partial; wait"):
            hf_to_megatron(small / "hf", tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "x"  # unharmed


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="out exists; choose another"),
        written_aside(tmp_path / "out"),
    ):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system in memory; where that is not permitted, the test is skipped."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root may mount a small file system")
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let root mount a file system")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_a_disk_too_small_is_refused_beforehand(
    small: Path, tiny_disk: Callable[..., Path], kind: str
) -> None:
    disk = tiny_disk("size=1m")
    with pytest.raises(ValueError, match=r"has 0\.00 GiB free and the output takes 0\.02 GiB; fr"):
        DIRECTIONS[kind](small / kind, disk / "out")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_meanwhile_loses_nothing(
    middle: Path,
    tiny_disk: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    workers: int,
) -> None:
    disk = tiny_disk("size=6m")
    (disk / "mine").write_text("kept")
    for module in (hf, weights):
        monkeypatch.setattr(module, "check_space", lambda *space: None)
    monkeypatch.setattr(weights, "FILE_BYTES", 2_000_000)
    with pytest.raises(ValueError, match="out, nothing of it is left: the disk is full; free sp"):
        DIRECTIONS[kind](middle / kind, disk / "out", workers=workers)
    assert [path.name for path in disk.iterdir()] == ["mine"]
    certificate.check(middle / "checkpoint")


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_a_file_longer_than_permitted_is_explained(small: Path, tmp_path: Path, kind: str) -> None:
    def body(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(ValueError, match=r"a file would be longer than .*\(ulimit -f\)"):
            DIRECTIONS[kind](small / kind, tmp_path / "out")

    run_ranks(1, body)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_parent_is_explained(small: Path, tiny_disk: Callable[..., Path]) -> None:
    disk = tiny_disk("size=1m", "ro")
    with pytest.raises(ValueError, match="the file system is read-only; choose another output"):
        hf_to_megatron(small / "hf", disk / "out")


def test_a_file_for_a_parent_is_explained(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="a file is in the way of a directory"):
        hf_to_megatron(small / "hf", tmp_path / "file" / "out")


def test_free_space_is_judged_in_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the output takes 1048576\.02 GiB; free some"):
        aside_module.check_space(tmp_path, 2**50)
    aside_module.check_space(tmp_path, 1)


def config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def resave(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = load_file(path)
    change(held)
    save_file(held, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: first_shard(d).unlink(), "names .*, which is missing; download it again"),
        (lambda d: truncate(first_shard(d)), "cannot be read as safetensors: .* is truncated"),
        (lambda d: resave(first_shard(d), lambda w: w.popitem()), "it is in none of them; the fi"),
        (
            lambda d: resave(first_shard(d), lambda w: w.update({"x": next(iter(w.values())) + 1})),
            "does not list x of",
        ),
        (lambda d: config(d, intermediate_size=97), r"has shape \[96, 40\], its shape in this"),
        (lambda d: config(d, num_hidden_layers=3), "has 9 weights this model does not know: model"),
        (lambda d: config(d, num_hidden_layers=5), "lacks 9 weights of this model: model.layers.4"),
        (lambda d: config(d, model_type="gpt2"), "model_type is 'gpt2'"),
        (lambda d: config(d, quantization_config={"bits": 4}), "save the model in float32"),
        (
            lambda d: resave(
                first_shard(d), lambda w: w.update({k: v.char() for k, v in w.items()})
            ),
            r"is stored as I8, wanted one of .*; save the model in float32",
        ),
    ],
)
def test_bad_input_leaves_nothing(
    small: Path, tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(small / "hf", tmp_path / "hf")
    harm(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_that_shrinks_while_it_is_read_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small / "hf", tmp_path / "hf")
    real = hf.HfWeights.__getitem__

    def shrinking(self: hf.HfWeights, name: str) -> Any:
        truncate(self._places[name][0])
        return real(self, name)

    monkeypatch.setattr(hf.HfWeights, "__getitem__", shrinking)
    with pytest.raises(ValueError, match="ends within a weight: it changed while it was read"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_checkpoint_leaves_nothing(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "checkpoint", tmp_path / "checkpoint")
    iteration = tmp_path / "checkpoint" / "iter_0000000"
    path = iteration / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x05\x06")  # the directory of the first entry, a zip file
    data[at : at + 4] = b"XXXX"
    path.write_bytes(data)
    integrity.write(iteration)  # as if it had been written so
    with pytest.raises(ValueError, match=r"damaged: embedding\.word_embeddings\.weight cannot"):
        megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_changed_bit_in_a_checkpoint_leaves_nothing(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "iter_0000000" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    row = random_weights(GROUPED)[FIRST][7].numpy().tobytes()
    data[data.index(row)] ^= 1  # a weight that can be read, and is wrong
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged: its sha256 is"):
        megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def drop_part(index: Any) -> None:
    del index.state_dict_metadata[FC2].chunks[2]


def claim_half(index: Any) -> None:
    index.state_dict_metadata[FC2].properties.dtype = torch.float16


def claim_transformed(index: Any) -> None:
    for box, place in index.storage_data.items():
        if box.fqn == FC2:
            place.transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop_part, r"lacks part of .*mlp\.linear_fc2\.weight of layer 2; copy it again"),
        (claim_half, r"of layer 0 holds torch.float32 \[1, 40, 96\] where its index says torch.fl"),
        (
            claim_transformed,
            r"of layer 0 cannot be read: it is transformed by \['zstd'\], wh",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_its_index_leaves_nothing(
    small: Path, tmp_path: Path, harm: Callable[[Any], None], message: str
) -> None:
    shutil.copytree(small / "checkpoint", tmp_path / "checkpoint")
    iteration = tmp_path / "checkpoint" / "iter_0000000"
    index = check_pickles(iteration)
    harm(index)
    (iteration / ".metadata").write_bytes(pickle.dumps(index))
    integrity.write(iteration)
    with pytest.raises(ValueError, match=message):
        megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
