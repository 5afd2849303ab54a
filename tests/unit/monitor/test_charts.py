"""Charts group tags that exist, each question once."""

from __future__ import annotations

import re

import pytest

from megashear.monitor import tags
from megashear.monitor.charts import charts, mask_charts

KINDS, DOMAINS = ("hidden", "head"), ("cc", "c++ (old)")
MASKS = mask_charts(KINDS)


def test_every_chart_has_tags_and_no_tag_is_in_a_chart_twice() -> None:
    for category, of_category in charts(more=MASKS, domains=DOMAINS, has_references=True).items():
        for chart, names in of_category.items():
            assert names, (category, chart)
            assert len(set(names)) == len(names), (category, chart)


def test_what_every_evaluation_and_log_line_writes_has_a_chart() -> None:
    layout = charts(more=MASKS, domains=DOMAINS, has_references=True)
    shown = {
        tag for of_category in layout.values() for names in of_category.values() for tag in names
    }
    constants = {v for k, v in vars(tags).items() if k.isupper() and isinstance(v, str)}
    left_out = {
        tags.TOKENS_PER_SECOND,  # that of a device is there
        tags.SECONDS_PER_STEP,  # by part
        tags.MASK_LEARNING_RATE,  # the same curve as the weights'
        tags.EVAL_MEAN_ERROR,
        tags.FULL_MEAN_LOSS,  # one point
        tags.DISCRETISATION_GAP,  # as the distance of two curves
    }
    assert constants - shown == left_out


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ({"domains": DOMAINS}, {"2", "3"}),
        ({"domains": DOMAINS, "more": MASKS}, set()),
    ],
)
def test_a_run_has_the_charts_of_what_it_does(more: dict, missing: set[str]) -> None:
    categories = [category[0] for category in charts(**more)]
    assert categories == [number for number in "12345" if number not in missing]


def test_excess_is_shown_where_there_are_references() -> None:
    for has_references in (True, False):
        reading = charts(domains=DOMAINS, has_references=has_references)["4 what does it read"]
        chart = reading.get("cc: weight against excess loss", [])
        assert chart == (["mix/weight/cc", "eval/excess/cc"] if has_references else [])


def test_tags_with_odd_characters_are_matched_alone() -> None:
    tag = tags.mixture_weight(DOMAINS[1])
    assert re.match(f"{re.escape(tag)}$", tag)
    assert not re.match(f"{re.escape(tag)}$", tag + "x")
