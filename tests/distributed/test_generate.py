"""generate at every layout says what transformers' greedy generation says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from megashear.checkpoint.shear import cut_checkpoint  # noqa: E402
from megashear.config import GenerateRun, ParallelConfig  # noqa: E402
from megashear.train import reading  # noqa: E402
from megashear.train.generate import generate, prepare_generate  # noqa: E402
from tests.distributed.test_cut import prune_half_way  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.stock import Stock  # noqa: E402
from tests.text_run import SHAPE, TextRun, write_checkpoint  # noqa: E402
from tests.tiny import layout  # noqa: E402

PROMPTS = ("Return the", "The path of a file is joined with", "x")
NEW = 8
TARGET = dataclasses.replace(
    SHAPE,
    num_layers=3,
    hidden_size=24,
    num_attention_heads=2,
    num_query_groups=2,
    ffn_hidden_size=56,
)


def configured(checkpoint: Path, **more: Any) -> GenerateRun:
    given: dict[str, Any] = {
        "load": str(checkpoint),
        "prompt": PROMPTS,
        "max_new_tokens": NEW,
        "micro_batch_size": 2,
    }
    return GenerateRun(**(given | more))


def said(
    config: GenerateRun,
    parallel: ParallelConfig,
    *,
    replicas: int = 1,
    broken: Callable[[], None] | None = None,
) -> list[str]:
    """What every rank returns at a layout."""
    world_size = replicas * parallel.model_parallel_size

    def body(rank: int) -> list[str]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if broken is not None:
            broken()
        return generate(dataclasses.replace(config, parallel=parallel))

    found = run_ranks(world_size, body)
    assert all(texts == found[0] for texts in found), "ranks differ"
    return found[0]


@pytest.fixture(scope="module")
def in_transformers(stock: Stock) -> list[str]:
    """What transformers' greedy generation says from the exported directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(stock.hf, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stock.hf)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        texts.append(tokenizer.decode(whole[0], skip_special_tokens=True))
    return texts


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("parallel", "replicas"),
    [
        pytest.param(layout(tp=2), 1, id="tp2"),
        pytest.param(layout(pp=2), 1, id="pp2"),
        pytest.param(layout(tp=2, pp=2, vpp=2, sp=True), 1, id="tp2-sp-pp2-vpp2"),
        pytest.param(layout(), 2, id="dp2"),
    ],
)
def test_greedy_text_is_that_of_transformers(
    stock: Stock, in_transformers: list[str], parallel: ParallelConfig, replicas: int
) -> None:
    assert len({*in_transformers}) == len(PROMPTS)
    assert said(configured(stock.checkpoint), parallel, replicas=replicas) == in_transformers


def test_a_slice_of_the_vocabulary_that_is_left_out_is_noticed(
    stock: Stock, in_transformers: list[str]
) -> None:
    whole_rows = reading.whole_rows

    def first_slice(*args: Any) -> Tensor:
        rows = whole_rows(*args)
        rows[:, rows.size(1) // 2 :] = -torch.inf
        return rows

    def broken() -> None:
        reading.whole_rows = first_slice  # type: ignore[assignment]  # of this process alone

    assert said(configured(stock.checkpoint), layout(tp=2), broken=broken) != in_transformers


def test_drawn_text_is_the_same_at_every_layout(stock: Stock) -> None:
    config = configured(stock.checkpoint, temperature=1.0, top_k=50, seed=3)
    alone = said(config, layout())
    assert said(config, layout(tp=2), replicas=2) == alone
    assert alone != said(configured(stock.checkpoint), layout())


def test_a_pruning_run_under_exact_masks_says_what_its_cut_says(
    text: TextRun, tmp_path: Path
) -> None:
    at = layout(pp=2)
    run_ranks(2, lambda rank: prune_half_way(tmp_path / "pruned", SHAPE, TARGET, at))
    run_ranks(
        1,
        lambda rank: cut_checkpoint(tmp_path / "pruned", tmp_path / "cut", exact_target=True),
    )
    config = configured(tmp_path / "pruned", tokenizer_model=str(text.tokenizer))
    cut = said(dataclasses.replace(config, load=str(tmp_path / "cut")), layout())
    assert said(config, layout(tp=2)) == cut


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ("a " * 200,)}, r"has \d+ tokens; the model reads up to 64, and a text to"),
        ({"prompt": ("",), "prepend_bos": False}, "has 0 tokens; the model reads"),
        ({"tokenizer_model": "nowhere"}, "tokenizer nowhere does not exist"),
    ],
)
def test_texts_that_the_model_cannot_read_are_refused(
    stock: Stock, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_generate(configured(stock.checkpoint, **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ()}, "--prompt is not given; give texts to continue, or a file"),
        ({"top_k": 5}, "--top-k 5 chooses what tokens are drawn from, and --temperature 0 draws"),
        ({"top_p": 0.5}, "--top-p 0.5 chooses what tokens"),
        ({"top_p": 1.5, "temperature": 1.0}, "--top-p is 1.5; wanted"),
        ({"load": None}, "--load is not given; name a checkpoint"),
        ({"load_hf": "hf"}, "exclude each other"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(Path("model"), **given)


def test_a_file_of_prompts_has_one_on_each_line(stock: Stock, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two\n")
    prepared = prepare_generate(configured(stock.checkpoint, prompt_file=str(file)))
    decoded = [prepared.tokenizer.decode(tokens) for tokens in prepared.texts]
    assert decoded == [*PROMPTS, "one", "  two"]
    file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"prompts.txt has no line with text"):
        prepare_generate(configured(stock.checkpoint, prompt=(), prompt_file=str(file)))
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"prompts.txt is no text in UTF-8"):
        prepare_generate(configured(stock.checkpoint, prompt_file=str(file)))


def test_a_model_without_a_tokenizer_needs_one(tmp_path: Path, text: TextRun) -> None:
    write_checkpoint(tmp_path / "bare", SHAPE)
    with pytest.raises(ValueError, match="carries no tokenizer; name one with --tokenizer-model"):
        prepare_generate(configured(tmp_path / "bare"))
    small = dataclasses.replace(SHAPE, vocab_size=128)
    write_checkpoint(tmp_path / "small", small)
    with pytest.raises(ValueError, match="has 256 tokens and the model an embedding of 128"):
        prepare_generate(configured(tmp_path / "small", tokenizer_model=str(text.tokenizer)))
