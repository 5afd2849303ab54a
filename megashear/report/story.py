"""Write the sections of a report and what stands above them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from megashear.files.structured import read_json_object
from megashear.masks.kinds import EXTENTS
from megashear.monitor import tags
from megashear.monitor.console import format_duration
from megashear.report.costs import STAGES, cost_section, device_hours, hours_as_text
from megashear.report.curves import (
    recovery_figure,
)
from megashear.report.losses import (
    BEFORE_PRUNING,
    MeanLoss,
    final_loss,
    known_errors,
    levels_of,
)
from megashear.report.page import (
    PageFigure,
    Section,
    bars,
    cards,
    definitions,
    large,
    moment,
    paragraph,
    state,
    table,
)
from megashear.report.record import RESULTS, RunRecord
from megashear.report.run_section import run_section
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
        found.append(run_section(record, f"run{number}" if len(records) > 1 else "run", source))
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
    """Return the title of a page."""
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
        what = STAGES.get(record.stage or "", "The run")
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
    levels = levels_of(records[-1], source)
    if loss.on_subsample and BEFORE_PRUNING in levels:
        name = f"{BEFORE_PRUNING} (over all held-out text; this loss over a subsample)"
        levels = {name: levels.pop(BEFORE_PRUNING), **levels}
    return [
        f"That is {loss.mean - level:.3f} above {words}, {level:.3f}."
        if loss.mean >= level
        else f"That is {level - loss.mean:.3f} below {words}, {level:.3f}."
        for words, level in levels.items()
    ]


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
        for words, level in levels_of(records[-1], source).items():
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
                "better. The smaller models, of units chosen by masks or by importance, stand "
                "against their source and against a model of their shape from scratch."
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
        levels_of(shown[-1], source),
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


def _before_and_after(
    records: Sequence[RunRecord],
) -> tuple[ModelShape | None, ModelShape | None]:
    """Return the first model that is known and the last."""
    before = next((r.source_shape for r in records if r.source_shape is not None), None)
    after = next((r.target_shape for r in reversed(records) if r.target_shape is not None), None)
    if after is None and records[-1].description is not None:
        after = records[-1].description.shape
    return before, after
