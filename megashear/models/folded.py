"""FoldedModel: a model that runs on folded weights, one set of them for each noise stream."""

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
    """Shows this rank's modules W' = r * W * c in the place of every weight that masks act on.

    The model runs as if there were no masks. W' is made when a microbatch of its noise stream first
    asks for it, and kept until the stream's last one went backward. Then the gradient of W' is
    unfolded where it lies, before replicas add it up, into those of the weight and of the gates.
    Where a replica's microbatches belong to several streams, a stream's gradient is collected
    apart, and added when it is unfolded.

    Args:
        chunks: this rank's model chunks, wrapped or not, of the local spec.
        kinds: of the masks.
        shape: of the whole model.
        groups: where this rank stands.
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
        self._streams: dict[int, _Stream] = {}
        self._now: _Stream | None = None
        self._weights: list[_FoldedWeight] = []
        self._norms: list[RMSNorm] = []
        # Without sequence parallelism every tensor rank has the whole gradient of a norm, and one
        # of them counts; of other weights each has the part that its own shard adds.
        norms_count = sequence_parallel or groups.tensor_rank == 0
        self._is_alone = groups.data_size == 1
        for chunk in chunks:
            self._attach(chunk, norms_count=norms_count)

    def bind(self, sampled: Mapping[int, Mapping[str, Tensor]], streams: Sequence[int]) -> None:
        """Fold gates in from the next microbatch on.

        Args:
            sampled: gates of this rank's weights by stream and kind, on the host.
            streams: of the microbatches that go backward before the gates are released, in order.
        """
        self.release()
        self._streams = {
            stream: _Stream(gates, len(self._layers), self._shape, is_trained=stream in streams)
            for stream, gates in sampled.items()
        }
        order = [self._streams[stream] for stream in streams]
        for weight in self._weights:
            weight.bind(order)

    def select(self, chunk: torch.nn.Module, stream: int) -> Tensor:
        """Choose the stream of the microbatch that ``chunk`` runs next.

        Returns:
            The stream's number as the layers want it, for ``attention_mask``.
        """
        self._now = self._streams[stream]
        return torch.tensor([stream])

    def release(self) -> None:
        """Take all gates away: the model is its unmasked self again."""
        self._streams, self._now = {}, None
        for weight in self._weights:
            weight.release()
        for norm in self._norms:
            norm.num_open = None

    def gradients(self) -> dict[int, dict[str, Tensor]]:
        """Return what this rank's weights add to the gradient of each bound gate, on the device.

        Of a gate that several ranks hold, the sum over them is its gradient.
        """
        for weight in self._weights:
            weight.check_done()
        return {number: stream.gate_gradients() for number, stream in self._streams.items()}

    def _attach(self, chunk: torch.nn.Module, *, norms_count: bool) -> None:
        """Have a chunk's modules ask for their folded weights whenever they run."""
        gpt = unwrap(chunk)
        rows = {row.name.format(layer=n): (row, n) for row, n in weight_table.tensors(self._shape)}
        for own_name, name in names_in_whole(gpt, self._shape).items():
            row, layer = rows[name]
            part = row.parts[0]
            module = gpt.get_submodule(own_name.rpartition(".")[0])
            is_norm = part.axes == (KINDS[HIDDEN].axis,)
            if is_norm:
                self._norms.append(module)
                module.register_forward_pre_hook(self._count)
            if not self._kinds.intersection(itertools.chain(*part.folds)):
                continue
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
            # the last stage's copy of a tied embedding is not read by its own module
            user = gpt.decoder.final_layernorm if own_name == OUTPUT else module
            user.register_forward_pre_hook(functools.partial(self._enter, weight))
        for layer in gpt.decoder.layers:
            layer.register_forward_pre_hook(self._choose, with_kwargs=True)

    def _choose(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Choose the stream that came with a layer's arguments, for the weights in it.

        Full recompute runs a layer again long after other microbatches have passed, so the stream
        must travel with the layer's arguments. Causal attention needs no mask tensor: the argument
        ``attention_mask``, which megatron-core carries through its recompute, is the stream's
        number (one int64 on the host). ``context_mask``, carried in the same way and used by cross
        attention alone, which there is none of, is the mask where documents are kept apart.
        """
        if not self._streams:
            return None
        self._now = self._streams[int(kwargs["attention_mask"])]
        return args, kwargs | {"attention_mask": kwargs.get("context_mask"), "context_mask": None}

    def _enter(self, weight: _FoldedWeight, user: torch.nn.Module, args: Any) -> None:
        """Show a module its weight when it runs; DDP's own hook has waited for all of it."""
        if self._now is not None:
            weight.enter(self._now)

    def _count(self, norm: RMSNorm, args: Any) -> None:
        """Tell a norm how many hidden dimensions are open."""
        if self._now is not None:
            norm.num_open = self._now.num_open


class _Stream:
    """The gates of one noise stream on the device, and what their gradients have come to.

    Args:
        gates: of this rank's weights by kind, on the host.
        num_layers: of this rank.
        shape: of the whole model.
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
        """Return the factor of each axis of a weight, without their graph."""
        with torch.enable_grad():  # recompute asks first without
            found = self._factors.of(folds, layer)
        return [None if each is None else each.detach() for each in found]

    def gradients(self, folds: Sequence[tuple[str, ...]], layer: int | None) -> list[Tensor | None]:
        """Return for each axis of a weight what the gradient of its factor is added to."""
        found: list[Tensor | None] = []
        for kinds in folds:
            factors = self._factors.stacked(kinds)
            if factors is not None and kinds not in self._gradients:
                self._gradients[kinds] = torch.zeros_like(factors)
            found.append(None if factors is None else pick(self._gradients[kinds], layer))
        return found

    def gate_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the gates by kind, shaped like them."""
        if not self._gradients:  # no microbatch here was of this stream
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
    """One weight of this rank, and what it is folded to.

    Args:
        chunk: the model chunk that has it, wrapped or not.
        module: whose ``weight`` it is.
        folds: of its row of the table.
        layer: its layer among this rank's; None outside the layers.
        counts: whether this rank's gradient of it is part of the gates' gradients.
        is_alone: whether there is one replica, which then has all of the optimizer's state.
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
        # A linear adds its gradient to main_grad itself and returns a placeholder; an embedding
        # or a norm returns it. A tied embedding without pipeline stages is both.
        is_linear = isinstance(module, (ColumnParallelLinear, RowParallelLinear))
        self._is_tied = getattr(self._parameter, "zero_out_wgrad", False)
        self._returns = not is_linear
        self._folded: dict[_Stream, Tensor] = {}
        self._spare: list[Tensor] = []
        self._order: Sequence[_Stream] = ()
        self._is_mixed = False
        self._num_done = 0
        self._apart: Tensor | None = None

    def bind(self, order: Sequence[_Stream]) -> None:
        """Take the streams of the microbatches that will go backward, in their order."""
        self._order, self._num_done = order, 0
        self._is_mixed = any(stream is not order[0] for stream in order)

    def enter(self, stream: _Stream) -> None:
        """Put the stream's weight in the parameter's place, for the forward pass that follows."""
        if stream not in self._folded:
            self._wait_for_gather()
            out = self._spare.pop() if self._spare else torch.empty_like(self._parameter.data)
            factors = stream.factors(self._folds, self._layer)
            self._folded[stream] = fold(self._whole(), factors, out=out)
        weight: Any = _Folded.apply(self._parameter, self, stream)
        # Without autograd (evaluations, the pass that recompute runs again) linears would take it
        # for frozen, and multiply in another way.
        weight.requires_grad_()
        if stream.is_trained:
            weight.main_grad = self._raw()
            weight.grad_added_to_main_grad = False  # a placeholder is returned where it is there
            weight.zero_out_wgrad = self._is_tied
        # An attribute of the instance hides the parameter, which keeps its name in checkpoints.
        self._module.__dict__["weight"] = weight

    def folded(self, stream: _Stream) -> Tensor:
        """Return the stream's weight, as a tensor of its own over the same memory."""
        return self._folded[stream].detach()

    def unfold(self, stream: _Stream, gradient: Tensor) -> None:
        """Take in the gradient of one microbatch.

        Args:
            stream: the microbatch's.
            gradient: what autograd found; a placeholder where the weight is a linear's alone.
        """
        raw, number = self._raw(), self._num_done
        assert stream in self._order[number : number + 1], (
            f"microbatch {number} went backward out of turn"
        )
        assert number or not self._parameter.grad_added_to_main_grad, (
            "gradients of another step lie in the buffer; zero it first"
        )
        if self._returns:
            raw.add_(gradient)
        self._num_done += 1
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
        if stream not in self._order[self._num_done :]:
            self._give_back(stream)
        if self._num_done == len(self._order):
            # megatron-core next looks for the gradient of a tied weight by way of its module
            self._module.__dict__.pop("weight", None)
        # DDP's hook comes next: it must add nothing, and may reduce
        self._parameter.grad_added_to_main_grad = True
        self._parameter.zero_out_wgrad = False

    def check_done(self) -> None:
        """Make sure that no gradient was left folded."""
        found, wanted = self._num_done, len(self._order)
        assert found == wanted, f"{found} of {wanted} gradients came"

    def release(self) -> None:
        """Show the parameter again."""
        self._module.__dict__.pop("weight", None)
        if self._is_tied:
            self._parameter.zero_out_wgrad = True
        for stream in [*self._folded]:
            self._give_back(stream)

    def _give_back(self, stream: _Stream) -> None:
        """Let other streams have the memory of this one's weight."""
        self._spare.append(self._folded.pop(stream))

    def _whole(self) -> Tensor:
        """Return the float32 master where every replica has it, else the weight.

        Of a shared state a replica may have a master whole and the next nothing of it: from what
        each has, they would fold two models.
        """
        main = getattr(self._parameter, "main_param", None)
        if main is None or (
            getattr(self._parameter, "main_param_sharded", False) and not self._is_alone
        ):
            return self._parameter.detach()
        return main.detach().view_as(self._parameter)

    def _raw(self) -> Tensor:
        """Return what gradients of the folded weight are added to, until they are unfolded."""
        total: Tensor = self._parameter.main_grad
        if not self._is_mixed:
            return total
        if self._apart is None:
            self._apart = torch.zeros_like(total)
        return self._apart

    def _wait_for_gather(self) -> None:
        """Wait until other replicas' parts of the weight are here.

        DDP's own hook of the module has done so, but for the last stage's copy of a tied embedding,
        which another module reads.
        """
        ddp = self._chunk
        if isinstance(ddp, DistributedDataParallel) and ddp.ddp_config.overlap_param_gather:
            ddp.param_to_bucket_group[self._parameter].finish_param_sync()


class _Folded(torch.autograd.Function):
    """A folded weight in the graph of one microbatch.

    Its gradient goes to the weight that it was made of, whose own hooks, DDP's among them, run
    afterwards.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, weight: _FoldedWeight, stream: _Stream) -> Tensor:
        ctx.weight, ctx.stream = weight, stream
        return weight.folded(stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.weight.unfold(ctx.stream, gradient)
        return gradient, None, None
