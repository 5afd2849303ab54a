"""Interleaved rounds, ratios, the machine's rates and its description, for the other scripts."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megashear.parallel import device

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "apex", "triton")
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the matrices whose product gives the machine's rate: large enough that the
rate no longer rises, small enough to take seconds."""
_STREAMED_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Bytes that are read and written to find the bandwidth, many times any cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Cost of one way in one round."""

    way: str
    round: int
    wall_s: float
    cpu_s: float
    """User and system time of the threads of all ranks, seconds."""
    load: float
    """Other work of the machine at the start: its load average over one minute."""


def interleave(
    ways: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 1
) -> list[Measured]:
    """Run every way once a round, in alternating order, so that other work slows all of them.

    Collective over the world: every rank runs the same ways in the same order, and a way takes as
    long as its slowest rank.

    Args:
        ways: what to run, by name.
        rounds: how many are measured.
        warm_up: rounds before them, not measured.
    """
    names, found = list(ways), []
    for number in range(-warm_up, rounds):
        turn = number % len(names)
        for way in names[turn:] + names[:turn]:
            load = os.getloadavg()[0]
            device.synchronize()
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            ways[way]()
            device.synchronize()
            took = torch.tensor(
                [time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64
            )
            wall_s, cpu_s = slowest_and_sum(took)
            if number >= 0:
                found.append(Measured(way=way, round=number, wall_s=wall_s, cpu_s=cpu_s, load=load))
                if dist.get_rank() == 0:
                    print(
                        f"round {number} {way}: {wall_s:.4f} s, CPU {cpu_s:.4f} s", file=sys.stderr
                    )
    return found


def slowest_and_sum(took: torch.Tensor) -> tuple[float, float]:
    """Return the slowest rank's wall time and all ranks' CPU time. Collective over the world."""
    slowest = took[:1].clone().to(device.device())
    together = took[1:].clone().to(device.device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(together)
    return float(slowest), float(together)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """One way over another, round by round."""

    median: float
    low: float
    """First quartile of the rounds' ratios."""
    high: float
    """Third quartile of the rounds' ratios."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(measured: Sequence[Measured], way: str, base: str, *, clock: str = "wall_s") -> Ratio:
    """Return the time of ``way`` over that of ``base``: median and quartiles over rounds."""
    over = [
        getattr(a, clock) / getattr(b, clock)
        for a, b in zip(_rounds(measured, way), _rounds(measured, base))
    ]
    # inclusive: quartiles of two rounds lie between them, and not below 0
    quartiles = statistics.quantiles(over, n=4, method="inclusive") if len(over) > 1 else over * 3
    low, _, high = quartiles
    return Ratio(median=statistics.median(over), low=low, high=high)


def median_seconds(measured: Sequence[Measured], way: str, *, clock: str = "wall_s") -> float:
    """Return the median over rounds, seconds."""
    return statistics.median(getattr(each, clock) for each in _rounds(measured, way))


def _rounds(measured: Sequence[Measured], way: str) -> list[Measured]:
    return sorted((each for each in measured if each.way == way), key=lambda each: each.round)


def matmul_rate(dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of this rank's largest products."""
    size = _MATMUL_SIZE[device.device().type]
    a, b = (torch.randn(size, size, device=device.device()).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_of(lambda: a @ b)


def memory_bandwidth() -> float:
    """Return the bytes a second that an operation in place reads and writes.

    A copy is no measure, because a CPU first reads the memory that a copy only writes.
    """
    many = _STREAMED_BYTES[device.device().type] // 4
    values = torch.ones(many, device=device.device())
    return 2 * 4 * many / _best_of(lambda: values.mul_(1.0))


def _best_of(work: Callable[[], object], repeats: int = 9) -> float:
    # the best: a floor that other work of the machine would raise is none
    took = []
    for _ in range(repeats):
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        took.append(time.perf_counter() - begin)
    return min(took)


def environment(script: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return a description of the command and the machine."""
    return {
        "command": " ".join(
            [f"tools/benchmarks/{script}", *(sys.argv[1:] if argv is None else argv)]
        ),
        "commit": commit(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "load": [round(each, 2) for each in os.getloadavg()],
        "device": device_name(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def device_name() -> str:
    """Return the maker's name of the device."""
    if device.has_cuda():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def report(script: str, tables: Sequence[str], result: dict[str, Any], path: Path | None) -> None:
    """Print tables on rank 0, and write JSON to ``path``, or print it if that is None."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    print("\n\n".join(tables))
    text = json.dumps(result, default=_plain)
    if path is None:
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")
        print(f"\n{script}: every measurement is in {path}", file=sys.stderr)


def _plain(value: Any) -> Any:
    return asdict(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the name of the commit that is checked out; None where git has none."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return found.stdout.strip() or None
