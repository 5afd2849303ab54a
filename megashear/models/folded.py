"""FoldedModel: a model that runs on folded weights, with one set of them for each noise stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from megashear.masks.kinds import HIDDEN, KINDS
from megashear.models import weight_table
from megashear.models.core import RMSNorm
from megashear.models.fold import Factors, fold, pick, unfold
from megashear.models.llama import OUTPUT, names_in_whole, own_layers, unwrap
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape


class FoldedModel:
    """Puts W' = r * W * c in the place of every weight of this rank that masks act on.

    The model runs as if there were no masks. W' is made when a microbatch of its noise stream first
    needs it, and kept until the stream's last microbatch has gone backward. Then the gradient of W'
    is unfolded, in place and before replicas add it up, into the gradients of the weight and of the
    gates. Where a replica's microbatches belong to several streams, the gradient of each stream is
    collected in a buffer of its own and added to the weight's when it is unfolded.

    Args:
        chunks: this rank's model chunks, wrapped or not, of the local spec.
        kinds: kinds of mask.
        shape: the whole model.
        groups: ranks and groups of this process.
        sequence_parallel: whether tensor ranks see their own parts of the sequence.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        kinds: Collection[str],
        shape: ModelShape,
        groups: ParallelGroups,
        *,
        sequence_parallel: bool,
    ) -> None:
        self._kinds = {kind.name for kind in KINDS.values() if {kind.name, kind.within} & {*kinds}}
        self._shape = shape
        self._layers = own_layers(chunks)
        self._streams: dict[int, _NoiseStream] = {}
        self._now: _NoiseStream | None = None
        self._weights: list[_FoldedWeight] = []
        self._norms: list[RMSNorm] = []
        # Without sequence parallelism every tensor rank has the whole gradient of a norm, and only
        # one rank's may count. Of other weights each rank has the part that its own shard adds.
        norms_count = sequence_parallel or groups.tensor_rank == 0
        self._is_alone = groups.data_size == 1
        for chunk in chunks:
            self._attach(chunk, norms_count=norms_count)

    def bind(self, sampled: Mapping[int, Mapping[str, Tensor]], streams: Sequence[int]) -> None:
        """Fold gates into the weights, from the next microbatch on.

        Args:
            sampled: gates of this rank's weights by stream and kind, on the host.
            streams: the stream of each microbatch that goes backward before the gates are released,
                in order.
        """
        self.release()
        self._streams = {
            stream: _NoiseStream(
                gates, len(self._layers), self._shape, is_trained=stream in streams
            )
            for stream, gates in sampled.items()
        }
        order = [self._streams[stream] for stream in streams]
        for weight in self._weights:
            weight.bind(order)

    def select(self, chunk: torch.nn.Module, stream: int) -> Tensor:
        """Choose the stream of the microbatch that ``chunk`` runs next.

        Returns:
            The stream's number as `_choose` reads it, to be passed as ``attention_mask``.
        """
        self._now = self._streams[stream]
        return torch.tensor([stream])

    def release(self) -> None:
        """Take all gates away, so that the model runs on its own weights again."""
        self._streams, self._now = {}, None
        for weight in self._weights:
            weight.release()
        for norm in self._norms:
            norm.num_open = None

    def gradients(self) -> dict[int, dict[str, Tensor]]:
        """Return what this rank's weights add to the gradient of each bound gate, on the device.

        The gradient of a gate that several ranks hold is the sum over these ranks.
        """
        for weight in self._weights:
            weight.check_done()
        return {number: stream.gate_gradients() for number, stream in self._streams.items()}

    def _attach(self, chunk: torch.nn.Module, *, norms_count: bool) -> None:
        """Have a chunk's modules fetch their folded weights whenever they run."""
        # modules and their rows of the table
        gpt = unwrap(chunk)
        rows = {row.name.format(layer=n): (row, n) for row, n in weight_table.tensors(self._shape)}
        for own_name, name in names_in_whole(gpt, self._shape).items():
            row, layer = rows[name]
            part = row.parts[0]
            module = gpt.get_submodule(own_name.rpartition(".")[0])
            # norms count open dimensions
            is_norm = part.axes == (KINDS[HIDDEN].axis,)
            if is_norm:
                self._norms.append(module)
                module.register_forward_pre_hook(self._count)
            if not self._kinds.intersection(itertools.chain(*part.folds)):
                continue
            # folded weights
            assert row.fusion is weight_table.Fusion.NONE, f"{name} is fused of several weights"
            weight = _FoldedWeight(
                chunk,
                module,
                part.folds,
                layer=None if layer is None else self._layers.index(layer),
                counts=norms_count or not is_norm,
                is_alone=self._is_alone,
            )
            self._weights.append(weight)
            # the own module of the last stage's copy of a tied embedding never runs
            user = gpt.decoder.final_layernorm if own_name == OUTPUT else module
            user.register_forward_pre_hook(functools.partial(self._enter, weight))
        # layers choose the stream
        for layer in gpt.decoder.layers:
            layer.register_forward_pre_hook(self._choose, with_kwargs=True)

    def _choose(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Choose the stream that a layer's arguments name, for the weights of the layer.

        Full recompute runs a layer again long after other microbatches have passed, so the stream
        must travel with the layer's arguments. Causal attention needs no mask tensor. Therefore the
        argument ``attention_mask``, which megatron-core carries through its recompute, is the
        stream's number (one int64 on the host). The argument ``context_mask`` is carried too, and
        only cross attention, which this model has not, reads it: it is the attention mask where
        documents are kept apart.
        """
        if not self._streams:
            return None
        self._now = self._streams[int(kwargs["attention_mask"])]
        return args, kwargs | {"attention_mask": kwargs.get("context_mask"), "context_mask": None}

    def _enter(self, weight: _FoldedWeight, user: torch.nn.Module, args: Any) -> None:
        """Put a module's folded weight in place when it runs, after DDP's hook has gathered it."""
        if self._now is not None:
            weight.enter(self._now)

    def _count(self, norm: RMSNorm, args: Any) -> None:
        """Give a norm the number of open hidden dimensions."""
        if self._now is not None:
            norm.num_open = self._now.num_open


class _NoiseStream:
    """The gates of one noise stream on the device, and their gradients so far.

    Args:
        gates: gates of this rank's weights by kind, on the host.
        num_layers: layers of this rank.
        shape: the whole model.
        is_trained: whether gradients of the gates are wanted.
    """

    def __init__(
        self,
        gates: Mapping[str, Tensor],
        num_layers: int,
        shape: ModelShape,
        *,
        is_trained: bool,
    ) -> None:
        self.is_trained = is_trained
        self._leaves = {
            kind: device.pinned(z.detach()).to(device.device(), non_blocking=True)
            for kind, z in gates.items()
        }
        for leaf in self._leaves.values():
            leaf.requires_grad_(is_trained)
        self.num_open = None
        if HIDDEN in gates:
            self.num_open = torch.count_nonzero(self._leaves[HIDDEN]).float()
        self._factors = Factors(self._leaves, shape, num_layers=num_layers)
        self._gradients: dict[tuple[str, ...], Tensor] = {}

    def factors(self, folds: Sequence[tuple[str, ...]], layer: int | None) -> list[Tensor | None]:
        """Return the factor of each axis of a weight, detached from its graph."""
        with torch.enable_grad():  # the first pass of recompute runs without
            found = self._factors.of(folds, layer)
        return [None if each is None else each.detach() for each in found]

    def gradients(self, folds: Sequence[tuple[str, ...]], layer: int | None) -> list[Tensor | None]:
        """Return for each axis of a weight the tensor that sums the gradient of its factor."""
        found: list[Tensor | None] = []
        for kinds in folds:
            factors = self._factors.stacked(kinds)
            if factors is not None and kinds not in self._gradients:
                self._gradients[kinds] = torch.zeros_like(factors)
            found.append(None if factors is None else pick(self._gradients[kinds], layer))
        return found

    def gate_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the gates by kind, shaped like the gates."""
        if not self._gradients:  # this rank had no microbatch of this stream
            return {kind: torch.zeros_like(leaf) for kind, leaf in self._leaves.items()}
        factors = [self._factors.stacked(kinds) for kinds in self._gradients]
        found = torch.autograd.grad(
            [each for each in factors if each is not None],
            list(self._leaves.values()),
            list(self._gradients.values()),
            allow_unused=True,
            materialize_grads=True,
            retain_graph=True,
        )
        return dict(zip(self._leaves, found))


class _FoldedWeight:
    """One weight of this rank and its folded copies.

    Args:
        chunk: the model chunk of the weight, wrapped or not.
        module: the module whose ``weight`` it is.
        folds: `Weight.folds` of its row in the table.
        layer: its layer, counted among this rank's layers; None outside layers.
        counts: whether this rank's gradient of the weight is part of the gates' gradients.
        is_alone: whether there is only one replica, which then has all of the optimizer's state.
    """

    def __init__(
        self,
        chunk: torch.nn.Module,
        module: torch.nn.Module,
        folds: Sequence[tuple[str, ...]],
        *,
        layer: int | None,
        counts: bool,
        is_alone: bool,
    ) -> None:
        self._chunk, self._module, self._is_alone = chunk, module, is_alone
        self._folds, self._layer, self._counts = folds, layer, counts
        self._parameter: Any = module.weight
        # A linear adds the gradient to main_grad itself and returns a placeholder. An embedding or
        # a norm returns the gradient. A tied embedding without pipeline stages does both.
        is_linear = isinstance(module, (ColumnParallelLinear, RowParallelLinear))
        self._is_tied = getattr(self._parameter, "zero_out_wgrad", False)
        self._returns = not is_linear
        self._folded: dict[_NoiseStream, Tensor] = {}
        self._spare: list[Tensor] = []
        self._order: Sequence[_NoiseStream] = ()
        self._is_mixed = False
        self._num_done = 0
        self._apart: Tensor | None = None

    def bind(self, order: Sequence[_NoiseStream]) -> None:
        """Set the streams of the microbatches that will go backward, in order."""
        self._order, self._num_done = order, 0
        self._is_mixed = any(stream is not order[0] for stream in order)

    def enter(self, stream: _NoiseStream) -> None:
        """Put the stream's folded weight in the parameter's place, for the next forward pass."""
        # fold once
        if stream not in self._folded:
            self._wait_for_gather()
            out = self._spare.pop() if self._spare else torch.empty_like(self._parameter.data)
            factors = stream.factors(self._folds, self._layer)
            self._folded[stream] = fold(self._whole(), factors, out=out)
        # a node for autograd
        weight: Any = _FoldedView.apply(self._parameter, self, stream)
        # Without autograd (in evaluations, and in the first pass of recompute) linears would take
        # the weight for frozen, and multiply in another way.
        weight.requires_grad_()
        # what linears look up
        if stream.is_trained:
            weight.main_grad = self._raw()
            weight.grad_added_to_main_grad = False  # linears check whether it exists
            weight.zero_out_wgrad = self._is_tied
        # In place: an attribute of the instance hides the parameter, which stays in checkpoints.
        self._module.__dict__["weight"] = weight

    def folded(self, stream: _NoiseStream) -> Tensor:
        """Return the stream's folded weight as a new tensor over the same memory."""
        return self._folded[stream].detach()

    def unfold(self, stream: _NoiseStream, gradient: Tensor) -> None:
        """Take in the gradient of one microbatch.

        Args:
            stream: the stream of the microbatch.
            gradient: the gradient that autograd found, or a placeholder from a linear.
        """
        # check the order
        raw, number = self._raw(), self._num_done
        assert stream in self._order[number : number + 1], (
            f"microbatch {number} went backward out of turn"
        )
        assert number or not self._parameter.grad_added_to_main_grad, (
            "gradients of another step lie in the buffer; zero it first"
        )
        # collect
        if self._returns:
            raw.add_(gradient)
        self._num_done += 1
        # unfold after the stream's last microbatch in a row
        if self._num_done == len(self._order) or self._order[self._num_done] is not stream:
            gradients = stream.gradients(self._folds, self._layer)
            unfold(
                raw,
                self._whole(),
                stream.factors(self._folds, self._layer),
                gradients if self._counts else [None] * len(gradients),
            )
            if raw is self._apart:
                self._parameter.main_grad.add_(raw)
                raw.zero_()
        # clean up
        if stream not in self._order[self._num_done :]:
            self._give_back(stream)
        if self._num_done == len(self._order):
            # next megatron-core reads the gradient of a tied weight from its module's parameter
            self._module.__dict__.pop("weight", None)
        # the hook of DDP comes next: it must add nothing, and may reduce
        self._parameter.grad_added_to_main_grad = True
        self._parameter.zero_out_wgrad = False

    def check_done(self) -> None:
        """Assert that no gradient was left folded."""
        found, wanted = self._num_done, len(self._order)
        assert found == wanted, f"{found} of {wanted} gradients came"

    def release(self) -> None:
        """Put the parameter back in its place."""
        self._module.__dict__.pop("weight", None)
        if self._is_tied:
            self._parameter.zero_out_wgrad = True
        for stream in [*self._folded]:
            self._give_back(stream)

    def _give_back(self, stream: _NoiseStream) -> None:
        """Give the memory of a stream's folded weight to other streams."""
        self._spare.append(self._folded.pop(stream))

    def _whole(self) -> Tensor:
        """Return the float32 master where every replica has it, else the weight.

        Where replicas share the optimizer's state, one may have a whole master and another no part
        of it. If each folded what it has, replicas would have different models.
        """
        main = getattr(self._parameter, "main_param", None)
        if main is None or (
            getattr(self._parameter, "main_param_sharded", False) and not self._is_alone
        ):
            return self._parameter.detach()
        return main.detach().view_as(self._parameter)

    def _raw(self) -> Tensor:
        """Return the tensor that sums gradients of the folded weight until they are unfolded."""
        total: Tensor = self._parameter.main_grad
        if not self._is_mixed:
            return total
        if self._apart is None:
            self._apart = torch.zeros_like(total)
        return self._apart

    def _wait_for_gather(self) -> None:
        """Wait until the parts of the weight from other replicas are here.

        The hook of DDP on the module has already waited, except for the last stage's copy of a tied
        embedding, which another module reads.
        """
        ddp = self._chunk
        if isinstance(ddp, DistributedDataParallel) and ddp.ddp_config.overlap_param_gather:
            ddp.param_to_bucket_group[self._parameter].finish_param_sync()


class _FoldedView(torch.autograd.Function):
    """A folded weight in the graph of one microbatch.

    Its gradient goes on to the parameter, whose own hooks, among them that of DDP, run after it.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, weight: _FoldedWeight, stream: _NoiseStream) -> Tensor:
        ctx.weight, ctx.stream = weight, stream
        return weight.folded(stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.weight.unfold(ctx.stream, gradient)
        return gradient, None, None
