import gzip
import hashlib
import json
import logging
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megashear.commands.preprocess import format_manifest
from megashear.data.manifest import read_manifest
from megashear.preprocessing import domains
from megashear.preprocessing.documents import read_texts
from megashear.preprocessing.inputs import find_domains
from megashear.tokenizer.choice import load_tokenizer
from tests.texts import preprocess, write_jsonl


def documents(prefix: Path) -> list[list[int]]:
    text = IndexedDataset(str(prefix))
    return [text[i].tolist() for i in range(len(text))]


def below(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_every_document_is_tokenised_on_its_side_in_order(data, texts, sentencepiece_file) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    assert data.names == tuple(texts)
    for name, each in texts.items():
        for prefix, side in ((data.prefix(name), False), (data.held_out_prefix(name), True)):
            expected = [
                [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                for text in each
                if below(text, 0.1) is side
            ]
            assert documents(prefix) == expected
            assert expected


def test_manifest_counts_what_is_there(data, jsonl, sentencepiece_file) -> None:
    for domain in data.domains:
        train = documents(data.prefix(domain.name))
        held_out = documents(data.held_out_prefix(domain.name))
        assert (domain.documents, domain.tokens) == (len(train), sum(map(len, train)))
        assert domain.held_out_documents == len(held_out)
        assert domain.held_out_tokens == sum(map(len, held_out))
        assert domain.source_bytes == jsonl[domain.name][0].stat().st_size
    assert read_manifest(data.directory) == data
    assert data.dtype == "uint16"
    assert load_tokenizer(data.tokenizer_directory).fingerprint == data.tokenizer_fingerprint


def test_marks_can_be_left_out(tokenise, texts) -> None:
    data = tokenise(texts["numbers"], append_eod=False, prepend_bos=False)
    tokens = set().union(*documents(data.prefix("prose")))
    assert not {data.bos_id, data.eos_id} & tokens


def test_sides_stay_when_text_is_added(tokenise, texts) -> None:
    first = tokenise(texts["numbers"], "first", held_out_fraction=0.1)
    added = [text for text in texts["paths"] if text not in texts["numbers"]]
    more = tokenise(added + texts["numbers"], "more", held_out_fraction=0.1)
    for side in ("prefix", "held_out_prefix"):
        before, after = (documents(getattr(each, side)("prose")) for each in (first, more))
        assert [document for document in after if document in before] == before


def test_sides_stay_in_any_order_and_packing(jsonl, data, tmp_path, sentencepiece_file) -> None:
    """Held out once, held out for ever: whatever files lie around the document."""
    for name in data.names:
        lines = jsonl[name][0].read_bytes().splitlines(keepends=True)
        first, second = tmp_path / f"{name}/1.jsonl", tmp_path / f"{name}/0.jsonl.gz"
        first.parent.mkdir()
        first.write_bytes(b"".join(lines[::-2]))
        second.write_bytes(gzip.compress(b"".join(lines[-2::-2])))
    found = preprocess(
        find_domains(tmp_path), tmp_path / "o", sentencepiece_file, held_out_fraction=0.1
    )
    for name in data.names:
        for side in ("prefix", "held_out_prefix"):
            before, after = (documents(getattr(each, side)(name)) for each in (data, found))
            assert before != after
            assert sorted(before) == sorted(after)


def test_workers_change_nothing(jsonl, sentencepiece_file, data, tmp_path) -> None:
    output = tmp_path / "parallel"
    options = {"held_out_fraction": 0.1, "chunk_bytes": 2000}  # many chunks: their order counts
    preprocess(jsonl, output, sentencepiece_file, workers=2, **options)
    assert content(output) == content(data.directory)


def test_blank_documents_are_skipped_and_counted(tokenise, texts) -> None:
    data = tokenise(["", " \n", None, 7, ["a"], *texts["numbers"]])
    assert data.domains[0].skipped == {"empty": 2, "not a string": 3}
    total = data.domains[0].documents + data.domains[0].held_out_documents
    assert total == len(texts["numbers"])


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path, sentencepiece_file) -> None:
    file = tmp_path / "web.jsonl"
    file.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n\n')
    data = preprocess({"web": [file]}, tmp_path / "out", sentencepiece_file)
    assert data.domains[0].documents == data.domains[0].held_out_documents == 1
    assert data.domains[0].lone_surrogates == 1  # the pair of the second line is one character
    assert "| 1 halves of surrogate pairs replaced" in format_manifest(data)
    assert read_manifest(data.directory) == data
    assert list(read_texts(file, "text")) == ["cut \ufffd", "whole \U0001f600"]


@pytest.mark.parametrize("beside", ["{}", None])
def test_the_file_taken_of_two_tokenizers_is_said(
    jsonl, sentencepiece_file, tmp_path, caplog, beside: str | None
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(sentencepiece_file, model / "tokenizer.model")
    if beside is not None:
        (model / "tokenizer.json").write_text(beside)
    preprocess(jsonl, tmp_path / "out", model)
    said = f"--tokenizer-model: {model}/tokenizer.model is used, not tokenizer.json beside it"
    assert (said in caplog.text) is (beside is not None)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_small_domain_is_divided_by_length(tokenise, fraction: float, caplog) -> None:
    short, long = "a short text", "a much longer text " * 20
    with caplog.at_level(logging.WARNING):
        data = tokenise([long, short, long, short], held_out_fraction=fraction)
    lengths = {
        side: {len(tokens) for tokens in documents(prefix("prose"))}
        for side, prefix in (("train", data.prefix), ("held out", data.held_out_prefix))
    }
    small = "held out" if fraction < 0.5 else "train"
    large = "train" if fraction < 0.5 else "held out"
    assert max(lengths[small]) < min(lengths[large])
    assert len(lengths[small]) == len(lengths[large]) == 1  # copies went with it
    assert "domain prose: by hash all its 4 documents fell on one side" in caplog.text
    assert not list(data.directory.glob("*~*"))


GOOD = b'{"text": "a line"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut\n', r"prose\.jsonl, line 3 is not valid JSON: "),
        (b'{"text": "\xff"}\n', r"prose\.jsonl, line 3 is not UTF-8: .*convert the file"),
        (b'["text"]\n', "line 3 holds a list; a JSON object is wanted"),
        (b'{"content": "x", "id": 1}\n', r"line 3 has no key 'text', only \['content', 'id'\]"),
    ],
)
def test_broken_lines_are_refused_and_leave_nothing(
    tmp_path, sentencepiece_file, line: bytes, message: str
) -> None:
    file = tmp_path / "prose.jsonl"
    file.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(ValueError, match=message):
        preprocess({"prose": [file]}, tmp_path / "out", sentencepiece_file)
    assert os.listdir(tmp_path) == ["prose.jsonl"]


def test_refusal_of_a_worker_reaches_the_user(tmp_path, sentencepiece_file) -> None:
    file = tmp_path / "prose.jsonl"
    file.write_bytes(GOOD + GOOD + b"{}\n")
    inputs, output = {"prose": [file]}, tmp_path / "out"
    with pytest.raises(ValueError, match=r"prose\.jsonl, line 3 has no key 'text'"):
        preprocess(inputs, output, sentencepiece_file, workers=2, chunk_bytes=1)
    assert os.listdir(tmp_path) == ["prose.jsonl"]


def test_existing_output_is_refused(tokenise, texts, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists; delete it or write to another"):
        tokenise(texts["numbers"])


@pytest.mark.parametrize(
    ("texts_of_domain", "message"),
    [
        ([], r"domain 'prose' is empty: its 1 files .*\(nothing skipped\)"),
        (["", " ", 1], r"domain 'prose' is empty: .*\(2 empty, 1 not a string skipped\)"),
        (["one"], "domain 'prose' has 1 documents, all of one text; .* two different"),
        (["one", "one"], "domain 'prose' has 2 documents, all of one text"),
    ],
)
def test_domains_that_cannot_be_divided_are_refused(
    tokenise, tmp_path, texts_of_domain: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenise(texts_of_domain)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_fraction": 0.0}, "--held-out-fraction is 0.0; wanted 1e-9 or more, below 1"),
        ({"held_out_fraction": 1.0}, "--held-out-fraction is 1.0"),
        ({"workers": 0}, "--workers is 0; wanted 1"),
        ({"json_key": "body"}, r"no key 'body', only \['text'\]; .*--json-key"),
    ],
)
def test_options_out_of_range_are_refused(tokenise, texts, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenise(texts["numbers"], **options)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("a/b", ["x.jsonl"], "domain 'a/b' cannot name a file"),
        ("tokenizer", ["x.jsonl"], "domain 'tokenizer' cannot name a file"),
        ("cc_heldout", ["x.jsonl"], "domain 'cc_heldout' ends in '_heldout'.*rename"),
        ("cc", [], "domain 'cc' has no"),
        ("cc", ["gone.jsonl"], "domain 'cc': .*gone.jsonl does not exist"),
    ],
)
def test_inputs_that_are_none_are_refused(
    tmp_path, sentencepiece_file, name: str, files: list[str], message: str
) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    with pytest.raises(ValueError, match=message):
        preprocess({name: [tmp_path / f for f in files]}, tmp_path / "out", sentencepiece_file)
    with pytest.raises(ValueError, match="no domain to preprocess"):
        preprocess({}, tmp_path / "out", sentencepiece_file)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("eos_token", "has no EOS token .*--no-append-eod to do without"),
        ("bos_token", "has no BOS token .*--no-prepend-bos to do without"),
    ],
)
def test_missing_marks_are_refused(tmp_path, hugging_face_file, key: str, message: str) -> None:
    load_tokenizer(hugging_face_file).copy_to(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: None}))
    file = write_jsonl(tmp_path / "x.jsonl", ["a", "b"])
    with pytest.raises(ValueError, match=message):
        preprocess({"x": [file]}, tmp_path / "out", tmp_path)


def test_vocabulary_of_the_model_is_checked(data, tmp_path) -> None:
    largest = max(data.domains, key=lambda domain: domain.largest_id)
    file, _, token = largest.largest_id_at.partition(", token ")
    stored = np.fromfile(data.directory / file, dtype=np.uint16)
    assert stored[int(token)] == largest.largest_id
    data.check_vocab(largest.largest_id + 1)
    with pytest.raises(
        ValueError, match=rf"{file}, token {int(token) + 1} is id \d+, but the model has"
    ):
        data.check_vocab(largest.largest_id)


def test_largest_id_is_that_of_the_files(data) -> None:
    for domain in data.domains:
        files = [data.prefix(domain.name), data.held_out_prefix(domain.name)]
        found = [np.fromfile(f"{file}.bin", dtype=np.uint16).max() for file in files]
        assert domain.largest_id == max(found)


def test_manifests_of_before_fall_back_on_the_tokenizer(untouched) -> None:
    path = untouched.directory / "manifest.json"
    content = json.loads(path.read_text())
    for domain in content["domains"]:
        for key in ("skipped", "text_bytes", "pretokenised_documents", "largest_id"):
            del domain[key]
        del domain["largest_id_at"]
        domain["skipped_documents"] = 3
    path.write_text(json.dumps(content))
    data = read_manifest(untouched.directory)
    assert data.domains[0].skipped == {"empty": 3}
    data.check_vocab(300)
    with pytest.raises(ValueError, match="tokenised with 300 ids but the model has 299"):
        data.check_vocab(299)


def test_directories_of_something_else_are_refused(tokenise, texts, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is not a megashear data directory.*preprocess"):
        read_manifest(tmp_path)
    for text, message in (
        ("{", "is not a manifest this version reads: it is not JSON: Expecting"),
        ("[]", "is not a manifest this version reads"),
        ('{"format": "x"}', "its format is 'x', wanted 'megashear-data-1'"),
        ('{"format": "megashear-data-1", "domains": [], "more": 1}', "'more'"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)


def test_copies_cut_short_are_refused(tokenise, texts) -> None:
    data = tokenise(texts["numbers"])
    text, index = data.directory / "prose_heldout.bin", data.directory / "prose_heldout.idx"
    whole = text.read_bytes(), index.read_bytes()
    size = len(whole[0])
    text.write_bytes(whole[0][:-2])
    with pytest.raises(
        ValueError, match=rf"heldout.bin has {size - 2} bytes, .*idx .* describes {size}: "
    ):
        read_manifest(data.directory)
    text.write_bytes(whole[0])
    index.write_bytes(whole[1][:-8])
    length = len(whole[1])
    with pytest.raises(ValueError, match=rf"idx has {length - 8} bytes, its header wants {length}"):
        read_manifest(data.directory)
    index.unlink()
    with pytest.raises(ValueError, match=r"heldout.idx does not exist, though .*heldout.bin is"):
        read_manifest(data.directory)
    text.unlink()
    with pytest.raises(ValueError, match=r"prose_heldout.idx does not exist; copy both"):
        read_manifest(data.directory)


def test_files_of_another_run_are_refused(tokenise, texts) -> None:
    data, other = tokenise(texts["numbers"]), tokenise(texts["paths"], "other")
    for suffix in (".bin", ".idx"):
        shutil.copy(other.directory / f"prose{suffix}", data.directory)
    with pytest.raises(
        ValueError, match=r"hold \d+ tokens .* but manifest.json says \d+ of uint16"
    ):
        read_manifest(data.directory)


def test_what_lies_where_data_should_is_said(tokenise, texts, tmp_path) -> None:
    (tmp_path / "gone.tmp").mkdir()
    with pytest.raises(ValueError, match=r"gone.tmp does: preprocessing was interrupted"):
        read_manifest(tmp_path / "gone")
    data = tokenise(texts["numbers"])
    (data.directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has .bin files; data that Megatron-LM tokenised"):
        read_manifest(data.directory)


def test_the_working_directory_without_data_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it has no \S+; make one with `megashear preprocess`"):
        read_manifest(".")


def test_bytes_per_token_are_those_of_the_text(data, texts) -> None:
    for domain in data.domains:
        size = sum(len(text.encode()) for text in texts[domain.name])
        assert domain.text_bytes == size
        assert domain.bytes_per_token == size / (domain.tokens + domain.held_out_tokens)


def test_progress_shows_bytes_and_documents(tokenise, texts, capsys) -> None:
    tokenise(texts["numbers"], "quiet")
    assert capsys.readouterr().err == ""
    tokenise(texts["numbers"], "loud", progress=True)
    assert "prose" in (shown := capsys.readouterr().err)
    assert "docs/s" in shown
    assert threading.active_count() < 10


def test_tokens_are_stored_as_megatron_stores_them(data) -> None:
    text = IndexedDataset(str(data.prefix("words")))
    assert text.index.dtype == np.uint16


def test_a_mistake_of_a_whole_domain_is_found_at_the_start(
    jsonl, tmp_path, sentencepiece_file
) -> None:
    last = tmp_path / "zz.jsonl"
    last.write_bytes(b"\n" + b'{"body": "x"}\n' * 9)
    with pytest.raises(ValueError, match=r"zz\.jsonl, line 2 has no key 'text', only \['body'\]"):
        preprocess({**jsonl, "zz": [last]}, tmp_path / "out", sentencepiece_file, progress=True)
    assert os.listdir(tmp_path) == ["zz.jsonl"]


def test_a_description_beside_the_data_is_found_at_the_start(
    jsonl, tmp_path, sentencepiece_file, monkeypatch
) -> None:
    """Whatever lies before it in its domain, of the same suffix or another."""
    monkeypatch.setattr(domains, "encode_chunk", None)  # before anything is tokenised
    file = shutil.copy(jsonl["numbers"][0], tmp_path / "a.jsonl")
    other = tmp_path / "dataset_infos.json"
    other.write_text('{\n  "name": "numbers"\n}')
    message = r"infos\.json, line 1 is not valid JSON: .* or move the file away if it is no text"
    inputs = {"x": [Path(file), other]}
    with pytest.raises(ValueError, match=message):
        preprocess(inputs, tmp_path / "out", sentencepiece_file, progress=True)
    other.write_text('{"name": "numbers"}')
    message = r"infos\.json, line 1 has no key 'text', only \['name'\]; .* or move the file away"
    alike = Path(shutil.copy(file, tmp_path / "a.json"))
    for inputs in ({"x": [Path(file), other]}, {"x": [alike, other]}):
        with pytest.raises(ValueError, match=message):
            preprocess(inputs, tmp_path / "out", sentencepiece_file, progress=True)
