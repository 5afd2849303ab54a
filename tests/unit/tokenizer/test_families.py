"""Ids are those of transformers' AutoTokenizer, whatever files of a tokenizer are there."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from megashear.tokenizer import fast_tokenizer, tokenizer_files
from megashear.tokenizer.choice import load_tokenizer
from megashear.tokenizer.models import SentencePieceTokenizer

transformers = pytest.importorskip("transformers")

SENTENCES = ["the cat sat on the mat", "a  cat   that    sat", "on  the    mat  sat"] * 40
TEXTS = [
    "the cat sat",
    "the  cat   sat on\n\n\tthe mat ",
    "a <tool> the <tool>cat</tool> mat",
    "mat \u20ac e\u0301 \U0001f642 cat <s> </s> <|im_end|> 12,345",
    "",
]
LEADING = [" the cat", "  the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model made as LLaMA's."""
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def vocabulary(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same model's pieces and merges, for LlamaTokenizer."""
    folder = tmp_path_factory.mktemp("fast")
    fast_tokenizer.write_for_transformers(model, folder)
    values: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())["model"]
    return {"vocab": values["vocab"], "merges": [tuple(pair) for pair in values["merges"]]}


@pytest.fixture(scope="module")
def bytes_vocabulary() -> dict[str, Any]:
    """Pieces and merges of a byte-level tokenizer, as LLaMA-3's and Qwen's."""
    trained = tokenizers.Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES, trainer)
    values = json.loads(trained.to_str())["model"]
    return {"vocab": values["vocab"], "merges": [tuple(pair) for pair in values["merges"]]}


def plain(name: str) -> AddedToken:
    return AddedToken(name, normalized=False, special=False)


def check(directory: Path, kind: str, *texts: str) -> Any:
    """Hold what we read to what AutoTokenizer reads."""
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    auto = transformers.AutoTokenizer.from_pretrained(str(directory))
    ours = load_tokenizer(directory)
    assert (ours.bos_id, ours.eos_id) == (auto.bos_token_id, auto.eos_token_id)
    for text in [*TEXTS, *texts]:
        wanted = auto.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == wanted, (text, type(auto).__name__)
    files = tokenizer_files.find(directory)
    assert tokenizer_files.fingerprint(files) == ours.fingerprint
    ids = tokenizer_files.token_ids(files)
    assert ids.get("eos_token_id") == ours.eos_id
    ours.copy_to(directory / "copy")
    assert load_tokenizer(directory / "copy").fingerprint == ours.fingerprint
    return ours


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    change(values)
    file.write_text(json.dumps(values))


def test_llama_with_both_files_keeps_the_ids_of_the_sentencepiece_model(
    tmp_path: Path, model: Path, vocabulary: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    transformers.LlamaTokenizer(**vocabulary).save_pretrained(tmp_path)
    ours = check(tmp_path, "llama")
    assert (ours.path.name, ours.note) == ("tokenizer.model", None)
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    assert (ours.path.name, ours.note) == ("tokenizer.model", None)
    # a blank at the very beginning is where transformers 5 leaves SentencePiece
    fast = load_tokenizer(tmp_path / "tokenizer.json")
    assert [fast.encode(text) for text in LEADING] != [ours.encode(text) for text in LEADING]


@pytest.mark.parametrize("word", ["cat", "\u20ac\U0001f642"])
def test_a_sentencepiece_model_reads_what_a_template_wrote(
    model: Path, tmp_path: Path, word: str
) -> None:
    fast_tokenizer.write_for_transformers(model, tmp_path)
    shutil.copyfile(model, tmp_path / "tokenizer.model")
    text = f"<s>the {word}\n\nsat: on the mat</s>\n a<unk><s>{word} mat"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    ours = SentencePieceTokenizer(model)
    ids, ends = ours.encode_rendered(text)
    assert ids == wanted["input_ids"]
    assert ends == [end for _, end in wanted["offset_mapping"]]
    assert ours.special_tokens == {"<s>", "</s>", "<unk>"}
    assert [ours.token(number) for number in (ours.bos_id, ours.eos_id)] == ["<s>", "</s>"]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "options",
    [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_bos_token": True}],
    ids=["plain", "legacy", "no prefix space", "adds BOS"],
)
def test_a_tokenizer_json_with_more_tokens_is_used(
    tmp_path: Path, model: Path, vocabulary: dict[str, Any], kind: str, options: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    richer = transformers.LlamaTokenizer(**vocabulary, **options)
    richer.add_tokens([plain("<tool>"), plain("</tool>")])
    richer.add_special_tokens({"eos_token": "<|im_end|>"})
    richer.save_pretrained(tmp_path)
    # transformers 5 forgets to write legacy, release 4 does
    edit(tmp_path / "tokenizer_config.json", lambda v: v.update(options))
    ours = check(tmp_path, kind, *LEADING)
    assert ours.note is not None
    assert "tokenizer.json is used, as transformers does, and not tokenizer.model" in ours.note
    assert "2 added tokens are no pieces of it ('<tool>', '</tool>')" in ours.note
    assert "EOS is 292, not 2" in ours.note
    # the twin: what was silently taken before
    before = SentencePieceTokenizer(model)
    assert before.eos_id == 2
    assert before.encode(TEXTS[2]) != ours.encode(TEXTS[2])


def test_a_file_that_is_named_is_used_and_said_to_disagree(
    tmp_path: Path, model: Path, vocabulary: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    richer = transformers.LlamaTokenizer(**vocabulary)
    richer.add_tokens([plain("<tool>")])
    richer.save_pretrained(tmp_path)
    named = load_tokenizer(tmp_path / "tokenizer.model")
    assert named.path.name == "tokenizer.model"
    assert named.note is not None
    assert "used as it was named, though transformers takes tokenizer.json" in named.note
    named.copy_to(tmp_path / "copy")  # which must not be read as the other one
    assert load_tokenizer(tmp_path / "copy").fingerprint == named.fingerprint


def test_tokens_that_never_come_from_text_change_nothing(
    tmp_path: Path, model: Path, vocabulary: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    padded = transformers.LlamaTokenizer(**vocabulary)
    padded.add_special_tokens({"pad_token": "<pad>"})
    padded.save_pretrained(tmp_path)
    ours = check(tmp_path, "llama")
    assert (ours.path.name, ours.note) == ("tokenizer.model", None)


def test_files_that_cut_otherwise_are_noticed(
    tmp_path: Path, model: Path, vocabulary: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    vocabulary = vocabulary | {"merges": vocabulary["merges"][:3]}
    transformers.LlamaTokenizer(**vocabulary).save_pretrained(tmp_path)
    ours = check(tmp_path, "llama", *LEADING)
    assert ours.note is not None
    assert "disagrees: it cuts text into other pieces; to use that" in ours.note


def test_another_eos_in_the_config_alone_is_taken(
    tmp_path: Path, model: Path, vocabulary: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    transformers.LlamaTokenizer(**vocabulary).save_pretrained(tmp_path)
    added = {"290": {"content": "<|im_end|>", "special": True, "normalized": False}}
    edit(
        tmp_path / "tokenizer_config.json",
        lambda v: v.update(eos_token="<|im_end|>", added_tokens_decoder=added),
    )
    assert check(tmp_path, "llama", *LEADING).eos_id == 290
    (tmp_path / "tokenizer.json").unlink()
    alone = load_tokenizer(tmp_path)  # pieces and the config
    assert (alone.bos_id, alone.eos_id, alone.vocab_size, alone.note) == (1, 290, 291, None)
    assert alone.decode([*alone.encode("the cat"), 290]) == "the cat"


def test_tokens_of_text_beside_a_lone_sentencepiece_model_are_said(
    tmp_path: Path, model: Path
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 290, "[PAD]": 291}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    note = load_tokenizer(tmp_path).note
    assert note is not None
    assert "lacks 1 tokens that the files beside it add ('<tool>')" in note


@pytest.mark.parametrize("config", [{"bos_token": "", "eos_token": ""}, {}])
def test_an_empty_name_says_nothing(tmp_path: Path, model: Path, config: dict[str, str]) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def byte_level(directory: Path, vocabulary: dict[str, Any]) -> None:
    """Save a tokenizer as LLaMA-3's."""
    made = tokenizers.Tokenizer(BPE(**vocabulary, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    made.add_tokens([plain("<tool>")])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    wrapped.save_pretrained(directory)


def test_llama_3_beside_a_tiktoken_file_is_read(
    tmp_path: Path, bytes_vocabulary: dict[str, Any]
) -> None:
    byte_level(tmp_path, bytes_vocabulary)
    lines = (f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    ours = check(tmp_path, "llama", *LEADING)
    assert ours.path.name == "tokenizer.json"
    assert "tokenizer.json is used, not tokenizer.model beside it" in str(ours.note)
    assert "not a SentencePiece model but tiktoken's" in str(ours.note)
    with pytest.raises(ValueError, match=r"but tiktoken's, as LLaMA-3 .*give its tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tiktoken's.*; and .*tokenizer\.json is not .*: neither can"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"tokenizer\.model is not a SentencePiece model but tikto"
    ):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_json_leaves_the_sentencepiece_model(
    tmp_path: Path, model: Path
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    ours = load_tokenizer(tmp_path)
    assert ours.path.name == "tokenizer.model"
    assert "tokenizer.model is used, not tokenizer.json beside it" in str(ours.note)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_is_read_with_its_added_tokens(
    tmp_path: Path, bytes_vocabulary: dict[str, Any], kind: str
) -> None:
    made = transformers.Qwen2Tokenizer(**bytes_vocabulary)
    made.add_tokens([plain("<tool>"), plain("</tool>")])
    made.add_special_tokens({"eos_token": "<|im_end|>"})
    made.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(bytes_vocabulary["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in bytes_vocabulary["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    ours = check(tmp_path, kind, *LEADING)
    assert (ours.bos_id, ours.note) == (None, None)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"it has a vocab\.json: write the other file with trans"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("declared_in", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_other_files_declare_are_added(
    tmp_path: Path, bytes_vocabulary: dict[str, Any], declared_in: str
) -> None:
    byte_level(tmp_path, bytes_vocabulary)
    edit(tmp_path / "tokenizer.json", lambda v: v["added_tokens"].pop())  # <tool>
    size = len(bytes_vocabulary["vocab"]) + 2
    token = {"content": "<tool>", "special": False, "normalized": False}
    without = load_tokenizer(tmp_path)
    lacking = without.encode(TEXTS[2])

    def declare(number: int) -> None:
        entry = {"added_tokens_decoder": {str(number): token}}
        named = entry if declared_in == "tokenizer_config.json" else {"<tool>": number}
        edit(tmp_path / declared_in, lambda v: v.update(named))

    declare(size)
    ours = check(tmp_path, "llama", *LEADING)
    assert ours.encode(TEXTS[2]).count(size) == 2
    assert ours.encode(TEXTS[2]) != lacking
    assert ours.fingerprint == without.fingerprint
    assert without.added_fingerprint is None
    assert ours.added_fingerprint is not None
    (tmp_path / declared_in).write_text("{}")
    declare(size + 7)
    with pytest.raises(ValueError, match=rf"'<tool>' the id {size + 7}, and it would get {size}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "entry", [{"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": 1}}]
)
def test_added_tokens_that_are_none_are_refused(
    tmp_path: Path, model: Path, entry: dict[str, Any]
) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json does not list added tokens"):
        load_tokenizer(tmp_path)


def test_an_eos_that_the_model_lacks_is_refused(tmp_path: Path, model: Path) -> None:
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    with pytest.raises(ValueError, match=r"names eos_token '<\|eot\|>'.*different tokenizers"):
        load_tokenizer(tmp_path)
