"""Write the section of one run: its figures, tables, settings and command."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import yaml
from markupsafe import Markup

from megashear import config
from megashear.checkpoint.description import Description
from megashear.masks.kinds import KINDS
from megashear.monitor import tags
from megashear.monitor.console import format_duration
from megashear.monitor.figures import domains_of, mixture_figure
from megashear.report.captions import (
    loss_caption,
    mixture_caption,
    pruned_layers,
    settling_caption,
    sparsity_caption,
    speed_caption,
    timeline_caption,
    training_caption,
)
from megashear.report.costs import STAGES
from megashear.report.curves import (
    has_settling,
    kinds_of,
    loss_figure,
    settling_figure,
    sparsity_figure,
    speed_figure,
    timeline_figure,
    training_figure,
)
from megashear.report.losses import (
    BEFORE_PRUNING,
    MeanLoss,
    final_loss,
    levels_of,
    references_of,
)
from megashear.report.mask_map import mask_map
from megashear.report.page import (
    PageFigure,
    Section,
    folded,
    heading,
    moment,
    paragraph,
    preformatted,
    samples,
    table,
)
from megashear.report.record import RunRecord
from megashear.report.tables import origin_text
from megashear.report.task_curves import tasks_caption, tasks_figure, tasks_of
from megashear.report.verdict import verdict


def run_section(record: RunRecord, name: str, source: MeanLoss | None) -> Section:
    """Return the section of one run.

    Args:
        record: the run.
        name: where links lead to.
        source: loss of the model before pruning, where it is known.
    """
    points = record.points
    parts: list[Markup | PageFigure] = []

    def drawn(what: str, figure: Any, caption: str) -> None:
        parts.append(PageFigure(name=f"{name}-{what}", figure=figure, caption=caption))

    if record.masks is not None:
        parts.append(heading("What is kept where"))
        kept = record.masks.exact
        drawn(
            "masks",
            mask_map(kept),
            f"Every row is a layer of the model before the cut, every column one of its heads or "
            f"neurons: blue is kept, blank is pruned, and fainter cells stand for neighbours of "
            f"which only some are kept. {pruned_layers(kept.removed_layers)}",
        )
        parts.append(_kinds_table(record))
        parts.append(paragraph(verdict(record)))
    if tags.LM_LOSS in points:
        parts.append(heading("Loss"))
        drawn("loss", loss_figure(points, levels_of(record, source)), loss_caption(record, points))
    if tags.LEARNING_RATE in points or tags.GRAD_NORM in points:
        parts.append(heading("Learning rate and gradients"))
        drawn("training", training_figure(points), training_caption(record, points))
    if kinds_of(points):
        parts.append(heading("How much is pruned"))
        lengths = {}
        if record.masks is not None:
            lengths = {kind: one.num_units for kind, one in record.masks.kinds.items()}
        drawn("sparsity", sparsity_figure(points, lengths), sparsity_caption(points))
    if has_settling(points):
        parts.append(heading("How settled the masks are"))
        drawn("settling", settling_figure(points), settling_caption(points))
    if domains_of(points):
        parts.append(heading("Domains"))
        drawn("domains", mixture_figure([points]), mixture_caption(points))
        parts += _domains_table(record, source)
    if tasks_of(points):
        parts.append(heading("Downstream tasks"))
        drawn("tasks", tasks_figure(points), tasks_caption(points))
    if record.description is not None and record.description.known.text_samples:
        parts.append(heading("What the model writes"))
        parts += _samples(record.description)
    if record.sessions and tags.LM_LOSS in record.events:
        parts.append(heading("Timeline"))
        drawn("timeline", timeline_figure(record), timeline_caption(record))
        parts.append(_events_table(record))
    if tags.TOKENS_PER_SECOND in points:
        parts.append(heading("Speed"))
        drawn("speed", speed_figure(points), speed_caption(points))
    if (description := record.description) is not None:
        origin = origin_text(description.known)
        if origin is not None:
            parts += [heading("Importance scores"), paragraph(f"Its {origin}.")]
    if record.config:
        parts.append(heading("Settings"))
        parts += _config_parts(record.config)
    if record.description is not None:
        parts.append(heading("How to repeat it"))
        parts += _environment_parts(record.environment)
    title = f"{STAGES.get(record.stage, 'Run')}: {record.name}"
    return Section(name=name, title=title, parts=parts)


def _kinds_table(record: RunRecord) -> Markup:
    assert record.masks is not None
    rows = []
    for kind, one in record.masks.kinds.items():
        fewest, most = one.fewest_open, one.most_open
        rows.append(
            [
                KINDS[kind].units,
                f"{one.num_units:,}",
                f"{one.target:,}",
                f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}",
                f"{one.num_undecided:,} of {one.num_gates:,}",
                f"{one.num_changed:,} of {one.num_gates:,}",
            ]
        )
    exact, expected = record.masks.exact.num_params(), record.masks.expected.num_params()
    head = ["in each row", "now", "target", "masks ask for", "undecided", "changed by rounding"]
    said = (
        f"Cut to the target the model has {exact:,} parameters; as the masks stand now they ask "
        f"for {expected:,}."
    )
    return table(head, rows) + paragraph(said, kind="muted")


def _domains_table(record: RunRecord, source: MeanLoss | None) -> list[Markup]:
    """Return the last loss of every domain beside what it is held to."""
    loss = final_loss(record)
    if loss is None or len(loss.domains) < 2:
        return []
    columns: dict[str, Mapping[str, float]] = {"loss": loss.domains}
    if loss.errors:
        columns["standard error"] = loss.errors
    references = references_of(record)
    if references:
        columns["reference"] = references
        columns["above it"] = {n: loss.domains[n] - references[n] for n in references}
    if source is not None and BEFORE_PRUNING in levels_of(record, source):
        columns["before pruning"] = source.domains
    rows = [
        [name, *(f"{of[name]:.3f}" if name in of else "-" for of in columns.values())]
        for name in loss.domains
    ]
    said = f"Held-out loss of every domain, nats per token, {loss.words}; the mean is {loss}."
    return [table(["domain", *columns], rows), paragraph(said, kind="muted")]


def _samples(description: Description) -> list[Markup]:
    of_masks = ", under the masks that a cut would keep" if description.stage == "prune" else ""
    said = (
        f"Beginnings of held-out texts as the model continues them{of_masks}: in colour what it "
        f"wrote, the likeliest token each time, and below how the text goes on."
    )
    return [paragraph(said), samples(description.known.text_samples)]


def _environment_parts(found: Mapping[str, Any]) -> list[Markup]:
    """Return versions, device and the command that repeats a run."""
    if not found:
        said = "This run is of a release that kept neither versions nor its command."
        return [paragraph(said, kind="muted")]
    rows = [
        [name, str(found[name])]
        for name in ("megashear", "torch", "megatron-core", "python", "device", "processes")
        if name in found
    ]
    parts = [table(["", "of the last start"], rows, left=2)]
    if found.get("command"):
        parts += [
            paragraph("The command of the last start; with other paths it repeats the run."),
            preformatted(_command(found)),
        ]
    return parts


def _command(found: Mapping[str, Any]) -> str:
    """Return what a shell takes to start such a run."""
    words = shlex.join(found["command"])
    processes, on_host = int(found.get("processes", 1)), int(found.get("processes on a host", 1))
    if processes == 1:
        return f"megashear {words}"
    hosts = f"--nnodes {processes // on_host}" if processes > on_host else "--standalone"
    return f"torchrun {hosts} --nproc-per-node {on_host} -m megashear {words}"


def _events_table(record: RunRecord) -> Markup:
    rows = []
    for number, session in enumerate(record.sessions, start=1):
        rows.append(
            [
                moment(session.began),
                "started" if number == 1 else "started again",
                "no step"
                if session.first_step is None
                else f"steps {session.first_step:,} to {session.last_step:,}",
                format_duration(session.seconds),
            ]
        )
    for saved in record.iterations:
        rows.append(
            [
                "" if saved.saved_at is None else moment(saved.saved_at),
                "checkpoint",
                f"step {saved.step:,}",
                "deleted since" if saved.path is None else f"{saved.num_bytes / 1e9:.3g} GB",
            ]
        )
    rows.sort(key=lambda row: row[0] or "z")
    listed = table(["when", "what", "where", ""], rows, left=3)
    return folded(f"All {len(rows)} starts and checkpoints", listed)


def _config_parts(values: Mapping[str, Any]) -> list[Markup]:
    """Return settings that differ from defaults, and all settings as a file for --config."""
    flat: dict[str, Any] = {}
    rows = []
    defaults = _defaults()
    for group, inside in values.items():
        for key, value in (inside if isinstance(inside, Mapping) else {group: inside}).items():
            flat[key] = value
            default = defaults.get(key)
            if value != default:
                shown = "" if default is None else _plain(default)
                rows.append(["--" + key.replace("_", "-"), _plain(value), shown])
    whole = yaml.safe_dump(flat, sort_keys=False, allow_unicode=True)
    return [
        paragraph("Settings that differ from their defaults."),
        table(["setting", "value", "default"], rows, left=3),
        folded(f"All {len(flat)} settings, as a file for --config", preformatted(whole)),
    ]


def _defaults() -> dict[str, Any]:
    """Return the default of every setting that has one."""
    found = {}
    for owner in vars(config).values():
        if isinstance(owner, type) and dataclasses.is_dataclass(owner):
            for field in dataclasses.fields(owner):
                if owner.__name__ in GROUPS and field.default is not dataclasses.MISSING:
                    default = field.default
                    found[field.name] = list(default) if isinstance(default, tuple) else default
    return found


GROUPS = (
    *("ParallelConfig", "ModelConfig", "TrainConfig", "OptimizerConfig", "DataConfig"),
    *("MaskConfig", "PruneRun", "PretrainRun"),
)
"""Dataclasses whose fields are settings of a run."""


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
