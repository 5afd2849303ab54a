"""No reader of a small file hangs, dies of depth or swallows what is out of bounds."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megashear.checkpoint.description import (
    DESCRIPTION,
    TRACKER,
    find_iteration,
    latest_iteration,
    read_description,
)
from megashear.commands.parse import parse
from megashear.config import EvaluateRun
from megashear.conversion import certificate, hf, hf_config
from megashear.conversion.megatron_lm import find_megatron_lm
from megashear.data.manifest import read_manifest
from megashear.data.phases import read_phases
from megashear.data.reference_loss import read_reference
from megashear.data.shares import ShareLimits
from megashear.files import integrity
from megashear.files.integrity import CHECKSUMS, DamagedError
from megashear.preprocessing import journal, mds
from megashear.shape import ModelShape, read_shape
from megashear.tokenizer import tokenizer_files
from megashear.tokenizer.companions import named
from tests.unit.checkpoint.shapes import GROUPED

Read = Callable[[Path], Any]
"""Reads one file, given the directory that holds it."""


JSON_READERS: dict[str, tuple[str, Read]] = {
    "config": (hf_config.CONFIG, hf_config.read_config),
    "index of weights": (hf.INDEX, lambda d: hf.HfWeights(d, GROUPED)),
    "shape": ("s.json", lambda d: read_shape(str(d / "s.json"))),
    "description": (DESCRIPTION, read_description),
    "certificate": (certificate.CERTIFICATE, certificate.check),
    "manifest": ("manifest.json", read_manifest),
    "journal": (f"{journal.FOLDER}/x.json", lambda d: journal.read_journal(d, "x")),
    "shards": (mds.INDEX_NAME, mds.shards_of),
    "tokenizer config": ("tokenizer_config.json", lambda d: named(d / "tokenizer.json", "x")),
    "generation config": (
        "generation_config.json",
        lambda d: tokenizer_files.token_ids([d / "generation_config.json"]),
    ),
}
YAML_READERS: dict[str, tuple[str, Read]] = {
    "config": (
        "c.yaml",
        lambda d: parse(EvaluateRun, ["--config", str(d / "c.yaml")], prog="x", description=""),
    ),
    "references": ("r.yaml", lambda d: read_reference(d / "r.yaml", ["a"])),
    "phases": (
        "p.yaml",
        lambda d: read_phases(
            d / "p.yaml", ["a"], ShareLimits(floors=np.zeros(1), caps=np.ones(1))
        ),
    ),
}


def put(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)


@pytest.mark.parametrize("reader", JSON_READERS)
def test_every_json_is_read_within_bounds(tmp_path: Path, reader: str) -> None:
    name, read = JSON_READERS[reader]
    for text, message in (
        ("[" * 100_000, "is nested deeper than 64"),
        ('{"a": 1, "a": 2}', "'a' is there twice in one object"),
        ('{"rms_norm_eps": 1e400}', r"the number 1e400 is out of range \(rms_norm_eps\)"),
        ('{"n": %s}' % ("9" * 5000), r"out of range \(n\)"),
    ):
        put(tmp_path, name, text)
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert Path(name).name in str(error.value)


@pytest.mark.parametrize("reader", YAML_READERS)
def test_every_yaml_is_read_within_bounds(tmp_path: Path, reader: str) -> None:
    name, read = YAML_READERS[reader]
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    for text, message in (
        (bomb, "unfolds to more than 100,000 values"),
        ("[" * 1000, "is nested deeper than 64"),
        ("a: 1\na: 2", "line 2: a is there twice; keep one"),
        ("a: " + "9" * 5000, "line 1: .* is out of range"),
    ):
        put(tmp_path, name, text)
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert name in str(error.value)


@pytest.mark.parametrize("reader", [*JSON_READERS, *(f"YAML {name}" for name in YAML_READERS)])
def test_no_reader_waits_for_a_pipe(tmp_path: Path, reader: str) -> None:
    name, read = {**JSON_READERS, **{f"YAML {n}": r for n, r in YAML_READERS.items()}}[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)  # nobody writes: a reader that opened it would wait for ever
    if reader == "journal":  # as if it were not there
        assert read(tmp_path) == journal.Journal()
        return
    with pytest.raises(ValueError, match=f"{Path(name).name}|{tmp_path}"):
        read(tmp_path)


def test_trackers_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("9" * 5000)
    with pytest.raises(ValueError, match=f"{TRACKER} has 5,000 bytes"):
        latest_iteration(tmp_path)
    with pytest.raises(ValueError, match=f"{TRACKER} has 5,000 bytes"):
        find_megatron_lm(tmp_path)
    (tmp_path / TRACKER).unlink()
    (tmp_path / TRACKER).symlink_to("/dev/zero")
    assert latest_iteration(tmp_path) is None


def listed(directory: Path, name: str) -> None:
    """Write a whole list of checksums that names ``name``."""
    text = f"{integrity._TITLE}\n{'0' * 64}  {name}\n# 5 bytes\n"
    own = hashlib.sha256(text.encode()).hexdigest()
    (directory / CHECKSUMS).write_text(f"{text}# sha256 of all above: {own}\n")


@pytest.mark.parametrize("name", ["/dev/zero", "../x", "a/../../x", "pipe", "device"])
def test_a_list_of_checksums_opens_only_files_of_its_directory(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "iter_0000001"
    directory.mkdir()
    (tmp_path / "x").write_text("12345")
    os.mkfifo(directory / "pipe")
    (directory / "device").symlink_to("/dev/zero")
    listed(directory, name)
    message = (
        "names .*, which is not a file inside of"
        if "/" in name
        else "is a (named pipe|character device); a regular file is wanted; 5 bytes were written"
    )
    with pytest.raises(DamagedError, match=message):
        integrity.verify(directory)
    with pytest.raises(DamagedError, match=f"{message}|has no {DESCRIPTION}"):
        find_iteration(directory)


def test_a_list_of_checksums_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CHECKSUMS)
    with pytest.raises(DamagedError, match=r"checksums\.txt is a named pipe"):
        integrity.read(tmp_path)


def test_linked_files_of_a_list_are_read(tmp_path: Path) -> None:
    """The twin: links to files stay as good as the files."""
    (tmp_path / "blob").write_text("12345")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "a").symlink_to("../blob")
    integrity.write(directory)
    integrity.verify(directory)
    (tmp_path / "blob").write_text("12346")
    with pytest.raises(DamagedError, match="is damaged"):
        integrity.verify(directory)


@pytest.mark.parametrize("file", ["/etc/passwd", "../x.safetensors", 3, "a/b.safetensors"])
def test_an_index_names_only_files_of_its_directory(tmp_path: Path, file: object) -> None:
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ValueError, match=r"index\.json names .*not a file"):
        hf.HfWeights(tmp_path, GROUPED)


def test_shards_lie_in_their_directory(tmp_path: Path) -> None:
    shard = {"format": "mds", "version": 2, "compression": None, "zip_data": None}
    shard["raw_data"] = {"basename": "../x", "bytes": 3}  # type: ignore[assignment]
    (tmp_path / mds.INDEX_NAME).write_text(json.dumps({"shards": [shard]}))
    with pytest.raises(ValueError, match=r"index\.json names '\.\./x', which is not a file inside"):
        mds.shards_of(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000; it must be at most 65,"),
        ("vocab_size", 2**31, "vocab_size is 2147483648; it must be at most 2,147,483,647"),
        ("rms_norm_eps", 1e300, r"rms_norm_eps is 1e\+300; it must be at most 1e\+18"),
        ("rope_theta", float("inf"), "rope_theta is inf; it must be a positive number"),
        ("hidden_size", "40", "hidden_size is '40'; it must be a positive integer"),
    ],
)
def test_fields_out_of_bounds_are_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    config = hf_config.config_of_shape(GROUPED, dtype="float32")
    for place in (config, config["rope_parameters"]):
        if field in place:
            place[field] = value
    (tmp_path / hf_config.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: (rope_parameters: )?{message}"):
        hf_config.read_shape(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 10**12, "num_layers is 1000000000000; it must be at most 65,536"),
        ("num_layers", "2", "num_layers is '2'; it must be a positive integer"),
        ("head_dim", True, "head_dim is True; it must be a positive integer"),
        ("norm_epsilon", float("nan"), "norm_epsilon is nan; it must be a positive number"),
        ("norm_epsilon", float("inf"), "norm_epsilon is inf; it must be a positive number"),
        ("sliding_window", -1, "sliding_window is -1; it must be a positive integer"),
    ],
)
def test_shapes_out_of_bounds_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUPED, **{field: value})
    assert ModelShape(**GROUPED.to_dict()) == GROUPED


@pytest.mark.parametrize(
    ("reader", "entry", "message"),
    [
        ("description", {"iteration": "3"}, "iteration is '3'; wanted int"),
        ("description", {"details": [1]}, r"details is \[1\]; wanted dict"),
        ("description", {"shape": 3}, "megashear.json is broken"),
        ("manifest", {"domains": [3]}, "manifest.json is not a manifest"),
        ("manifest", {"vocab_size": "9"}, "vocab_size is '9'; wanted int"),
        ("manifest", {"dtype": "nonsense"}, "'nonsense' not understood"),
        ("manifest", {"eos_id": True}, "eos_id is True; wanted int | None"),
        ("certificate", {"weights": {"a": 3}}, "3 stands where an object is wanted"),
        ("journal", {"places": [3]}, "x.json does not say what a run"),
    ],
)
def test_values_of_another_type_are_refused(
    tmp_path: Path, reader: str, entry: dict[str, Any], message: str
) -> None:
    values: dict[str, dict[str, Any]] = {
        "description": {"format": 2, "iteration": 3, "stage": "cut", "shape": GROUPED.to_dict()},
        "manifest": {"format": "megashear-data-1", "domains": [], "dtype": "uint16"},
        "certificate": {"format": certificate.FORMAT},
        "journal": {"counts": None},
    }
    name, read = JSON_READERS[reader]
    put(tmp_path, name, json.dumps(values[reader] | entry))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
