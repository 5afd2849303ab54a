"""JSON and YAML are read within bounds, and what is refused is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megashear.files import structured
from megashear.files.structured import (
    MAX_DEPTH,
    parse_json,
    read_json,
    read_json_object,
    read_yaml,
    read_yaml_pairs,
)

VALUES = {"a": [1, 2.5, None, True, "x"], "b": {"c": -(2**63), "d": 2**64 - 1}, "e": 1e-320}
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


def test_json_is_read_as_the_standard_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALUES))
    assert read_json(path) == VALUES
    assert parse_json("\ufeff{}".encode(), "x") == {}
    assert math.isnan(parse_json("NaN", "x"))  # losses of our own logs


def test_yaml_is_read_as_pyyaml_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(VALUES) + "f: &w {x: 1}\ng: *w\nh: {<<: *w, y: .inf}\n")
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    assert read_yaml_pairs(path)[-1] == (13, "h", {"x": 1, "y": math.inf})
    path.write_text("# nothing\n")
    assert (read_yaml(path), read_yaml_pairs(path)) == (None, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "f.json is not JSON: Expecting property name"),
        ("\xff", "f.json is not JSON: 'utf-8' codec"),
        ("[" * 100_000, "f.json is nested deeper than 64"),
        ('{"a": ' * 70 + "1" + "}" * 70, "f.json is nested deeper than 64"),
        ('{"a": 1, "b": 2, "a": 3}', "f.json: 'a' is there twice in one object; keep one"),
        ("[1e400]", "f.json: the number 1e400 is out of range"),
        ("[-1e400]", "f.json: the number -1e400 is out of range"),
        (f"[{2**64}]", f"f.json: the number {2**64} is out of range"),
        ("9" * 5000, r"f.json: the number 9{20}\.\.\. \(5,000 characters\) is out of range"),
        ("0." + "9" * 5000, "f.json: the number .* is out of range"),
    ],
)
def test_json_out_of_bounds_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_nesting_up_to_the_bound_passes() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    with pytest.raises(ValueError, match="x is nested deeper"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "x")


def test_wide_integers_pass_where_they_are_asked_for() -> None:
    text = '{"model_max_length": 1000000000000000019884624838656}'
    assert parse_json(text, "x", wide_integers=True) == {"model_max_length": int(1e30)}
    with pytest.raises(ValueError, match="out of range"):
        parse_json("9" * 41, "x", wide_integers=True)


def test_an_object_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json holds a list, not a JSON object"):
        read_json_object(path)


def test_a_file_too_large_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + " " * 50)  # no JSON either
    with pytest.raises(ValueError, match="has 51 bytes"):
        read_json(path, max_bytes=50)
    monkeypatch.setattr(structured, "YAML_BYTES", 50)
    with pytest.raises(ValueError, match="has 51 bytes"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "--config x.yaml unfolds to more than 100,000 values"),
        ("a: &a [*a]", "--config x.yaml line 1: an alias stands inside of what it names"),
        ("[" * 1000, "--config x.yaml is nested deeper than 64"),
        (
            "- &a0 [x]\n" + "".join(f"- &a{n} [*a{n - 1}]\n" for n in range(1, 2000)),
            "--config x.yaml is nested deeper than 64",
        ),
        ("a: 1\nb: {c: 2, c: 3}", "--config x.yaml line 2: c is there twice; keep one"),
        ("a: 1\nb: 1.0e+400", r"line 2: 1.0e\+400 is out of range"),
        (f"a: {2**64}", f"line 1: {2**64} is out of range"),
        ("a: " + "9" * 5000, r"line 1: 9{20}\.\.\. \(5,000 characters\) is out of range"),
        ("a: " + "1" + ":10" * 3000, r"line 1: 1:10.* is out of range"),
        ("a: 1" + ":10" * 3000 + ".5", r"line 1: 1:10.* is out of range"),
        ("a: [1", "--config x.yaml is not YAML: while parsing"),
        ("a: !!int x", "--config x.yaml is not YAML: line 1: invalid literal"),
        ("a: !!float ''", "--config x.yaml is not YAML: line 1: "),
        ("a: 2021-99-99", "--config x.yaml is not YAML: line 1: month must be"),
        ("{[1]: 2}", "--config x.yaml is not YAML: .*unhashable"),
        ("a: !!python/object/apply:os.getcwd []", "--config x.yaml is not YAML: could not"),
        ("a: \x01", "--config x.yaml is not YAML: unacceptable character"),
    ],
)
def test_yaml_out_of_bounds_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)

    def read(how: Any) -> None:
        with pytest.raises(ValueError, match=message):
            how(path, "--config x.yaml")

    read(read_yaml)
    if not text.startswith(("[", "-", "{[")):
        read(read_yaml_pairs)


def test_pairs_want_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("- 1")
    with pytest.raises(ValueError, match="--config x does not hold a mapping"):
        read_yaml_pairs(path, "--config x")


def test_aliases_within_the_bound_pass(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("- &w {web: 1}\n" + "- *w\n" * 1000)
    assert read_yaml(path) == [{"web": 1}] * 1001
