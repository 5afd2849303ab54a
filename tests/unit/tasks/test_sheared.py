"""The table of the eleven tasks: published means, and a model's own scores beside them."""

import pytest

from megashear.tasks.sheared import PUBLISHED, TASKS, score_of, sheared_table
from megashear.tasks.table import scores_table

ROUNDING = 0.1
"""Points; the paper's means are of scores that were not rounded."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_means_are_those_of_their_rows(model: str) -> None:
    *scores, mean = PUBLISHED[model]
    assert len(scores) == len(TASKS)
    assert abs(sum(scores) / len(scores) - mean) < ROUNDING


def test_scores_stand_beside_published_ones() -> None:
    results = {
        "results": {
            name: {"alias": name, "acc,none": 0.1, f"{paper.metric},strip": 0.25 + n / 100}
            for n, (name, paper) in enumerate(TASKS.items())
            if paper.metric != "acc"
        }
        | {name: {"acc,none": 0.5} for name, paper in TASKS.items() if paper.metric == "acc"},
        "n-shot": {name: paper.num_shots for name, paper in TASKS.items()},
    }
    assert score_of(results, "sciq", "acc") == 0.5
    assert score_of(results, "sciq", "acc_norm") is None
    lines = sheared_table(results, "small").splitlines()
    own = next(line for line in lines if line.startswith("small"))
    assert own.split()[1:] == [
        *("50.0", "50.0", "50.0", "50.0", "29.0", "30.0", "31.0", "50.0", "50.0", "34.0", "50.0"),
        "43.1",
    ]
    assert sum("(published)" in line for line in lines) == len(PUBLISHED) + 1
    assert max(map(len, lines)) <= 118
    examples = ["0", "0", "0", "0", "25", "10", "0", "32", "0", "32", "5"]
    assert next(x for x in lines if x.startswith("examples")).split()[1:] == examples
    assert "*" not in "".join(lines)
    # one task that was not asked leaves no mean
    del results["results"]["sciq"]
    own = next(x for x in sheared_table(results, "small").splitlines() if x.startswith("small"))
    assert (own.split()[1], own.split()[-1]) == ("-", "-")


def test_other_numbers_of_examples_than_the_papers_are_marked() -> None:
    shots = {name: paper.num_shots for name, paper in TASKS.items()}
    del shots["mmlu"]
    results = {"results": {}, "n-shot": shots | {"arc_challenge": 0, "boolq": 3}}
    lines = sheared_table(results, "small").splitlines()
    examples = ["0", "0", "0", "0", "0*", "10", "0", "3*", "0", "32", "-"]
    assert next(x for x in lines if x.startswith("examples")).split()[1:] == examples
    assert lines[-1].startswith("* not the number of examples of the published scores")
    assert lines[-1].endswith("ARC-C 25, BoolQ 32")


def test_a_table_has_a_row_for_each_metric() -> None:
    results = {
        "results": {
            "made": {
                "alias": "made",
                "sample_len": 7,
                "acc,none": 0.25,
                "acc_stderr,none": 0.125,
                "exact_match,strict": 1234567.0,
                "exact_match_stderr,strict": "N/A",
            }
        },
        "n-shot": {"made": 2},
    }
    head, _, *rows = (line.split() for line in scores_table(results).splitlines())
    assert head == ["task", "metric", "filter", "examples", "score", "standard", "error"]
    assert rows == [
        ["made", "acc", "2", "0.2500", "0.1250"],
        ["made", "exact_match", "strict", "2", "1.235e+06"],
    ]
