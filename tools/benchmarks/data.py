"""Measure reading of training data, against megatron-core's BlendedDataset.

It measures samples a second, the cost of a change of the weights, and start-up time and memory at
the size of a real corpus. Domains of synthetic text (sparse .bin files, an .idx of documents of
real lengths) are made in a temporary folder. Rounds are interleaved: each runs both ways once, in
alternating order, over the same files, with torch's DataLoader and the same number of workers. A
table and JSON go to stdout.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexWriter
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from megashear.data.loader import MixtureLoader
from megashear.data.mixture import DomainMixture
from megashear.data.sequences import DomainSequences

NUM_DOMAINS = 7
WEIGHTS = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
"""Weights of RedPajama's seven domains, with which the recipe of Sheared LLaMA starts."""
MEDIAN_LENGTH, LENGTH_SIGMA = 600, 1.0
"""Parameters of the log-normal lengths of documents, tokens: a mean of about 990."""
SEED = 1234

BLENDED, MEGASHEAR = "BlendedDataset", "MixtureLoader"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the text, and how it is read."""

    prefixes: Sequence[str]
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    num_samples: int
    """In a round."""


def make_domain(prefix: Path, num_tokens: int, seed: int) -> int:
    """Write a domain that repeats token 0, and return the number of its documents."""
    generator = np.random.default_rng(seed)
    mean = MEDIAN_LENGTH * np.exp(LENGTH_SIGMA**2 / 2)
    lengths = generator.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA, int(num_tokens / mean)).clip(
        8
    )
    lengths = lengths.astype(np.int64)
    with _IndexWriter(f"{prefix}.idx", np.uint16) as index:
        index.write(lengths.tolist(), None, list(range(len(lengths) + 1)))
    with Path(f"{prefix}.bin").open("wb") as text:
        text.truncate(2 * int(lengths.sum()))  # a hole: reads as zeros and takes no room
    return len(lengths)


class _NoTokenizer:
    """The part of a tokenizer that GPTDataset uses."""

    vocab_size = None
    pad, eod = -1, -2
    unique_identifiers: dict[str, Any] = {}  # noqa: RUF012  # never written to


def blended(sizes: Sizes, num_samples: int) -> BlendedDataset:
    """Return megatron-core's blend with fixed weights, with its index in memory."""
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=sizes.seq_length,
        blend=(list(sizes.prefixes), WEIGHTS),
        split="1,0,0",
        path_to_cache="",
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # what it makes with True, [s, s] a sample, nobody needs
    )
    datasets = []
    for prefix, weight in zip(sizes.prefixes, WEIGHTS):
        text = IndexedDataset(prefix)
        documents = np.arange(len(text), dtype=np.int32)
        # its builder, too, asks each domain for half a percent more than the weight says
        wanted = int(num_samples * weight * 1.005) + 1
        datasets.append(GPTDataset(text, prefix, documents, wanted, Split.train, config))
    return BlendedDataset(datasets, WEIGHTS, num_samples, config)


def blended_batches(sizes: Sizes, data: BlendedDataset, workers: int) -> Iterator[int]:
    """Read a round as Megatron-LM's loader does, and yield sizes of microbatches."""
    size = sizes.micro_batch_size
    order = [list(range(at, at + size)) for at in range(0, sizes.num_samples, size)]
    for batch in DataLoader(data, batch_sampler=order, num_workers=workers):
        assert batch["tokens"].shape == (size, sizes.seq_length)
        yield len(batch["tokens"])


def mixture(sizes: Sizes, workers: int) -> MixtureLoader:
    """Return megashear's loader of one replica."""
    return MixtureLoader(
        [DomainSequences(p, sizes.seq_length, SEED, i) for i, p in enumerate(sizes.prefixes)],
        DomainMixture(WEIGHTS),
        global_batch_size=sizes.global_batch_size,
        micro_batch_size=sizes.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=workers,
    )


def mixture_batches(sizes: Sizes, loader: MixtureLoader) -> Iterator[int]:
    """Read a round, and yield sizes of microbatches."""
    for _ in range(sizes.num_samples // sizes.global_batch_size):
        for batch in loader.next_batch():
            assert batch.tokens.shape == (sizes.micro_batch_size, sizes.seq_length)
            yield len(batch.tokens)
    loader.close()


def rate(batches: Iterator[int], global_batch_size: int) -> dict[str, float]:
    """Return samples a second and CPU time a sample, of all processes, after the first batch.

    The first one waits for workers to start, and for megashear's index (the other's is there
    before).
    """
    total, start, behind, own = 0, 0.0, 0, 0.0
    others = _cpu_seconds(resource.RUSAGE_CHILDREN)
    for size in batches:
        total += size
        if total == global_batch_size:
            start, own = time.perf_counter(), _cpu_seconds(resource.RUSAGE_SELF)
        elif total > global_batch_size:
            behind += size
    seconds = time.perf_counter() - start
    own = _cpu_seconds(resource.RUSAGE_SELF) - own
    gc.collect()  # workers that ended are counted, with their first batch
    others = _cpu_seconds(resource.RUSAGE_CHILDREN) - others
    return {"samples_per_s": behind / seconds, "cpu_us": 1e6 * (own / behind + others / total)}


def throughput(sizes: Sizes, workers: int, rounds: int) -> list[dict[str, Any]]:
    """Run both ways in turn, once in every round."""
    blend = blended(sizes, sizes.num_samples)
    ways: dict[str, Callable[[], Iterator[int]]] = {
        BLENDED: lambda: blended_batches(sizes, blend, workers),
        MEGASHEAR: lambda: mixture_batches(sizes, mixture(sizes, workers)),
    }
    found = []
    for number in range(-1, rounds):  # -1 brings text and code into memory
        names = list(ways)[:: 1 if number % 2 else -1]
        for way in names:
            load = os.getloadavg()[0]
            run = rate(ways[way](), sizes.global_batch_size)
            print(f"round {number}, {workers} workers, {way}: {run}", file=sys.stderr)
            if number >= 0:
                found.append({"way": way, "round": number, "workers": workers, "load": load} | run)
    return found


def weight_change(sizes: Sizes, workers: int, changes: int, step_s: float) -> dict[str, Any]:
    """Return milliseconds of a change of weights, and of a batch after it and otherwise.

    Both wall time and CPU time. Between batches this process sleeps ``step_s`` seconds.
    """
    loader, generator = mixture(sizes, workers), np.random.default_rng(0)
    loader.next_batch()
    found: dict[str, Any] = {
        "workers": workers,
        "set_weights_ms": [],
        "batch_after_ms": [],
        "batch_after_cpu_ms": [],
        "batch_otherwise_ms": [],
        "batch_otherwise_cpu_ms": [],
    }
    for number in range(2 * changes):
        time.sleep(step_s)
        if number % 2:
            # a tenth of the share anywhere: as much as an evaluation moves at most
            weights = 0.9 * np.array(WEIGHTS) + 0.1 * generator.dirichlet(np.ones(NUM_DOMAINS))
            start = time.perf_counter()
            loader.mixture.set_weights(weights)
            found["set_weights_ms"].append(1e3 * (time.perf_counter() - start))
        which = "batch_after" if number % 2 else "batch_otherwise"
        start, cpu = time.perf_counter(), time.process_time()
        loader.next_batch()
        found[f"{which}_ms"].append(1e3 * (time.perf_counter() - start))
        found[f"{which}_cpu_ms"].append(1e3 * (time.process_time() - cpu))
    loader.close()
    return found


def start_up(sizes: Sizes, way: str, workers: int, epoch: int, pipe: Any) -> None:
    """Send the seconds to the first batch and the memory then, from a process of its own.

    Its memory does not include mapped files; memory of workers does not include what they share.
    """
    before, start = _anonymous_mib(), time.perf_counter()
    if way == MEGASHEAR:
        loader = mixture(sizes, workers)
        loader.next_batch()
    else:
        data = blended(sizes, epoch)
        batches = blended_batches(sizes, data, workers)
        next(batches)
    seconds = time.perf_counter() - start
    mib = _anonymous_mib() - before
    children = [each.memory_full_info().uss for each in psutil.Process().children()]
    pipe.send(
        {
            "way": way,
            "seconds": seconds,
            "mib": mib,
            "workers_mib": [size / 2**20 for size in children],
        }
    )


def measure_start_up(sizes: Sizes, workers: int, epoch: int, rounds: int) -> list[dict[str, Any]]:
    """Run both ways in turn, each in a process forked from this one, which has read nothing."""
    context, found = multiprocessing.get_context("fork"), []
    for number in range(rounds):
        for way in (BLENDED, MEGASHEAR)[:: 1 if number % 2 else -1]:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=start_up, args=(sizes, way, workers, epoch, sender))
            process.start()
            found.append(receiver.recv())
            print(f"round {number}, start of {way}: {found[-1]}", file=sys.stderr)
            process.join()
    return found


def _anonymous_mib() -> float:
    (line,) = (
        line
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
        if line.startswith("Anonymous:")
    )
    return int(line.split()[1]) / 2**10


def _cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def _median(runs: Sequence[dict[str, Any]], way: str, key: str) -> float:
    return statistics.median(run[key] for run in runs if run["way"] == way)


def _ratios(runs: Sequence[dict[str, Any]], key: str) -> str:
    pairs = [[run[key] for run in runs if run["way"] == way] for way in (MEGASHEAR, BLENDED)]
    ratios = [ours / theirs for ours, theirs in zip(*pairs)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _say_throughput(runs: Sequence[dict[str, Any]], workers: Sequence[int]) -> Iterator[str]:
    yield "| workers | way | samples/s | ratio | CPU us a sample | ratio |"
    yield "|---|---|---|---|---|---|"
    for count in workers:
        own = [run for run in runs if run["workers"] == count]
        for way in (BLENDED, MEGASHEAR):
            ratio = functools.partial(_ratios, own) if way == MEGASHEAR else lambda key: "1"
            yield (
                f"| {count} | {way} | {_median(own, way, 'samples_per_s'):.0f} | "
                f"{ratio('samples_per_s')} | {_median(own, way, 'cpu_us'):.0f} | "
                f"{ratio('cpu_us')} |"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e9, help="of each of seven domains")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4096, help="read by each way in a round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--changes", type=int, default=50, help="of the weights")
    parser.add_argument("--step-ms", type=float, default=100.0, help="between batches, for these")
    args = parser.parse_args(argv)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megashear").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [str(Path(folder) / f"domain{number}") for number in range(NUM_DOMAINS)]
        documents = [make_domain(Path(p), int(args.tokens), i) for i, p in enumerate(prefixes)]
        sizes = Sizes(
            prefixes=prefixes,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            num_samples=args.samples // args.global_batch_size * args.global_batch_size,
        )
        # first, for processes forked later have what this one has read
        epoch = int(NUM_DOMAINS * args.tokens) // args.seq_length
        starts = measure_start_up(sizes, args.workers[-1], epoch, 3)
        runs = [r for count in args.workers for r in throughput(sizes, count, args.rounds)]
        changes = [
            weight_change(sizes, count, args.changes, args.step_ms / 1e3) for count in args.workers
        ]
    print("\n".join(_say_throughput(runs, args.workers)))
    print("\n| workers | set_weights, ms | next batch after it, ms | CPU | otherwise, ms | CPU |")
    print("|---|---|---|---|---|---|")
    for found in changes:
        medians = [statistics.median(found[key]) for key in list(found)[1:]]
        print(f"| {found['workers']} | {' | '.join(f'{value:.3f}' for value in medians)} |")
    print("\n| way | start to first batch, s | memory, MiB | of each worker alone, MiB |")
    print("|---|---|---|---|")
    for way in (BLENDED, MEGASHEAR):
        in_workers = statistics.median(
            size for run in starts if run["way"] == way for size in run["workers_mib"] or [0.0]
        )
        seconds, mib = (_median(starts, way, key) for key in ("seconds", "mib"))
        print(f"| {way} | {seconds:.2f} | {mib:.0f} | {in_workers:.0f} |")
    environment = {
        "documents": documents,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("megatron-core", "numpy", "torch")},
        "command": " ".join(["tools/benchmarks/data.py", *(argv or sys.argv[1:])]),
    }
    print(
        json.dumps({"environment": environment, "runs": runs, "changes": changes, "starts": starts})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
