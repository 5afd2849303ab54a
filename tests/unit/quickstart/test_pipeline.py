"""The quickstart's tokenizer, its table, and how it starts and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer

from megashear.__main__ import main
from megashear.parallel import device
from megashear.quickstart import tokenizer as tokenizer_module
from megashear.quickstart.pipeline import Quickstart, Result, rows
from megashear.quickstart.recipe import FULL, SHORT, SOURCE, TARGET
from megashear.quickstart.tokenizer import train_tokenizer
from megashear.text_table import text_table
from megashear.tokenizer.fast_tokenizer import write_for_transformers

CODE = "def f(x):\n    return  x + 1  # kept: \u00e4, tabs\t and ends \n"


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    folder = tmp_path / "jsonl"
    folder.mkdir()
    for name in ("a", "b"):
        texts = [f"{CODE}{name} {number}\n" * 5 for number in range(20)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_the_tokenizer_keeps_code_as_it_is(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "VOCABULARY", 310)
    train_tokenizer(jsonl, tmp_path / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert tokenizer.vocab_size() == 310
    assert tokenizer.decode(tokenizer.encode(CODE)) == CODE
    # stock runtimes get a tokenizer.json that cuts alike, and begins with BOS as training did
    assert write_for_transformers(tmp_path / "tokenizer.model", tmp_path)
    stock = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert stock.encode(CODE).ids == [tokenizer.bos_id(), *tokenizer.encode(CODE)]


def test_the_same_text_gives_the_same_tokenizer(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "VOCABULARY", 270)
    monkeypatch.setattr(tokenizer_module, "_LINES", 100)  # of 800: most are left out
    models = [tmp_path / f"{number}.model" for number in range(3)]
    for model in models:
        train_tokenizer(jsonl, model)
    assert len({pieces(model) for model in models}) == 1


def pieces(model: Path) -> tuple[str, ...]:
    tokenizer = sentencepiece.SentencePieceProcessor(str(model))
    return tuple(tokenizer.id_to_piece(number) for number in range(tokenizer.vocab_size()))


def test_too_little_text_for_the_vocabulary_is_refused(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not make a vocabulary of 2048 .* give more text"):
        train_tokenizer(jsonl, tmp_path / "tokenizer.model")


def test_a_broken_line_of_the_users_text_is_named(jsonl: Path, tmp_path: Path) -> None:
    with (jsonl / "b.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 21 is not valid JSON"):
        train_tokenizer(jsonl, tmp_path / "tokenizer.model")


def test_the_table_shows_every_model_and_domain() -> None:
    results = [
        Result(name="source", parameters=3_443_136, losses={"c": 3.0, "prose": 4.0}),
        Result(name="sheared", parameters=1_279_104, losses={"c": 3.25, "prose": 4.5}),
    ]
    assert text_table(rows(results)).splitlines() == [
        "held-out loss (nats per token)  parameters      c  prose   mean",
        "---------------------------------------------------------------",
        "source                           3,443,136  3.000  4.000  3.500",
        "sheared                          1,279,104  3.250  4.500  3.875",
    ]


def test_the_target_is_smaller_in_all_four_dimensions() -> None:
    for extent in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
        assert getattr(TARGET, extent) < getattr(SOURCE, extent), extent
    assert SHORT.source_iters < FULL.source_iters


def test_an_existing_output_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("kept")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} exists; choose another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_stage_that_fails_ends_the_quickstart(tmp_path: Path) -> None:
    stages = Quickstart(output=tmp_path / "out", recipe=SHORT, seed=1)
    with pytest.raises(ValueError, match=r"a stage ended with status 2; its message is above"):
        stages._run("convert", input=tmp_path / "missing", output=tmp_path / "hf")


def test_the_users_text_must_be_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["quickstart", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "is not a directory of jsonl files, one for each domain" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_does_not_end_the_quickstart(tmp_path: Path) -> None:
    line = Quickstart(output=tmp_path / "nothing", recipe=SHORT, seed=1)._report()
    assert line.startswith("no report.html: no run at ")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_machine_with_a_gpu_is_told_that_the_cpu_is_meant(
    has_gpu: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: has_gpu)
    monkeypatch.setattr(Quickstart, "run", lambda self: None)
    assert main(["quickstart", "--output", str(tmp_path / "out")]) == 0
    assert ("uses the CPU on purpose" in capsys.readouterr().out) is has_gpu
