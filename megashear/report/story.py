"""What a report says of runs, section by section."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from megashear import config
from megashear.files.structured import read_json_object
from megashear.masks.kinds import EXTENTS, KINDS
from megashear.monitor import tags
from megashear.monitor.console import format_duration
from megashear.monitor.figures import domains_of, mixture_figure
from megashear.report.costs import STAGES, cost_section, device_hours, hours_as_text
from megashear.report.curves import (
    MEMORY_NAMES,
    has_settling,
    kinds_of,
    loss_figure,
    parts_of,
    recovery_figure,
    settling_figure,
    sparsity_figure,
    speed_figure,
    timeline_figure,
    training_figure,
)
from megashear.report.losses import (
    MeanLoss,
    final_loss,
    known_errors,
    mean_reference,
    references_of,
)
from megashear.report.mask_map import mask_map
from megashear.report.page import (
    PageFigure,
    Section,
    bars,
    cards,
    definitions,
    folded,
    heading,
    large,
    moment,
    paragraph,
    preformatted,
    state,
    table,
)
from megashear.report.record import RESULTS, RunRecord
from megashear.report.tables import EXTENT_NAMES, PARTS, part_params
from megashear.report.verdict import findings, verdict
from megashear.shape import ModelShape

GLOSSARY = {
    "pruning": "Making a model smaller by taking whole parts out of it: layers, attention heads, "
    "MLP neurons, hidden dimensions. What is left is an ordinary model of a smaller shape.",
    "mask, gate": "Every part that may be pruned has a gate, a learned number between closed and "
    "open. A mask is the row of all gates of one kind. Weights and gates are trained together; "
    "closing gates is asked for by a constraint that grows until the target shape is met.",
    "expected and exact": "In expected mode as many gates are open as the masks ask for, which is "
    "what training measures. In exact mode every row keeps the target's number of most open gates, "
    "which is the model that is cut. The nearer the two, the less the cut changes.",
    "undecided": "A gate whose chance to be open lies between 10 and 90 percent.",
    "settled": "Masks have settled when, of every kind, at most 10 % of the gates are undecided, "
    "at most 2 % changed side since the evaluation before, rounding to the target changes at most "
    "5 % (one gate is never too many), and the expected size of a row is within 5 % of its units "
    "of the target.",
    "reference": "The loss that a domain is to reach; the mixture follows the distance from it.",
    "loss": "How badly the model guesses the next token, in nats per token; lower is better. "
    "Held-out text is text that is never trained on. The band around a curve is one standard "
    "error.",
    "domain, mixture": "Training text comes from several domains. After every evaluation the "
    "domains that lag behind their reference loss get a larger share of the text to come.",
    "continued pretraining": "After the cut the smaller model is trained on, to win back what "
    "pruning cost.",
}
"""Words of a page for those who never saw the tool."""


def sections_of(
    records: Sequence[RunRecord], folder: Path | None, source: MeanLoss | None = None
) -> list[Section]:
    """Return everything a report says of runs, in order.

    Args:
        records: the runs.
        folder: of a quickstart, for its table of results; None for none.
        source: loss of the model before pruning, where it is known.
    """
    found = []
    shape = _shape_section(records)
    if shape is not None:
        found.append(shape)
    results = None if folder is None else _results_section(folder / RESULTS)
    if results is not None:
        found.append(results)
    recovery = _recovery_section(records, source)
    if recovery is not None:
        found.append(recovery)
    for number, record in enumerate(records, start=1):
        found.append(_run_section(record, f"run{number}" if len(records) > 1 else "run", source))
    found.append(cost_section(records))
    found.append(Section(name="words", title="What the words mean", parts=[definitions(GLOSSARY)]))
    return found


def headline(records: Sequence[RunRecord], source: MeanLoss | None = None) -> list[Markup]:
    """Return what stands below the title: what happened in a few sentences, the largest numbers.

    Args:
        records: the runs.
        source: loss of the model before pruning, where it is known.
    """
    lead = [paragraph(" ".join([_sentence(records), *_gaps(records, source)]), kind="lead")]
    lead += [state(record.state, _status(record)) for record in records]
    lead += [paragraph(note, kind="warn") for record in records for note in record.notes]
    for record in records:
        if any(not one.is_settled for one in findings(record)):
            lead.append(paragraph(verdict(record, most=1), kind="warn"))
    numbers = list(_cards(records, source))
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
        loss = final_loss(record)
        what = {"prune": "Pruning", "pretrain": "Continued pretraining"}.get(
            record.stage or "", "The run"
        )
        steps = f"{record.step:,} of {record.train_iters:,}" if record.train_iters else record.step
        done = f"{what} has done {steps} steps"
        if loss is not None:
            done += f"; its loss on held-out text is {loss} nats per token {loss.words}"
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


def _gaps(records: Sequence[RunRecord], source: MeanLoss | None) -> list[str]:
    """Return how far the last loss is above the source's and the references', a sentence each."""
    loss = final_loss(records[-1])
    if loss is None:
        return []
    levels = _levels(records[-1], source)
    if loss.on_subsample and BEFORE_PRUNING in levels:
        name = f"{BEFORE_PRUNING} (over all held-out text; this loss over a subsample)"
        levels = {name: levels.pop(BEFORE_PRUNING), **levels}
    return [
        f"That is {loss.mean - level:.3f} above {words}, {level:.3f}."
        if loss.mean >= level
        else f"That is {level - loss.mean:.3f} below {words}, {level:.3f}."
        for words, level in levels.items()
    ]


def _levels(record: RunRecord, source: MeanLoss | None) -> dict[str, float]:
    """Return the losses that a run's are held to, by name; a source that is the reference once."""
    reference = mean_reference(record)
    levels = {}
    if source is not None:
        levels[BEFORE_PRUNING] = source.mean
    if reference is not None and (source is None or abs(reference - source.mean) > SAME_LOSS):
        levels["the mean of the references"] = reference
    return levels


BEFORE_PRUNING = "the model before pruning"
"""What the source is called where a loss is held to it."""
SAME_LOSS = 5e-4
"""Nats; losses that differ less are one line, for three digits are shown."""


def _cards(records: Sequence[RunRecord], source: MeanLoss | None) -> Iterator[tuple[str, str, str]]:
    before, after = _before_and_after(records)
    if before is not None and after is not None:
        share = 100 * after.num_params() / before.num_params()
        yield (
            "Parameters",
            large(after.num_params()),
            f"of {large(before.num_params())} before, {share:.1f} % are kept",
        )
    loss = final_loss(records[-1])
    if loss is not None:
        error = "" if loss.error is None else f"+- {loss.error:.3f} "
        yield "Held-out loss", f"{loss.mean:.3f}", f"{error}nats per token, {loss.words}"
        for words, level in _levels(records[-1], source).items():
            where = words.removeprefix("the mean of ").removeprefix("the model ")
            yield f"Gap: {where}", f"{loss.mean - level:+.3f}", f"nats per token, to {words}"
    tokens = [record.tokens for record in records if record.tokens is not None]
    if tokens:
        yield "Text read", large(sum(tokens)), "tokens of training"
    seconds = sum(record.seconds for record in records)
    if seconds:
        yield "Time", format_duration(seconds), "h:min:s, from first to last log line"
        hours = device_hours(records)
        if hours is not None:
            yield hours[0], hours_as_text(hours[1]), "time x processes"


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
        if field in EXTENTS
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
    content = read_json_object(path)
    try:
        models = content["models"]
        domains = list(models[0]["losses"])
        rows = [
            [
                model["name"],
                f"{model['parameters']:,}",
                *(f"{model['losses'][domain]:.3f}" for domain in domains),
                str(
                    MeanLoss(domains=model["losses"], errors=known_errors(model.get("errors", {})))
                ),
            ]
            for model in models
        ]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what a quickstart wrote: {error!r}; remove it") from None
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


def _recovery_section(records: Sequence[RunRecord], source: MeanLoss | None) -> Section | None:
    """Return the losses of runs that follow each other on one axis; None for a run alone."""
    shown = [record for record in records if tags.LM_LOSS in record.points]
    if len(shown) < 2:
        return None
    scales = [record.tokens_per_step for record in shown]
    by_tokens = None not in scales
    figure = recovery_figure(
        [record.points for record in shown],
        [float(scale) if by_tokens and scale is not None else 1.0 for scale in scales],
        [record.name for record in shown],
        _levels(shown[-1], source),
        xlabel="training tokens, of all runs together"
        if by_tokens
        else "step, of all runs together",
    )
    losses = [(record.name, final_loss(record)) for record in shown]
    words = ", ".join(f"{name} {loss}" for name, loss in losses if loss is not None)
    caption = (
        f"Loss of the runs one after the other, each from where the one before ended: blue on "
        f"training text, orange on held-out text, dashed for the model that would be cut there. "
        f"Held-out losses at the ends: {words}."
    )
    return Section(
        name="joined",
        title="From pruning to recovery",
        parts=[PageFigure(name="recovery", figure=figure, caption=caption)],
    )


def _run_section(record: RunRecord, name: str, source: MeanLoss | None) -> Section:
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
            f"which only some are kept. {_pruned_layers(kept.removed_layers)}",
        )
        parts.append(_kinds_table(record))
        parts.append(paragraph(verdict(record)))
    if tags.LM_LOSS in points:
        parts.append(heading("Loss"))
        drawn("loss", loss_figure(points, _levels(record, source)), _loss_caption(record, points))
    if tags.LEARNING_RATE in points or tags.GRAD_NORM in points:
        parts.append(heading("Learning rate and gradients"))
        drawn("training", training_figure(points), _training_caption(record, points))
    if kinds_of(points):
        parts.append(heading("How much is pruned"))
        lengths = {}
        if record.masks is not None:
            lengths = {kind: one.num_units for kind, one in record.masks.kinds.items()}
        drawn("sparsity", sparsity_figure(points, lengths), _sparsity_caption(points))
    if has_settling(points):
        parts.append(heading("How settled the masks are"))
        drawn("settling", settling_figure(points), _settling_caption(points))
    if domains_of(points):
        parts.append(heading("Domains"))
        drawn("domains", mixture_figure([points]), _mixture_caption(points))
        parts += _domains_table(record, source)
    if record.sessions and tags.LM_LOSS in record.events:
        parts.append(heading("Timeline"))
        drawn("timeline", timeline_figure(record), _timeline_caption(record))
        parts.append(_events_table(record))
    if tags.TOKENS_PER_SECOND in points:
        parts.append(heading("Speed"))
        drawn("speed", speed_figure(points), _speed_caption(points))
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
    if source is not None and BEFORE_PRUNING in _levels(record, source):
        columns["before pruning"] = source.domains
    rows = [
        [name, *(f"{of[name]:.3f}" if name in of else "-" for of in columns.values())]
        for name in loss.domains
    ]
    said = f"Held-out loss of every domain, nats per token, {loss.words}; the mean is {loss}."
    return [table(["domain", *columns], rows), paragraph(said, kind="muted")]


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
    if tags.EVAL_MEAN_ERROR in points:
        words += "; the band is one standard error"
    return words + "."


def _training_caption(record: RunRecord, points: Mapping[str, Mapping[int, float]]) -> str:
    rates = list(points.get(tags.LEARNING_RATE, {}).values())
    norms = sorted(points.get(tags.GRAD_NORM, {}).values())
    words = "Learning rate and norm of the gradients at every log line"
    if rates:
        words += f"; the rate of the weights goes to {max(rates):.1e} and ends at {rates[-1]:.1e}"
    if norms:
        words += f", the median norm is {norms[len(norms) // 2]:.2f}"
    skipped = record.points.get(tags.SKIPPED_STEPS, {})
    if skipped and max(skipped.values()) > 0:
        words += f"; {max(skipped.values()):.0f} steps were skipped, because they were not finite"
    return words + "."


def _sparsity_caption(points: Mapping[str, Mapping[int, float]]) -> str:
    gaps = []
    for kind in kinds_of(points):
        expected = list(points[tags.expected_sparsity(kind)].values())[-1]
        target = list(points[tags.target_sparsity(kind)].values())[-1]
        gaps.append((abs(expected - target), kind, expected, target))
    _, kind, expected, target = max(gaps)
    return (
        f"The share of each kind to be pruned, dashed, grows from 0 to its target, and the share "
        f"that the masks expect to close, blue, follows it; farthest at the end are "
        f"{KINDS[kind].units}, {expected:.3f} where {target:.3f} is asked for."
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
        f"{100 * last[most]:.1f} % of the {KINDS[most].units} are undecided, the most of all kinds."
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
    utilisation = sorted(points.get(tags.MODEL_FLOPS_UTILISATION, {}).values())
    if utilisation:
        middle = 100 * utilisation[len(utilisation) // 2]
        words += f"; the median share of the device's peak arithmetic is {middle:.1f} %"
    if any(tag in points for tag in MEMORY_NAMES):
        words += "; last, memory of the rank that has most"
    return words + "."


def _pruned_layers(layers: Sequence[int]) -> str:
    if not layers:
        return "All layers are kept."
    numbers = ", ".join(map(str, layers))
    return f"Layer {numbers} is pruned." if len(layers) == 1 else f"Layers {numbers} are pruned."


def _config_parts(values: Mapping[str, Any]) -> list[Markup]:
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
    """Return the first model that is known and the last."""
    before = next((r.source_shape for r in records if r.source_shape is not None), None)
    after = next((r.target_shape for r in reversed(records) if r.target_shape is not None), None)
    if after is None and records[-1].description is not None:
        after = records[-1].description.shape
    return before, after
