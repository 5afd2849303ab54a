import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from megashear.data.reference_loss import (
    MEASURED,
    REFERENCE,
    Model,
    find_references,
    fit_scaling_law,
    read_models,
    read_reference,
)
from tests.published_losses import (
    PUBLISHED_DOMAINS,
    REFERENCE_LOSSES,
    SOURCE_LOSSES,
    TARGET_SIZES,
)

FOUR_DECIMALS = 5e-5
ROUNDING = 1e-9
"""Nats; float64 of numbers near 1, through exponents of ln N near 20."""


@pytest.mark.parametrize("domain", PUBLISHED_DOMAINS)
def test_fit_reproduces_the_published_references(domain: str) -> None:
    column = PUBLISHED_DOMAINS.index(domain)
    law = fit_scaling_law(
        list(SOURCE_LOSSES), [losses[column] for losses in SOURCE_LOSSES.values()]
    )
    assert law.residual < ROUNDING
    for target, size in TARGET_SIZES.items():
        assert law(size) == pytest.approx(REFERENCE_LOSSES[target][column], abs=FOUR_DECIMALS)
        assert law.a * size**-law.b + law.c == pytest.approx(law(size), abs=ROUNDING)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_fit_finds_the_law_that_made_the_losses(order: tuple[int, ...]) -> None:
    sizes = [int(7e9), int(1e8), int(1.3e9)]
    losses = [406.4 * size**-0.336 + 0.69 for size in sizes]
    law = fit_scaling_law([sizes[i] for i in order], [losses[i] for i in order])
    assert (law.a, law.b, law.c) == pytest.approx((406.4, 0.336, 0.69), rel=1e-8)
    assert law.remarks == ()


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1], [2.0], "fitted to two or more models .*with one size take its own losses"),
        ([1, 2, 2], [2.0, 1.0, 1.0], "fitted to two or more models of different size"),
        ([10, 100, 1000], [1.0, 2.0, 3.0], "they do not fall with size. Check them, leave"),
        ([10, 100, 1000], [3.0, 2.9999, 0.5], r"their falls have the ratio 2.5e\+04, wanted 1 to"),
        ([10, 100, 1000], [3.0, 2.0, float("nan")], "no law"),
        ([10, 100], [3.0, -1.0], "a power law with c = 0 has no losses of 0 or below"),
        ([10, 100, 1000, 10000], [1.0, 2.0, 2.5, 2.7], "they do not fall with size"),
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
        ("wiki: 1.7\ncc: .nan\n", "loss of 'cc' is nan; wanted nats per token, above 0"),
        (
            "wiki: -1\ncc: 1.5\n",
            "loss of 'wiki' is -1; wanted nats per token, above 0 and at most 100",
        ),
        ("wiki: 1.7\ncc: 1.0e+300\n", "loss of 'cc' is 1e.300; wanted nats per token, above 0"),
        ("wiki: 1.7\nwiki: 1.8\n", "twice"),
        ("wiki: 1.7\ncc: true\n", "loss of 'cc' is True; wanted nats per token, above 0"),
        ("wiki: 1.7\ncc: high\n", "loss of 'cc' is 'high'"),
        ("[1.7, 2.0]\n", "holds no mapping; wanted `domain: loss`"),
        ("wiki: [\n", "is not YAML"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "losses.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "losses.yaml", ["cc", "wiki"])


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"losses .*gone\.yaml does not exist"):
        read_reference(tmp_path / "gone.yaml", ["cc"])


def test_what_evaluate_measured_serves_as_reference(tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    summary = {"parameters": 3, MEASURED: {"a": 2.0, "b": 3.0}, "mean": 2.5, "tokens": {"a": 1}}
    path.write_text(json.dumps(summary))
    assert read_reference(path, ["b", "a"]).tolist() == [3.0, 2.0]


def by_newton(sizes: list[float], losses: list[float]) -> tuple[float, float, float]:
    """The three equations a N^-b + c = L, solved as they stand, in all unknowns at once."""
    log_size, loss = np.log(np.array(sizes) / sizes[0]), np.array(losses)
    a, b, c = loss[0] / 2, 0.2, loss[0] / 2  # a is that of sizes relative to the first
    for _ in range(200):
        power = np.exp(-b * log_size)
        jacobian = np.stack([power, -a * log_size * power, np.ones(3)], axis=1)
        step = np.linalg.solve(jacobian, loss - (a * power + c))
        while b + step[1] < b / 2:  # stay above 0
            step /= 2
        a, b, c = np.array([a, b, c]) + step
    return a * sizes[0] ** b, b, c


@pytest.mark.parametrize("domain", PUBLISHED_DOMAINS)
def test_fit_equals_an_independent_solution(domain: str) -> None:
    column = PUBLISHED_DOMAINS.index(domain)
    sizes = [float(size) for size in SOURCE_LOSSES]
    losses = [losses[column] for losses in SOURCE_LOSSES.values()]
    law = fit_scaling_law(list(SOURCE_LOSSES), losses)
    assert (law.a, law.b, law.c) == pytest.approx(by_newton(sizes, losses), rel=1e-6)
    other = fit_scaling_law(list(SOURCE_LOSSES), [losses[0] + 0.001, *losses[1:]])
    assert abs(other.b - law.b) > 1e-3  # the comparison would notice


def test_more_models_are_fitted_by_least_squares() -> None:
    sizes = [int(10**e) for e in (8, 8.5, 9, 9.5, 10)]
    exact = [50 * size**-0.2 + 1.5 for size in sizes]
    law = fit_scaling_law(sizes, exact)
    assert (law.a, law.b, law.c) == pytest.approx((50, 0.2, 1.5), rel=1e-4)
    noisy = [loss + 0.01 * (-1) ** i for i, loss in enumerate(exact)]
    law = fit_scaling_law(sizes, noisy)
    residuals = np.array([law(size) for size in sizes]) - noisy
    assert law.residual == pytest.approx(np.abs(residuals).max(), abs=ROUNDING)
    # at the least squares, residuals are orthogonal to every direction the law can move in
    size = np.array(sizes, dtype=float)
    power = size**-law.b
    for direction in (power, law.a * np.log(size) * power, np.ones(5)):
        assert abs(residuals @ direction) < 1e-6 * np.linalg.norm(direction)


def test_two_models_give_a_power_law() -> None:
    law = fit_scaling_law([int(1e9), int(1e10)], [2.0, 1.6])
    assert law(1e8) == pytest.approx(2.5, rel=1e-12)
    assert law.c == pytest.approx(0, abs=ROUNDING)
    assert law.remarks == ()


@pytest.mark.parametrize("target", TARGET_SIZES)
def test_the_power_law_through_two_is_nearer_than_own_losses(target: str) -> None:
    (small, first), (middle, second), _ = SOURCE_LOSSES.items()
    wanted = np.array(REFERENCE_LOSSES[target])
    laws = [fit_scaling_law([small, middle], list(pair)) for pair in zip(first, second)]
    found = np.array([law(TARGET_SIZES[target]) for law in laws])
    own = np.abs(np.array(first) - wanted)
    assert (np.abs(found - wanted) < own / 2).all()
    if target == "1.3B":  # what the docstring says
        assert np.abs(found - wanted).max() == pytest.approx(0.042, abs=5e-4)
        assert own.max() == pytest.approx(0.275, abs=5e-4)


@pytest.mark.parametrize(
    ("losses", "remark"),
    [
        ([2.0, 1.8, 1.605], r"the asymptote c = -\d.* is negative"),
        ([3.0, 2.0, 0.5], r"b = -0\.\d+ is not above 0, so losses fall ever faster"),
        ([3.0, 2.0, 1.99989884], r"not converged: b = 3.99\d is at the edge of \(-4.0, 4.0\)"),
        ([3.0, 2.0, 1.0], r"is not above 0"),
    ],
)
def test_a_degenerate_fit_says_so(
    losses: list[float], remark: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = [
        Model(name=str(size), parameters=size, losses={"wiki": loss})
        for size, loss in zip((10, 100, 1000), losses)
    ]
    found = find_references(models, method="auto", params=5)
    assert "the law of wiki is degenerate: " in caplog.text
    assert any(re.search(remark, line) for line in found["fit"]["wiki"]["remarks"])
    assert math.isfinite(found[REFERENCE]["wiki"])


def models(*sizes: int) -> list[Model]:
    return [
        Model(name=f"{size}.json", parameters=size, losses={"a": 9 / size, "b": 2 + 1 / size})
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("given", "asked", "method"),
    [
        (models(5), "auto", "own-loss"),
        (models(5, 3), "auto", "power-law"),
        (models(5, 3, 8), "auto", "scaling-law"),
        (models(5, 3, 8), "own-loss", "own-loss"),
    ],
)
def test_the_method_is_said_and_recorded(
    given: list[Model], asked: str, method: str, tmp_path: Path
) -> None:
    found = find_references(given, method=asked, params=2)
    assert found["method"] == method
    assert [model["parameters"] for model in found["models"]] == sorted(
        model.parameters for model in given
    )
    file = tmp_path / "reference.yaml"
    file.write_text(yaml.safe_dump(found))
    read = read_reference(file, ["b", "a"]).tolist()
    assert read == [found[REFERENCE]["b"], found[REFERENCE]["a"]]
    if method == "own-loss":
        assert read == list(given[-2 if asked == "own-loss" else 0].losses.values())[::-1]
    elif method == "power-law":
        law = found["fit"]["a"]
        assert (law["a"], law["b"], law["c"]) == pytest.approx((9, 1, 0), abs=ROUNDING)
        assert (law["largest residual"] < ROUNDING, law["remarks"]) == (True, [])
    else:
        assert read == pytest.approx([2.5, 4.5])


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        (models(5, 5), {}, r"5.json and 5.json both have 5 parameters; give each size once"),
        (models(5, 3), {"params": None}, "--method power-law wants the size .* --target or --par"),
        (
            models(5, 3),
            {"method": "scaling-law"},
            "--method scaling-law is .* three .* 2 are given",
        ),
        (models(5, 3, 8), {"method": "power-law"}, "--method power-law is .* two .* 3 are given"),
        (
            [*models(5), Model(name="x", parameters=9, losses={"a": 1.0})],
            {},
            r"x has losses for \['a'\] and 5.json for \['a', 'b'\]; evaluate all models on the",
        ),
        (
            [Model(name="x", parameters=n, losses={"a": float(n)}) for n in (1, 2, 3)],
            {},
            "a: no law .* they do not fall with size.*--method own-loss",
        ),
    ],
)
def test_models_that_give_no_references_are_refused(
    given: list[Model], arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_references(given, **{"method": "auto", "params": 2, **arguments})


def test_models_are_read_from_what_evaluate_wrote_and_from_tables(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps({"parameters": 7, MEASURED: {"a": 2.0}, "mean": 2}))
    (tmp_path / "t.yaml").write_text("11: {a: 1.5}\n13.0: {a: 1.25}\n")
    found = read_models([tmp_path / "e.json", tmp_path / "t.yaml"])
    assert [(model.parameters, dict(model.losses)) for model in found] == [
        (7, {"a": 2.0}),
        (11, {"a": 1.5}),
        (13, {"a": 1.25}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wiki: 1.7\n", "has 'wiki' where a number of parameters was wanted"),
        ("7: 1.7\n", r"7 parameters: 1.7; wanted `\{domain: loss\}`"),
        (
            "7: {wiki: low}\n",
            "7 parameters: the loss of 'wiki' is 'low'; wanted nats per token, above 0",
        ),
        ("true: {wiki: 1.0}\n", "has True where a number of parameters"),
    ],
)
def test_files_that_are_no_models_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_models([tmp_path / "m.yaml"])


def test_models_evaluated_at_different_lengths_are_refused(tmp_path: Path) -> None:
    files = []
    for size, length in ((1000, 128), (2000, 4096)):
        files.append(tmp_path / f"{size}.json")
        values = {"parameters": size, "held-out loss": {"wiki": 3.0}, "sequence length": length}
        files[-1].write_text(json.dumps(values))
    models = read_models(files)
    with pytest.raises(ValueError, match=r"different length, tokens: .*128.*4096.* same --seq-len"):
        find_references(models, method="auto", params=500)
    own = find_references(models[:1], method="own-loss", params=None)
    assert own["sequence length"] == 128
