"""What a report says of runs, section by section."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megashear import config
from megashear.masks.targets import EXTENTS
from megashear.monitor import tensorboard as tags
from megashear.monitor.console import format_duration
from megashear.monitor.figures import domains_of, mixture_figure
from megashear.report.curves import (
    has_settling,
    kinds_of,
    loss_figure,
    parts_of,
    settling_figure,
    sparsity_figure,
    speed_figure,
    timeline_figure,
)
from megashear.report.mask_map import mask_map
from megashear.report.page import (
    Drawn,
    Section,
    bars,
    cards,
    definitions,
    folded,
    large,
    moment,
    paragraph,
    preformatted,
    table,
    text,
)
from megashear.report.record import HELD_OUT_LOSS, RESULTS, RunRecord
from megashear.report.tables import EXTENT_NAMES, KIND_NAMES, PARTS, part_params
from megashear.shape import ModelShape

STAGES = {"prune": "Pruning", "pretrain": "Continued pretraining", None: "Run"}
GLOSSARY = {
    "pruning": "Making a model smaller by taking whole parts out of it: layers, attention heads, "
    "MLP neurons, hidden dimensions. What is left is an ordinary model of a smaller shape.",
    "mask, gate": "Every part that may go has a gate, a learned number between closed and open. A "
    "mask is the row of all gates of one kind. Weights and gates are trained together; closing "
    "gates is asked for by a constraint that grows until the target shape is met.",
    "expected and exact": "In expected mode as many gates are open as the masks ask for, which is "
    "what training measures. In exact mode every row keeps the target's number of most open gates, "
    "which is the model that is cut. The nearer the two, the less the cut changes.",
    "undecided": "A gate whose chance to be open lies between 10 and 90 percent.",
    "loss": "How badly the model guesses the next token, in nats per token; lower is better. "
    "Held-out text is text that is never trained on. The band around a curve is one standard "
    "error.",
    "domain, mixture": "Training text comes from several domains. After every evaluation the "
    "domains that lag behind their reference loss get a larger share of the text to come.",
    "continued pretraining": "After the cut the smaller model is trained on, to win back what "
    "pruning cost.",
}
"""Words of a page for those who never saw the tool."""


def sections_of(records: Sequence[RunRecord], folder: Path | None) -> list[Section]:
    """Everything a report says of runs, in order.

    Args:
        records: the runs.
        folder: of a quickstart, for its table of results; None for none.
    """
    found = []
    shape = _shape_section(records)
    if shape is not None:
        found.append(shape)
    results = None if folder is None else _results_section(folder / RESULTS)
    if results is not None:
        found.append(results)
    for number, record in enumerate(records, start=1):
        found.append(_run_section(record, f"run{number}" if len(records) > 1 else "run"))
    found.append(_cost_section(records))
    found.append(Section(name="words", title="What the words mean", parts=[definitions(GLOSSARY)]))
    return found


def headline(records: Sequence[RunRecord]) -> list[str]:
    """What stands below the title: what happened in a sentence or two, and the largest numbers."""
    lead = [paragraph(_sentence(records), kind="lead")]
    badges = "".join(
        f'<p class="state"><span class="badge {record.state.replace(" ", "-")}">'
        f"{text(record.state)}</span> "
        f"{text(_status(record))}</p>"
        for record in records
    )
    lead.append(badges)
    lead += [paragraph(note, kind="warn") for record in records for note in record.notes]
    numbers = list(_cards(records))
    return [*lead, cards(numbers)] if numbers else lead


def title_of(records: Sequence[RunRecord]) -> str:
    """What a page is called."""
    *first, last = (record.name for record in records)
    return f"Run report: {', '.join(first)} and {last}" if first else f"Run report: {last}"


def _sentence(records: Sequence[RunRecord]) -> str:
    words = []
    before, after = _before_and_after(records)
    if before is not None and after is not None:
        share = 100 * after.num_params() / before.num_params()
        words.append(
            f"A model of {large(before.num_params())} parameters becomes one of "
            f"{large(after.num_params())}, {share:.0f} % of it."
        )
    for record in records:
        loss = _final_loss(record)
        what = {"prune": "Pruning", "pretrain": "Continued pretraining"}.get(
            record.stage or "", "The run"
        )
        steps = f"{record.step:,} of {record.train_iters:,}" if record.train_iters else record.step
        done = f"{what} has done {steps} steps"
        if loss is not None:
            done += f"; its loss on held-out text is {loss[0]:.3f} nats per token {loss[1]}"
        words.append(done + ".")
    return " ".join(words)


def _status(record: RunRecord) -> str:
    words = f"{STAGES.get(record.stage, 'Run')} ({record.name}): step {record.step:,}"
    if record.train_iters:
        words += f" of {record.train_iters:,}"
    if record.sessions:
        words += f", last sign of life {moment(record.sessions[-1].ended)}"
    if len(record.sessions) > 1:
        words += f", started {len(record.sessions)} times"
    return words


def _cards(records: Sequence[RunRecord]) -> Iterator[tuple[str, str, str]]:
    before, after = _before_and_after(records)
    if before is not None and after is not None:
        share = 100 * after.num_params() / before.num_params()
        yield (
            "Parameters",
            large(after.num_params()),
            f"of {large(before.num_params())} before, {share:.1f} % are kept",
        )
    loss = _final_loss(records[-1])
    if loss is not None:
        yield "Held-out loss", f"{loss[0]:.3f}", f"nats per token, {loss[1]}"
    tokens = [record.tokens for record in records if record.tokens is not None]
    if tokens:
        yield "Text read", large(sum(tokens)), "tokens of training"
    seconds = sum(record.seconds for record in records)
    if seconds:
        yield "Time", format_duration(seconds), "h:min:s, from first to last log line"
        hours = _device_hours(records)
        if hours is not None:
            yield hours[0], _hours(hours[1]), "time x processes"


def _shape_section(records: Sequence[RunRecord]) -> Section | None:
    before, after = _before_and_after(records)
    if after is None:
        return None
    if before is None:
        rows = [(name, f"{getattr(after, field):,}") for field, name in EXTENT_NAMES.items()]
        rows.append(("parameters", f"{after.num_params():,}"))
        return Section(name="shape", title="The model", parts=[table(["", ""], rows)])
    rows_of = [
        (EXTENT_NAMES[field], int(getattr(before, field)), int(getattr(after, field)))
        for field in EXTENT_NAMES
        if field in EXTENTS.values()
    ]
    rows_of += [(what, part_params(before, p), part_params(after, p)) for what, p in PARTS.items()]
    rows_of.append(("parameters in all", before.num_params(), after.num_params()))
    said = paragraph(
        f"The model before and after, extent by extent: the bar is what is kept. The width of a "
        f"head, {before.head_dim}, and the vocabulary never change."
    )
    return Section(name="shape", title="Shape before and after", parts=[said, bars(rows_of)])


def _results_section(path: Path) -> Section | None:
    if not path.is_file():
        return None
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    domains = list(models[0]["losses"])
    rows = [
        [
            model["name"],
            f"{model['parameters']:,}",
            *(f"{model['losses'][domain]:.3f}" for domain in domains),
            f"{model['mean']:.3f}",
        ]
        for model in models
    ]
    return Section(
        name="results",
        title="All models of this quickstart",
        parts=[
            paragraph(
                "Loss on held-out text, nats per token, by domain and as their mean; lower is "
                "better. The sheared model stands against its source, against itself before "
                "recovery, and against models of its own shape that began from nothing."
            ),
            table(["model", "parameters", *domains, "mean"], rows),
        ],
    )


def _run_section(record: RunRecord, name: str) -> Section:
    points = record.points
    parts: list[str | Drawn] = []

    def drawn(what: str, figure: Any, caption: str) -> None:
        parts.append(Drawn(name=f"{name}-{what}", figure=figure, caption=caption))

    if record.masks is not None:
        parts.append("<h3>What is kept where</h3>")
        kept = record.masks.exact
        drawn(
            "masks",
            mask_map(kept),
            f"Every row is a layer of the model before the cut, every column one of its heads or "
            f"neurons: blue stays, blank goes, and fainter cells stand for neighbours of which "
            f"only some stay. {_layers_that_go(kept.removed_layers)}",
        )
        parts.append(_kinds_table(record))
    if tags.LM_LOSS in points:
        parts.append("<h3>Loss</h3>")
        drawn("loss", loss_figure(points), _loss_caption(record, points))
    if kinds_of(points):
        parts.append("<h3>How much goes</h3>")
        lengths = {}
        if record.masks is not None:
            lengths = {kind: one.num_units for kind, one in record.masks.kinds.items()}
        drawn("sparsity", sparsity_figure(points, lengths), _sparsity_caption(points))
    if has_settling(points):
        parts.append("<h3>How settled the masks are</h3>")
        drawn("settling", settling_figure(points), _settling_caption(points))
    if domains_of(points):
        parts.append("<h3>Domains</h3>")
        drawn("domains", mixture_figure([points]), _mixture_caption(points))
    if record.sessions and tags.LM_LOSS in record.events:
        parts.append("<h3>Timeline</h3>")
        drawn("timeline", timeline_figure(record), _timeline_caption(record))
        parts.append(_events_table(record))
    if tags.TOKENS_PER_SECOND in points:
        parts.append("<h3>Speed</h3>")
        drawn("speed", speed_figure(points), _speed_caption(points))
    if record.config:
        parts.append("<h3>Settings</h3>")
        parts += _config_parts(record.config)
    title = f"{STAGES.get(record.stage, 'Run')}: {record.name}"
    return Section(name=name, title=title, parts=parts)


def _kinds_table(record: RunRecord) -> str:
    assert record.masks is not None
    rows = []
    for kind, one in record.masks.kinds.items():
        fewest, most = one.fewest_open, one.most_open
        rows.append(
            [
                KIND_NAMES[kind],
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


def _events_table(record: RunRecord) -> str:
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


def _cost_section(records: Sequence[RunRecord]) -> Section:
    head = ["", *(f"{STAGES.get(r.stage, 'Run')}: {r.name}" for r in records)]
    rows = [[name, *(cost(record) for record in records)] for name, cost in COSTS.items()]
    shown = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return Section(
        name="cost",
        title="What it cost",
        parts=[
            paragraph(
                "Times are those of the event files, from a start's first line to its last; "
                "starting up and loading come before the first. Processes are one a device."
            ),
            table(head, shown),
        ],
    )


def _cost_tokens(record: RunRecord) -> str:
    return "-" if record.tokens is None else f"{record.tokens:,}"


def _cost_processes(record: RunRecord) -> str:
    return "-" if record.num_processes is None else str(record.num_processes)


def _cost_device(record: RunRecord) -> str:
    return "-" if (device := _device(record)) is None else device


def _cost_hours(record: RunRecord) -> str:
    hours = _device_hours([record])
    return "-" if hours is None else _hours(hours[1])


def _cost_evaluation(record: RunRecord) -> str:
    share = record.evaluation_share
    return "-" if share is None else f"{100 * share:.1f} % of the wall time"


def _cost_saving(record: RunRecord) -> str:
    values = record.events.get(tags.SAVE_STALL_SECONDS, {})
    if not values:
        return "-"
    return f"{sum(point.value for point in values.values()):,.1f} s for {len(values)} checkpoints"


def _cost_memory(record: RunRecord) -> str:
    for tag, where in (
        (tags.MEMORY_RESERVED, "on a GPU"),
        (tags.MEMORY_RESIDENT, "of a process on its host"),
    ):
        if values := record.points.get(tag):
            return f"{max(values.values()):.3g} GB {where}"
    return "-"


def _cost_utilisation(record: RunRecord) -> str:
    values = sorted(record.points.get(tags.MODEL_FLOPS_UTILISATION, {}).values())
    return f"{100 * values[len(values) // 2]:.1f} %" if values else "-"


def _cost_disk(record: RunRecord) -> str:
    total = sum(saved.num_bytes for saved in record.iterations)
    return f"{total / 1e9:.3g} GB" if total else "-"


COSTS = {
    "training tokens": _cost_tokens,
    "steps": lambda record: f"{record.step:,}",
    "wall time": lambda record: format_duration(record.seconds) if record.sessions else "-",
    "starts": lambda record: str(len(record.sessions)) if record.sessions else "-",
    "processes": _cost_processes,
    "devices": _cost_device,
    "process-hours": _cost_hours,
    "model FLOPs utilisation, median": _cost_utilisation,
    "most memory": _cost_memory,
    "evaluations took": _cost_evaluation,
    "training stood still for saving": _cost_saving,
    "checkpoints on disk now": _cost_disk,
}
"""Lines of the table of costs; "-" where a run does not tell."""


def _device(record: RunRecord) -> str | None:
    """What the run ran on, where it says so."""
    if record.description is None:
        return None
    found: str | None = record.description.details.get("device")
    return found


def _device_hours(records: Sequence[RunRecord]) -> tuple[str, float] | None:
    """What an hour of a process is called, and how many there were; None where not known."""
    total = 0.0
    for record in records:
        if record.num_processes is None:
            return None
        total += record.seconds / 3600 * record.num_processes
    devices = {_device(record) for record in records}
    on_gpus = None not in devices and "CPU" not in devices
    return ("GPU-hours" if on_gpus else "Process-hours"), total


def _hours(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"


def _loss_caption(record: RunRecord, points: Mapping[str, Mapping[int, float]]) -> str:
    losses = list(points[tags.LM_LOSS].values())
    words = (
        f"Loss on training text, blue, goes from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"
    )
    held_out = list(points.get(tags.EVAL_MEAN_LOSS, {}).values())
    if held_out:
        words += f", on held-out text, orange, from {held_out[0]:.2f} to {held_out[-1]:.2f}"
    if record.stage == "prune":
        words += "; it may rise while more and more of the model is closed, and falls after that"
    return words + "."


def _sparsity_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    gaps = []
    for kind in kinds_of(points):
        expected = list(points[tags.expected_sparsity(kind)].values())[-1]
        target = list(points[tags.target_sparsity(kind)].values())[-1]
        gaps.append((abs(expected - target), kind, expected, target))
    _, kind, expected, target = max(gaps)
    return (
        f"The share of each kind that shall go, dashed, grows from 0 to its target, and the share "
        f"that the masks expect to close, blue, follows it; farthest at the end are "
        f"{KIND_NAMES[kind]}, {expected:.3f} where {target:.3f} is asked for."
    )


def _settling_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    last = {
        kind: list(points[tags.undecided(kind)].values())[-1]
        for kind in kinds_of(points)
        if tags.undecided(kind) in points
    }
    most = max(last, key=lambda kind: last[kind])
    return (
        f"The share of gates whose chance to be open lies between 10 and 90 %, and the share that "
        f"opened or closed since the evaluation before: both fall as the masks settle; at the end "
        f"{100 * last[most]:.1f} % of the {KIND_NAMES[most]} are undecided, the most of all kinds."
    )


def _mixture_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    shares = {
        name: list(points[tags.mixture_weight(name)].values())[-1] for name in domains_of(points)
    }
    most = next(iter(shares))
    words = (
        f"The share of each domain in the text to come; {most} has most at the end, "
        f"{100 * shares[most]:.0f} %"
    )
    if any(tags.eval_loss(name) in points for name in shares):
        words += ". Below, the held-out loss of each domain"
    if any(tags.eval_excess(name) in points for name in shares):
        words += (
            ", and how far it is above its reference: domains that are far above get a larger share"
        )
    return words + "."


def _timeline_caption(record: RunRecord) -> str:
    times = "once" if len(record.sessions) == 1 else f"{len(record.sessions)} times"
    return (
        f"Steps done over time: the steeper, the faster. The run was started {times}; each grey "
        f"field is one start, circles are evaluations and triangles are checkpoints."
    )


def _speed_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    rates = sorted(points[tags.TOKENS_PER_SECOND].values())
    words = (
        f"Training tokens per second over all processes, without evaluations and checkpoints; the "
        f"median is {large(rates[len(rates) // 2])}"
    )
    if parts_of(points):
        words += "; below, what the time of a step goes to"
    return words + "."


def _layers_that_go(layers: Sequence[int]) -> str:
    if not layers:
        return "All layers stay."
    numbers = ", ".join(map(str, layers))
    return f"Layer{'s' if len(layers) > 1 else ''} {numbers} go{'es' if len(layers) == 1 else ''}."


def _config_parts(values: Mapping[str, Any]) -> list[str]:
    """Settings that differ from their defaults, and all of them as a file for --config."""
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
        paragraph("What was set to something else than its default."),
        table(["setting", "value", "default"], rows, left=3),
        folded(f"All {len(flat)} settings, as a file for --config", preformatted(whole)),
    ]


def _defaults() -> dict[str, Any]:
    """Default of every setting that has one."""
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


def _before_and_after(
    records: Sequence[RunRecord],
) -> tuple[ModelShape | None, ModelShape | None]:
    """The first model that is known and the last."""
    before = next((r.source_shape for r in records if r.source_shape is not None), None)
    after = next((r.target_shape for r in reversed(records) if r.target_shape is not None), None)
    if after is None and records[-1].description is not None:
        after = records[-1].description.shape
    return before, after


def _final_loss(record: RunRecord) -> tuple[float, str] | None:
    """The held-out loss that says most of a run, and what it was measured on."""
    if record.description is not None:
        by_mode = record.description.details.get(HELD_OUT_LOSS, {})
        for mode, words in (
            ("loss", "over all held-out text"),
            ("exact", "over all held-out text, cut to the target"),
        ):
            if mode in by_mode:
                losses = list(by_mode[mode].values())
                mean = sum(losses) / len(losses)
                if math.isfinite(mean):
                    return mean, words
    points = record.points.get(tags.EVAL_MEAN_LOSS, {})
    if not points:
        return None
    step = max(points)
    return points[step], f"at step {step:,}, on the run's subsample"
