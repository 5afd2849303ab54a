"""Folded weights in a run: one for each noise stream, unfolded in time, and the model as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucketGroup as BucketGroup,
)
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megashear.config import MaskConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megashear.models import fold, folded
from megashear.models.llama import build_llama, gather_weights, unwrap
from megashear.parallel.groups import ParallelGroups
from megashear.train.optim import build_optimizer, ready_gradients, step_with_norm
from megashear.train.pruning import EXPECTED, StructuredPruning
from megashear.train.schedule import run_chunk
from tests.distributed.pruning_run import half_open_masks
from tests.distributed.test_masked_model import (
    BROKEN,
    middle_of_pruning,
    plain_pass,
    sampled_pass,
    worst,
)
from tests.live import fill
from tests.ranks import run_ranks
from tests.tiny import (
    BATCH,
    PAIRS,
    layout,
    megatron_weights,
    microbatches,
    named_parameters,
    relative_error,
    set_weights,
)

PAIR = "8-groups-of-4"
SOURCE, TARGET = PAIRS[PAIR]
RECOMPUTE = ModelConfig(recompute_granularity="full")
FEW_MICROBATCHES = 1e-4
"""Relative per tensor; of a stream of two or three microbatches the gradients of layer gates, each
a sum over all weights of its layer, nearly cancel. Measured up to 2.8e-5, of all others 4e-6."""
IN_TURN, JUMBLED = [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 0, 2, 1, 0, 2, 2]
"""Noise streams of a replica's 8 microbatches."""


@pytest.mark.parametrize(
    ("parallel", "model", "streams", "vocab"),
    [
        pytest.param(layout(), None, JUMBLED, 64, id="whole-jumbled"),
        pytest.param(layout(pp=2), None, [0] * BATCH, 64, id="pp2-one"),
        pytest.param(layout(pp=2), RECOMPUTE, JUMBLED, 64, id="pp2-recompute-jumbled"),
        pytest.param(layout(pp=2, vpp=2), RECOMPUTE, JUMBLED, 64, id="pp2-vpp2-recompute-jumbled"),
        pytest.param(layout(tp=2, sp=True), None, IN_TURN, 61, id="tp2-sp-padded-in-turn"),
    ],
)
def test_streams_of_a_replica_in_any_order_are_the_plain_formula(
    parallel: ParallelConfig, model: ModelConfig | None, streams: list[int], vocab: int
) -> None:
    source, target = (replace(shape, vocab_size=vocab) for shape in (SOURCE, TARGET))
    masks = middle_of_pruning(source, target)
    found = sampled_pass(parallel, source, target, masks, streams=streams, model=model)
    assert {stream for stream, _ in found.gate_grads} == {*streams}
    assert worst(found, plain_pass(source, masks, streams=streams)) < FEW_MICROBATCHES


def test_streams_collected_together_are_noticed() -> None:
    def broken() -> None:
        def total(weight: folded._FoldedWeight) -> Tensor:
            return weight._parameter.main_grad  # type: ignore[no-any-return]

        folded._FoldedWeight._raw = total  # type: ignore[method-assign]

    masks = middle_of_pruning(SOURCE, TARGET)
    found = sampled_pass(layout(), SOURCE, TARGET, masks, streams=IN_TURN, broken=broken)
    assert worst(found, plain_pass(SOURCE, masks, streams=IN_TURN)) > BROKEN


class Pruning:
    """The objective of one replica on this rank, in the middle of pruning."""

    def __init__(
        self,
        parallel: ParallelConfig | None = None,
        *,
        streams: int = 2,
        tied: bool = False,
        model: ModelConfig | None = None,
    ) -> None:
        self.parallel = parallel or layout()
        shapes = (replace(shape, tied_embeddings=tied) for shape in (SOURCE, TARGET))
        self.source, target = shapes
        self.groups = ParallelGroups.create(self.parallel)
        self.chunks = build_llama(
            self.source, self.groups, self.parallel, model or ModelConfig(), variant="local"
        )
        set_weights(
            self.chunks,
            megatron_weights(self.source),
            self.groups.tensor_rank,
            self.groups.tensor_size,
        )
        self.objective = StructuredPruning(
            self.chunks,
            self.groups,
            source=self.source,
            target=target,
            config=MaskConfig(mask_noise_streams=streams),
            seed=7,
            global_batch_size=BATCH,
            sequence_parallel=self.parallel.sequence_parallel,
        )
        self.binding = self.objective.binding
        fill(self.objective.masks.state_dict(), self.binding.slice_gates(half_open_masks(PAIR)))

    def batches(self, step: int) -> list[Any]:
        share = {"data_rank": self.groups.data_rank, "data_size": self.groups.data_size}
        return microbatches(step, **share)

    def train(self, step: int) -> dict[str, Tensor]:
        """Gradients of all weights and masks."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.objective.forward_backward(self.batches(step), step)
        return {
            name: parameter.main_grad.clone()  # type: ignore[attr-defined]
            for name, parameter in named_parameters(self.chunks).items()
        } | {kind: given(mask.grad).clone() for kind, mask in self.masks.items()}

    @property
    def masks(self) -> dict[str, torch.nn.Parameter]:
        return self.objective.masks.log_alpha

    def evaluate(self) -> list[float]:
        """Losses of another batch under expected gates."""
        with self.objective.evaluating(EXPECTED) as measure:
            return [float(loss.sums) for loss in measure(self.batches(9))]


def given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def test_a_bound_model_keeps_its_names_and_its_weights() -> None:
    def seen(gpt: torch.nn.Module) -> dict[str, tuple[int, int, Tensor]]:
        """What a model shows to whoever counts, saves or steps it."""
        of = {name: id(each) for name, each in gpt.named_parameters()}
        saved = {
            name: (each.data_ptr(), each.clone())
            for name, each in gpt.state_dict().items()
            if isinstance(each, Tensor)
        }
        assert of.keys() == saved.keys()
        return {name: (of[name], *saved[name]) for name in of}

    def body(rank: int) -> None:
        pruning = Pruning()
        gpt = unwrap(pruning.chunks[0])
        before = seen(gpt)
        modules = list(gpt.modules())

        def check() -> None:
            after = seen(gpt)
            assert after.keys() == before.keys()
            for name, (number, place, weight) in before.items():
                assert after[name][:2] == (number, place), name
                assert torch.equal(after[name][2], weight), name

        with pruning.objective.evaluating(EXPECTED) as measure:
            measure(pruning.batches(0))
            assert any("weight" in vars(module) for module in modules)
            check()
        pruning.train(0)
        check()
        for module in modules:
            assert "weight" not in vars(module)
            assert vars(module).get("num_open") is None

    run_ranks(1, body)


def trained_around_an_evaluation(broken: Callable[[], None] | None = None) -> bool:
    """Whether a step after an evaluation, and after gates that were bound for nothing, is the step
    without them, bit by bit."""

    def body(rank: int) -> bool:
        pruning = Pruning()
        first = pruning.train(0)
        if broken is not None:
            broken()
        losses = pruning.evaluate()
        gates = pruning.objective.masks.sample(seed=1, step=3, stream=0)
        pruning.binding.bind({0: gates}, [0])
        second = pruning.train(0)
        same = all(torch.equal(second[name], grad) for name, grad in first.items())
        return same and pruning.evaluate() == losses

    return run_ranks(1, body)[0]


@pytest.mark.parametrize("model", [ModelConfig(), RECOMPUTE], ids=["plain", "recompute"])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_linear_takes_a_folded_weight_for_a_frozen_one(model: ModelConfig, frozen: bool) -> None:
    def body(rank: int) -> int:
        taken = []
        real = layers.linear_with_frozen_weight

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            taken.append(1)
            return real(*args, **kwargs)  # type: ignore[no-any-return]

        layers.linear_with_frozen_weight = watched
        if frozen:
            asked = Tensor.requires_grad_

            def only_where_told(self: Tensor, *on: bool) -> Tensor:
                return asked(self, *on) if on else self

            Tensor.requires_grad_ = only_where_told  # type: ignore[method-assign, assignment]
        run = Pruning(model=model)
        run.train(0)
        run.evaluate()
        return len(taken)

    [taken] = run_ranks(1, body)
    assert bool(taken) == frozen


def test_a_step_repeats_bit_by_bit_after_an_evaluation() -> None:
    assert trained_around_an_evaluation()


def test_a_weight_that_was_folded_for_others_is_noticed() -> None:
    def broken() -> None:
        # whatever the last stream left there
        folded.fold = lambda *arguments, out: out  # type: ignore[assignment]

    assert not trained_around_an_evaluation(broken)


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        ([1, 1, 1, 1, 0, 0, 0, 0], r"microbatch 0 went backward out of turn"),
        ([0, 0, 0, 0, 1, 1, 1], r"microbatch 7 went backward out of turn"),
        ([0, 0, 0, 0, 1, 1, 1, 1, 1], r"8 of 9 gradients came"),
    ],
    ids=["another-order", "too-few", "too-many"],
)
def test_microbatches_other_than_announced_are_refused(announced: list[int], message: str) -> None:
    def body(rank: int) -> None:
        pruning = Pruning()
        bind = pruning.binding.bind

        def bind_others(sampled: dict[int, dict[str, Tensor]], streams: Sequence[int]) -> None:
            bind(sampled, announced)

        pruning.binding.bind = bind_others  # type: ignore[method-assign, assignment]
        pruning.train(0)

    with pytest.raises(AssertionError, match=message):
        run_ranks(1, body)


def test_a_stream_that_no_microbatch_has_gives_no_gradient() -> None:
    def body(rank: int) -> None:
        pruning = Pruning()
        bind, gradients = pruning.binding.bind, pruning.binding.whole_gradients
        found: list[dict[int, dict[str, Tensor]]] = []

        def bind_one_more(sampled: dict[int, dict[str, Tensor]], streams: Sequence[int]) -> None:
            bind(sampled | {5: pruning.objective.masks.sample(seed=7, step=0, stream=5)}, streams)

        def collecting() -> dict[int, dict[str, Tensor]]:
            found.append(gradients())
            return found[-1]

        pruning.binding.bind = bind_one_more  # type: ignore[method-assign, assignment]
        pruning.binding.whole_gradients = collecting  # type: ignore[method-assign]
        pruning.train(0)
        (of_stream,) = found
        assert of_stream.keys() == {0, 1, 5}
        for kind, grad in of_stream[5].items():
            assert grad.shape == pruning.masks[kind].shape
            assert not grad.any()
            assert of_stream[0][kind].any()

    run_ranks(1, body)


@pytest.mark.parametrize("parallel", [layout(), layout(pp=2)], ids=["whole", "pp2"])
@pytest.mark.parametrize("streams", [[0] * BATCH, IN_TURN], ids=["one", "several"])
def test_a_tied_matrix_has_the_gradients_of_both_its_uses(
    parallel: ParallelConfig, streams: list[int]
) -> None:
    source, target = (replace(shape, tied_embeddings=True) for shape in (SOURCE, TARGET))
    masks = middle_of_pruning(source, target)
    found = sampled_pass(parallel, source, target, masks, streams=streams)
    assert worst(found, plain_pass(source, masks, streams=streams)) < FEW_MICROBATCHES


@pytest.mark.parametrize("use", ["_returns", "_adds"])
def test_a_use_of_a_tied_matrix_left_out_is_noticed(use: str) -> None:
    def broken() -> None:
        create = folded._FoldedWeight.__init__

        def without(weight: folded._FoldedWeight, *arguments: Any, **more: Any) -> None:
            create(weight, *arguments, **more)
            if weight._is_tied and use == "_returns":  # the embedding's
                weight._returns = False
            elif weight._is_tied:  # the output layer's goes to another place
                elsewhere = torch.zeros_like(weight._parameter)
                weight._raw = lambda: elsewhere  # type: ignore[method-assign]

        folded._FoldedWeight.__init__ = without  # type: ignore[method-assign]

    source, target = (replace(shape, tied_embeddings=True) for shape in (SOURCE, TARGET))
    masks = middle_of_pruning(source, target)
    streams = [0] * BATCH
    found = sampled_pass(layout(), source, target, masks, streams=streams, broken=broken)
    assert worst(found, plain_pass(source, masks, streams=streams)) > BROKEN


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_finished_on_the_parameters_themselves(tied: bool) -> None:
    """megatron-core looks for a tied matrix by way of its module, and would add up the wrong one,
    or wait for a stage that found none."""

    def body(rank: int) -> bool:
        pruning = Pruning(layout(pp=2), tied=tied)
        config = unwrap(pruning.chunks[0]).config
        finish, seen = config.finalize_model_grads_func, []

        def finish_plain(*arguments: Any, **more: Any) -> None:
            modules = unwrap(pruning.chunks[0]).modules()
            seen.extend(module for module in modules if "weight" in vars(module))
            finish(*arguments, **more)

        config.finalize_model_grads_func = finish_plain
        pruning.train(0)
        return not seen

    assert all(run_ranks(2, body))


def test_gradients_that_were_not_zeroed_are_refused() -> None:
    def body(rank: int) -> None:
        pruning = Pruning(streams=1)
        pruning.train(0)
        with pytest.raises(AssertionError, match="gradients of another step lie in the buffer"):
            pruning.objective.forward_backward(pruning.batches(1), 1)

    run_ranks(1, body)


BUCKET = 1500
"""Parameters, so that the model has 18 buckets."""
REDUCED = {"overlap_grad_reduce": True, "ddp_bucket_size": BUCKET}
SHARDED = {"use_distributed_optimizer": True}
GATHERED = SHARDED | REDUCED | {"overlap_param_gather": True}


def stepped(
    parallel: ParallelConfig, streams: int, broken: Callable[[], None] | None = None
) -> list[dict[str, Tensor]]:
    """The weights of each rank after three steps on two replicas, and the gradients of its masks
    in the last."""

    def body(rank: int) -> dict[str, Tensor]:
        if broken is not None:
            broken()
        pruning = Pruning(parallel, streams=streams)
        sharded = parallel.use_distributed_optimizer
        optimizer = build_optimizer(pruning.chunks, OptimizerConfig(), bf16=False, sharded=sharded)
        found: dict[str, Tensor] = {}
        for step in range(3):
            optimizer.zero_grad()
            found = pruning.train(step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            ready_gradients(optimizer)
            step_with_norm(optimizer, 0.5)  # of shards the norm is another sum: none is clipped
        gather_weights(pruning.chunks)
        if parallel.overlap_grad_reduce and pruning.groups.is_first_stage:
            assert len(pruning.chunks[0].bucket_groups) > 4
        weights = named_parameters(pruning.chunks).items()
        return {kind: found[kind] for kind in pruning.masks} | {n: w.detach() for n, w in weights}

    return run_ranks(2 * parallel.model_parallel_size, body)


def differing(
    flags: dict[str, Any],
    without: dict[str, Any],
    streams: int,
    broken: Callable[[], None] | None = None,
    **parallel: Any,
) -> dict[str, float]:
    """What overlap changes at all, with its relative error."""
    found = stepped(layout(**parallel, **flags), streams, broken)
    wanted = stepped(layout(**parallel, **without), streams)
    return {
        f"rank {rank} {name}": relative_error(ours[name], theirs[name])
        for rank, (ours, theirs) in enumerate(zip(found, wanted))
        for name in theirs
        if not torch.equal(ours[name], theirs[name])
    }


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("flags", "without", "streams", "parallel"),
    [
        pytest.param(REDUCED, {}, 2, {}, id="reduced-one-stream-each"),
        pytest.param(REDUCED, {}, 4, {}, id="reduced-two-streams-each"),
        pytest.param(GATHERED, SHARDED, 4, {}, id="gathered-two-streams-each"),
        pytest.param(GATHERED, SHARDED, 2, {"pp": 2, "vpp": 2}, id="gathered-pp2-vpp2"),
    ],
)
def test_overlap_changes_no_bit(
    flags: dict[str, Any], without: dict[str, Any], streams: int, parallel: dict[str, int]
) -> None:
    assert differing(flags, without, streams, **parallel) == {}


def test_unfolding_behind_the_reduction_of_a_bucket_is_noticed() -> None:
    def broken() -> None:
        late: list[Any] = []
        gradients = folded.FoldedModel.gradients

        def unfold_all(model: folded.FoldedModel) -> Any:
            for arguments in late:
                fold.unfold(*arguments)
            late.clear()
            return gradients(model)

        folded.unfold = lambda *arguments: late.append(arguments)  # type: ignore[assignment]
        folded.FoldedModel.gradients = unfold_all  # type: ignore[method-assign]

    found = differing(REDUCED, {}, 2, broken)
    assert max(error for name, error in found.items() if "linear_fc2" in name) > BROKEN


def test_a_weight_folded_before_it_was_gathered_is_noticed() -> None:
    def broken() -> None:
        choose = folded.FoldedModel._choose

        def choose_early(model: Any, layer: torch.nn.Module, *arguments: Any) -> Any:
            found = choose(model, layer, *arguments)
            for weight in model._weights:
                if model._now is not None and weight._module in {*layer.modules()}:
                    weight.enter(model._now)
            return found

        folded.FoldedModel._choose = choose_early  # type: ignore[method-assign]
        folded._FoldedWeight._wait_for_gather = lambda weight: None  # type: ignore[method-assign]

    found = differing(GATHERED, SHARDED, 2, broken)
    assert max(found.values()) > BROKEN


def order_of_waits(*, masked: bool, early: bool = False) -> list[str]:
    """Gathers that a forward pass waits for ("wait"), among the products that it makes."""

    def body(rank: int) -> list[str]:
        seen: list[str] = []
        finish, multiply = BucketGroup.finish_param_sync, torch.matmul

        def finish_noted(group: Any, *arguments: Any, **more: Any) -> None:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                seen.append("wait")
            finish(group, *arguments, **more)

        def multiply_noted(*arguments: Any, **more: Any) -> Tensor:
            seen.append("product")
            return multiply(*arguments, **more)

        pruning = Pruning(layout(**GATHERED), streams=2)
        optimizer = build_optimizer(pruning.chunks, OptimizerConfig(), bf16=False, sharded=True)
        optimizer.zero_grad()
        pruning.train(0)
        ready_gradients(optimizer)
        step_with_norm(optimizer, 0.5)
        binding, batch = pruning.binding, pruning.batches(1)[0]
        if masked:
            gates = pruning.objective.masks.sample(seed=7, step=1, stream=0)
            binding.bind({0: {kind: z.detach() for kind, z in gates.items()}})
        BucketGroup.finish_param_sync = finish_noted  # type: ignore[method-assign]
        torch.matmul = multiply_noted
        if early:
            for weight in binding._model._weights:
                weight._wait_for_gather()
        with torch.no_grad():
            run_chunk(pruning.chunks[0], batch, select=binding.select if masked else None)
        return seen

    return run_ranks(2, body)[0]


def test_masks_wait_for_no_gather_earlier_than_plain_weights_do() -> None:
    plain = order_of_waits(masked=False)
    assert plain.count("wait") > 10
    assert order_of_waits(masked=True) == plain
    assert order_of_waits(masked=True, early=True) != plain
