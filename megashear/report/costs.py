"""Show what runs cost: tokens, time, devices, memory, disk."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.monitor import tags
from megashear.monitor.console import format_duration
from megashear.report.page import Section, paragraph, table
from megashear.report.record import RunRecord

STAGES = {
    "prune": "Pruning",
    "pretrain": "Continued pretraining",
    "finetune": "Instruction tuning",
    None: "Run",
}
"""What the stages of a run are called."""


def cost_section(records: Sequence[RunRecord]) -> Section:
    """Return the table of costs, a column for each run."""
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
    hours = device_hours([record])
    return "-" if hours is None else hours_as_text(hours[1])


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
"""Lines of the table of costs; "-" where it is not known."""


def _device(record: RunRecord) -> str | None:
    """Return the device that the run used, where it is known."""
    if record.description is None:
        return None
    known = record.description.known
    found: str | None = known.environment.get("device") or known.device
    return found


def device_hours(records: Sequence[RunRecord]) -> tuple[str, float] | None:
    """Return what an hour of a process is called, and how many there were; None where not known."""
    total = 0.0
    for record in records:
        if record.num_processes is None:
            return None
        total += record.seconds / 3600 * record.num_processes
    devices = {_device(record) for record in records}
    on_gpus = None not in devices and "CPU" not in devices
    return ("GPU-hours" if on_gpus else "Process-hours"), total


def hours_as_text(hours: float) -> str:
    """Return hours in three digits."""
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"
