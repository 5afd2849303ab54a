"""Settle which way to a small model is best: masks, importance, random units, or from scratch.

    python tools/benchmarks/quality.py --size tiny --output runs/quality

A source is trained on real text (`quality_text.py`, or --data), then every arm of
`quality_arms.py` makes a model of the same target shape from it, with several seeds, at equal
tokens and at equal arithmetic. Whatever is done is not done again: started anew, the command
resumes where it was, after an interruption or after --minutes. OUTPUT/quality.json has every
curve, OUTPUT/quality.md the tables, OUTPUT/quality.svg the figure; they are written after each arm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import measuring
import torch
import yaml
from quality_arms import ARMS, SIZES, Arm, Budget, Size, arithmetic, plan
from quality_figures import draw, losses_table, pairs_table
from quality_text import make_text

from megashear.checkpoint.description import find_iteration, read_description
from megashear.masks.kinds import KINDS, kinds_of
from megashear.monitor import tags
from megashear.quickstart.stage import run_stage
from megashear.quickstart.tokenizer import train_tokenizer

PAIRS = (
    ("masks", "importance"),
    ("masks-kd", "importance-kd"),
    ("importance", "random"),
    ("importance-kd", "random-kd"),
    ("importance-kd", "importance"),
    ("masks-kd", "masks"),
    ("importance-kd", "masks"),
    ("importance-kd", "scratch"),
    ("scratch-kd", "scratch"),
    ("random-kd", "random"),
    ("masks-kd-05", "importance-kd"),
    ("widths-kd-05", "importance-kd"),
    ("widths-kd-05", "masks-kd-05"),
    ("importance-kd-dynamic", "importance-kd"),
)
"""Arms whose difference the second table shows: the first should be lower."""
_EXIT_TIME_UP = 3
"""Exit status where --minutes are over before everything is done."""
_SHORTEST_MINUTES = 1
"""Least minutes that a training stage is started for, because its start alone takes part of one."""


class TimeUpError(Exception):
    """The minutes of this call are over."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="Shapes and lengths.")
    parser.add_argument("--output", type=Path, required=True, help="Directory, new or of this.")
    parser.add_argument("--data", type=Path, help="jsonl files, one per domain; else packages'.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="To run.")
    parser.add_argument("--seeds", nargs="+", type=int, help="Of the arms; those of the size.")
    parser.add_argument(
        "--budget", choices=["tokens", "arithmetic", "both"], default="both", help="Equal in what."
    )
    parser.add_argument("--minutes", type=float, help="Stop and save after so long.")
    args = parser.parse_args(argv)
    budgets = ["tokens", "arithmetic"] if args.budget == "both" else [args.budget]
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    comparison = Comparison(
        output=args.output, size=SIZES[args.size], data=args.data, deadline=deadline
    )
    seeds = args.seeds or comparison.size.seeds
    try:
        comparison.prepare(args.size)
        for budget in budgets:
            for seed in seeds:
                for name in args.arms:
                    if budget == "tokens" or arithmetic_differs(ARMS[name], comparison.size):
                        comparison.run_arm(name, seed, cast(Budget, budget))
                        comparison.write(args.size, argv)
    except TimeUpError:
        print("time is up: start the same command again, and it resumes", file=sys.stderr)
        return _EXIT_TIME_UP
    except ValueError as error:
        print(f"quality.py: {error}", file=sys.stderr)
        return 2
    print((args.output / "quality.md").read_text(encoding="utf-8"))
    return 0


def arithmetic_differs(arm: Arm, size: Size) -> bool:
    """Return whether an arm has other steps at equal arithmetic than at equal tokens."""
    return plan(arm, size, "arithmetic") != plan(arm, size, "tokens")


@dataclass
class Comparison:
    """The stages of the experiment, each of which is left out once it is done.

    Args:
        output: directory of everything.
        size: shapes and lengths.
        data: directory of jsonl files, one per domain; None for text of packages.
        deadline: when to stop, of ``time.monotonic``; None for never.
    """

    output: Path
    size: Size
    data: Path | None
    deadline: float | None
    source_loss: dict[str, float] = field(default_factory=dict)

    def prepare(self, size_name: str) -> None:
        """Make text, tokenizer, data and source.

        Raises:
            ValueError: the output is of another size, or a stage failed.
            TimeUpError: with the source half trained.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        name_file = self.output / "size"
        if name_file.exists() and name_file.read_text() != size_name:
            raise ValueError(
                f"--output {self.output} is of --size {name_file.read_text()}, not {size_name}; "
                f"choose another directory"
            )
        name_file.write_text(size_name)
        text = self.data or self.output / "text" / "text"
        if self.data is None and not (self.output / "text" / "sources.json").exists():
            make_text(self.output / "text", most_bytes=self.size.domain_bytes)
        tokenizer = self.output / "tokenizer.model"
        if not tokenizer.exists():
            train_tokenizer(text, tokenizer)
        if not (self.output / "data").exists():
            flags = {"input": text, "output": self.output / "data", "tokenizer_model": tokenizer}
            run_stage("preprocess", flags | {"held_out_fraction": self.size.held_out_fraction})
        shape = self.output / "source-shape.json"
        shape.write_text(json.dumps(self.size.source.to_dict(), indent=2) + "\n")
        self._train(
            "pretrain",
            self.output,
            "source",
            steps=self.size.source_steps,
            lr=self.size.source_lr,
            warmup=self.size.source_steps // 40,
            batch=self.size.source_batch,
            flags={
                "init_shape": shape,
                "init_method_std": self.size.init_method_std,
                "seed": 1,
                "reweight": "constant",
                "eval_interval": self.size.source_steps // 10,
            },
        )
        self.source_loss = _losses(self.output / "source")
        (self.output / "reference_loss.yaml").write_text(yaml.safe_dump(self.source_loss))

    def run_arm(self, name: str, seed: int, budget: Budget) -> None:
        """Run one arm, if it has no result yet.

        Raises:
            ValueError: a stage failed.
            TimeUpError: before the arm is done.
        """
        folder = self.output / "arms" / f"{name}.{budget}" / f"seed{seed}"
        if (folder / "result.json").exists():
            return
        print(f"\n=== {name}, equal {budget}, seed {seed}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        arm, steps = ARMS[name], plan(ARMS[name], self.size, budget)
        start = self._start_of(arm, folder, seed, steps.mask_steps)
        self._train(
            "pretrain",
            folder,
            "model",
            steps=steps.recover_steps,
            lr=self.size.recover_lr,
            warmup=steps.recover_steps // 20,
            batch=self.size.batch,
            flags=start | {"seed": seed} | self._learning(arm),
        )
        step_tokens = self.size.batch * self.size.seq_length
        masks = folder / "masks.jsonl"
        found = {
            "arm": name,
            "label": arm.label,
            "budget": budget,
            "seed": seed,
            "commit": measuring.commit(),
            "tokens": {
                "masks": steps.mask_steps * step_tokens,
                "recovery": steps.recover_steps * step_tokens,
            },
            "flops": arithmetic(arm, self.size, steps),
            "loss": _losses(folder / "model"),
            "curve": _curve(folder / "model.jsonl", tags.EVAL_MEAN_LOSS, step_tokens),
            "mask curve": _curve(masks, tags.EXACT_MEAN_LOSS, step_tokens),
        }
        (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n")

    def write(self, size_name: str, argv: Sequence[str] | None) -> None:
        """Write JSON, tables and figure of all results so far."""
        runs = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((self.output / "arms").glob("*/*/result.json"))
        ]
        sources = self.output / "text" / "sources.json"
        environment = measuring.environment("quality.py", ["--size", size_name])
        content = {
            "environment": environment,
            "size": asdict(self.size),
            "text": json.loads(sources.read_text()) if sources.exists() else None,
            "source": {
                "loss": _rounded(self.source_loss),
                "curve": _curve(
                    self.output / "source.jsonl",
                    tags.EVAL_MEAN_LOSS,
                    self.size.source_batch * self.size.seq_length,
                ),
            },
            "runs": [each | {"loss": _rounded(each["loss"])} for each in runs],
        }
        (self.output / "quality.json").write_text(json.dumps(content) + "\n")
        page = [tables(runs, self.source_loss, budget) for budget in ("tokens", "arithmetic")]
        (self.output / "quality.md").write_text("\n".join(page), encoding="utf-8")
        if any(each["budget"] == "tokens" for each in runs):
            draw(runs, self.source_loss, self.output / "quality.svg")

    def _start_of(self, arm: Arm, folder: Path, seed: int, mask_steps: int) -> dict[str, object]:
        """Return the flags that say which weights recovery begins with; make these weights."""
        if arm.start == "scratch":
            shape = self.output / "target-shape.json"
            shape.write_text(json.dumps(self.size.target.to_dict(), indent=2) + "\n")
            return {"init_shape": shape, "init_method_std": self.size.init_method_std}
        extents = {
            f"target_{kind.extent}": getattr(self.size.target, kind.extent)
            for kind in kinds_of(self.size.source)
        }
        cut: dict[str, object] = {"output": folder / "cut", "load": self.output / "source"}
        if arm.start == "masks":
            masked = self._fewer_layers(seed) if arm.depth_first else self.output / "source"
            flags: dict[str, object] = {
                "seed": seed,
                "load": masked,
                "sparsity_warmup_iters": mask_steps // 5,
                "mask_noise_streams": self.size.noise_streams,
            }
            self._train(
                "prune",
                folder,
                "masks",
                steps=mask_steps,
                lr=self.size.mask_phase_lr,
                warmup=mask_steps // 10,
                batch=self.size.batch,
                flags=flags | extents | self._learning(arm) | dict(arm.mask_flags),
            )
            cut |= {"load": folder / "masks", "exact_target": True}
        else:
            random = arm.start == "random"
            scores = self._random_scores(seed) if random else self._scores(seed)
            cut |= {"scores": scores, **extents}
        if not (folder / "cut").exists():
            run_stage("cut", cut)
        return {"load": folder / "cut"}

    def _fewer_layers(self, seed: int) -> Path:
        """Return the source without its least important layers; cut it if need be."""
        path = self.output / "fewer-layers" / f"seed{seed}"
        if not path.exists():
            run_stage(
                "cut",
                {
                    "load": self.output / "source",
                    "scores": self._scores(seed),
                    "target_num_layers": self.size.target.num_layers,
                    "output": path,
                },
            )
        return path

    def _scores(self, seed: int) -> Path:
        """Return the file of importance scores; measure them if need be."""
        path = self.output / "scores" / f"importance-seed{seed}.json"
        if not path.exists():
            flags = {
                "load": self.output / "source",
                "data_path": self.output / "data",
                "output": path,
                "num_sequences": self.size.score_sequences,
                "seq_length": self.size.seq_length,
                "micro_batch_size": 8,
                "seed": seed,
            }
            run_stage("score", flags, use_gpu=self.size.use_gpu)
        return path

    def _random_scores(self, seed: int) -> Path:
        """Return a file of scores that rank units by chance."""
        from megashear.checkpoint.scores import ImportanceScores

        generator = torch.Generator().manual_seed(seed)
        source = self.size.source
        values = {
            kind.name: torch.rand(kind.extents(source), generator=generator, dtype=torch.float64)
            for kind in KINDS.values()
        }
        path = self.output / "scores" / f"random-seed{seed}.json"
        ImportanceScores(shape=source, values=values, measured={"random": seed}).write(path)
        return path

    def _learning(self, arm: Arm) -> dict[str, object]:
        """Return the flags of mixture and teacher, of both phases."""
        flags: dict[str, object] = {"reweight": "constant"}
        if arm.dynamic:
            flags = {"reference_loss": self.output / "reference_loss.yaml"}
        if arm.distilled:
            flags["distill_from"] = self.output / "source"
        return flags

    def _train(
        self,
        command: str,
        folder: Path,
        name: str,
        *,
        steps: int,
        lr: float,
        warmup: int,
        batch: int,
        flags: Mapping[str, object],
    ) -> None:
        """Run a training stage that saves to ``folder/name``, unless it is done; resume it."""
        done = folder / f"{name}.done"
        if done.exists():
            return
        size = self.size
        streams = size.noise_streams if command == "prune" else 1
        common: dict[str, object] = {
            "save": folder / name,
            "resume": True,
            "keep": 1,
            "save_interval": max(1, steps // 5),
            "data_path": self.output / "data",
            "jsonl_log": folder / f"{name}.jsonl",
            "train_iters": steps,
            "lr": lr,
            "lr_warmup_iters": warmup,
            "seq_length": size.seq_length,
            "global_batch_size": batch,
            "micro_batch_size": batch // max(size.ranks, streams),
            "eval_micro_batch_size": batch,
            "eval_interval": size.eval_interval,
            "eval_sequences": size.eval_sequences,
            "log_interval": max(1, steps // 10),
            "num_workers": 0,
            **({"bf16": True} if size.use_gpu else {}),
            **self._time_left(),
        }
        summary = run_stage(command, common | dict(flags), ranks=size.ranks, use_gpu=size.use_gpu)
        if (stopped := json.loads(summary)["stopped"]) is not None:
            raise TimeUpError(stopped)
        done.write_text(summary)

    def _time_left(self) -> dict[str, object]:
        if self.deadline is None:
            return {}
        minutes = int((self.deadline - time.monotonic()) / 60)
        if minutes < _SHORTEST_MINUTES:
            raise TimeUpError("--minutes are over")
        return {"exit_duration_in_mins": minutes}


def tables(runs: Sequence[Mapping[str, Any]], source: Mapping[str, float], budget: str) -> str:
    """Return the tables of one budget in Markdown, or that there are no runs."""
    chosen = [each for each in runs if each["budget"] == budget]
    title = f"## Equal {budget}\n\n"
    if not chosen:
        return f"{title}No arm has run.\n"
    found = title + losses_table(chosen, source, budget) + "\n"
    if budget == "tokens":
        found += "\n" + pairs_table(chosen, PAIRS) + "\n"
    return found


def _losses(checkpoint: Path) -> dict[str, float]:
    """Return the loss of all held-out text at the end of a run, by domain."""
    return dict(read_description(find_iteration(checkpoint)).known.held_out_loss["loss"])


def _rounded(losses: Mapping[str, float]) -> dict[str, float]:
    return {domain: round(loss, 4) for domain, loss in losses.items()}


def _curve(log: Path, tag: str, step_tokens: int) -> list[tuple[int, float]]:
    """Return tokens and loss of every evaluation that a log has; none where there is no log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    points = [json.loads(line) for line in lines]
    found = {each["step"] * step_tokens: round(each[tag], 4) for each in points if tag in each}
    return sorted(found.items())


if __name__ == "__main__":
    sys.exit(main())
