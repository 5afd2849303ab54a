"""What each domain's loss should be: fitted over model sizes, or read from a file."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from megashear.data.shares import unknown_domain
from megashear.files.structured import read_yaml

logger = logging.getLogger(__name__)

EXPONENT_RANGE = (-4.0, 4.0)
"""Exponents b that a fit may find. Published ones for language models lie near 0.05 to 0.5; an
exponent of 0 or less gives a warning."""
HALVINGS = 70
"""Halvings of the bracket around b; it is then narrower than float64 resolves."""
GRID = 401
"""Number of exponents that a fit through more than three models tries first."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Ratio of the golden section."""

SEQUENCE_LENGTH = "sequence length"
"""Key under which ``megashear evaluate --output`` writes the tokens per sequence."""
MEASURED = "held-out loss"
"""Key under which ``megashear evaluate`` writes the losses it measured, by domain."""
PARAMETERS = "parameters"
"""Key under which ``megashear evaluate`` writes the size of the model."""
REFERENCE = "reference loss"
"""Key under which ``megashear reference-loss`` writes what each domain's loss should be."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "scaling-law": "L(N) = a N^-b + c through the losses of three or more models",
        "power-law": "L(N) = a N^-b, with c = 0, through the losses of two models",
        "own-loss": "the loss of the smallest model as it is",
    }
)
"""Meaning of each name that ``--method`` takes."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Losses of one model."""

    name: str
    """File or directory that the losses come from."""
    parameters: int
    """Parameters of the whole model, embeddings included."""
    losses: Mapping[str, float]
    """Loss by domain, nats per token."""
    sequence_length: int | None = None
    """Tokens per sequence of the evaluation; None where unknown."""


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The law L(N) = a N^-b + c, kept as L(N) = loss - slope * (1 - (N / size)^-b) / b, which also
    holds where b is near 0 and a and c are not finite."""

    size: float
    """Number of parameters at which ``loss`` and ``slope`` are taken."""
    loss: float
    """L(size), nats per token."""
    slope: float
    """-dL / d ln N at ``size``."""
    b: float
    """Exponent b."""
    residual: float
    """Largest distance between the law and a loss it was fitted to, nats per token."""
    remarks: tuple[str, ...]
    """Reasons to distrust the law; empty where there are none."""

    def __call__(self, size: float) -> float:
        """Return the loss of a model of ``size`` parameters, nats per token."""
        return self.loss - self.slope * float(_fall(np.log(size / self.size), self.b))

    @property
    def a(self) -> float:
        """Factor of N^-b."""
        return self.slope / self.b * self.size**self.b if self.b else math.inf

    @property
    def c(self) -> float:
        """Loss of an infinitely large model."""
        return self.loss - self.slope / self.b if self.b else -math.inf


def fit_scaling_law(sizes: Sequence[int], losses: Sequence[float]) -> ScalingLaw:
    """Fit L(N) = a N^-b + c through the losses of one domain at two or more model sizes.

    The law goes exactly through three losses; more are fitted by least squares. Two losses do not
    settle three unknowns, so c = 0 is taken: through LLaMA-2's two smaller models that comes within
    0.042 of the published references for 1.3 B parameters in every domain. The smaller model's own
    losses are up to 0.275 off, and a law with b = 0.336 and c fitted up to 0.092.

    Args:
        sizes: parameters of two or more models.
        losses: their losses, nats per token.

    Raises:
        ValueError: fewer than two different sizes, a size twice, or losses that do not fall with
            size, so that no law fits.

    Source: the form is Hoffmann et al. 2022 (arXiv:2203.15556), without its term in the data.
    """
    if len(set(sizes)) != len(losses) or len(sizes) != len(losses) or len(sizes) < 2:
        raise ValueError(
            f"a scaling law is fitted to two or more models of different size, got sizes "
            f"{list(sizes)} and {len(losses)} losses; with one size take its own losses"
        )
    order = np.argsort(sizes)
    size = np.array(sizes, dtype=np.float64)[order]
    loss = np.array(losses, dtype=np.float64)[order]
    log_size = np.log(size / size[0])
    try:
        if not np.isfinite(loss).all() or (len(loss) <= 3 and not (loss[0] > loss[1:]).all()):
            raise ValueError("they do not fall with size")
        if len(size) == 2:
            start, slope, b = _through_two(log_size, loss)
        elif len(size) == 3:
            start, slope, b = _through_three(log_size, loss)
        else:
            start, slope, b = _through_many(log_size, loss)
    except ValueError as error:
        raise ValueError(
            f"no law a N^-b + c with b in {EXPONENT_RANGE} meets losses {loss.tolist()} at "
            f"{size.astype(int).tolist()} parameters: {error}. Check them, leave a model out, or "
            f"use --method own-loss"
        ) from None
    residual = float(np.abs(start - slope * _fall(log_size, b) - loss).max())
    law = ScalingLaw(
        size=float(size[0]), loss=start, slope=slope, b=b, residual=residual, remarks=()
    )
    return replace(law, remarks=tuple(_remarks(law, num_models=len(size))))


def _remarks(law: ScalingLaw, *, num_models: int) -> Iterator[str]:
    span = EXPONENT_RANGE[1] - EXPONENT_RANGE[0]
    if min(abs(law.b - edge) for edge in EXPONENT_RANGE) < 1e-3 * span:
        yield f"not converged: b = {law.b:.4g} is at the edge of {EXPONENT_RANGE}"
    if law.b <= 0:
        yield f"b = {law.b:.4g} is not above 0, so losses fall ever faster with size"
    elif num_models > 2 and law.c < 0:
        yield f"the asymptote c = {law.c:.4g} is negative, which no loss can be"


def _fall(log_size: npt.NDArray[np.float64], b: float) -> npt.NDArray[np.float64]:
    """Return (1 - e^(-b x)) / b at x = ``log_size``; x itself at b = 0."""
    fall: npt.NDArray[np.float64] = -np.expm1(-b * log_size) / b if b else log_size
    return fall


Line = tuple[float, float, float]
"""Loss at the smallest size, slope there, exponent."""


def _through_two(log_size: npt.NDArray[np.float64], loss: npt.NDArray[np.float64]) -> Line:
    if loss[1] <= 0:
        raise ValueError("a power law with c = 0 has no losses of 0 or below")
    b = float(np.log(loss[0] / loss[1]) / log_size[1])
    return float(loss[0]), float(loss[0]) * b, b


def _through_three(log_size: npt.NDArray[np.float64], loss: npt.NDArray[np.float64]) -> Line:
    def ratio(b: float) -> float:
        """Return the fall of the loss to the largest size divided by that to the middle size.

        The ratio depends on neither a nor c, and falls as b grows, so one b gives the wanted one.
        """
        middle, largest = _fall(log_size[1:], b)
        return float(largest / middle)

    wanted = float((loss[0] - loss[2]) / (loss[0] - loss[1]))
    low, high = EXPONENT_RANGE
    if not ratio(high) < wanted < ratio(low):
        raise ValueError(
            f"their falls have the ratio {wanted:.4g}, wanted {ratio(high):.4g} to {ratio(low):.4g}"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) > wanted else (low, middle)
    b = (low + high) / 2
    return float(loss[0]), float((loss[0] - loss[2]) / _fall(log_size[2:], b)[0]), b


def _through_many(log_size: npt.NDArray[np.float64], loss: npt.NDArray[np.float64]) -> Line:
    """Fit by least squares: given b, the law is a line in its fall, so only b is searched."""

    def line(b: float) -> tuple[float, Line]:
        fall = _fall(log_size, b)
        centred = fall - fall.mean()
        slope = -float(centred @ loss / (centred @ centred))
        start = float(loss.mean() + slope * fall.mean())
        return float(np.square(start - slope * fall - loss).sum()), (start, slope, b)

    grid = np.linspace(*EXPONENT_RANGE, GRID)
    best = int(np.argmin([line(float(b))[0] for b in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, GRID - 1)])
    for _ in range(HALVINGS):
        one, other = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, other) if line(one)[0] < line(other)[0] else (one, high)
    _, found = line((low + high) / 2)
    if found[1] <= 0:
        raise ValueError("they do not fall with size")
    return found


def find_references(models: Sequence[Model], *, method: str, params: int | None) -> dict[str, Any]:
    """Return what ``megashear reference-loss`` writes: references, and how they were found.

    Args:
        models: one or more.
        method: a name in ``METHODS``, or ``auto`` for the first that has enough models.
        params: parameters of the target; the two laws need them.

    Raises:
        ValueError: models of different domains or the same size, too few of them, no target, or
            losses that no law fits.
    """
    # Choose the method.
    models = sorted(models, key=lambda model: model.parameters)
    domains = list(models[0].losses)
    _check_models(models, domains)
    if method == "auto":
        method = {1: "own-loss", 2: "power-law"}.get(len(models), "scaling-law")
    least = {"own-loss": 1, "power-law": 2, "scaling-law": 3}[method]
    if len(models) < least or (method == "power-law" and len(models) > 2):
        raise ValueError(
            f"--method {method} is {METHODS[method]}, and {len(models)} are given; "
            f"--method auto takes what fits their number"
        )
    # Find the references.
    found: dict[str, Any] = {"method": method, "meaning": METHODS[method]}
    if method == "own-loss":
        found[REFERENCE] = dict(models[0].losses)
    else:
        if params is None:
            raise ValueError(
                f"--method {method} wants the size of what the model shall become; give --target "
                f"or --params, or take the smallest model's own losses with --method own-loss"
            )
        sizes = [model.parameters for model in models]
        laws = {}
        for name in domains:
            try:
                laws[name] = fit_scaling_law(sizes, [model.losses[name] for model in models])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            for remark in laws[name].remarks:
                logger.warning("the law of %s is degenerate: %s", name, remark)
        found[PARAMETERS] = params
        found[REFERENCE] = {name: law(params) for name, law in laws.items()}
        found["fit"] = {
            name: {
                "a": law.a,
                "b": law.b,
                "c": law.c if len(models) > 2 else 0.0,
                "largest residual": law.residual,
                "remarks": list(law.remarks),
            }
            for name, law in laws.items()
        }
    # Note the origin.
    if (length := models[0].sequence_length) is not None:
        found[SEQUENCE_LENGTH] = length
    found["models"] = [
        {"name": m.name, PARAMETERS: m.parameters, MEASURED: dict(m.losses)} for m in models
    ]
    return found


def _check_models(models: Sequence[Model], domains: Sequence[str]) -> None:
    lengths = {m.name: m.sequence_length for m in models if m.sequence_length is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the models were evaluated on sequences of different length, tokens: {lengths}; no "
            f"law goes through such losses: evaluate all with the same --seq-length"
        )
    for one, other in itertools.pairwise(models):
        if one.parameters == other.parameters:
            raise ValueError(
                f"{one.name} and {other.name} both have {one.parameters} parameters; give each "
                f"size once"
            )
    for model in models[1:]:
        if set(model.losses) != set(domains):
            raise ValueError(
                f"{model.name} has losses for {list(model.losses)} and {models[0].name} for "
                f"{domains}; evaluate all models on the same data"
            )


def read_models(files: Sequence[str | Path]) -> list[Model]:
    """Read models from files that ``megashear evaluate --output`` wrote, or from YAML tables of
    ``parameters: {domain: loss}``.

    Raises:
        ValueError: a file is missing or holds something else.
    """
    models = []
    for file in files:
        values = _read_yaml(Path(file))
        if isinstance(values.get(MEASURED), dict):
            rows = {values.get(PARAMETERS): values[MEASURED]}
        else:
            rows = values
        for size, losses in rows.items():
            if (
                isinstance(size, bool)
                or not isinstance(size, int | float)
                or not (1 <= size < math.inf)
            ):
                raise ValueError(
                    f"{file} has {size!r} where a number of parameters was wanted; wanted what "
                    f"`megashear evaluate --output` wrote, or lines `parameters: {{domain: loss}}`"
                )
            if not isinstance(losses, dict) or not losses:
                raise ValueError(
                    f"{file}, {size:.0f} parameters: {losses!r}; wanted `{{domain: loss}}`"
                )
            for name, value in losses.items():
                _check_loss(value, name, f"{file}, {size:.0f} parameters")
            models.append(
                Model(
                    name=str(file),
                    parameters=int(size),
                    losses=losses,
                    sequence_length=values.get(SEQUENCE_LENGTH),
                )
            )
    return models


def read_reference(
    source: str | Path | Mapping[str, float], domains: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return reference losses in the order of ``domains``.

    Args:
        source: loss by domain, nats per token; or a YAML or JSON file that holds these, or that
            ``megashear reference-loss`` or ``megashear evaluate --output`` wrote.
        domains: names of the domains of the data.

    Raises:
        ValueError: the file is missing or holds something else, a domain has no loss or a name is
            no domain, or a loss is not a finite number.
    """
    if isinstance(source, Mapping):
        where, values = "the reference losses", source
    else:
        where, values = str(source), _read_mapping(Path(source))
    for name in values:
        if name not in domains:
            raise ValueError(f"{where}: {unknown_domain(name, domains)}")
    missing = [name for name in domains if name not in values]
    if missing:
        raise ValueError(
            f"{where}: no loss for {missing}; give one for every domain, such as the source "
            f"model's own loss there"
        )
    for name in domains:
        _check_loss(values[name], name, where)
    return np.array([values[name] for name in domains], dtype=np.float64)


def _check_loss(value: object, name: str, where: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MOST_LOSS:  # type: ignore[operator]  # NaN is not
        raise ValueError(
            f"{where}: the loss of {name!r} is {value!r}; wanted nats per token, above 0 and at "
            f"most {MOST_LOSS:g}"
        )


MOST_LOSS = 100.0
"""Largest loss accepted, nats per token; a guess among all 32-bit ids costs 22."""


def _read_mapping(path: Path) -> Mapping[str, float]:
    values = _read_yaml(path)
    for key in (REFERENCE, MEASURED):
        if isinstance(values.get(key), dict):
            found: Mapping[str, float] = values[key]
            return found
    return values


def _read_yaml(path: Path) -> dict[Any, Any]:
    values = read_yaml(path, f"losses {path}")  # JSON is YAML
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping; wanted `domain: loss`, a line for each domain")
    return values
