"""Tokenizer files travel with checkpoints, and transformers cuts text as SentencePiece does."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from megashear.conversion import hf
from megashear.tokenizer import tokenizer_files
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import GROUPED

TEXTS = [
    "the cat sat on the mat",
    "the  cat   sat    on",
    "    the cat\n\n\n  sat\n",
    " the",
    "",
    "mat \u20ac \U0001f642 cat",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model made as LLaMA's: byte-pair, byte fallback, spaces scored last."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentences = ["the cat sat on the mat", "a  cat   that    sat", "on  the    mat  sat"] * 40
    (folder / "text").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "bpe"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString((folder / "bpe.model").read_bytes())
    for piece in proto.pieces:
        if set(piece.piece) == {"\u2581"}:
            piece.score = -1e9
    (folder / "llama.model").write_bytes(proto.SerializeToString())
    return folder / "llama.model"


def write(output: Path, tokenizer: Any) -> Path:
    hf.write_directory(output, random_weights(GROUPED).items(), GROUPED, tokenizer=tokenizer)
    return output


def test_text_is_cut_as_sentencepiece_cuts_it(tmp_path: Path, model: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    written = write(tmp_path / "model", model)
    fast = Tokenizer.from_file(str(written / "tokenizer.json"))
    for text in TEXTS:
        ids = fast.encode(text).ids
        assert ids == [pieces.bos_id(), *pieces.encode(text)], text
        assert fast.decode(ids) == text


def test_merges_in_the_order_of_the_pieces_are_noticed(tmp_path: Path, model: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    path = write(tmp_path / "model", model) / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    values["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])
    fast = Tokenizer.from_str(json.dumps(values))
    differ = [text for text in TEXTS if fast.encode(text).ids[1:] != pieces.encode(text)]
    assert "the  cat   sat    on" in differ  # what transformers does without a tokenizer.json


def test_transformers_loads_it(tmp_path: Path, model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    loaded = transformers.AutoTokenizer.from_pretrained(write(tmp_path / "model", model))
    for text in TEXTS:
        assert loaded(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)], text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (pieces.bos_id(), pieces.eos_id())


def test_token_ids_are_taken_from_the_sentencepiece_model(tmp_path: Path, model: Path) -> None:
    config = json.loads((write(tmp_path / "model", model) / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    bare = json.loads((write(tmp_path / "bare", None) / "config.json").read_text())
    assert (bare["bos_token_id"], bare["eos_token_id"]) == (None, None)


def test_token_ids_are_taken_from_a_fast_tokenizer_and_generation_config(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    added = [{"id": 5, "content": "<a>"}, {"id": 6, "content": "<b>"}]
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    names = {"bos_token": {"content": "<a>"}, "eos_token": "<b>", "pad_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    files = tokenizer_files.find(source)
    assert tokenizer_files.token_ids(files) == {"bos_token_id": 5, "eos_token_id": 6}
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 9]}))
    files = tokenizer_files.find(source)
    assert tokenizer_files.token_ids(files) == {"bos_token_id": 5, "eos_token_id": [6, 9]}


def test_token_ids_are_read_again_only_where_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parse = [], tokenizer_files._json
    monkeypatch.setattr(tokenizer_files, "_json", lambda path: read.append(path) or parse(path))
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 5, "content": "<a>"}]}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<a>"}')
    files = tokenizer_files.find(tmp_path)
    ids = tokenizer_files.token_ids(files)
    ids["eos_token_id"] = 7  # whoever changes what he got changes no other's
    before = len(read)
    assert tokenizer_files.token_ids(files) == {"bos_token_id": 5}
    assert len(read) == before > 0
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 66, "content": "<a>"}]}')
    assert tokenizer_files.token_ids(files) == {"bos_token_id": 66}
    assert len(read) > before


def test_the_files_of_a_directory_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    output.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "config.json"):
        (source / name).write_text("{}")
    (source / tokenizer_files.TEMPLATES).mkdir()
    (source / tokenizer_files.TEMPLATES / "endless.jinja").symlink_to("/dev/zero")
    tokenizer_files.copy_for_transformers(tokenizer_files.find(source), output)
    assert sorted(p.name for p in output.iterdir()) == ["chat_template.jinja", "tokenizer.json"]


def test_the_fingerprint_is_the_tokenizers(tmp_path: Path, model: Path) -> None:
    wanted = hashlib.sha256(model.read_bytes()).hexdigest()
    written = write(tmp_path / "model", model)
    assert tokenizer_files.fingerprint(tokenizer_files.find(written)) == wanted
    assert tokenizer_files.fingerprint([written / "tokenizer_config.json"]) is None


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer file .*nowhere does not exist"):
        tokenizer_files.find(tmp_path / "nowhere")
    (tmp_path / "words.txt").write_text("")
    with pytest.raises(ValueError, match="is not a tokenizer file: its name is none of"):
        tokenizer_files.find([tmp_path / "words.txt"])
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x.model is not a SentencePiece model"):
        tokenizer_files.token_ids([tmp_path / "x.model"])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer.model is not a SentencePiece model"):
        tokenizer_files.copy_for_transformers([tmp_path / "x.model"], tmp_path / "out")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not JSON"):
        tokenizer_files.token_ids([tmp_path / "generation_config.json"])


def test_files_of_every_kind_of_tokenizer_travel_both_ways(tmp_path: Path) -> None:
    texts = {
        "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
        "generation_config.json": '{"eos_token_id": [2, 7], "temperature": 0.6}',
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2\n",
        "tekken.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    source = write(tmp_path / "hf", None)
    for name, text in texts.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "README.md").write_text("not the tokenizer's")
    hf_to_megatron(source, tmp_path / "checkpoint", progress=False)
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back", progress=False)
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text, name
    assert "not the tokenizer's" not in (tmp_path / "back" / "README.md").read_text()
