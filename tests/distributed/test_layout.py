"""Law 1: every layout computes what one process computes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.config import ModelConfig, ParallelConfig
from megashear.masks import mask_set
from megashear.masks.gates import probability_closed, uniform_noise
from megashear.masks.targets import target_units
from megashear.models import binding, fold, folded
from megashear.models.core import RMSNorm
from megashear.models.fold import unit_values
from megashear.models.llama import unwrap
from megashear.shape import ModelShape
from megashear.train.pruning import StructuredPruning
from tests.distributed.pruning_run import Snapshot, run
from tests.tiny import PAIRS, layout, relative_error

REDUCTION_ORDER = 1e-5
"""Relative; float32 sums over at most 4 shards and 4 layers in another order."""
FREE_RUNNING = 1e-3
"""Absolute, on log_alpha: Adam at rate 1.0 turns rounding of nearly cancelled gradients into
steps; architecture law 1 (b)."""

RECOMPUTE = ModelConfig(recompute_granularity="full")

LAYOUTS = [
    pytest.param(layout(tp=2), 1, None, id="tp2"),
    pytest.param(layout(tp=4), 1, None, id="tp4"),
    pytest.param(layout(tp=2, sp=True), 1, None, id="tp2-sp"),
    pytest.param(layout(pp=2), 1, None, id="pp2"),
    pytest.param(layout(pp=4), 1, None, id="pp4"),
    pytest.param(layout(pp=2, vpp=2), 1, None, id="pp2-vpp2"),
    pytest.param(
        layout(pp=2, vpp=2, overlap_p2p_communication=True), 1, None, id="pp2-vpp2-overlap"
    ),
    pytest.param(layout(), 2, None, id="dp2"),
    pytest.param(layout(), 4, None, id="dp4"),
    pytest.param(layout(), 1, RECOMPUTE, id="recompute"),
    pytest.param(layout(pp=2), 1, RECOMPUTE, id="pp2-recompute"),
    pytest.param(layout(tp=2, pp=2, sp=True), 1, None, id="tp2-pp2-sp"),
    pytest.param(layout(tp=2, sp=True), 2, RECOMPUTE, id="tp2-sp-dp2-recompute"),
    pytest.param(layout(tp=2, pp=2, vpp=2, sp=True), 1, RECOMPUTE, id="tp2-pp2-vpp2-sp-recompute"),
]


GROUPED = "8-groups-of-4"
"""Query heads in groups and groups of them: both kinds of attention masks at once."""


@functools.cache
def whole_run(pair: str = GROUPED) -> list[Snapshot]:
    return run(layout(), steps=6 if pair == GROUPED else 3, pair=pair)


def check_steps(
    parallel: ParallelConfig, data_size: int, model: ModelConfig | None, pair: str
) -> None:
    reference = whole_run(pair)[:3]
    found = run(parallel, data_size=data_size, model=model, follow=reference, pair=pair)
    for here, there in zip(found, reference):
        assert errors(here, there) == pytest.approx(
            dict.fromkeys(errors(here, there), 0.0), abs=REDUCTION_ORDER
        )


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("parallel", "data_size", "model"), LAYOUTS)
def test_a_step_does_not_depend_on_layout(
    parallel: ParallelConfig, data_size: int, model: ModelConfig | None
) -> None:
    check_steps(parallel, data_size, model, GROUPED)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("parallel", "data_size", "model", "pair"),
    [
        pytest.param(layout(tp=4), 1, None, "multi-head", id="multi-head-tp4"),
        pytest.param(
            *(layout(tp=2, pp=2, vpp=2, sp=True), 1, RECOMPUTE, "multi-head"), id="multi-head-all"
        ),
        pytest.param(layout(tp=4), 1, None, "groups-alone", id="groups-alone-tp4"),
        # one key/value head cannot be divided: tensor-parallel size 1
        pytest.param(layout(pp=2, vpp=2), 2, RECOMPUTE, "one-group", id="one-group"),
    ],
)
def test_a_step_does_not_depend_on_layout_however_attention_is_pruned(
    parallel: ParallelConfig, data_size: int, model: ModelConfig | None, pair: str
) -> None:
    check_steps(parallel, data_size, model, pair)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("parallel", "data_size", "model"),
    [case for case in LAYOUTS if case.id in ("tp2-pp2-sp", "pp2-vpp2", "tp2-sp-dp2-recompute")],
)
def test_free_running_layouts_stay_together(
    parallel: ParallelConfig, data_size: int, model: ModelConfig | None
) -> None:
    reference = whole_run()
    for here, there in zip(run(parallel, data_size=data_size, model=model, steps=6), reference):
        assert here.loss == pytest.approx(there.loss, rel=REDUCTION_ORDER)
        for name, value in there.multipliers.items():
            assert here.multipliers[name] == pytest.approx(
                float(value), rel=REDUCTION_ORDER, abs=REDUCTION_ORDER
            ), name
        for kind, log_alpha in there.masks.items():
            assert (here.masks[kind] - log_alpha).abs().max() < FREE_RUNNING, kind
            assert torch.equal(here.expected_open[kind] > 0, there.expected_open[kind] > 0), kind


PROJECTED = {"steps": 4, "constraint": "projection"}


@functools.cache
def projected_run() -> list[Snapshot]:
    return run(layout(), **PROJECTED)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("parallel", "data_size", "model"),
    [case for case in LAYOUTS if case.id in ("tp2-pp2-sp", "pp2-vpp2", "tp2-sp-dp2-recompute")],
)
def test_projected_masks_do_not_depend_on_layout(
    parallel: ParallelConfig, data_size: int, model: ModelConfig | None
) -> None:
    found = run(parallel, data_size=data_size, model=model, **PROJECTED)
    assert furthest(found, projected_run()) < FREE_RUNNING
    for here, there in zip(found, projected_run()):
        assert here.loss == pytest.approx(there.loss, rel=REDUCTION_ORDER)
        assert not here.multiplier_grads
        assert not here.penalty
        assert not any(here.multipliers.values())
    # the target of step 3 of a warm-up over 4, in every row
    source, target = PAIRS[GROUPED]
    for kind, kept in target_units(source, target).items():
        log_alpha = found[3].masks[kind]
        wanted = 0.75 * (1 - kept / log_alpha.shape[1])
        sparsity = probability_closed(log_alpha).mean(dim=1)
        assert sparsity.tolist() == pytest.approx([wanted] * len(sparsity), abs=FREE_RUNNING), kind


def test_projection_notices_rows_of_one_rank_alone() -> None:
    def broken(objective: StructuredPruning) -> None:
        whole = objective.binding.whole_sums

        def own_only(own: Any) -> Any:
            size = objective.binding.groups.tensor_size
            if any(sums.dim() == 1 for sums in own.values()):
                return whole(own)
            # each rank projects as if the other's units were like its own
            scale = {k: size if k in binding.SPLIT_OVER_TENSOR else 1 for k in own}
            objective.binding._owners = lambda: []  # type: ignore[method-assign]
            found = whole({kind: sums * scale[kind] for kind, sums in own.items()})
            del objective.binding._owners
            return found

        objective.binding.whole_sums = own_only  # type: ignore[method-assign]

    found = run(layout(tp=2), broken=broken, **PROJECTED)
    assert furthest(found, projected_run()) > 10 * FREE_RUNNING


def furthest(found: list[Snapshot], wanted: list[Snapshot]) -> float:
    """Return the largest distance of log_alpha in any step."""
    return max(
        float((here.masks[kind] - log_alpha).abs().max())
        for here, there in zip(found, wanted)
        for kind, log_alpha in there.masks.items()
    )


def test_layout_parity_notices_norms_counted_by_every_tensor_rank() -> None:
    def broken(objective: StructuredPruning) -> None:
        for weight in objective.binding._model._weights:
            weight._counts = True

    found = worst(layout(tp=2), broken=broken)
    assert found["leaf hidden"] > 0.1
    assert found["leaf intermediate"] < REDUCTION_ORDER


def test_layout_parity_notices_a_missing_sum_over_tensor_ranks() -> None:
    def broken(objective: StructuredPruning) -> None:
        # the hidden mask treated as if each tensor rank had its own
        binding.SPLIT_OVER_TENSOR = frozenset({"hidden", *binding.SPLIT_OVER_TENSOR})

    with pytest.raises(AssertionError, match="copies of hidden gradients differ"):
        worst(layout(tp=2), broken=broken)


def test_layout_parity_notices_a_missing_sum_over_stages() -> None:
    def broken(objective: StructuredPruning) -> None:
        # the hidden mask treated as if each stage had its own
        binding.SPLIT_OVER_PIPELINE = frozenset({"hidden", *binding.SPLIT_OVER_PIPELINE})

    with pytest.raises(AssertionError, match="copies of hidden gradients differ"):
        worst(layout(pp=2), broken=broken)


def test_layout_parity_notices_noise_of_the_ranks_own_rows() -> None:
    def broken(objective: StructuredPruning) -> None:
        # rows of groups counted on each rank from 0, as if a row were a layer
        part = objective.masks.parts["head"]
        own = {row: place for place, row in enumerate(part.rows)}

        def noise(num_units: int, *, kind: str, row: int, **key: int) -> torch.Tensor:
            return uniform_noise(num_units, kind=kind, row=own.get(row, row), **key)

        mask_set.uniform_noise = noise  # type: ignore[assignment]

    assert worst(layout(tp=2), broken=broken)["leaf head"] > 0.1


def test_layout_parity_notices_another_ranks_groups() -> None:
    def broken(objective: StructuredPruning) -> None:
        # query heads of a layer laid out as [H/G, groups/tp]
        def transposed(
            gates: dict[str, Tensor], shape: ModelShape, num_layers: int
        ) -> dict[str, Tensor]:
            values = unit_values(gates, shape, num_layers)
            heads = gates["head"].view(*gates["group"].shape, -1) * gates["group"][..., None]
            return values | {"head": heads.transpose(1, 2).flatten(1)}

        fold.unit_values = transposed

    assert worst(layout(tp=2), broken=broken)["leaf head"] > 0.1


def test_streams_mixed_up_by_recompute_are_refused() -> None:
    def broken(objective: StructuredPruning) -> None:
        # gates looked up when a layer runs again, instead of carried with its arguments
        def choose(model: Any, layer: Any, args: Any, kwargs: Any) -> Any:
            selected = model._now
            found = carried(model, layer, args, kwargs)
            if found is not None:
                model._now = selected
            return found

        carried = folded.FoldedModel._choose
        for chunk in objective.chunks:
            for layer in unwrap(chunk).decoder.layers:
                layer._forward_pre_hooks.clear()
                layer.register_forward_pre_hook(
                    functools.partial(choose, objective.binding._model), with_kwargs=True
                )

    with pytest.raises(Exception, match="went backward out of turn"):
        worst(layout(pp=2), model=RECOMPUTE, broken=broken)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_layout_parity_notices_a_fold_left_out_of_an_axis(axis: int) -> None:
    def broken(objective: StructuredPruning) -> None:
        def fold_less(weight: torch.Tensor, factors: Any, **more: Any) -> torch.Tensor:
            factors = [None if n == axis else each for n, each in enumerate(factors)]
            return fold.fold(weight, factors if weight.dim() == 2 else [None], **more)

        folded.fold = fold_less

    assert worst(layout(tp=2), broken=broken)["loss"] > 1e-3


def test_layout_parity_notices_gradients_unfolded_after_the_reduction() -> None:
    def broken(objective: StructuredPruning) -> None:
        late: list[Any] = []
        gradients = objective.binding._model.gradients

        def unfold_all() -> Any:
            for arguments in late:
                fold.unfold(*arguments)
            late.clear()
            return gradients()

        folded.unfold = lambda *arguments: late.append(arguments)
        objective.binding._model.gradients = unfold_all  # type: ignore[method-assign]

    # each replica has a stream of its own
    found = worst(layout(), data_size=2, broken=broken)
    assert max(error for name, error in found.items() if "linear_fc2" in name) > 0.1


def test_layout_parity_notices_weights_folded_before_the_last_update() -> None:
    def broken(objective: StructuredPruning) -> None:
        first: dict[int, torch.Tensor] = {}

        def fold_old(weight: torch.Tensor, factors: Any, **more: Any) -> torch.Tensor:
            old = first.setdefault(weight.data_ptr(), weight.clone())
            return fold.fold(old, factors, **more)

        folded.fold = fold_old

    assert max(worst(layout(tp=2), broken=broken).values()) > 1e-3


def test_layout_parity_notices_a_norm_over_closed_dimensions() -> None:
    def broken(objective: StructuredPruning) -> None:
        def forward(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (x.size(-1),), norm.weight, norm.eps)

        RMSNorm.forward = forward  # type: ignore[method-assign]

    assert worst(layout(tp=2), broken=broken)["loss"] > 1e-3


def worst(parallel: ParallelConfig, **more: Any) -> dict[str, float]:
    """The largest error of each quantity over three followed steps."""
    reference = whole_run()[:3]
    steps = [errors(a, b) for a, b in zip(run(parallel, follow=reference, **more), reference)]
    return {name: max(step[name] for step in steps) for name in steps[0]}


def errors(here: Snapshot, there: Snapshot) -> dict[str, float]:
    """Relative error of the loss, and per tensor of all gradients."""
    found = {"loss": abs(here.loss - there.loss) / there.loss}
    if there.penalty:
        found["penalty"] = abs(here.penalty - there.penalty) / abs(there.penalty)
    assert here.weight_grads.keys() == there.weight_grads.keys()
    for name, grad in there.weight_grads.items():
        found[name] = relative_error(here.weight_grads[name], grad)
    for kind in there.mask_grads:
        streams = [stream for stream, k in there.leaf_grads if k == kind]
        found[f"leaf {kind}"] = max(
            relative_error(here.leaf_grads[stream, kind], there.leaf_grads[stream, kind])
            for stream in streams
        )
    # log_alpha of all kinds together: some kinds' gradients nearly cancel
    ours = torch.cat([here.mask_grads[kind].flatten() for kind in there.mask_grads])
    theirs = torch.cat([grad.flatten() for grad in there.mask_grads.values()])
    found["log_alpha"] = relative_error(ours, theirs)
    for name, grad in there.multiplier_grads.items():
        found[name] = abs(float(here.multiplier_grads[name] - grad))
    return found
