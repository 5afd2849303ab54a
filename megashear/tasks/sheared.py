"""The eleven tasks of Sheared LLaMA, and what was published about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megashear.tasks.scores import scores_of
from megashear.text_table import text_table

SHEARED = "sheared"
"""Name of the group of all eleven."""


class PaperTask(NamedTuple):
    """One of the paper's tasks."""

    title: str
    """Head of its column."""
    metric: str
    """Metric of the harness that the paper gives."""
    num_shots: int
    """Examples before each question."""


TASKS = {
    "sciq": PaperTask("SciQ", "acc", 0),
    "piqa": PaperTask("PIQA", "acc", 0),
    "winogrande": PaperTask("WinoGr", "acc", 0),
    "arc_easy": PaperTask("ARC-E", "acc", 0),
    "arc_challenge": PaperTask("ARC-C", "acc_norm", 25),
    "hellaswag": PaperTask("HellaS", "acc_norm", 10),
    "logiqa": PaperTask("LogiQA", "acc_norm", 0),
    "boolq": PaperTask("BoolQ", "acc", 32),
    "lambada_openai": PaperTask("LAMBADA", "acc", 0),
    "nq_open": PaperTask("NQ", "exact_match", 32),
    "mmlu": PaperTask("MMLU", "acc", 5),
}
"""The tasks by their names in the harness. Source: arXiv:2310.06694, table 2."""

PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "LLaMA2-7B": (93.7, 78.1, 69.3, 76.4, 53.0, 78.6, 30.7, 82.1, 73.9, 28.8, 46.6, 64.6),
    "OPT-1.3B": (84.3, 71.7, 59.6, 57.0, 29.7, 54.5, 26.9, 57.5, 58.0, 6.9, 24.7, 48.2),
    "Pythia-1.4B": (86.4, 70.9, 57.4, 60.7, 31.2, 53.0, 27.3, 57.4, 61.6, 6.2, 25.7, 48.9),
    "TinyLlama-1.1B": (88.9, 73.3, 58.8, 55.3, 30.1, 60.3, 26.3, 60.9, 58.8, 12.1, 25.5, 50.0),
    "Sheared-1.3B": (87.3, 73.4, 57.9, 61.5, 33.5, 60.7, 26.9, 64.0, 61.0, 9.6, 25.7, 51.0),
    "OPT-2.7B": (85.8, 73.7, 60.8, 60.8, 34.0, 61.5, 26.0, 63.4, 63.6, 10.1, 25.9, 51.4),
    "Pythia-2.8B": (88.3, 74.0, 59.7, 64.4, 36.4, 60.8, 28.0, 66.0, 64.7, 9.0, 26.9, 52.5),
    "INCITE-Base-3B": (90.7, 74.6, 63.5, 67.7, 40.2, 64.8, 27.7, 65.9, 65.3, 14.9, 27.0, 54.7),
    "OpenLLaMA-3B-v1": (91.3, 73.7, 61.5, 67.6, 39.6, 62.6, 28.4, 70.0, 65.4, 18.6, 27.0, 55.1),
    "OpenLLaMA-3B-v2": (91.8, 76.2, 63.5, 66.5, 39.0, 67.6, 28.1, 69.6, 66.5, 17.1, 26.9, 55.7),
    "Sheared-2.7B": (90.8, 75.8, 64.2, 67.0, 41.2, 70.8, 28.9, 73.7, 68.4, 16.5, 26.4, 56.7),
}
"""Percent by model, in the order of ``TASKS``, and then their mean. Source: arXiv:2310.06694, table
2; the paper prints LAMBADA and NQ of LLaMA2-7B the other way round, where they do not fit."""

_SHORT = {"acc": "acc", "acc_norm": "norm", "exact_match": "EM"}
NOTE = (
    "metrics: acc, acc_norm (norm) and exact_match (EM), percent\n"
    "(published): arXiv:2310.06694, table 2, by an older harness, whose scores differ by 1 to 2 "
    "points;\nto compare, evaluate those models with this command"
)


def score_of(results: Mapping[str, Any], task: str, metric: str) -> float | None:
    """Return a score that the harness found, whatever filter it was taken behind.

    Args:
        results: of `lm_eval.evaluate`.
        task: name of a task or group.
        metric: of the task; ``acc``, say.
    """
    of_task = (score for score in scores_of(results) if score.task == task)
    return next((score.value for score in of_task if score.metric == metric), None)


def sheared_table(results: Mapping[str, Any], name: str) -> str:
    """Return the scores of the eleven tasks beside the published ones, percent.

    Args:
        results: of `lm_eval.evaluate` on all of them.
        name: of the model.
    """
    scores = [score_of(results, task, paper.metric) for task, paper in TASKS.items()]
    known = [100 * score for score in scores if score is not None]
    mean = sum(known) / len(known) if len(known) == len(TASKS) else None
    shown = ["-" if score is None else f"{100 * score:.1f}" for score in scores]
    head = ["", *(paper.title for paper in TASKS.values()), "mean"]
    own = [name, *shown, "-" if mean is None else f"{mean:.1f}"]
    published = [
        [f"{model} (published)", *(f"{value:.1f}" for value in row)]
        for model, row in PUBLISHED.items()
    ]
    asked = {task: results["n-shot"].get(task) for task in TASKS}
    other = {
        task: shots
        for task, shots in asked.items()
        if shots is not None and shots != TASKS[task].num_shots
    }
    shown_shots = [
        "-" if shots is None else f"{shots}{'*' if task in other else ''}"
        for task, shots in asked.items()
    ]
    shots = ["examples", *shown_shots, ""]
    metrics = ["metric", *(_SHORT[paper.metric] for paper in TASKS.values()), ""]
    table = f"{text_table([head, metrics, shots, own, *published])}\n{NOTE}"
    if not other:
        return table
    paper = ", ".join(f"{TASKS[task].title} {TASKS[task].num_shots}" for task in other)
    return f"{table}\n* not the number of examples of the published scores, which is {paper}"
