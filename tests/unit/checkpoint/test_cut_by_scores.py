"""A one-shot cut keeps the units of the highest scores, bit by bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.__main__ import main
from megashear.checkpoint.description import Description, read_description
from megashear.checkpoint.scores import ImportanceScores, fingerprint, read_scores
from megashear.checkpoint.shear import check_cut_by_scores, cut_by_scores
from megashear.checkpoint.weights import CheckpointWeights, write_weights
from megashear.config import TargetConfig
from megashear.masks.kinds import EXTENTS, KINDS
from megashear.shape import ModelShape
from tests.families import FAMILIES, pruned
from tests.reference_llama import random_weights
from tests.unit.checkpoint.shapes import (
    CUT_GROUPED,
    CUT_MULTI_HEAD,
    CUT_ONE_GROUP,
    CUT_WIDE,
    GROUPED,
    MULTI_HEAD,
    ONE_GROUP,
    WIDE,
)

PAIRS = {
    "multi-head": (MULTI_HEAD, CUT_MULTI_HEAD),
    "groups-alone": (GROUPED, CUT_GROUPED),
    "8-groups-of-4": (WIDE, CUT_WIDE),
    "one-group": (ONE_GROUP, CUT_ONE_GROUP),
    **{name: (FAMILIES[name], pruned(FAMILIES[name])) for name in ("qwen2", "qwen3-tied")},
}


def random_scores(shape: ModelShape, *, num_values: int = 2**20) -> dict[str, Tensor]:
    """Scores of every unit; with few values there are many ties."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randint(num_values, kind.extents(shape), generator=generator).double()
        for name, kind in KINDS.items()
    }


def flags_of(target: ModelShape, **more: Any) -> TargetConfig:
    extents = {f"target_{extent}": getattr(target, extent) for extent in EXTENTS}
    return TargetConfig(**extents, force_unloadable_target=True, **more)


def highest(scores: list[float], number: int) -> list[int]:
    """Units of the highest scores, rising; of equal ones the last."""
    order = sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))
    return sorted(order[len(scores) - number :])


def selected(
    weights: dict[str, Tensor], scores: dict[str, Tensor], source: ModelShape, target: ModelShape
) -> dict[str, Tensor]:
    """The weights of the kept units, picked from the Hugging Face weights by hand."""
    d, per_group = source.head_dim, source.heads_per_group
    h = torch.tensor(highest(scores["hidden"][0].tolist(), target.hidden_size))
    found = {
        name: weights[name][..., h] if name != "model.norm.weight" else weights[name][h]
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
        if name in weights
    }
    layers = highest(scores["layer"][0].tolist(), target.num_layers)
    for new, old in enumerate(layers):
        # a key/value head and its query heads are one unit where each has one
        of_groups = scores["head" if per_group == 1 else "group"][old].tolist()
        groups = highest(of_groups, target.num_query_groups)
        heads = [
            group * per_group + head
            for group in groups
            for head in highest(
                scores["head"][old, group * per_group : (group + 1) * per_group].tolist(),
                target.heads_per_group,
            )
        ]
        neurons = torch.tensor(
            highest(scores["intermediate"][old].tolist(), target.ffn_hidden_size)
        )
        q = torch.tensor([head * d + at for head in heads for at in range(d)])
        kv = torch.tensor([group * d + at for group in groups for at in range(d)])
        picks: dict[str, Callable[[Tensor], Tensor]] = {
            "input_layernorm.weight": lambda w: w[h],
            "post_attention_layernorm.weight": lambda w: w[h],
            "self_attn.q_proj.weight": lambda w, q=q: w[q][:, h],
            "self_attn.k_proj.weight": lambda w, kv=kv: w[kv][:, h],
            "self_attn.v_proj.weight": lambda w, kv=kv: w[kv][:, h],
            "self_attn.q_proj.bias": lambda w, q=q: w[q],
            "self_attn.k_proj.bias": lambda w, kv=kv: w[kv],
            "self_attn.v_proj.bias": lambda w, kv=kv: w[kv],
            "self_attn.q_norm.weight": lambda w: w,
            "self_attn.k_norm.weight": lambda w: w,
            "self_attn.o_proj.weight": lambda w, q=q: w[h][:, q],
            "mlp.gate_proj.weight": lambda w, n=neurons: w[n][:, h],
            "mlp.up_proj.weight": lambda w, n=neurons: w[n][:, h],
            "mlp.down_proj.weight": lambda w, n=neurons: w[h][:, n],
        }
        for name, pick in picks.items():
            if (whole := weights.get(f"model.layers.{old}.{name}")) is not None:
                found[f"model.layers.{new}.{name}"] = pick(whole)
    return found


def stored(folder: Path, shape: ModelShape, **details: Any) -> Path:
    description = Description(shape=shape, iteration=7, stage="pretrain", details=details)
    write_weights(folder / "model", random_weights(shape), description)
    return folder / "model"


def write(
    path: Path, shape: ModelShape, scores: dict[str, Tensor], weights: dict[str, Tensor] | None
) -> Path:
    print_of = None if weights is None else fingerprint(weights)
    ImportanceScores(
        shape=shape, values=scores, fingerprint=print_of, measured={"sequences": 3}
    ).write(path)
    return path


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_values", [2**20, 3])
def test_a_cut_by_scores_is_a_selection_by_hand(tmp_path: Path, name: str, num_values: int) -> None:
    source, target = PAIRS[name]
    scores = random_scores(source, num_values=num_values)
    weights = random_weights(source)
    model = stored(tmp_path, source)
    file = write(tmp_path / "scores.json", source, scores, weights)
    report = cut_by_scores(model, tmp_path / "cut", file, flags_of(target))
    found = CheckpointWeights(tmp_path / "cut")
    assert found.shape == dataclasses.replace(target, vocab_size=source.vocab_size)
    wanted = selected(weights, scores, source, target)
    assert wanted.keys() == found.keys()
    for weight in wanted:
        assert torch.equal(found[weight], wanted[weight]), weight
    kept = highest(scores["layer"][0].tolist(), target.num_layers)
    assert report["dropped layers"] == sorted({*range(source.num_layers)} - {*kept})
    # where the model is from
    known = read_description(tmp_path / "cut" / "iter_0000000").known
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    assert known.source_shape == source
    assert known.importance_scores == {"sequences": 3, "file": str(file), "sha256": sha}
    # the twin: scores of one unit more, and another model comes out
    other = scores | {"hidden": scores["hidden"].roll(1)}
    wanted = selected(weights, other, source, target)
    assert not all(torch.equal(found[weight], wanted[weight]) for weight in wanted)


def test_only_what_the_target_lowers_is_cut(tmp_path: Path) -> None:
    model = stored(tmp_path, GROUPED)
    file = write(tmp_path / "scores.json", GROUPED, random_scores(GROUPED), random_weights(GROUPED))
    report = cut_by_scores(model, tmp_path / "cut", file, TargetConfig(target_ffn_hidden_size=56))
    found = CheckpointWeights(tmp_path / "cut")
    assert found.shape == dataclasses.replace(GROUPED, ffn_hidden_size=56)
    assert report["dropped layers"] == []
    name = "model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(found[name], random_weights(GROUPED)[name])


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    scores = {kind: values / 7 for kind, values in random_scores(WIDE).items()}
    file = write(tmp_path / "new" / "scores.json", WIDE, scores, random_weights(WIDE))
    found = read_scores(file, "--scores")
    assert found.shape == WIDE
    assert (found.measured["sequences"], found.measured["file"]) == (3, str(file))
    assert found.fingerprint == fingerprint(random_weights(WIDE))
    for kind, values in scores.items():
        assert torch.allclose(found.values[kind], values, rtol=1e-8, atol=0.0), kind
    # what a script writes: a list for each layer; flat ones for hidden and layer
    content = json.loads(file.read_text())["scores"]
    assert (len(content["hidden"]), len(content["layer"])) == (40, 4)
    assert [len(row) for row in content["head"]] == [32] * 4
    assert [len(row) for row in content["group"]] == [8] * 4


def test_a_fingerprint_is_of_the_model_in_any_number_format() -> None:
    weights = random_weights(GROUPED)
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    assert fingerprint(rounded) == fingerprint(weights)
    moved = weights | {"model.norm.weight": weights["model.norm.weight"] * 1.01}
    assert fingerprint(moved) != fingerprint(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="megashear-scores-2"), "is of format 'megashear-scores-2', wan"),
        (lambda c: c.pop("shape"), "its shape is that of no model: 'shape'"),
        (lambda c: c["shape"].update(num_layers=0), "its shape is that of no model"),
        (lambda c: c["scores"].pop("group"), "'group' are to be 4 lists of 4 finite .* is missing"),
        (lambda c: c["scores"]["hidden"].pop(), "'hidden' are to be 40 finite numbers >= 0; it"),
        (lambda c: c["scores"]["head"][2].pop(), "'head' are to be 4 lists of 8 finite numbers"),
        (lambda c: c["scores"]["layer"].__setitem__(0, -1.0), "'layer' are to be 4 finite numb"),
        (lambda c: c["scores"]["layer"].__setitem__(0, True), "'layer' are to be 4 finite numb"),
        (lambda c: c.update(scores=[]), "scores and measured are objects in files of"),
        (lambda c: c.update(fingerprint=7), "fingerprint is 7, wanted text or null"),
    ],
)
def test_a_file_that_is_not_of_scores_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = write(tmp_path / "scores.json", GROUPED, random_scores(GROUPED), None)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"--scores \S+scores.json.*{message}"):
        read_scores(file, "--scores")


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    model, weights = stored(tmp_path, GROUPED), random_weights(GROUPED)
    asked = TargetConfig(target_ffn_hidden_size=56)
    file = write(tmp_path / "wide.json", WIDE, random_scores(WIDE), None)
    wanted = r"wide.json is of a model with num_attention_heads 32, and --load \S+ has 8; measure"
    with pytest.raises(ValueError, match=wanted):
        check_cut_by_scores(model, file, asked)
    others = random_weights(GROUPED, seed=1)
    file = write(tmp_path / "other.json", GROUPED, random_scores(GROUPED), others)
    with pytest.raises(ValueError, match=r"other.json is of another model of the same shape"):
        check_cut_by_scores(model, file, asked)
    # scores of a script that does not say of which model they are
    check_cut_by_scores(
        model, write(tmp_path / "own.json", GROUPED, random_scores(GROUPED), None), asked
    )
    # and those of this one
    check_cut_by_scores(
        model, write(tmp_path / "right.json", GROUPED, random_scores(GROUPED), weights), asked
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target_num_attention_heads": 6}, "heads 6 is not a multiple of --target-num-query-gro"),
        ({"target_hidden_size": 48}, "target hidden_size is 48, the source has 40, and pruning"),
        ({"target_hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 8"),
        ({}, "nothing to prune: target and source both have"),
    ],
)
def test_targets_that_do_not_divide_are_refused(
    tmp_path: Path, asked: dict[str, int], message: str
) -> None:
    model = stored(tmp_path, GROUPED)
    file = write(tmp_path / "scores.json", GROUPED, random_scores(GROUPED), None)
    with pytest.raises(ValueError, match=message):
        cut_by_scores(model, tmp_path / "cut", file, TargetConfig(**asked))
    assert not (tmp_path / "cut").exists()


def test_scores_for_a_run_with_masks_are_refused(tmp_path: Path) -> None:
    extents = {"mask_extents": {"hidden": [1, 40]}, "target_shape": CUT_GROUPED.to_dict()}
    model = stored(tmp_path, GROUPED, **extents)
    file = write(tmp_path / "scores.json", GROUPED, random_scores(GROUPED), None)
    with pytest.raises(ValueError, match=r"is of a pruning run, whose masks say what is kept, and"):
        cut_by_scores(model, tmp_path / "cut", file, flags_of(CUT_GROUPED))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-num-layers", "3"], "--target-num-layers set the target of a cut by --scores"),
        (["--scores", "s.json", "--exact-target"], "--exact-target is for learned masks, and --sc"),
        (["--scores", "s.json"], "--scores s.json does not exist"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    assert main(["cut", "--load", "in", "--output", "out", *flags, "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stored(tmp_path, GROUPED)
    file = write(tmp_path / "scores.json", GROUPED, random_scores(GROUPED), random_weights(GROUPED))
    words = ["--load", str(model), "--output", str(tmp_path / "cut"), "--scores", str(file)]
    assert main(["cut", *words, "--target-num-layers", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["dropped layers"]) == 2
    assert CheckpointWeights(tmp_path / "cut").shape == dataclasses.replace(GROUPED, num_layers=2)
