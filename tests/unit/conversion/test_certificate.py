"""The certificate of a conversion: what it says, and every later change that it finds."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megashear.conversion import certificate, hf
from megashear.conversion.certificate import CERTIFICATE, check
from megashear.models import weight_table
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.families import FAMILIES
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

WEIGHTS = random_weights(GROUPED)
NAME = "model.layers.2.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory, its checkpoint and the directory back; do not change them."""
    folder = tmp_path_factory.mktemp("made")
    hf.write_directory(folder / "hf", WEIGHTS, GROUPED)
    hf_to_megatron(folder / "hf", folder / "checkpoint", workers=2)
    megatron_to_hf(folder / "checkpoint", folder / "back")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """As ``made``, to change."""
    hf.write_directory(tmp_path / "hf", WEIGHTS, GROUPED)
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    return tmp_path


def read(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / CERTIFICATE).read_text())
    return values


@pytest.mark.parametrize("output", ["checkpoint", "back"])
def test_it_says_what_was_read_and_written(made: Path, output: str) -> None:
    values = read(made / output)
    assert values["source"] == ("hf" if output == "checkpoint" else "checkpoint")
    assert (values["family"], values["shape"]) == ("llama", GROUPED.to_dict())
    assert (values["num_params"], values["num_weights"]) == (GROUPED.num_params(), len(WEIGHTS))
    assert values["bytes"] == 4 * GROUPED.num_params()
    assert values["equal_to_source"] is True
    assert list(values["weights"]) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        assert values["weights"][name] == {
            "shape": list(weight.shape),
            "source_dtype": "float32",
            "source_sha256": digest,
            "dtype": "float32",
            "sha256": digest,
        }


def test_a_changed_format_is_noted(made: Path, tmp_path: Path) -> None:
    hf_to_megatron(made / "hf", tmp_path / "out", dtype="bfloat16")
    values = read(tmp_path / "out")
    record = values["weights"][NAME]
    rounded = WEIGHTS[NAME].bfloat16().view(torch.int16).numpy().tobytes()
    assert (record["source_dtype"], record["dtype"]) == ("float32", "bfloat16")
    assert record["sha256"] == hashlib.sha256(rounded).hexdigest() != record["source_sha256"]
    assert values["equal_to_source"] is False
    assert check(tmp_path / "out")["equal to the source"] is False


def test_a_wrong_order_inside_a_fused_weight_is_in_the_certificate(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_table, "fuse", lambda row, parts, shape: torch.cat(list(parts)))
    hf_to_megatron(made / "hf", tmp_path / "out")
    records = read(tmp_path / "out")["weights"].items()
    changed = {name for name, record in records if record["sha256"] != record["source_sha256"]}
    assert len(changed) == 3 * GROUPED.num_layers  # q, k, v of every layer


@pytest.mark.parametrize("output", ["checkpoint", "back"])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_converted_passes(made: Path, output: str, workers: int) -> None:
    found = check(made / output, workers=workers)
    assert (found["weights"], found["bytes"]) == (len(WEIGHTS), 4 * GROUPED.num_params())


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2"])
def test_other_families_pass(tmp_path: Path, family: str) -> None:
    shape = FAMILIES[family]
    hf.write_directory(tmp_path / "hf", random_weights(shape), shape)
    hf_to_megatron(tmp_path / "hf", tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    for output in ("checkpoint", "back"):
        values = read(tmp_path / output)
        assert (values["num_params"], values["family"]) == (shape.num_params(), shape.family)
        assert values["equal_to_source"] is True
        check(tmp_path / output)


def flip_weights(directory: Path) -> None:
    """Change two weights of a Hugging Face directory, the later one first."""
    weights = load_file(directory / hf.SINGLE)
    weights["model.norm.weight"][3] += 1
    weights[NAME][1, 2] *= -1
    save_file(weights, directory / hf.SINGLE, metadata={"format": "pt"})


def flip_bytes(directory: Path) -> None:
    """Change one number of the same weight where it lies in a checkpoint."""
    path = directory / "iter_0000000" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    row = WEIGHTS[NAME][1].numpy().tobytes()
    at = data.index(row)
    data[at : at + 4] = torch.tensor(-1.5).numpy().tobytes()
    path.write_bytes(data)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("output", "harm", "message"),
    [
        ("back", flip_weights, f"{NAME} differs from its certificate, the first of 2 of 39"),
        ("checkpoint", flip_bytes, f"{NAME} differs from its certificate, the first of 1 of 39"),
        (
            "checkpoint",
            lambda d: (d / "iter_0000000" / "metadata.json").write_text("{}"),
            "iter_0000000/metadata.json is 2 bytes; 119 were written",
        ),
        (
            "back",
            lambda d: edit(d / "config.json", bos_token_id=3),
            r"config\.json differs .* first of 1 of 1 files .*; the weights are as they were",
        ),
        (
            "back",
            lambda d: edit(d / "config.json", rms_norm_eps=0.5),
            "norm_epsilon of the model is 0.5, its certificate says 1e-05",
        ),
        ("back", lambda d: (d / CERTIFICATE).unlink(), "has no certificate.json: give the direct"),
        ("back", lambda d: (d / CERTIFICATE).write_text("[]"), "is broken: no JSON object"),
        ("back", lambda d: edit(d / CERTIFICATE, format=9), "is of format 9, this megashear reads"),
    ],
)
def test_what_was_changed_since_is_named(
    own: Path, output: str, harm: Callable[[Path], object], message: str
) -> None:
    check(own / output)
    harm(own / output)
    with pytest.raises(ValueError, match=message):
        check(own / output)


def test_one_iteration_has_no_certificate_of_its_own(made: Path) -> None:
    with pytest.raises(ValueError, match="of a checkpoint, the one with latest_checkpointed_iter"):
        check(made / "checkpoint" / "iter_0000000")


def test_equal_bytes_are_told_from_equal_values() -> None:
    zeros = torch.zeros(3)  # 12 bytes: no whole number of 64-bit words
    assert certificate._same_bytes(zeros, zeros.clone())
    assert not certificate._same_bytes(zeros, -zeros)
    assert not certificate._same_bytes(zeros, zeros.half())
