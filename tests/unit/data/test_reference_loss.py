import json
from pathlib import Path

import pytest

from megashear.data.reference_loss import (
    MEASURED,
    PUBLISHED_DOMAINS,
    REFERENCE_LOSSES,
    SOURCE_LOSSES,
    TARGET_SIZES,
    fit_scaling_law,
    read_reference,
)

FOUR_DECIMALS = 5e-5


@pytest.mark.parametrize("domain", PUBLISHED_DOMAINS)
def test_fit_reproduces_the_published_references(domain: str) -> None:
    column = PUBLISHED_DOMAINS.index(domain)
    a, b, c = fit_scaling_law(
        list(SOURCE_LOSSES), [losses[column] for losses in SOURCE_LOSSES.values()]
    )
    for target, size in TARGET_SIZES.items():
        assert a * size**-b + c == pytest.approx(
            REFERENCE_LOSSES[target][column], abs=FOUR_DECIMALS
        )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_fit_finds_the_law_that_made_the_losses(order: tuple[int, ...]) -> None:
    sizes = [int(7e9), int(1e8), int(1.3e9)]
    losses = [406.4 * size**-0.336 + 0.69 for size in sizes]
    law = fit_scaling_law([sizes[i] for i in order], [losses[i] for i in order])
    assert law == pytest.approx((406.4, 0.336, 0.69), rel=1e-8)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1, 2], [2.0, 1.0], "fitted to three models .*use the source model's own losses"),
        ([1, 2, 2], [2.0, 1.0, 1.0], "fitted to three models of different size"),
        ([10, 100, 1000], [1.0, 2.0, 3.0], "losses must fall ever more slowly"),
        ([10, 100, 1000], [3.0, 2.0, 0.5], "losses must fall ever more slowly"),
        ([10, 100, 1000], [3.0, 2.0, float("nan")], "no law"),
    ],
)
def test_losses_without_a_law_are_refused(sizes: list, losses: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(sizes, losses)


def test_references_come_in_the_order_of_the_domains(tmp_path: Path) -> None:
    values = {"wiki": 1.759, "cc": 2}
    for name, text in (("r.json", json.dumps(values)), ("r.yaml", "wiki: 1.759\ncc: 2\n")):
        (tmp_path / name).write_text(text)
        assert read_reference(tmp_path / name, ["cc", "wiki"]).tolist() == [2.0, 1.759]
    assert read_reference(values, ["cc", "wiki"]).tolist() == [2.0, 1.759]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wiki: 1.7\n", r"no loss for \['cc'\]"),
        ("wiki: 1.7\ncc: 2.0\nwikki: 2.0\n", "no domain 'wikki'; did you mean 'wiki'"),
        ("wiki: 1.7\ncc: .nan\n", "loss of 'cc' is nan; wanted a finite number"),
        ("wiki: 1.7\ncc: true\n", "loss of 'cc' is True; wanted a finite number"),
        ("wiki: 1.7\ncc: high\n", "loss of 'cc' is 'high'"),
        ("[1.7, 2.0]\n", "holds no mapping; wanted `domain: loss`"),
        ("wiki: [\n", "is neither YAML nor JSON"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "losses.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "losses.yaml", ["cc", "wiki"])


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference losses .*gone\.yaml do not exist"):
        read_reference(tmp_path / "gone.yaml", ["cc"])


def test_what_evaluate_measured_serves_as_reference(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    summary = {"parameters": 3, MEASURED: {"a": 2.0, "b": 3.0}, "mean": 2.5, "tokens": {"a": 1}}
    path.write_text(json.dumps(summary))
    assert read_reference(path, ["b", "a"]).tolist() == [3.0, 2.0]
