"""Communication of equal values: flat reductions, broadcasts, agreement on errors."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megashear.files.integrity import SaveError
from megashear.parallel import device


def flat_all_reduce(
    tensors: Sequence[Tensor],
    group: dist.ProcessGroup,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> list[Tensor]:
    """Reduce several tensors of one dtype in one call. Collective over ``group``.

    Args:
        tensors: tensors with the same dtype, shapes and order on every rank; they do not change.
        group: the ranks whose values are combined.
        op: the operation.

    Returns:
        The reduced tensors, on the devices of ``tensors``, equal on every rank.
    """
    if not tensors:
        return []
    if dist.get_world_size(group) == 1:
        return [tensor.detach().clone() for tensor in tensors]
    # on the device, because nccl cannot send from the host
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(_on(group, tensors[0]))
    dist.all_reduce(flat, op=op, group=group)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor).to(tensor.device) for piece, tensor in zip(pieces, tensors)]


def ordered_sum(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Sum small tensors in rank order. Collective over ``group``.

    Sums are bit-equal in all groups that add the same numbers. An all-reduce is equal only on the
    ranks of one group: two groups may add in another order, and copies that follow from the sums
    would drift apart.

    Args:
        tensors: as for `flat_all_reduce`; the tensors of every rank cross the network.
        group: the ranks whose values are added.

    Returns:
        The sums, on the devices of ``tensors``.
    """
    if not tensors or dist.get_world_size(group) == 1:
        return [tensor.detach().clone() for tensor in tensors]
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(_on(group, tensors[0]))
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, flat, group=group)
    total = gathered[0]
    for one in gathered[1:]:
        total = total + one
    pieces = total.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor).to(tensor.device) for piece, tensor in zip(pieces, tensors)]


def check_same(values: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Refuse values that differ between ranks. Collective over ``group``.

    Args:
        values: values that must be equal on all ranks, by the name to print.
        group: the ranks, the world if None.

    Raises:
        ValueError: on every rank alike, with the first difference.
    """
    everyone = gather_objects(dict(values), group)
    for name in values:
        for rank, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                raise ValueError(
                    f"rank {rank} has {name} {theirs[name]}, rank 0 has {everyone[0][name]}; "
                    f"start all with the same flags, and let all hosts see the same files"
                )


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return all ranks' values in rank order. Collective over ``group``, the world if None."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    """Return the value of global rank ``source``. Collective over ``group``, the world if None."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def gather_tensors(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the tensors of all ranks, of one shape, in rank order. Collective over ``group``."""
    if dist.get_world_size(group) == 1:
        return [tensor.detach()]
    own = tensor.detach().to(_on(group, tensor)).contiguous()
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return gathered


def broadcast_tensor(
    tensor: Tensor | None, extents: Sequence[int], source: int, group: dist.ProcessGroup
) -> Tensor:
    """Return the float32 tensor of one rank on all ranks. Collective over ``group``.

    Args:
        tensor: the tensor, on the source; ignored on other ranks.
        extents: its shape, on every rank.
        source: rank within ``group``.
        group: the ranks that need the tensor.
    """
    if dist.get_world_size(group) == 1:
        assert tensor is not None
        return tensor.detach()
    if dist.get_rank(group) == source:
        assert tensor is not None, "the source has the tensor"
        assert tensor.dtype == torch.float32, "sent as float32"
        buffer = tensor.detach().to(device.device()).contiguous()
    else:
        buffer = torch.empty(tuple(extents), dtype=torch.float32, device=device.device())
    dist.broadcast(buffer, src=dist.get_global_rank(group, source), group=group)
    return buffer


def assert_replicated(
    named: Mapping[str, Tensor], where: str, group: dist.ProcessGroup | None = None
) -> None:
    """Check that copies are bit-equal on every rank. Collective over ``group``.

    Args:
        named: tensors by the name to print; the same names on every rank.
        where: place of the check, for the message.
        group: the ranks that hold copies, the world if None.

    Raises:
        RuntimeError: on every rank alike, with the first tensor that differs.
    """
    digests = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in named.items()}
    everyone = gather_objects(digests, group)
    for name in digests:
        seen = [theirs[name] for theirs in everyone]
        if len(set(seen)) > 1:
            odd = [rank for rank, digest in enumerate(seen) if digest != seen[0]]
            raise RuntimeError(
                f"{where}: copies of {name} have drifted apart; ranks {odd} of their group differ "
                f"from rank 0. Restart from the last checkpoint"
            )


def assert_same_bits(
    named: Mapping[str, Tensor], where: str, group: dist.ProcessGroup, what: str
) -> None:
    """Check that copies of large tensors are bit-equal on every rank. Collective over ``group``.

    Two sums over the bits of each tensor are compared: `assert_replicated` would take too long to
    hash them on the host. Each tensor is read once, where it is, and 16 bytes of it cross the
    network. A change of one element always shows; several changes that cancel in both sums do not.

    Args:
        named: tensors by the name to print; the same names on every rank.
        where: place of the check, for the message.
        group: the ranks that hold copies.
        what: kind of the group's ranks, for the message ("data-parallel").

    Raises:
        RuntimeError: on every rank of the group alike, with the first tensor that differs.
    """
    if not named or dist.get_world_size(group) == 1:
        return
    own = torch.stack([_bit_sums(tensor) for tensor in named.values()])  # [tensors, 2]
    everyone = torch.stack(gather_tensors(own, group)).cpu()
    same = (everyone == everyone[0]).all(dim=2)  # [ranks, tensors]
    for number, name in enumerate(named):
        odd = (~same[:, number]).nonzero().flatten().tolist()
        if odd:
            raise RuntimeError(
                f"{where}: copies of {name} have drifted apart: {what} ranks {odd} differ from "
                f"rank 0 of their group. Restart from the last checkpoint; if it comes again at "
                f"another step, suspect the machine of one of them"
            )


@contextlib.contextmanager
def raise_together(
    group: dist.ProcessGroup | None = None, *, task: str | None = None
) -> Iterator[None]:
    """Run a block without collectives, and if it fails on any rank, fail on all ranks.

    If one rank alone raised an error, the others would wait for it in their next collective.
    Collective over ``group``, the world if None.

    Args:
        group: the ranks that run the block.
        task: what cannot be done where saving fails, for the message of the SaveError.

    Raises:
        ValueError: on ranks where the block did not fail, with the message of the first that did.
            With ``task``, on every rank, where the first rank that failed raised a ValueError.
        SaveError: with ``task``, on every rank, where that rank raised any other error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    own = None if error is None else (isinstance(error, ValueError), str(error), reason(error))
    failed = {rank: one for rank, one in enumerate(gather_objects(own, group)) if one is not None}
    if not failed:
        return
    rank = min(failed)
    can_be_mended, text, short = failed[rank]
    if task is None:
        if error is not None:
            raise error
        raise ValueError(f"rank {rank}: {text}")
    if can_be_mended:
        raise ValueError(text) from error
    others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    raise SaveError(f"{task}: rank {rank}{others}: {short}") from error


def reason(error: Exception) -> str:
    """Return why something failed, in few words: of an OSError the cause and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {os.fspath(error.filename)}" if error.filename else "")
    return str(error) or type(error).__name__


def _on(group: dist.ProcessGroup, tensor: Tensor) -> torch.device:
    return device.device() if device.has_cuda() else tensor.device


def _bit_sums(tensor: Tensor) -> Tensor:
    """Return two int64 sums over the words of a tensor's bits, modulo 2^64.

    The first is a plain sum. The second multiplies each word by an odd number that depends on its
    place, so that exchanged elements show.
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().reshape(-1).view(words)
    plain = bits.sum(dtype=torch.int64)
    # pieces bound the temporary memory, and keep the multipliers of places small
    pieces = bits.split(_PIECE)
    place = torch.arange(1, 2 * _PIECE, 2, device=bits.device, dtype=torch.int64)
    weighted = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, piece in enumerate(pieces):
        weighted = weighted + (2 * number + 1) * (piece * place[: len(piece)]).sum()
    return torch.stack([plain, weighted])


_PIECE = 1 << 20
"""Elements that are multiplied at a time, a power of two."""


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
