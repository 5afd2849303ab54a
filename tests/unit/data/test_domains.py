import hashlib
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megashear.data import domains as domains_module
from megashear.data.documents import find_domains, read_chunks
from megashear.data.domains import preprocess
from megashear.data.manifest import read_manifest
from megashear.data.tokenizer import load_tokenizer
from tests.unit.data.conftest import write_jsonl


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


def test_workers_change_nothing(jsonl, sentencepiece_file, data, tmp_path, monkeypatch) -> None:
    # Many chunks, or their order says little.
    monkeypatch.setattr(domains_module, "read_chunks", lambda file: read_chunks(file, 2000))
    output = tmp_path / "parallel"
    preprocess(jsonl, output, sentencepiece_file, held_out_fraction=0.1, workers=2)
    assert content(output) == content(data.directory)


def test_blank_documents_are_skipped_and_counted(tokenise, texts) -> None:
    data = tokenise(["", " \n", *texts["numbers"]])
    assert data.domains[0].skipped_documents == 2
    total = data.domains[0].documents + data.domains[0].held_out_documents
    assert total == len(texts["numbers"])


def test_half_a_surrogate_pair_is_replaced(tmp_path, sentencepiece_file) -> None:
    file = tmp_path / "web.jsonl"
    file.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n\n')
    data = preprocess({"web": [file]}, tmp_path / "out", sentencepiece_file)
    assert data.domains[0].documents == data.domains[0].held_out_documents == 1


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


def test_chunks_are_whole_lines_with_their_numbers(tmp_path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"".join(b"%d\n" % n * 3 for n in range(1, 100)) + b"end")
    chunks = list(read_chunks(file, 50))
    assert len(chunks) > 5
    lines = [line for chunk in chunks for line in chunk.lines]
    assert b"".join(lines) == file.read_bytes()
    for chunk in chunks:
        assert lines[chunk.first_line - 1] == chunk.lines[0]


def test_domains_are_files_or_directories(tmp_path) -> None:
    for path in ("wiki.jsonl", "cc/b.jsonl", "cc/a.jsonl", "notes/readme.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert find_domains(tmp_path) == {
        "cc": [tmp_path / "cc/a.jsonl", tmp_path / "cc/b.jsonl"],
        "wiki": [tmp_path / "wiki.jsonl"],
    }
    (tmp_path / "cc.jsonl").touch()
    with pytest.raises(ValueError, match="domain 'cc' is there twice"):
        find_domains(tmp_path)


def test_directories_without_text_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.jsonl file in .* or one level below$"):
        find_domains(tmp_path)
    (tmp_path / "cc.jsonl.zst").touch()
    with pytest.raises(ValueError, match="unpack its 1 compressed"):
        find_domains(tmp_path)
    with pytest.raises(ValueError, match="gone is not a directory"):
        find_domains(tmp_path / "gone")


GOOD = b'{"text": "a line"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut\n', r"prose\.jsonl, line 3 is not valid JSON: "),
        (b'{"text": "\xff"}\n', r"prose\.jsonl, line 3 is not valid JSON: .*utf-8"),
        (b'["text"]\n', "line 3 holds a list; a JSON object is wanted"),
        (b'{"content": "x", "id": 1}\n', r"line 3 has no key 'text', only \['content', 'id'\]"),
        (b'{"text": null}\n', "line 3 has a NoneType under 'text'; text is wanted"),
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


def test_refusal_of_a_worker_reaches_the_user(tmp_path, sentencepiece_file, monkeypatch) -> None:
    monkeypatch.setattr(domains_module, "read_chunks", lambda file: read_chunks(file, 1))
    file = tmp_path / "prose.jsonl"
    file.write_bytes(GOOD + GOOD + b"{}\n")
    with pytest.raises(ValueError, match=r"prose\.jsonl, line 3 has no key 'text'"):
        preprocess({"prose": [file]}, tmp_path / "out", sentencepiece_file, workers=2)
    assert os.listdir(tmp_path) == ["prose.jsonl"]


def test_interrupted_run_leaves_nothing(tokenise, texts, tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(domains_module, "encode_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenise(texts["numbers"])
    assert os.listdir(tmp_path) == ["in"]


def test_left_overs_of_a_killed_run_are_refused(tokenise, texts, tmp_path) -> None:
    (tmp_path / "out.tmp").mkdir()
    with pytest.raises(ValueError, match=r"out\.tmp exists: another run is writing .*delete"):
        tokenise(texts["numbers"])
    assert (tmp_path / "out.tmp").is_dir()


def test_existing_output_is_refused(tokenise, texts, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists; delete it or write to another"):
        tokenise(texts["numbers"])


@pytest.mark.parametrize(
    ("texts_of_domain", "message"),
    [
        ([], "domain 'prose' is empty: its files hold 0 documents without text"),
        (["", " "], "domain 'prose' is empty: its files hold 2 documents without text"),
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
        ({"held_out_fraction": 0.0}, "--held-out-fraction is 0.0; it must lie between 0 and 1"),
        ({"held_out_fraction": 1.0}, "--held-out-fraction is 1.0"),
        ({"workers": 0}, "--workers is 0; at least 1"),
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


def test_vocabulary_of_the_model_is_checked(data) -> None:
    data.check_vocab(300)
    data.check_vocab(320)
    with pytest.raises(ValueError, match="tokenised with 300 ids but the model has 299"):
        data.check_vocab(299)


def test_another_tokenizer_is_refused(data, sentencepiece_file, hugging_face_file) -> None:
    data.check_tokenizer(load_tokenizer(sentencepiece_file))
    with pytest.raises(ValueError, match=r"with another tokenizer .*preprocess again"):
        data.check_tokenizer(load_tokenizer(hugging_face_file))


def test_directories_of_something_else_are_refused(tokenise, texts, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is not a megashear data directory.*preprocess"):
        read_manifest(tmp_path)
    for text, message in (
        ("{", "is not a manifest this version reads: Expecting"),
        ("[]", "is not a manifest this version reads"),
        ('{"format": "x"}', "its format is 'x', wanted 'megashear-data-1'"),
        ('{"format": "megashear-data-1", "domains": [], "more": 1}', "'more'"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(tmp_path)


def test_copies_cut_short_are_refused(tokenise, texts) -> None:
    data = tokenise(texts["numbers"])
    file = data.directory / "prose_heldout.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"prose_heldout.bin has \d+ bytes, wanted \d+ for"):
        read_manifest(data.directory)
    file.unlink()
    with pytest.raises(ValueError, match=r"prose_heldout.bin or .*\.idx is missing"):
        read_manifest(data.directory)


def test_progress_shows_bytes_and_documents(tokenise, texts, capsys) -> None:
    tokenise(texts["numbers"], "quiet")
    assert capsys.readouterr().err == ""
    tokenise(texts["numbers"], "loud", progress=True)
    assert "prose" in (shown := capsys.readouterr().err)
    assert "docs/s" in shown
    assert threading.active_count() < 10


def test_wide_vocabularies_take_wider_tokens(data) -> None:
    text = IndexedDataset(str(data.prefix("words")))
    assert text.index.dtype == np.uint16
    assert DType.optimal_dtype(128_256) == np.int32
