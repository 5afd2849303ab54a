"""Laws 1 and 6 for every family: masked, at any layout, it computes the independent formula."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from megashear.config import ParallelConfig
from megashear.models.core import VocabularyPadding
from tests.distributed.pruning_run import run
from tests.distributed.test_masked_model import (
    BROKEN,
    OTHER_KERNELS,
    middle_of_pruning,
    plain_pass,
    sampled_pass,
    worst,
)
from tests.families import FAMILIES, pruned
from tests.tiny import PAIRS, layout, relative_error

FREE_RUNNING = 1e-4
"""Relative, on weights after six steps: Adam divides small gradients, rounding and all, by their
own size."""
EVERYTHING = replace(
    FAMILIES["qwen3-tied"],
    rotary_base=500.0,
    qkv_bias=True,
    rope_scaling=FAMILIES["llama3.1"].rope_scaling,
    vocab_size=65,  # padded by 1 at TP 2, by 3 at TP 4
)
"""No family is all of this; what holds for it holds for each."""


@pytest.mark.parametrize(
    "parallel",
    [
        layout(),
        layout(tp=2),
        layout(tp=4),
        layout(pp=2),
        layout(tp=2, pp=2, sp=True),
        layout(pp=2, vpp=2),
    ],
    ids=["whole", "tp2", "tp4", "pp2", "tp2-pp2-sp", "pp2-vpp2"],
)
def test_every_part_of_every_family_keeps_the_laws(parallel: ParallelConfig) -> None:
    masks = middle_of_pruning(EVERYTHING, pruned(EVERYTHING))
    found = sampled_pass(parallel, EVERYTHING, pruned(EVERYTHING), masks)
    assert worst(found, plain_pass(EVERYTHING, masks)) < OTHER_KERNELS


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "parallel", [layout(tp=2, pp=2, sp=True), layout(tp=4)], ids=["tp2-pp2-sp", "tp4"]
)
def test_six_steps_of_the_optimizer_stay_together(
    parallel: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # norms of clipping count a tied matrix and the norms over heads once, at any layout
    monkeypatch.setitem(PAIRS, "everything", (EVERYTHING, pruned(EVERYTHING)))
    reference = run(layout(), steps=6, pair="everything")
    found = run(parallel, steps=6, pair="everything")
    for here, there in zip(found, reference):
        assert here.loss == pytest.approx(there.loss, rel=OTHER_KERNELS)
    for name, weight in reference[-1].weights.items():
        rows = here.weights[name]
        assert not rows[len(weight) :].any(), f"the padding of {name} learns"
        assert relative_error(rows[: len(weight)], weight) < FREE_RUNNING, name
        # the twin: far less than the steps have moved it
        assert relative_error(reference[0].weights[name], weight) > FREE_RUNNING, name


def broken_pass(parallel: ParallelConfig, broken: Callable[[], None]) -> tuple[Tensor, float]:
    """Logits and loss of `EVERYTHING` with one thing broken on every rank."""
    masks = middle_of_pruning(EVERYTHING, pruned(EVERYTHING))
    found = sampled_pass(parallel, EVERYTHING, pruned(EVERYTHING), masks, broken=broken)
    return found.logits, found.loss


def without_reduction(name: str) -> Callable[[], None]:
    def broken() -> None:
        # the package has a function of the module's name, which hides the module
        module = sys.modules["megatron.core.distributed.finalize_model_grads"]
        setattr(module, name, lambda *args: None)

    return broken


def test_head_norms_whose_gradients_stay_partial_are_noticed() -> None:
    with pytest.raises(AssertionError, match=r"copies of .*k_layernorm.* between tensor ranks"):
        broken_pass(layout(tp=2), without_reduction("_allreduce_non_tensor_model_parallel_grads"))


def test_a_tied_matrix_whose_gradients_stay_apart_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"copies of embedding.* differ between stages"):
        broken_pass(layout(pp=2), without_reduction("_allreduce_word_embedding_grads"))


def test_padding_that_takes_part_in_the_softmax_is_noticed() -> None:
    def broken() -> None:
        VocabularyPadding.__call__ = lambda hook, module, inputs, output: output  # type: ignore[method-assign]

    with pytest.raises(AssertionError, match=r"the padding of .* learns"):
        broken_pass(layout(tp=4), broken)


@pytest.mark.parametrize(
    "lost",
    [{"rope_scaling": None}, {"rotary_base": 10000.0}, {"norm_epsilon": 1e-2}],
    ids=["rope-scaling", "rotary-base", "epsilon"],
)
def test_a_lost_number_is_noticed(lost: dict[str, float | None]) -> None:
    masks = middle_of_pruning(EVERYTHING, pruned(EVERYTHING))
    found = sampled_pass(layout(), EVERYTHING, pruned(EVERYTHING), masks)
    wanted = plain_pass(replace(EVERYTHING, **lost), masks)  # type: ignore[arg-type]
    assert relative_error(found.logits, wanted.logits) > BROKEN
