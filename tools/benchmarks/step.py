"""Measure a training step, part by part: masked, unmasked, and transformers' LLaMA with SDPA.

    python tools/benchmarks/step.py --rounds 40
    torchrun --nproc-per-node 2 tools/benchmarks/step.py --tensor-model-parallel-size 2 --rounds 40

All ways run in one process (of each rank), interleaved round by round, so that other work of the
machine slows all of them. A second unmasked model gives the noise: the difference of two equal
ways. Each part is compared with the least time that the machine allows: that of its matrix products
at the rate of large products on this machine, or that of the bytes that it must move at the speed
of an operation in place. Memory and traffic are counted, not timed. Tables and JSON go to stdout;
--json sends JSON to a file. `steps.py` runs this script over shapes, layouts and precisions.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from counting import counting, peak_bytes
from measuring import (
    environment,
    interleave,
    matmul_rate,
    median_seconds,
    memory_bandwidth,
    ratio,
    report,
    table,
)
from ways import WHOLE, OurStep, Parts, TransformersStep, Work, kept_bytes, target_of

from megashear.config import ModelConfig, ParallelConfig
from megashear.models import weight_table
from megashear.models.llama import names_in_whole, unwrap
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.shape import PRESETS, ModelShape
from megashear.train.pruning import StructuredPruning

UNMASKED, AGAIN, MASKED = "unmasked", "unmasked again", "masked"
PLAIN, PLAIN_DEFAULT = "transformers, fused AdamW", "transformers, default AdamW"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags for the work and the layout of a step, with Megatron-LM's names."""
    parser.add_argument("--preset", choices=sorted(PRESETS), help="shape; or the extents below")
    for name, default in (
        ("num-layers", 4),
        ("hidden-size", 512),
        ("num-attention-heads", 8),
        ("num-query-groups", None),
        ("ffn-hidden-size", 1376),
        ("vocab-size", 32000),
        ("seq-length", 512),
        ("micro-batch-size", 2),
        ("num-microbatches", 1),
        ("mask-noise-streams", 1),
        ("tensor-model-parallel-size", 1),
        ("pipeline-model-parallel-size", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--recompute-granularity", choices=["full"])
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each way")
    parser.add_argument("--threads", type=int, help="of torch in each process; its default if none")
    parser.add_argument("--json", type=Path, help="file for every measurement; stdout if none")


def work_of(args: argparse.Namespace) -> Work:
    """Return the work that the flags describe.

    Raises:
        SystemExit: the hidden size does not divide over the heads.
    """
    shape = PRESETS[args.preset] if args.preset else None
    if shape is None:
        if args.hidden_size % args.num_attention_heads:
            raise SystemExit(
                f"--hidden-size {args.hidden_size} is not a multiple of --num-attention-heads "
                f"{args.num_attention_heads}; give a multiple, or other heads"
            )
        shape = ModelShape(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups or args.num_attention_heads,
            head_dim=args.hidden_size // args.num_attention_heads,
            ffn_hidden_size=args.ffn_hidden_size,
            vocab_size=args.vocab_size,
        )
    return Work(
        shape=shape,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        num_microbatches=args.num_microbatches,
        num_streams=args.mask_noise_streams,
    )


@contextlib.contextmanager
def processes(args: argparse.Namespace) -> Iterator[tuple[ParallelConfig, ModelConfig, Any]]:
    """Open the layout that the flags describe; yield it, the precision and this rank's groups."""
    if args.threads:
        torch.set_num_threads(args.threads)
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )
    model = ModelConfig(bf16=args.bf16, recompute_granularity=args.recompute_granularity)
    with distributed(parallel, model) as groups:
        yield parallel, model, groups


def build(
    work: Work,
    groups: ParallelGroups,
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    with_transformers: bool,
) -> dict[str, Callable[[], None]]:
    """Return the ways to compare, by name."""
    ways: dict[str, Callable[[], None]] = {
        UNMASKED: OurStep(work, groups, parallel, model),
        AGAIN: OurStep(work, groups, parallel, model),
        MASKED: OurStep(work, groups, parallel, model, target=target_of(work.shape)),
    }
    if with_transformers:
        ways[PLAIN] = TransformersStep(work, groups, model)
        ways[PLAIN_DEFAULT] = TransformersStep(work, groups, model, fused=False)
    return ways


def comparison(measured: Sequence[Any], ways: Sequence[str]) -> str:
    """Return each way's seconds and its ratio to the unmasked way, on both clocks."""
    rows = [
        (
            way,
            f"{median_seconds(measured, way):.4f}",
            ratio(measured, way, UNMASKED),
            f"{median_seconds(measured, way, clock='cpu_s'):.4f}",
            ratio(measured, way, UNMASKED, clock="cpu_s"),
        )
        for way in ways
    ]
    return table(["way", "s a step", "over unmasked", "CPU s a step", "over unmasked"], rows)


def parts_of(step: OurStep, rounds: int) -> dict[str, float]:
    """Return the seconds of each part of a step, that of median length among ``rounds``."""
    parts = Parts()
    step.watch(parts)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        parts.clear()
        with parts.time(WHOLE):
            step()
        found.append(dict(parts.seconds))
    parts.restore()
    return sorted(found, key=lambda each: each[WHOLE])[rounds // 2]


BYTES_OF_GATES = {
    "masks: sampling": 8,
    "masks: gradients": 8,
    "masks: penalty": 4,
    "masks: update": 28,
}
"""Bytes a gate that a part reads and writes at least, float32: log_alpha in, gate out; gradients of
gates in, of log_alpha out; log_alpha in; the two, and Adam's moments, in, three of them out."""


def floors(
    work: Work, step: OurStep, *, rate: float, bandwidth: float, model_parallel: int
) -> dict[str, float]:
    """Return the least seconds that a part can take on this machine.

    Args:
        work: the step.
        step: whose weights and gates are counted.
        rate: FLOP/s that large matrix products reach.
        bandwidth: bytes/s that an operation in place moves, read and written ones counted.
        model_parallel: ranks that share the arithmetic.
    """
    products = work.flops() / model_parallel / rate
    parameters = [p for chunk in step.chunks for p in chunk.parameters()]
    # the norm reads every float32 gradient; Adam reads it again, reads and writes the float32
    # weight and two moments, and under bfloat16 writes the weight once more
    each = 4 + 4 + 2 * 12 + (2 if parameters[0].dtype == torch.bfloat16 else 0)
    optimizer = each * sum(p.numel() for p in parameters) / bandwidth
    found = {"forward": products / 3, "backward": products * 2 / 3, "optimizer": optimizer}
    if isinstance(step.objective, StructuredPruning):
        size = parameters[0].element_size()
        streams = min(work.num_streams, work.num_microbatches)
        elements = streams * folded_elements(work.shape, step.chunks) / bandwidth
        # weight in, folded weight out; gradient and weight in, gradient out
        found |= {
            "masks: folding": 2 * size * elements,
            "masks: unfolding": (4 + size + 4) * elements,
        }
        gates = sum(each.numel() for each in step.objective.masks.log_alpha.values())
        found |= {part: size * gates / bandwidth for part, size in BYTES_OF_GATES.items()}
    return found | {"whole": sum(found.values())}


def folded_elements(shape: ModelShape, chunks: Sequence[torch.nn.Module]) -> int:
    """Return the elements of this rank's weights into which masks fold, with all kinds."""
    rows = {row.name.format(layer=layer): row for row, layer in weight_table.tensors(shape)}
    found = 0
    for chunk in chunks:
        gpt = unwrap(chunk)
        names = names_in_whole(gpt, shape)
        for name, parameter in gpt.named_parameters():
            if any(kinds for part in rows[names[name]].parts for kinds in part.folds):
                found += parameter.numel()
    return found


def breakdown(
    parts: dict[str, dict[str, float]], least: dict[str, dict[str, float]] | None = None
) -> str:
    """Return the table of each way's parts, seconds and shares of the step, with any floors."""
    names = list(dict.fromkeys(name for each in parts.values() for name in each))
    rows = []
    for name in names:
        row: list[object] = [name]
        for way, each in parts.items():
            seconds = each.get(name)
            share = (
                "" if seconds is None else f"{seconds:.4f} ({100 * seconds / each['whole']:.1f}%)"
            )
            row.append(share)
            if least is not None:
                floor = least[way].get(name)
                row.append("" if floor is None or seconds is None else f"{floor:.4f}")
        rows.append(row)
    heads = [(f"{way}, s", "its floor, s")[: 1 if least is None else 2] for way in parts]
    return table(["part", *(head for each in heads for head in each)], rows)


def memory(step: OurStep) -> dict[str, int]:
    """Return `kept_bytes`, and as "peak" the most bytes that a step's new tensors take at once."""
    return kept_bytes(step) | {"peak": peak_bytes(step)}


def sent(step: OurStep) -> dict[str, int]:
    """Return the calls in which this rank sends in a step, and their bytes."""
    with counting() as counts:
        step()
    return {"calls": sum(counts.calls.values()), "bytes": sum(counts.bytes.values())}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--no-transformers", action="store_true", help="leave it out")
    args = parser.parse_args(argv)
    work = work_of(args)
    with processes(args) as (parallel, model, groups):
        alone = groups.world_size == 1
        ways = build(
            work, groups, parallel, model, with_transformers=alone and not args.no_transformers
        )
        measured = interleave(ways, args.rounds, warm_up=2)
        ours = {way: step for way, step in ways.items() if isinstance(step, OurStep)}
        parts = {way: parts_of(ours[way], args.rounds) for way in (UNMASKED, MASKED)}
        kept = {way: memory(ours[way]) for way in (UNMASKED, MASKED)}
        rate = matmul_rate(torch.bfloat16 if model.bf16 else torch.float32)
        bandwidth = memory_bandwidth()
        flops = work.flops() / parallel.model_parallel_size
        floor = flops / rate
        lines = [
            f"{work.tokens:,} tokens a step and replica, {flops / 1e9:.1f} GFLOP on each rank; "
            f"matrix products of this machine reach {rate / 1e9:.1f} GFLOP/s, so no step is below "
            f"{floor:.4f} s; memory moves {bandwidth / 1e9:.1f} GB/s",
            f"unmasked: {floor / median_seconds(measured, UNMASKED):.2f} of that rate",
        ]
        least = {
            way: floors(
                work,
                ours[way],
                rate=rate,
                bandwidth=bandwidth,
                model_parallel=parallel.model_parallel_size,
            )
            for way in parts
        }
        sends = {way: sent(ours[way]) for way in (UNMASKED, MASKED)}
        counted = table(
            [
                *("way", "kept for backward passes, bytes", "over unmasked"),
                *("folded weights, bytes", "gradients apart, bytes"),
                *("most at once, bytes", "over unmasked", "sends, calls", "bytes"),
            ],
            [
                (
                    way,
                    f"{each['saved']:,}",
                    f"{each['saved'] / kept[UNMASKED]['saved']:.3f}",
                    f"{each['folded']:,}",
                    f"{each['apart']:,}",
                    f"{each['peak']:,}",
                    f"{each['peak'] / kept[UNMASKED]['peak']:.3f}",
                    sends[way]["calls"],
                    f"{sends[way]['bytes']:,}",
                )
                for way, each in kept.items()
            ],
        )
        report(
            "step.py",
            [
                "\n".join(lines),
                comparison(measured, list(ways)),
                breakdown(parts, least),
                counted,
            ],
            {
                "environment": environment("step.py", argv),
                "work": {"shape": asdict(work.shape), "tokens": work.tokens, "flops": flops},
                "matmul_flops_per_s": rate,
                "memory_bytes_per_s": bandwidth,
                "measured": measured,
                "parts_s": parts,
                "floors_s": least,
                "memory": kept,
                "sent": sends,
            },
            args.json,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
