"""The quickstart's stages, each a command that a user would type, run as its own processes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megashear.files.structured import read_json_object
from megashear.masks.kinds import kinds_of
from megashear.quickstart.recipe import SOURCE, TARGET, Recipe
from megashear.quickstart.stage import run_stage
from megashear.quickstart.text import write_domains
from megashear.quickstart.tokenizer import train_tokenizer
from megashear.shape import ModelShape
from megashear.text_table import text_table

RANKS = 2
"""Processes of every training stage: tensor, pipeline or data parallel."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table at the end."""

    name: str
    parameters: int
    losses: dict[str, float]
    """Held-out loss by domain, nats per token."""
    errors: dict[str, float | None] = field(default_factory=dict)
    """Standard error of each loss; None where it is not known."""

    @property
    def mean(self) -> float:
        """Mean over domains, each with the same weight."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass
class Quickstart:
    """Runs the stages one after the other in ``output``.

    Args:
        output: directory to make.
        recipe: steps and rates.
        seed: of data order, mask noise and fresh weights.
        data: directory of jsonl files, one per domain; None takes text of this installation.
    """

    output: Path
    recipe: Recipe
    seed: int
    data: Path | None = None
    results: list[Result] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Run everything, from text to the table.

        Raises:
            ValueError: the output exists, or a stage failed.
        """
        if self.output.exists():
            raise ValueError(f"--output {self.output} exists; choose another or remove it first")
        self._title("text: domains, tokenizer, preprocessing")
        self._prepare_text()
        self._title("source: a LLaMA to shear, data parallel, exported to Hugging Face")
        self._train_source()
        self._title(f"shear: Hugging Face -> Megatron -> prune on {RANKS} ranks, tensor parallel")
        self._prune()
        self._title("cut to the target, then continued pretraining, pipeline parallel")
        self._cut()
        self._recover()
        self._title("another way: units chosen at once by importance, the same tokens for recovery")
        self._one_shot()
        self._title("to compare with: the same shape from scratch, on the same tokens")
        self._train_fresh("scratch", TARGET, self._all_iters, self.recipe.recover_lr)
        self._read_result("scratch", "from scratch")
        self._write_results()

    def _prepare_text(self) -> None:
        text = self.data
        self.output.mkdir(parents=True)
        if text is None:
            text = self._path("text")
            for name, size in write_domains(text).items():
                print(f"  {name:10} {size / 1e6:5.1f} MB", flush=True)
        tokenizer = self._path("tokenizer.model")
        train_tokenizer(text, tokenizer)
        self._run(
            "preprocess",
            input=text,
            output=self._path("data"),
            tokenizer_model=tokenizer,
            held_out_fraction=self.recipe.held_out_fraction,
        )

    def _train_source(self) -> None:
        self._train_fresh("source", SOURCE, self.recipe.source_iters, self.recipe.source_lr)
        self._run("convert", input=self._path("source"), output=self._path("source-hf"))
        losses = self._read_result("source", "source").losses
        # the loss that each domain should reach: with one model at hand, its own loss
        self._path("reference_loss.yaml").write_text(yaml.safe_dump(losses), encoding="utf-8")

    def _prune(self) -> None:
        recipe = self.recipe
        self._run("convert", input=self._path("source-hf"), output=self._path("source-mcore"))
        self._train(
            "prune",
            "prune",
            {"load": self._path("source-mcore"), "save": self._path("pruned")},
            (recipe.prune_iters, recipe.prune_lr),
            **self._evaluations(),
            tensor_model_parallel_size=RANKS,
            micro_batch_size=recipe.global_batch_size // recipe.noise_streams,
            sparsity_warmup_iters=recipe.sparsity_warmup_iters,
            mask_noise_streams=recipe.noise_streams,
            distill_from=self._path("source-mcore"),
            **_target_flags(),
        )

    def _cut(self) -> None:
        self._run("cut", load=self._path("pruned"), output=self._path("cut"), exact_target=True)
        self._run(
            "evaluate",
            load=self._path("cut"),
            data_path=self._path("data"),
            seq_length=self.recipe.seq_length,
            micro_batch_size=self.recipe.global_batch_size,
            output=self._path("cut.json"),
        )
        cut = read_json_object(self._path("cut.json"))
        self.results.append(
            Result(
                name="masks, cut, no recovery",
                parameters=cut["parameters"],
                losses=cut["held-out loss"],
                errors=cut["standard error"],
            )
        )

    def _recover(self) -> None:
        self._continue(
            "cut",
            "sheared",
            self.recipe.recover_iters,
            pipeline_model_parallel_size=RANKS,
            micro_batch_size=max(1, self.recipe.global_batch_size // 4),
        )
        self._read_result("sheared", "masks, cut, recovery")

    def _one_shot(self) -> None:
        """Cut the source by importance scores, and spend all tokens on recovery."""
        recipe, scores = self.recipe, self._path("scores.json")
        self._run(
            "score",
            load=self._path("source-mcore"),
            data_path=self._path("data"),
            seq_length=recipe.seq_length,
            micro_batch_size=recipe.global_batch_size,
            num_sequences=recipe.score_sequences,
            seed=self.seed,
            output=scores,
        )
        self._run(
            "cut",
            load=self._path("source-mcore"),
            scores=scores,
            output=self._path("one-shot-cut"),
            **_target_flags(),
        )
        self._continue(
            "one-shot-cut",
            "one-shot",
            self._all_iters,
            micro_batch_size=self.recipe.global_batch_size // RANKS,
        )
        self._read_result("one-shot", "importance, cut, recovery")

    def _continue(self, cut: str, name: str, iters: int, **layout: object) -> None:
        """Train a cut model with the source as its teacher; export it."""
        self._train(
            "pretrain",
            name,
            {"load": self._path(cut), "save": self._path(name)},
            (iters, self.recipe.recover_lr),
            **self._evaluations(),
            **layout,
            distill_from=self._path("source-mcore"),
        )
        self._run("convert", input=self._path(name), output=self._path(f"{name}-hf"))

    @property
    def _all_iters(self) -> int:
        """Steps of a model that learns no masks: all the tokens of pruning and recovery."""
        return self.recipe.prune_iters + self.recipe.recover_iters

    def _write_results(self) -> None:
        path = self._path("results.json")
        content = {
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "models": [asdict(result) | {"mean": result.mean} for result in self.results],
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self._title("done")
        print(text_table(rows(self.results)))
        print(
            f"\nHugging Face models: {self._path('sheared-hf')}, {self._path('one-shot-hf')}\n"
            f"figures: tensorboard --logdir {self._path('tensorboard')}\n"
            f"this table: {path}\n"
            f"{self._report()}",
            flush=True,
        )

    def _report(self) -> str:
        """Write the report of pruning and recovery; return a line with its path."""
        from megashear.report.write import NAME, write_report

        try:
            (page,) = write_report([self.output])
        except (ValueError, OSError) as error:  # the models exist even if the page cannot
            return f"no {NAME}: {error}"
        return f"report, for a browser: {page}"

    def _train_fresh(self, name: str, init: ModelShape, iters: int, lr: float) -> None:
        shape = self._path(f"{name}-shape.json")
        shape.write_text(json.dumps(init.to_dict(), indent=2) + "\n", encoding="utf-8")
        self._train(
            "pretrain",
            name,
            {
                "init_shape": shape,
                "init_method_std": self.recipe.init_method_std,
                "save": self._path(name),
            },
            (iters, lr),
            reweight="constant",
            eval_interval=0,
            micro_batch_size=self.recipe.global_batch_size // RANKS,
        )

    def _train(
        self,
        command: str,
        name: str,
        paths: dict[str, object],
        steps_and_rate: tuple[int, float],
        **flags: object,
    ) -> None:
        """Run a training stage with the flags that all have."""
        iters, lr = steps_and_rate
        self._run(
            command,
            **paths,
            data_path=self._path("data"),
            tensorboard_dir=self._path("tensorboard") / name,
            train_iters=iters,
            lr=lr,
            lr_warmup_iters=iters // (10 if command == "prune" else 20),
            seq_length=self.recipe.seq_length,
            global_batch_size=self.recipe.global_batch_size,
            eval_micro_batch_size=self.recipe.eval_batch_size,
            log_interval=max(10, iters // 10),
            seed=self.seed,
            **flags,
        )

    def _evaluations(self) -> dict[str, Any]:
        return {
            "reference_loss": self._path("reference_loss.yaml"),
            "eval_interval": self.recipe.eval_interval,
            "eval_sequences": self.recipe.eval_sequences,
        }

    def _read_result(self, checkpoint: str, name: str) -> Result:
        """Add the last evaluation of a run to the table."""
        from megashear.checkpoint.description import find_iteration, read_description

        found = read_description(find_iteration(self._path(checkpoint)))
        result = Result(
            name=name,
            parameters=found.shape.num_params(),
            losses=found.known.held_out_loss["loss"],
            errors=found.known.held_out_standard_error.get("loss", {}),
        )
        self.results.append(result)
        return result

    def _run(self, command: str, **flags: object) -> None:
        """Run a command of megashear, a training command on all ranks."""
        run_stage(command, flags, ranks=RANKS if command in ("prune", "pretrain") else None)

    def _path(self, name: str) -> Path:
        return self.output / name

    def _title(self, title: str) -> None:
        print(f"\n=== [{time.monotonic() - self._started:4.0f} s] {title}", flush=True)


def rows(results: list[Result]) -> list[list[str]]:
    """Return the cells of the table: parameters and held-out loss per domain of every model."""
    domains = list(results[0].losses)
    return [
        ["held-out loss (nats per token)", "parameters", *domains, "mean"],
        *(
            [
                result.name,
                f"{result.parameters:,}",
                *(f"{result.losses[domain]:.3f}" for domain in domains),
                f"{result.mean:.3f}",
            ]
            for result in results
        ),
    ]


def _target_flags() -> dict[str, object]:
    return {f"target_{kind.extent}": getattr(TARGET, kind.extent) for kind in kinds_of(SOURCE)}
