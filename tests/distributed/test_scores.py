"""Importance scores at every layout are those of transformers' own model in one process."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from megashear.checkpoint.scores import ImportanceScores, read_scores  # noqa: E402
from megashear.config import ModelConfig, ParallelConfig, ScoreRun  # noqa: E402
from megashear.conversion import hf  # noqa: E402
from megashear.masks.kinds import KINDS  # noqa: E402
from megashear.models import activations  # noqa: E402
from megashear.models.activations import ActivationScores  # noqa: E402
from megashear.parallel.agree import flat_all_reduce  # noqa: E402
from megashear.shape import ModelShape  # noqa: E402
from megashear.train import score as score_module  # noqa: E402
from megashear.train.score import prepare_score, score  # noqa: E402
from tests import text_run  # noqa: E402
from tests.families import FAMILIES  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.reference_llama import random_weights  # noqa: E402
from tests.text_run import SEQUENCE, SHAPE, TextRun  # noqa: E402
from tests.tiny import layout  # noqa: E402

OTHER_KERNELS = 1e-5
"""Relative, of the largest score of a kind: float32 sums of other kernels, in another order."""
OF_BFLOAT16 = 0.02
"""Relative; bfloat16 has 8 significant bits, and sums over positions average its rounding."""
BROKEN = 1e-3
"""Relative; whatever is broken here is off by more."""
NUM_SEQUENCES = 13
"""Not a multiple of any batch of this file, so that the last microbatches are filled up."""
APART = ModelConfig(reset_attention_mask=True, reset_position_ids=True)

Scores = dict[str, Tensor]
"""By kind, [L, units] or [1, units]."""


class Stored(NamedTuple):
    """One model in both forms that a command loads."""

    shape: ModelShape
    checkpoint: Path
    hf: Path


@pytest.fixture(scope="module")
def stored(text: TextRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    folder = tmp_path_factory.mktemp("scored")
    shapes = {"grouped": SHAPE} | {
        name: dataclasses.replace(FAMILIES[name], vocab_size=256, max_position_embeddings=64)
        for name in ("llama2-mha", "qwen2", "qwen3-tied")
    }
    made = {}
    for name, shape in shapes.items():
        weights = random_weights(shape, scale=0.1)
        hf.write_directory(folder / f"{name}-hf", weights.items(), shape)
        text_run.write_checkpoint(folder / name, shape, text.tokenizer)
        made[name] = Stored(shape, folder / name, folder / f"{name}-hf")
    return made


def configured(text: TextRun, of: Stored, output: Path, **more: Any) -> ScoreRun:
    given: dict[str, Any] = {
        "load": str(of.checkpoint),
        "data_path": str(text.data),
        "output": str(output),
        "num_sequences": NUM_SEQUENCES,
        "seq_length": SEQUENCE,
        "micro_batch_size": 2,
    }
    return ScoreRun(**(given | more))


def scored(
    config: ScoreRun,
    parallel: ParallelConfig,
    *,
    replicas: int = 1,
    broken: Callable[[], None] | None = None,
) -> ImportanceScores:
    """What the command writes at a layout."""
    config = dataclasses.replace(config, parallel=parallel)
    Path(config.output).unlink(missing_ok=True)
    world_size = replicas * parallel.model_parallel_size

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if broken is not None:
            broken()
        score(config)

    run_ranks(world_size, body)
    return read_scores(config.output, "--scores")


def plain_scores(config: ScoreRun, model: Stored) -> Scores:
    """The formulas, on transformers' model in float64, each document by itself if kept apart."""
    prepared = prepare_score(dataclasses.replace(config, output="nowhere.json"))
    llama = transformers.AutoModelForCausalLM.from_pretrained(model.hf, dtype=torch.float64).eval()
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[name].append(
            output[0] if output.dim() == 3 else output
        )

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen[name].append(inputs[0][0])

    for number, layer in enumerate(llama.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep_input(f"context {number}"))
        layer.mlp.down_proj.register_forward_pre_hook(keep_input(f"neurons {number}"))
        layer.input_layernorm.register_forward_hook(keep(f"norm a{number}"))
        layer.post_attention_layernorm.register_forward_hook(keep(f"norm b{number}"))
        layer.register_forward_pre_hook(keep_input(f"before {number}"))
        layer.register_forward_hook(keep(f"after {number}"))
    llama.model.norm.register_forward_hook(keep("norm c"))
    shape, squares, layers = model.shape, defaultdict(list), defaultdict(list)
    for domain, sample in prepared.drawn:
        tokens = prepared.training[domain][sample][:-1]
        documents = [tokens]
        if config.model.reset_attention_mask:
            numbers = prepared.training[domain].documents(sample)[:-1]
            documents = list(
                tokens.split(numbers.unique_consecutive(return_counts=True)[1].tolist())
            )
        seen.clear()
        with torch.no_grad():
            for document in documents:
                llama(document[None])
        whole = {name: torch.cat(found) for name, found in seen.items()}  # [s, width] each
        assert all(len(found) == SEQUENCE for found in whole.values())
        for name, found in whole.items():
            if name.startswith("context"):
                found = found.view(SEQUENCE, shape.num_attention_heads, -1).norm(dim=2)
            squares[name].append(found.abs().mean(dim=0) ** 2)
        for number in range(shape.num_layers):
            before, after = whole[f"before {number}"], whole[f"after {number}"]
            cos = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
            layers[number].append((1 - cos).mean())
    roots = {name: torch.stack(found).sum(0).sqrt() for name, found in squares.items()}
    heads = torch.stack([roots[f"context {number}"] for number in range(shape.num_layers)])
    norms = [root for name, root in roots.items() if name.startswith("norm")]
    assert len(norms) == 2 * shape.num_layers + 1
    per_group = shape.num_attention_heads // shape.num_query_groups
    return {
        "hidden": torch.stack(norms).sum(0)[None],
        "head": heads,
        "group": torch.stack(
            [
                heads[:, first : first + per_group].sum(1)
                for first in range(0, shape.num_attention_heads, per_group)
            ],
            dim=1,
        ),
        "intermediate": torch.stack(
            [roots[f"neurons {number}"] for number in range(shape.num_layers)]
        ),
        "layer": torch.stack(
            [torch.stack(layers[number]).mean() for number in range(shape.num_layers)]
        )[None],
    }


def errors(found: ImportanceScores, wanted: Scores) -> dict[str, float]:
    """Largest difference of each kind, relative to each score."""
    assert found.values.keys() == wanted.keys() == KINDS.keys()
    differences = {}
    for kind, values in wanted.items():
        assert found.values[kind].shape == values.shape, kind
        differences[kind] = float(((found.values[kind] - values).abs() / values).max())
    return differences


LAYOUTS = {
    "whole": (layout(), 1),
    "tp2": (layout(tp=2), 1),
    "tp4-sp": (layout(tp=4, sp=True), 1),
    "pp2": (layout(pp=2), 1),
    "pp2-vpp2": (layout(pp=2, vpp=2), 1),
    "dp2": (layout(), 2),
    "tp2-sp-dp2": (layout(tp=2, sp=True), 2),
    "tp2-pp2-sp": (layout(tp=2, pp=2, sp=True), 1),
}


@pytest.fixture(scope="module")
def wanted(text: TextRun, stored: dict[str, Stored]) -> Scores:
    model = stored["grouped"]
    return plain_scores(configured(text, model, Path("nowhere.json")), model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_of_every_layout_are_those_of_the_formulas(
    text: TextRun, stored: dict[str, Stored], wanted: Scores, tmp_path: Path, name: str
) -> None:
    parallel, replicas = LAYOUTS[name]
    config = configured(text, stored["grouped"], tmp_path / "scores.json")
    found = scored(config, parallel, replicas=replicas)
    assert max(errors(found, wanted).values()) < OTHER_KERNELS
    assert found.measured["sequences"] == NUM_SEQUENCES
    assert found.measured["tokens"] == NUM_SEQUENCES * SEQUENCE


@pytest.mark.parametrize("name", ["llama2-mha", "qwen2", "qwen3-tied"])
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "parallel", [layout(), layout(tp=2, pp=2, sp=True)], ids=["whole", "split"]
)
def test_every_family_is_scored_from_either_form(
    text: TextRun, stored: dict[str, Stored], tmp_path: Path, name: str, parallel: ParallelConfig
) -> None:
    model = stored[name]
    config = configured(
        text, model, tmp_path / "scores.json", load=None, load_hf=str(model.hf), num_sequences=5
    )
    found = scored(config, parallel)
    assert max(errors(found, plain_scores(config, model)).values()) < OTHER_KERNELS
    # the same model in the other form has the same fingerprint
    from_checkpoint = dataclasses.replace(config, load=str(model.checkpoint), load_hf=None)
    assert scored(from_checkpoint, layout()).fingerprint == found.fingerprint


@pytest.mark.parametrize("name", ["whole", "pp2", "tp2-pp2-sp"])
def test_documents_that_are_kept_apart_are_scored_apart(
    text: TextRun, stored: dict[str, Stored], wanted: Scores, tmp_path: Path, name: str
) -> None:
    config = configured(text, stored["grouped"], tmp_path / "scores.json", model=APART)
    parallel, replicas = LAYOUTS[name]
    found = scored(config, parallel, replicas=replicas)
    apart = plain_scores(config, stored["grouped"])
    assert max(errors(found, apart).values()) < OTHER_KERNELS
    assert max(errors(found, wanted).values()) > BROKEN  # the twin: documents that see each other


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (ModelConfig(recompute_granularity="full"), OTHER_KERNELS),
        (ModelConfig(bf16=True), OF_BFLOAT16),
    ],
    ids=["recompute", "bf16"],
)
def test_how_the_model_computes_does_not_change_its_scores(
    text: TextRun,
    stored: dict[str, Stored],
    wanted: Scores,
    tmp_path: Path,
    flags: ModelConfig,
    tolerance: float,
) -> None:
    config = configured(text, stored["grouped"], tmp_path / "scores.json", model=flags)
    found = scored(config, layout(tp=2, pp=2, sp=True))
    assert max(errors(found, wanted).values()) < tolerance


def roots_over_replicas() -> None:
    def broken(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
        return [t.square() for t in flat_all_reduce([t.sqrt() for t in tensors], group)]

    whole = ActivationScores.whole

    def first_sum_of_roots(scores: ActivationScores) -> Scores:
        reductions = [broken]  # the first reduction is the one over replicas
        activations.flat_all_reduce = lambda tensors, group: (  # type: ignore[assignment]
            reductions.pop()(tensors, group) if reductions else flat_all_reduce(tensors, group)
        )
        return whole(scores)

    ActivationScores.whole = first_sum_of_roots  # type: ignore[method-assign]


def a_part_of_the_sequence_left_out() -> None:
    add = ActivationScores.add

    def without_reduction(scores: ActivationScores, counts: Tensor, length: int) -> None:
        activations.flat_all_reduce = lambda tensors, group: list(tensors)  # type: ignore[assignment]
        add(scores, counts, length)
        activations.flat_all_reduce = flat_all_reduce

    ActivationScores.add = without_reduction  # type: ignore[method-assign]


def units_of_another_rank() -> None:
    placed = ActivationScores._placed

    def exchanged(scores: ActivationScores, *rest: Any) -> Tensor:
        groups, other = scores._groups, scores._groups.tensor_size - 1 - scores._groups.tensor_rank
        scores._groups = dataclasses.replace(groups, tensor_rank=other)
        found = placed(scores, *rest)
        scores._groups = groups
        return found

    ActivationScores._placed = exchanged  # type: ignore[method-assign]


def filling_that_counts() -> None:
    micro_batch = score_module.micro_batch

    def all_counted(
        tokens: Tensor, labels: Tensor, domains: Any, positions: Any, count: int, **more: Any
    ) -> Any:
        return micro_batch(tokens, labels, domains, positions, len(tokens), **more)

    score_module.micro_batch = all_counted


@pytest.mark.parametrize(
    ("name", "broken", "kinds"),
    [
        ("dp2", roots_over_replicas, {"hidden", "head", "group", "intermediate"}),
        ("tp4-sp", a_part_of_the_sequence_left_out, {"hidden", "layer"}),
        ("tp2-pp2-sp", units_of_another_rank, {"head", "group", "intermediate"}),
        ("dp2", filling_that_counts, set(KINDS)),
    ],
)
def test_what_is_broken_is_noticed(
    text: TextRun,
    stored: dict[str, Stored],
    wanted: Scores,
    tmp_path: Path,
    name: str,
    broken: Callable[[], None],
    kinds: set[str],
) -> None:
    parallel, replicas = LAYOUTS[name]
    config = configured(text, stored["grouped"], tmp_path / "scores.json")
    found = errors(scored(config, parallel, replicas=replicas, broken=broken), wanted)
    assert all(found[kind] > BROKEN for kind in kinds), found


def test_a_file_is_the_same_at_the_same_layout_and_says_where_it_is_from(
    text: TextRun, stored: dict[str, Stored], tmp_path: Path
) -> None:
    config = configured(text, stored["grouped"], tmp_path / "scores.json")
    scored(config, layout(tp=2))
    first = json.loads(Path(config.output).read_text())
    scored(config, layout(tp=2))
    second = json.loads(Path(config.output).read_text())
    assert first == second
    assert first["format"] == "megashear-scores-1"
    measured = first["measured"]
    assert measured["model"] == str(stored["grouped"].checkpoint / "iter_0000000")
    assert (measured["seed"], measured["processes"]) == (config.seed, 2)
    assert sum(measured["sequences by domain"].values()) == NUM_SEQUENCES
    other = scored(dataclasses.replace(config, seed=config.seed + 1), layout())
    assert json.loads(Path(config.output).read_text())["scores"] != first["scores"]
    assert other.fingerprint == first["fingerprint"]


def test_sequences_are_drawn_once_and_in_proportion(
    text: TextRun, stored: dict[str, Stored], tmp_path: Path
) -> None:
    def drawn(number: int) -> tuple[list[tuple[int, int]], list[int]]:
        config = configured(text, stored["grouped"], tmp_path / "scores.json", num_sequences=number)
        prepared = prepare_score(config)
        assert len(set(prepared.drawn)) == len(prepared.drawn)
        return list(prepared.drawn), [d.samples_per_epoch for d in prepared.training]

    few, available = drawn(60)
    assert len(few) == 60
    for domain, number in enumerate(available):
        share = sum(1 for of, _ in few if of == domain) / 60
        assert share == pytest.approx(number / sum(available), abs=0.03)
    everything, _ = drawn(10**6)
    assert len(everything) == sum(available)
