"""The quickstart's stages, each the command a user would type, run as its own processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from megashear.files.structured import read_json_object
from megashear.masks.kinds import kinds_of
from megashear.quickstart.recipe import SOURCE, TARGET, VOCABULARY, Recipe
from megashear.quickstart.text import write_domains
from megashear.shape import ModelShape

RANKS = 2
"""Processes of every training stage: tensor, pipeline or data parallel."""

_TOKENIZER_LINES = 60_000
"""Lines the tokenizer learns from, about; more take longer and change little."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table at the end."""

    name: str
    parameters: int
    losses: dict[str, float]
    """Held-out loss by domain, nats per token."""
    errors: dict[str, float | None] = field(default_factory=dict)
    """Standard error of each; None where it is not known."""

    @property
    def mean(self) -> float:
        """Mean over domains, each counted alike."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass
class Quickstart:
    """Runs the stages one after the other in ``output``.

    Args:
        output: directory to make.
        recipe: steps and rates.
        seed: of data order, mask noise and fresh weights.
        data: directory of jsonl files, one a domain; None takes text of this installation.
    """

    output: Path
    recipe: Recipe
    seed: int
    data: Path | None = None
    results: list[Result] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Everything, from text to the table.

        Raises:
            ValueError: the output exists, or a stage failed.
        """
        if self.output.exists():
            raise ValueError(f"--output {self.output} exists; choose another or remove it first")
        self._prepare_text()
        self._train_source()
        self._shear()
        self._train_from_scratch()
        self._write_results()

    def _prepare_text(self) -> None:
        self._title("text: domains, tokenizer, preprocessing")
        text = self.data
        self.output.mkdir(parents=True)
        if text is None:
            text = self.output / "text"
            for name, size in write_domains(text).items():
                print(f"  {name:10} {size / 1e6:5.1f} MB", flush=True)
        tokenizer = self.output / "tokenizer.model"
        train_tokenizer(text, tokenizer)
        self._command(
            "preprocess",
            input=text,
            output=self._path("data"),
            tokenizer_model=tokenizer,
            held_out_fraction=self.recipe.held_out_fraction,
        )

    def _train_source(self) -> None:
        self._title("source: a LLaMA to shear, data parallel, exported to Hugging Face")
        recipe = self.recipe
        self._pretrain(
            "source",
            iters=recipe.source_iters,
            lr=recipe.source_lr,
            micro_batch_size=recipe.global_batch_size // RANKS,
            init=SOURCE,
        )
        self._command("convert", input=self._path("source"), output=self._path("source-hf"))
        losses = self._found("source", "source")
        # what each domain's loss should be: with one model at hand, its own loss
        self._path("reference_loss.yaml").write_text(yaml.safe_dump(losses), encoding="utf-8")

    def _shear(self) -> None:
        recipe = self.recipe
        self._title(f"shear: Hugging Face -> Megatron -> prune on {RANKS} ranks, tensor parallel")
        self._command("convert", input=self._path("source-hf"), output=self._path("source-mcore"))
        extents = [kind.extent for kind in kinds_of(SOURCE)]
        self._ranks(
            "prune",
            load=self._path("source-mcore"),
            save=self._path("pruned"),
            **self._training("prune", recipe.prune_iters, recipe.prune_lr),
            reference_loss=self._path("reference_loss.yaml"),
            eval_interval=recipe.eval_interval,
            eval_sequences=recipe.eval_sequences,
            tensor_model_parallel_size=RANKS,
            micro_batch_size=recipe.global_batch_size // recipe.noise_streams,
            sparsity_warmup_iters=recipe.sparsity_warmup_iters,
            mask_noise_streams=recipe.noise_streams,
            eval_relaxed_masks=True,
            **{f"target_{extent}": getattr(TARGET, extent) for extent in extents},
        )
        self._title("cut to the target, then continued pretraining, pipeline parallel")
        self._command("cut", load=self._path("pruned"), output=self._path("cut"), exact_target=True)
        self._command(
            "evaluate",
            load=self._path("cut"),
            data_path=self._path("data"),
            seq_length=recipe.seq_length,
            micro_batch_size=recipe.global_batch_size,
            output=self._path("cut.json"),
        )
        cut = read_json_object(self._path("cut.json"))
        self.results.append(
            Result(
                name="cut, no recovery",
                parameters=cut["parameters"],
                losses=cut["held-out loss"],
                errors=cut["standard error"],
            )
        )
        self._ranks(
            "pretrain",
            load=self._path("cut"),
            save=self._path("sheared"),
            **self._training("sheared", recipe.recover_iters, recipe.recover_lr),
            reference_loss=self._path("reference_loss.yaml"),
            eval_interval=recipe.eval_interval,
            eval_sequences=recipe.eval_sequences,
            pipeline_model_parallel_size=RANKS,
            micro_batch_size=max(1, recipe.global_batch_size // 4),
        )
        self._command("convert", input=self._path("sheared"), output=self._path("sheared-hf"))
        self._found("sheared", "sheared")

    def _train_from_scratch(self) -> None:
        recipe = self.recipe
        self._title("the same shape from scratch, to compare with")
        both = recipe.prune_iters + recipe.recover_iters
        for iters, name, tokens in (
            (recipe.recover_iters, "scratch-recovery", "recovery tokens"),
            (both, "scratch-both", "pruning + recovery tokens"),
        ):
            self._pretrain(
                name,
                iters=iters,
                lr=recipe.recover_lr,
                micro_batch_size=recipe.global_batch_size // RANKS,
                init=TARGET,
            )
            self._found(name, f"from scratch, {tokens}")

    def _write_results(self) -> None:
        path = self._path("results.json")
        content = {
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "models": [asdict(result) | {"mean": result.mean} for result in self.results],
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self._title("done")
        print(table(self.results))
        print(
            f"\nsheared model (Hugging Face): {self._path('sheared-hf')}\n"
            f"figures: tensorboard --logdir {self._path('tensorboard')}\n"
            f"this table: {path}\n"
            f"{self._report()}",
            flush=True,
        )

    def _report(self) -> str:
        """Write the report of pruning and recovery; a line that says where it lies."""
        from megashear.report.write import NAME, write_report

        try:
            (page,) = write_report([self.output])
        except (ValueError, OSError) as error:  # the models are there, whatever becomes of the page
            return f"no {NAME}: {error}"
        return f"report, for a browser: {page}"

    def _pretrain(
        self, name: str, *, iters: int, lr: float, micro_batch_size: int, init: ModelShape
    ) -> None:
        shape = self._path(f"{name}-shape.json")
        shape.write_text(json.dumps(init.to_dict(), indent=2) + "\n", encoding="utf-8")
        self._ranks(
            "pretrain",
            init_shape=shape,
            init_method_std=self.recipe.init_method_std,
            save=self._path(name),
            **self._training(name, iters, lr),
            reweight="constant",
            eval_interval=0,
            micro_batch_size=micro_batch_size,
        )

    def _training(self, name: str, iters: int, lr: float) -> dict[str, object]:
        return {
            "data_path": self._path("data"),
            "tensorboard_dir": self._path("tensorboard") / name,
            "train_iters": iters,
            "lr": lr,
            "lr_warmup_iters": iters // (10 if name == "prune" else 20),
            "seq_length": self.recipe.seq_length,
            "global_batch_size": self.recipe.global_batch_size,
            "log_interval": max(10, iters // 10),
            "seed": self.seed,
        }

    def _found(self, checkpoint: str, name: str) -> dict[str, float]:
        """Put a run's last evaluation into the table."""
        from megashear.checkpoint.description import find_iteration, read_description

        description = read_description(find_iteration(self._path(checkpoint)))
        losses = description.known.held_out_loss["loss"]
        self.results.append(
            Result(
                name=name,
                parameters=description.shape.num_params(),
                losses=losses,
                errors=description.known.held_out_standard_error.get("loss", {}),
            )
        )
        return losses

    def _command(self, command: str, **flags: object) -> None:
        self._start([sys.executable, "-m", "megashear", command, *_as_flags(flags)])

    def _ranks(self, command: str, **flags: object) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        # the log says it all; the summary on stdout is for scripts
        self._start(
            [sys.executable, *torchrun, "-m", "megashear", command, *_as_flags(flags)], quiet=True
        )

    def _start(self, command: Sequence[str], *, quiet: bool = False) -> None:
        shown = shlex.join(command).replace(shlex.quote(sys.executable), "python", 1)
        print(f"$ {shown}", flush=True)
        status = subprocess.run(
            command,
            env=_environment(),
            stdout=subprocess.DEVNULL if quiet else None,
            check=False,
        ).returncode
        if status:
            raise ValueError(f"a stage ended with status {status}; its message is above")

    def _path(self, name: str) -> Path:
        return self.output / name

    def _title(self, title: str) -> None:
        print(f"\n=== [{time.monotonic() - self._started:4.0f} s] {title}", flush=True)


def train_tokenizer(text: Path, output: Path) -> None:
    """Train a SentencePiece BPE tokenizer on the jsonl files of ``text``.

    Made as LLaMA's is, whitespace and newlines kept, so that the exported model's tokenizer cuts
    text in stock runtimes exactly as here.

    Raises:
        ValueError: no domains there, a broken line, or too little text for the vocabulary.
    """
    import sentencepiece

    from megashear.preprocessing.documents import read_texts
    from megashear.preprocessing.inputs import find_domains

    lines = [
        line
        for files in find_domains(text).values()
        for file in files
        for document in read_texts(file, "text")
        for line in document.splitlines()
    ]
    # SentencePiece's own sample differs from run to run, and --seed shall repeat one
    sample = lines[:: max(1, len(lines) // _TOKENIZER_LINES)]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_prefix=str(output.with_suffix("")),
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"{text} does not make a vocabulary of {VOCABULARY} pieces: {error}; give more text"
        ) from None
    output.with_suffix(".vocab").unlink()


def table(results: Sequence[Result]) -> str:
    """Held-out loss per domain and parameters of every model, as aligned text."""
    domains = list(results[0].losses)
    head = ["held-out loss (nats per token)", "parameters", *domains, "mean"]
    rows = [
        [
            result.name,
            f"{result.parameters:,}",
            *(f"{result.losses[domain]:.3f}" for domain in domains),
            f"{result.mean:.3f}",
        ]
        for result in results
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in [head, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _as_flags(values: dict[str, object]) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _environment() -> dict[str, str]:
    return os.environ | {
        # two gloo ranks on the CPU everywhere: a machine with one GPU has none for the second
        "CUDA_VISIBLE_DEVICES": "",
        # one thread per rank, and no spinning of ranks that wait for each other
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
