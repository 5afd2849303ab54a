import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from megashear.tokenizer.choice import load_tokenizer
from tests.texts import preprocess, write_jsonl
from tests.unit.preprocessing.test_domains import documents


@pytest.fixture(params=["sentencepiece_file", "hugging_face_file"])
def file(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_encoding_and_decoding_return_the_text(file: Path, texts) -> None:
    tokenizer = load_tokenizer(file)
    text = texts["words"][0]
    ids = tokenizer.encode(text)
    assert len(ids) > 4  # the truncation saved in the file does not act
    assert max(ids) < tokenizer.vocab_size == 300
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_special_tokens_are_found_and_never_come_from_text(file: Path) -> None:
    tokenizer = load_tokenizer(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ((1, 2) if file.suffix == ".model" else (0, 1))
    ids = tokenizer.encode("before</s>after<s>")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_fingerprint_is_the_sha256_of_the_file(file: Path) -> None:
    assert load_tokenizer(file).fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


def test_directory_is_the_tokenizer_it_holds(file: Path) -> None:
    assert load_tokenizer(file.parent).path == file


def test_copy_loads_under_its_standard_name(tmp_path: Path, file: Path) -> None:
    odd = shutil.copy(file, tmp_path / f"my_llama{file.suffix}")
    (tmp_path / "tokenizer_config.json").write_text("{}")  # another model's
    written = load_tokenizer(odd).copy_to(tmp_path / "copy")
    assert [path.name for path in written] == [file.name]
    assert load_tokenizer(tmp_path / "copy").fingerprint == load_tokenizer(file).fingerprint


def test_files_are_the_companions_of_a_standard_name(tmp_path: Path, file: Path) -> None:
    shutil.copy(file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    assert [path.name for path in tokenizer.files] == [file.name, "tokenizer_config.json"]
    tokenizer.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token": "<end>"}, (0, 2)),
        ({"eos_token": {"content": "<end>", "lstrip": False}}, (0, 2)),
        ({"bos_token": None}, (None, 1)),
    ],
)
def test_special_tokens_follow_the_config(
    tmp_path: Path, hugging_face_file: Path, config: dict, expected: tuple
) -> None:
    shutil.copy(hugging_face_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


def test_config_of_another_tokenizer_is_refused(tmp_path: Path, hugging_face_file: Path) -> None:
    shutil.copy(hugging_face_file, tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eot|>"}')
    with pytest.raises(ValueError, match=r"names eos_token '<\|eot\|>'.*different tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "not a SentencePiece model.*tokenizer.json"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json of the tokenizers library"),
        ("vocab.txt", b"a\n", r"ends in neither \.model \(SentencePiece\) nor \.json"),
        ("special_tokens_map.json", b"{", "is not a tokenizer.json"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "holds a list, not a JSON object")]
)
def test_broken_config_is_refused(
    tmp_path: Path, hugging_face_file: Path, content: str, message: str
) -> None:
    shutil.copy(hugging_face_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*neither tokenizer\.model nor"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer .*gone\.model does not exist"):
        load_tokenizer(tmp_path / "gone.model")


@pytest.fixture
def with_added_tokens(tmp_path: Path, hugging_face_file: Path) -> Path:
    """A tokenizer.json with tokens added later and a template that adds BOS and EOS."""
    model = tokenizers.Tokenizer.from_file(str(hugging_face_file))
    model.add_tokens([tokenizers.AddedToken("<user>", normalized=False)])
    model.add_special_tokens(["<pad>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    file = tmp_path / "tokenizer.json"
    model.save(str(file))
    return file


def test_added_tokens_count_and_templates_do_not(with_added_tokens: Path) -> None:
    tokenizer = load_tokenizer(with_added_tokens)
    found = tokenizers.Tokenizer.from_file(str(with_added_tokens))
    assert tokenizer.vocab_size == 302 == found.token_to_id("<pad>") + 1
    ids = tokenizer.encode("a <user> asks")
    assert ids.count(found.token_to_id("<user>")) == 1  # ordinary text, though added later
    assert not {tokenizer.bos_id, tokenizer.eos_id, found.token_to_id("<pad>")} & set(ids)
    assert tokenizer.decode(ids) == "a <user> asks"


def test_documents_begin_and_end_once(with_added_tokens: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", ["one text", "<s>another</s>"])
    data = preprocess({"x": [file]}, tmp_path / "out", with_added_tokens)
    sides = [documents(p("x")) for p in (data.prefix, data.held_out_prefix)]
    for (tokens,) in sides:
        assert tokens[0] == data.bos_id
        assert tokens[-1] == data.eos_id
        assert not {data.bos_id, data.eos_id} & set(tokens[1:-1])
    assert (data.prepend_bos, data.append_eod) == (True, True)
