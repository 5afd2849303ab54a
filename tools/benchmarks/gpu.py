"""Check and measure megashear on one GPU: first correctness, then speed at real shapes.

    python tools/benchmarks/gpu.py --json gpu.json
    python tools/benchmarks/gpu.py --dry-run

It needs only torch, megatron-core and this repository, and uses Apex and Transformer Engine where
they are installed.

Correctness: a masked model on the GPU is compared with the same model on the CPU in float32, with
gradients; bfloat16 is compared with float32; and the cut is compared with the masked model in both.
Speed: pruning at the shape of LLaMA-2-7B (random weights, full recompute), with masked and unmasked
steps in turn on the same weights; continued pretraining at the shapes of 1.3B and 2.7B, with
torch's kernels and with Transformer Engine's where it is installed; torch's attention kernels.
Sequences have 4096 tokens. MFU is the model's arithmetic, without recompute, over the GPU's dense
bfloat16 peak. A shape that according to the plan does not fit on the GPU is left out, with a note.

--dry-run does everything with tiny shapes on any device; on a CPU speeds are "not measured". Tables
and JSON go to stdout; --json sends JSON to a file. The exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Measured,
    device_name,
    environment,
    interleave,
    matmul_rate,
    median_seconds,
    ratio,
    report,
    table,
)
from step import breakdown, parts_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from ways import OPTIMIZER, SEED, OurStep, Work, target_of

from megashear.config import ModelConfig, ParallelConfig, TransformerImpl
from megashear.masks.mask_set import exact_gates
from megashear.masks.targets import target_units
from megashear.models.llama import build_llama
from megashear.parallel import device, kernel_choice
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.planning import work as planned_work
from megashear.planning.hardware import gpu_of_device
from megashear.planning.memory import fullest_stage
from megashear.shape import PRESETS, ModelShape
from megashear.train.handover import SAME_LOSS_BF16
from megashear.train.in_flight import ModelAndOptimizer, cut_in_flight
from megashear.train.optim import build_optimizer
from megashear.train.pruning import EXACT, StructuredPruning
from megashear.train.schedule import run_chunk

NOT_MEASURED = "not measured"
OTHER_DEVICE = 1e-4
"""Relative: float32 sums in another order, over 1,376 products; TF32 is off."""
BFLOAT16_LOSS = 0.01
"""Relative: bfloat16 rounds at 2^-9, and the loss is a mean over tokens."""
BFLOAT16_LOGITS = 0.05
"""Relative: some twenty roundings at 2^-9 between embedding and logits, errors adding up."""
BFLOAT16_GRADIENTS = 0.1
"""Relative: some fifty roundings at 2^-9 forward and backward, and gates' gradients are sums over
weights that cancel in part. On a CPU 0.025 was found, with gated activations."""
CUT = 1e-4
"""Relative: sums over fewer units, in another order."""
LAYERS = 3.0
"""log_alpha of layers: with the noise of `SEED` two are open, and two between, with gradients."""

SMALL = ModelShape(
    num_layers=4,
    hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=64,
    ffn_hidden_size=1376,
    vocab_size=1024,
)
TINY = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=8,
    head_dim=8,
    ffn_hidden_size=160,
    vocab_size=256,
)
PUBLISHED = (
    ("LLM-Shearing, 7B pruning", "A100", "28 %"),
    ("LLM-Shearing, 2.7B pretraining", "A100", "32 %"),
    ("LLM-Shearing, 1.3B pretraining", "A100", "29 %"),
    ("Megatron-core, 1.7B", "H100", "41 %"),
    ("Megatron-core, 7.1B", "H100", "47 %"),
)
"""MFU. Source: arXiv:2310.06694, its throughputs over A100's 312 TFLOP/s; Megatron-LM's README."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A case to be timed."""

    name: str
    work: Work
    target: ModelShape | None
    """Shape to prune to; None for continued pretraining."""
    recompute: bool
    variant: TransformerImpl = "local"
    """Kind of layers, if there is no target."""

    @property
    def model(self) -> ModelConfig:
        """Return precision and recompute."""
        return ModelConfig(bf16=True, recompute_granularity="full" if self.recompute else None)

    def obstacle(self) -> str | None:
        """Return why the case cannot be timed here, or None."""
        if (
            self.variant == "transformer_engine"
            and not device.find_accelerators()["transformer_engine"]
        ):
            return "no Transformer Engine"
        if not device.has_cuda():
            return None
        _, planned = fullest_stage(
            planned_work.Work(
                shape=self.work.shape,
                parallel=ParallelConfig(),
                model=self.model,
                seq_length=self.work.seq_length,
                micro_batch_size=self.work.micro_batch_size,
                num_microbatches=self.work.num_microbatches,
                data_size=1,
                masks=frozenset(target_units(self.work.shape, self.target) if self.target else ()),
            )
        )
        free, _ = torch.cuda.mem_get_info()
        if planned.total <= free:
            return None
        return f"{planned.total / 2**30:.0f} GiB planned, {free / 2**30:.0f} free"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison."""

    name: str
    found: float
    bound: float

    @property
    def verdict(self) -> str:
        """Return the verdict in a word."""
        return "ok" if self.found < self.bound else "WRONG"


def cases(*, dry: bool) -> list[Case]:
    """Return the cases to time; with ``dry`` tiny ones of the same kinds."""

    def work(preset: str, micro_batch_size: int, num_microbatches: int) -> Work:
        return Work(
            shape=TINY if dry else PRESETS[preset],
            seq_length=32 if dry else 4096,
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
        )

    seven = work("llama2-7b", 1, 4)
    target = target_of(TINY) if dry else PRESETS["llama2-2.7b"]
    pretraining = {
        "1.3B pretraining": work("llama2-1.3b", 4, 4),
        "2.7B pretraining": work("llama2-2.7b", 2, 4),
    }
    return [
        Case(name="7B pruning", work=seven, target=target, recompute=True),
        *(
            Case(name=name, work=each, target=None, recompute=False)
            for name, each in pretraining.items()
        ),
        *(
            Case(
                name=f"{name}, Transformer Engine",
                work=each,
                target=None,
                recompute=False,
                variant="transformer_engine",
            )
            for name, each in pretraining.items()
        ),
    ]


def whole_pass(groups: ParallelGroups, model: ModelConfig) -> dict[str, Tensor]:
    """Return loss, logits and gradients of a small masked model, which any device must equal."""
    # two microbatches, so that gradients are added to what is there
    work = Work(shape=SMALL, seq_length=128, micro_batch_size=2, num_microbatches=2)
    step = OurStep(work, groups, ParallelConfig(), model, target=target_of(SMALL))
    _same_weights(step.chunks)
    # folding is from float32 masters where there are any
    step.train_step.optimizer.reload_model_params()
    objective = step.objective
    assert isinstance(objective, StructuredPruning)
    # as drawn, two of the four layers are closed, and a closed layer's gradients are all 0
    objective.masks.log_alpha["layer"].data.fill_(LAYERS)
    for chunk in step.chunks:
        chunk.zero_grad_buffer()
    losses = objective.forward_backward(step.batches, 0)
    found = {"loss": losses[0].sums.sum() / losses[0].counts.sum()}
    for name, parameter in step.chunks[0].named_parameters():
        inner = name.replace("module.", "")  # wrapped once more under bfloat16
        found[f"gradient of {inner}"] = parameter.main_grad
    for kind, log_alpha in objective.masks.log_alpha.items():
        assert log_alpha.grad is not None
        found[f"gradient of log_alpha {kind}"] = log_alpha.grad
    found["logits"] = _masked_logits(step)[0]
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


def _same_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Set weights from the host's generator, because devices draw others from the same seed."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(drawn + float("norm" in name))


def _masked_logits(step: OurStep) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits under the gates of the target, and these whole gates."""
    objective = step.objective
    assert isinstance(objective, StructuredPruning)
    with objective.evaluating(EXACT), torch.no_grad():
        logits = run_chunk(
            step.chunks[0],
            step.batches[0],
            select=objective.binding.select,
            with_labels=False,
        )
    return logits, exact_gates(objective.binding.gather_log_alpha(), objective.targets)


def cut_error(groups: ParallelGroups, model: ModelConfig) -> float:
    """Return the relative difference between logits of the masked model and of its cut."""
    work, target = Work(shape=SMALL, seq_length=128, micro_batch_size=2), target_of(SMALL)
    parallel = ParallelConfig()
    step = OurStep(work, groups, parallel, model, target=target)
    step()  # the cut wants moments
    logits, gates = _masked_logits(step)
    chunks = build_llama(target, groups, parallel, model, variant="local", seed=SEED)
    optimizer = build_optimizer(chunks, OPTIMIZER, bf16=model.bf16)
    cut_in_flight(
        ModelAndOptimizer(step.chunks, step.train_step.optimizer, SMALL, groups),
        ModelAndOptimizer(chunks, optimizer, target, groups),
        gates,
    )
    with torch.no_grad():
        smaller = run_chunk(chunks[0], step.batches[0], with_labels=False)
    return relative(smaller, logits)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return ||found - wanted|| / ||wanted||, not finite where wanted is 0, which tests nothing."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def worst(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference, or NaN if one is NaN, which max() may hide."""
    each = [relative(found[name], tensor) for name, tensor in wanted.items()]
    return float(torch.tensor(each, dtype=torch.float64).max())


WITHOUT_GPU = """
import os, runpy, sys
# they would make tensors on a GPU that this process does not see
sys.modules["transformer_engine"] = sys.modules["apex"] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_the_cpu() -> dict[str, Tensor]:
    """Return `whole_pass` from a process that sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "reference.pt"
        subprocess.run(
            [sys.executable, "-c", WITHOUT_GPU, __file__, "--reference", str(output)],
            check=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        found: dict[str, Tensor] = torch.load(output, weights_only=True)
    return found


def correctness(groups: ParallelGroups) -> list[Check]:
    """Return every comparison: the GPU with the CPU, bfloat16 with float32, the cut with masks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    reference, here = on_the_cpu(), whole_pass(groups, ModelConfig())
    rough = whole_pass(groups, ModelConfig(bf16=True))
    gradients = {name: tensor for name, tensor in here.items() if name.startswith("gradient")}
    return [
        Check(
            name="float32 against the CPU, worst of all tensors",
            found=worst(here, reference),
            bound=OTHER_DEVICE,
        ),
        Check(
            name="loss, bfloat16 against float32",
            found=relative(rough["loss"], here["loss"]),
            bound=BFLOAT16_LOSS,
        ),
        Check(
            name="logits, bfloat16 against float32",
            found=relative(rough["logits"], here["logits"]),
            bound=BFLOAT16_LOGITS,
        ),
        Check(
            name="gradients, log_alpha's included, bfloat16 against float32, worst of all",
            found=worst(rough, gradients),
            bound=BFLOAT16_GRADIENTS,
        ),
        Check(name="logits, cut against masked", found=cut_error(groups, ModelConfig()), bound=CUT),
        Check(
            name="logits, cut against masked, bfloat16",
            found=cut_error(groups, ModelConfig(bf16=True)),
            bound=SAME_LOSS_BF16,
        ),
    ]


def timed(case: Case, groups: ParallelGroups, rounds: int) -> dict[str, Any]:
    """Time steps of a case; for pruning also unmasked steps of the same model, in turn."""
    step = OurStep(
        case.work, groups, ParallelConfig(), case.model, target=case.target, variant=case.variant
    )
    ways: dict[str, Callable[[], None]] = {case.name: step}
    watched = {case.name: step}
    if case.target is not None:
        # without gates a masked model is its plain self, with folded weights left in memory; two
        # such models do not fit on one GPU
        plain = step.unmasked()
        ways[f"{case.name}, unmasked"] = watched[f"{case.name}, unmasked"] = plain
        again = copy.copy(plain)
        ways[f"{case.name}, unmasked again"] = again
    measured = interleave(ways, rounds, warm_up=2)
    peaks = {way: peak_bytes(each) for way, each in ways.items()}
    parts = {way: parts_of(each, max(3, rounds // 2)) for way, each in watched.items()}
    return {"measured": measured, "peak_bytes": peaks, "parts_s": parts, "ways": list(ways)}


CHOICE = "torch's choice"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""torch's attention kernels that do not store the scores."""


def attention(shape: ModelShape, length: int, rounds: int) -> dict[str, Any]:
    """Time one layer's attention, forward and backward, with every kernel that takes it, in turn.

    Args:
        shape: shape with the heads.
        length: tokens of one sequence.
        rounds: measured passes of each kernel.
    """
    heads, width = shape.num_attention_heads, shape.head_dim
    q, k, v = (
        # as `CausalAttention` has them: sequences in a row, seen as [b, heads, s, d]
        torch.randn(1, length, heads, width, device=device.device(), dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )

    def run(backends: Sequence[SDPBackend]) -> None:
        with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(out.detach())

    ways: dict[str, Callable[[], object]] = {CHOICE: lambda: run(())}
    missing = []
    for name, backend in KERNELS.items():
        try:
            run((backend,))
        except RuntimeError:  # torch's way to say that a kernel does not take it
            missing.append(name)
        else:
            ways[name] = functools.partial(run, (backend,))
    return {"measured": interleave(ways, rounds), "ways": list(ways), "missing": missing}


def attention_rows(found: dict[str, Any]) -> list[list[object]]:
    """Return a row of the table for each kernel."""
    rows: list[list[object]] = [[name, "not here", ""] for name in found["missing"]]
    for way in found["ways"]:
        if not device.has_cuda():
            rows.append([way, NOT_MEASURED, NOT_MEASURED])
            continue
        seconds = median_seconds(found["measured"], way)
        rows.append([way, f"{1e3 * seconds:.3f}", ratio(found["measured"], way, CHOICE)])
    return rows


def peak_bytes(step: Callable[[], None]) -> int | None:
    """Return the most bytes that tensors take during a step, with model and optimizer.

    Return None on a CPU.
    """
    if not device.has_cuda():
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def peak_flops() -> float | None:
    """Return this GPU's dense bfloat16 peak, FLOP/s, or None if `megashear plan` has none."""
    gpu = gpu_of_device(device_name()) if device.has_cuda() else None
    return None if gpu is None else gpu.peak_flops


def speed_rows(
    all_cases: Sequence[Case], found: dict[str, dict[str, Any]], peak: float | None
) -> list[list[object]]:
    """Return a row of the table for each way of each case."""
    rows: list[list[object]] = []
    for case in all_cases:
        if "obstacle" in found[case.name]:
            why = found[case.name]["obstacle"]
            rows.append([case.name, f"{case.work.tokens:,}", f"{NOT_MEASURED}: {why}", *[""] * 4])
            continue
        measured: list[Measured] = found[case.name]["measured"]
        base = f"{case.name}, unmasked"
        for way in found[case.name]["ways"]:
            row: list[object] = [way, f"{case.work.tokens:,}"]
            if not device.has_cuda():
                rows.append([*row, *[NOT_MEASURED] * 5])
                continue
            seconds = median_seconds(measured, way)
            mfu = NOT_MEASURED
            if peak is not None:
                mfu = f"{100 * case.work.flops() / seconds / peak:.1f} %"
            over = ratio(measured, way, base) if case.target is not None else ""
            memory = f"{found[case.name]['peak_bytes'][way] / 2**30:.1f}"
            rows.append(
                [*row, f"{seconds:.3f}", f"{case.work.tokens / seconds:,.0f}", mfu, over, memory]
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print tables and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--only", choices=["correctness", "speed"], help="both unless given")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each way")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for every measurement; stdout if none")
    args = parser.parse_args(argv)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    with distributed(ParallelConfig(), ModelConfig()) as groups:
        if args.reference is not None:
            torch.save(whole_pass(groups, ModelConfig()), args.reference)
            return 0
        if not (device.has_cuda() or args.dry_run):
            print("gpu.py: no CUDA device is found; --dry-run shows that it works", file=sys.stderr)
            return 2
        checks = correctness(groups) if args.only != "speed" else []
        all_cases = cases(dry=args.dry_run) if args.only != "correctness" else []
        found: dict[str, dict[str, Any]] = {}
        kernels = None
        if all_cases:
            first = all_cases[0].work
            kernels = attention(first.shape, first.seq_length, args.rounds)
        for case in all_cases:
            # each with kernels of its own, as in a run, and none left uncompiled unseen
            torch.compiler.reset()
            why = case.obstacle()
            found[case.name] = (
                timed(case, groups, args.rounds) if why is None else {"obstacle": why}
            )
            gc.collect()
            if device.has_cuda():
                torch.cuda.empty_cache()
        peak = peak_flops()
        rate = matmul_rate(torch.bfloat16) if device.has_cuda() else None
        head = ["way", "tokens", "s a step", "tokens/s", "MFU", "over unmasked", "memory, GiB"]
        tables = [
            f"{device_name()}: dense bfloat16 peak "
            f"{'not known, so no MFU' if peak is None else f'{peak / 1e12:.0f} TFLOP/s'}, large "
            f"products reach {NOT_MEASURED if rate is None else f'{rate / 1e12:.0f} TFLOP/s'}",
            table(
                ["check", "relative difference", "bound", ""],
                [
                    (
                        c.name,
                        f"{c.found:.1e}",
                        f"{c.bound:g}",
                        c.verdict,
                    )
                    for c in checks
                ],
            ),
            table(head, speed_rows(all_cases, found, peak)),
            *(
                breakdown(each["parts_s"])
                for each in found.values()
                if device.has_cuda() and "parts_s" in each
            ),
            table(
                ["attention of one layer", "ms forward and backward", f"over {CHOICE}"],
                [] if kernels is None else attention_rows(kernels),
            ),
            table(["published", "GPU", "MFU"], PUBLISHED),
        ]
        report(
            "gpu.py",
            tables,
            {
                "environment": environment("gpu.py", argv),
                "peak_flops_per_s": peak,
                "matmul_flops_per_s": rate,
                "checks": checks,
                "speed": found,
                "attention": kernels,
                "compiled": kernel_choice.compiles_kernels(),
                "work": {case.name: asdict(replace(case.work)) for case in all_cases},
                "recompute": {case.name: case.recompute for case in all_cases},
            },
            args.json,
        )
    return 0 if all(check.found < check.bound for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
