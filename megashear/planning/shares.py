"""Share of a GPU's peak that training reaches: what was measured on which GPU, and by whom."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megashear.config import PlanConfig
from megashear.planning.hardware import Gpu, gpu_of_device
from megashear.planning.time import FORWARD_SHARE
from megashear.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class MfuShare:
    """A share of the peak while computing, and where it comes from."""

    value: float
    """Share of the peak of dense bfloat16 arithmetic; recomputed layers count as arithmetic."""
    source: str
    """Who measured it, on which GPU."""


_A100 = (
    MfuShare(value=0.28, source="LLM-Shearing, 7B on A100"),
    MfuShare(value=0.32, source="LLM-Shearing, 2.7B on A100"),
)
_H100 = (
    MfuShare(value=0.45, source="Megatron-core, 7.1B on H100, less 5 % for masks"),
    MfuShare(value=0.41, source="Megatron-core, 1.7B on H100"),
)
_H200 = (
    MfuShare(value=0.55, source="megashear, 7B on one H200"),
    MfuShare(value=0.57, source="megashear, 2.7B on one H200"),
)
SHARES: dict[str, tuple[MfuShare, MfuShare]] = {
    **dict.fromkeys(("A100-40G", "A100-80G", "A800-80G"), _A100),
    **dict.fromkeys(("H100-80G", "H800-80G"), _H100),
    "H200-141G": _H200,
}
"""Shares in pruning and in continued pretraining by kind of GPU.

Source: LLM-Shearing, arXiv:2310.06694 (its throughputs over the peak, `docs/benchmarks.md`).
Megatron-core: the README of Megatron-LM, whole steps with Transformer Engine and communication; the
5 % are what masks cost on the H200. H200: docs/benchmarks.md, "One GPU", without communication,
attention counted over the whole square."""

_PRUNING, _PRETRAINING = " pruning", " pretraining"
"""Ends of the names of the jobs in a file of `tools/benchmarks/gpu.py`."""


def planned_share(
    config: PlanConfig,
    shape: ModelShape,
    gpu: Gpu,
    measured: Mapping[str, Any] | None,
    *,
    has_masks: bool,
) -> MfuShare:
    """Return the share of the peak of a job: of flags, or of a benchmark, or the usual one.

    Raises:
        ValueError: the benchmark is of another GPU, or has no such job.
    """
    name = "pruning_mfu" if has_masks else "mfu"
    if (asked := getattr(config, name)) is not None:
        return MfuShare(value=asked, source="--" + name.replace("_", "-"))
    if measured is None:
        return usual_share(gpu, has_masks=has_masks)
    flag = f"--measured {config.measured}"
    return measured_share(measured, shape, gpu, has_masks=has_masks, flag=flag)


def usual_share(gpu: Gpu, *, has_masks: bool) -> MfuShare:
    """Return the share that was measured on a kind of GPU, or else that of A100, and its source.

    Args:
        gpu: the kind.
        has_masks: whether masks are learned.
    """
    shares = SHARES.get(gpu.name)
    found = (shares or _A100)[0 if has_masks else 1]
    if shares is not None:
        return found
    return MfuShare(value=found.value, source=f"assumed, as {found.source}")


def measured_share(
    values: Mapping[str, Any], shape: ModelShape, gpu: Gpu, *, has_masks: bool, flag: str
) -> MfuShare:
    """Return the share of a benchmark's job that is nearest to a job in parameters.

    Args:
        values: JSON of `tools/benchmarks/gpu.py`.
        shape: model of the job that is planned.
        gpu: kind of GPU that is planned for.
        has_masks: whether masks are learned.
        flag: flag and file as the user typed them, for messages.

    Raises:
        ValueError: no such file, no figures of this kind of job, or a GPU with another peak.
    """
    try:
        device, peak = values["environment"]["device"], values["peak_flops_per_s"]
        recompute = values.get("recompute", {})
        found = {
            name: _Measured.read(values["work"][name], case, name, recompute)
            for name, case in values["speed"].items()
            if "measured" in case and name.endswith(_PRUNING if has_masks else _PRETRAINING)
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{flag} is no output of tools/benchmarks/gpu.py --json ({error!r}); measure with "
            f"that, or give shares of your own with --pruning-mfu and --mfu"
        ) from None
    kind = "pruning" if has_masks else "pretraining"
    way_out = "give shares of your own with --pruning-mfu and --mfu in its place"
    if not found or not isinstance(peak, int | float):
        raise ValueError(
            f"{flag} has no time of {kind} on a GPU whose peak is known (its device is {device}); "
            f"{way_out}"
        )
    known = gpu_of_device(str(device))
    if known is None and peak != gpu.peak_flops:
        raise ValueError(
            f"{flag} is of {device}, whose peak is {peak / 1e12:g} TFLOP/s, and --gpu {gpu.name} "
            f"has {gpu.peak_flops / 1e12:g}; {way_out}"
        )
    # drivers do not name the memory, nor does the share depend on it
    if known is not None and known.name.partition("-")[0] != gpu.name.partition("-")[0]:
        raise ValueError(
            f"{flag} is of {device}, and the plan for --gpu {gpu.name}; plan for --gpu "
            f"{known.name}, or {way_out}"
        )
    name, best = min(
        found.items(), key=lambda each: abs(each[1].shape.num_params() - shape.num_params())
    )
    return MfuShare(value=best.flops_per_second / peak, source=f"measured, {name} on {device}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """A job of a benchmark: its model, and the arithmetic of a second."""

    shape: ModelShape
    flops_per_second: float

    @classmethod
    def read(
        cls,
        work: Mapping[str, Any],
        case: Mapping[str, Any],
        name: str,
        recompute: Mapping[str, Any],
    ) -> _Measured:
        shape, length = ModelShape(**work["shape"]), int(work["seq_length"])
        tokens = length * int(work["micro_batch_size"]) * int(work["num_microbatches"])
        seconds = [float(m["wall_s"]) for m in case["measured"] if m["way"] == name]
        flops = shape.training_flops(length)
        # files without the key are older; all of them ran pruning with full recompute
        if recompute.get(name, name.endswith(_PRUNING)):
            head = 6 * shape.vocab_size * shape.hidden_size
            flops += round(FORWARD_SHARE * (flops - head))
        return cls(shape=shape, flops_per_second=flops * tokens / statistics.median(seconds))
