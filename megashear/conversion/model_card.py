"""The model card of a Hugging Face directory: what the model is, how it was made, its scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megashear import __version__
from megashear.checkpoint.details import RunDetails
from megashear.checkpoint.history import runs_of
from megashear.checkpoint.origin import LICENCE_FIELDS, README, is_hub_name
from megashear.checkpoint.run_summary import RunSummary
from megashear.conversion.sources import Source
from megashear.conversion.task_results import TaskResults
from megashear.masks.kinds import EXTENTS
from megashear.models import loadable

_PAPER = "[Sheared LLaMA](https://arxiv.org/abs/2310.06694)"
_NAMES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "query heads",
    "num_query_groups": "key/value heads",
    "head_dim": "width of a head",
    "ffn_hidden_size": "neurons of the MLP",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest sequence, tokens",
}
_STAGES = {
    "prune": "pruning (masks and weights together)",
    "pretrain": "continued pretraining",
    "finetune": "instruction tuning",
}
_SAME = frozenset({"head_dim", "vocab_size", "max_position_embeddings"})


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is written of."""

    title: str
    source: Source
    """The model, with all that its checkpoint says."""
    has_tokenizer: bool
    results: TaskResults | None = None
    """Scores of tasks."""

    @property
    def known(self) -> RunDetails:
        """Return the details of the checkpoint; empty ones of other sources."""
        return RunDetails.of(self.source.details)

    @property
    def runs(self) -> list[RunSummary]:
        """Return the runs that made the model, the first one first."""
        return [] if self.source.description is None else runs_of(self.source.description)

    @property
    def is_pruned(self) -> bool:
        """Return whether the model was pruned."""
        return self.known.source_shape is not None

    def text(self) -> str:
        """Return the card, Markdown with YAML at its head."""
        head = yaml.safe_dump(self.front_matter(), sort_keys=False, allow_unicode=True)
        parts = [self._summary(), *self._sections()]
        return f"---\n{head}---\n\n# {_cell(self.title)}\n\n" + "\n\n".join(parts) + "\n"

    def front_matter(self) -> dict[str, Any]:
        """Return what the hub reads of a card; what is not known is left out."""
        origin, tags = self.known.origin, ["megashear", self.source.shape.family]
        if self.is_pruned:
            tags += ["pruning", *["sheared"] * (self.known.pruned_for is not None)]
        if any(run.distill_from for run in self.runs):
            tags.append("distillation")
        name = origin.get("name", "")
        return {
            # the hub would take a folder's name for a repository's
            **({"base_model": name} if is_hub_name(name) else {}),
            **{key: origin[key] for key in LICENCE_FIELDS if key in origin},
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": tags,
        }

    def _summary(self) -> str:
        shape, before = self.source.shape, self.known.source_shape
        base = self.known.origin.get("name")
        what = f"A {shape.family} model of {shape.num_params():,} parameters"
        if before is not None:
            of = f"{_cell(base)}, a model" if base else "a model"
            way = f"the method of {_PAPER} (masks that are learned with the weights)"
            if self.known.pruned_for is None:
                way = "importance scores, in one shot"
            what += (
                f", pruned from {of} of {before.num_params():,}, to a uniform shape, by {way}, "
                f"with megashear {__version__}"
            )
        else:
            what += f", written by megashear {__version__}" + (
                f" from {_cell(base)}" if base else ""
            )
        return what + "."

    def _sections(self) -> Iterator[str]:
        yield "## Shape\n\n" + self._shape()
        if made := self._making():
            yield "## How it was made\n\n" + made
        if mixture := self._mixture():
            yield "## Training text\n\n" + mixture
        if losses := self._losses():
            yield "## Held-out loss\n\n" + losses
        if self.results is not None:
            yield "## Tasks\n\n" + _tasks(self.results)
        yield "## How to load it\n\n" + self._loading()
        yield "## Licence\n\n" + self._licence()

    def _shape(self) -> str:
        shape, before = self.source.shape, self.known.source_shape
        names = [name for name in _NAMES if name in EXTENTS or name in _SAME]
        if before is None:
            rows = [[_NAMES[name], f"{getattr(shape, name):,}"] for name in names]
            rows.append(["parameters", f"{shape.num_params():,}"])
            return _table(["", "this model"], rows)
        rows = [
            [_NAMES[name], f"{getattr(shape, name):,}", f"{getattr(before, name):,}"]
            for name in names
        ]
        rows.append(["parameters", f"{shape.num_params():,}", f"{before.num_params():,}"])
        return _table(["", "this model", "before pruning"], rows)

    def _making(self) -> str:
        known = self.known
        rows = [
            [
                _STAGES.get(run.stage, run.stage),
                f"{run.steps:,}",
                "" if run.tokens is None else f"{run.tokens:,}",
                "" if run.distill_from is None else _cell(Path(run.distill_from).name),
            ]
            for run in self.runs
        ]
        parts = [_table(["stage", "steps", "tokens", "teacher"], rows)] if rows else []
        constraints = {run.constraint for run in self.runs if run.constraint}
        if constraints:
            parts.append(f"Masks were held to the target by the {', '.join(sorted(constraints))}.")
        if known.pruned_for is not None and not any(run.stage == "prune" for run in self.runs):
            parts.append(f"Its masks were learned in {known.pruned_for:,} steps.")
        return "\n\n".join(parts)

    def _mixture(self) -> str:
        runs = [run for run in self.runs if sum(run.drawn.values())]
        if not runs:
            return ""
        names = list(dict.fromkeys(name for run in runs for name in run.drawn))
        rows = [
            [_cell(name), *(_share(run.drawn.get(name, 0), run) for run in runs)] for name in names
        ]
        stages = [_STAGES.get(run.stage, run.stage) for run in runs]
        return "Sequences read by domain, and their share of the run.\n\n" + _table(
            ["domain", *stages], rows
        )

    def _losses(self) -> str:
        """Return the losses of the last run that measured them."""
        for run in reversed(self.runs):
            for mode in ("loss", "exact"):
                if found := run.held_out_loss.get(mode):
                    return _losses_of(run, mode, found)
        return ""

    def _loading(self) -> str:
        shape, name = self.source.shape, self.title
        lines = [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
        ]
        if self.has_tokenizer:
            lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
            lines.append('tokens = tokenizer("Once upon a time", return_tensors="pt")')
            lines.append("print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))")
        parts = ["\n".join([*lines, "```"])]
        parts.append("(`dtype` is `torch_dtype` in releases of transformers before 4.56.)")
        if not self.has_tokenizer:
            parts.append("No tokenizer was given with the model.")
        why = loadable.why_refused(shape)
        if why is not None:
            parts.append(f"Stock runtimes refuse this shape: {why}.")
        else:
            parts.append(
                "The directory has the fields and files that vLLM (`vllm serve DIRECTORY`) and "
                "llama.cpp's `convert_hf_to_gguf.py DIRECTORY` read."
            )
        return "\n\n".join(parts)

    def _licence(self) -> str:
        origin = self.known.origin
        base = _cell(origin["name"]) if "name" in origin else "the model it was made from"
        if "license" in origin:
            return (
                f"`{_cell(origin['license'])}`, the licence of {base}, whose terms apply to this "
                f"model too."
            )
        return (
            f"Not known: nothing beside {base} named its licence. Add `license` to the head of "
            f"this card before you publish the model; the terms of {base} apply to it."
        )


def write(directory: Path, card: Card) -> None:
    """Write the card into a directory that has none.

    Raises:
        FileExistsError: it has one.
    """
    with (directory / README).open("x", encoding="utf-8") as file:
        file.write(card.text())


def _losses_of(run: RunSummary, mode: str, found: dict[str, float]) -> str:
    errors = run.held_out_standard_error.get(mode) or {}
    rows = [
        [_cell(name), f"{loss:.4f}", _error(errors.get(name))]
        for name, loss in sorted(found.items())
    ]
    mean = sum(found.values()) / len(found)
    rows.append(["**mean of domains**", f"**{mean:.4f}**", ""])
    when = f"after step {run.steps:,} of {_STAGES.get(run.stage, run.stage)}"
    if mode == "exact":
        when += ", under masks at the size of the cut"
    return f"Cross entropy in nats per token, {when}.\n\n" + _table(
        ["domain", "loss", "standard error"], rows
    )


def _tasks(results: TaskResults) -> str:
    rows = [
        [
            _cell(score.task),
            "" if score.shots is None else str(score.shots),
            _cell(score.metric + (f" ({score.behind})" if score.behind else "")),
            f"{score.value:.4f}",
            _error(score.error),
        ]
        for score in results.scores
    ]
    return f"Scored with {_cell(results.harness)}.\n\n" + _table(
        ["task", "shots", "metric", "value", "standard error"], rows
    )


def _share(count: int, run: RunSummary) -> str:
    return f"{count:,} ({100 * count / sum(run.drawn.values()):.1f} %)"


def _error(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: object) -> str:
    """Return a name as one line of Markdown that no character of it ends or marks up."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "|`*<>[]#\\" else sign for sign in plain)
