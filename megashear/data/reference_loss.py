"""What each domain's loss should be: published, fitted over source sizes, or read from a file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

PUBLISHED_DOMAINS = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
"""The seven RedPajama domains, in the order of the tables below."""

REFERENCE_LOSSES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "1.3B": (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251),
        "2.7B": (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328),
        "370M": (2.1401, 0.8694, 2.3625, 1.7791, 2.0470, 1.6637, 2.3139),
    }
)
"""Reference loss of each domain by target, nats per token, for LLaMA-2-7B as the source.

Source: Xia et al. 2023 (arXiv:2310.06694), its public implementation.
"""

TARGET_SIZES: Mapping[str, int] = MappingProxyType(
    {"1.3B": 1_345_423_360, "2.7B": 2_701_560_320, "370M": 373_867_520}
)
"""Parameters of the targets of ``REFERENCE_LOSSES``."""

SOURCE_LOSSES: Mapping[int, tuple[float, ...]] = MappingProxyType(
    {
        6_738_415_616: (1.7520, 0.6216, 1.9063, 1.4482, 1.4844, 1.2637, 1.9219),
        13_015_864_320: (1.6680, 0.5791, 1.8242, 1.3936, 1.3945, 1.2109, 1.8486),
        68_976_648_192: (1.4621, 0.4890, 1.6450, 1.2805, 1.2118, 1.1148, 1.6848),
    }
)
"""Held-out loss of LLaMA-2 in each domain by number of parameters, nats per token.

Source: as ``REFERENCE_LOSSES``, which are fitted through these.
"""

EXPONENT_RANGE = (1e-3, 4.0)
"""Exponents b that a fit may find; published ones for language models lie near 0.05 to 0.5."""
HALVINGS = 60
"""Halvings of the bracket around b, which leave less than float64 resolves."""

MEASURED = "held-out loss"
"""Key under which ``megashear evaluate`` writes the losses it measured, by domain."""


def fit_scaling_law(sizes: Sequence[int], losses: Sequence[float]) -> tuple[float, float, float]:
    """Fit L(N) = a N^-b + c through the losses of one domain at three model sizes.

    Args:
        sizes: parameters of three models.
        losses: their losses, nats per token.

    Returns:
        (a, b, c), with which the three losses are met exactly.

    Raises:
        ValueError: not three different sizes, or losses that no such law meets.

    Source: the form is Hoffmann et al. 2022 (arXiv:2203.15556), without its term in the data.
    """
    if len(sizes) != 3 or len(losses) != 3 or len(set(sizes)) != 3:
        raise ValueError(
            f"a scaling law is fitted to three models of different size, got sizes {list(sizes)} "
            f"and {len(losses)} losses; with fewer sizes use the source model's own losses as "
            f"references"
        )
    order = np.argsort(sizes)
    size = np.array(sizes, dtype=np.float64)[order]
    loss = np.array(losses, dtype=np.float64)[order]
    log_size = np.log(size / size[0])  # relative to the smallest, or a N^-b underflows on the way

    def drops(b: float) -> npt.NDArray[np.float64]:
        """By how much N^-b falls from the smallest to the other two sizes."""
        fallen: npt.NDArray[np.float64] = -np.expm1(-b * log_size[1:])
        return fallen

    # The ratio of the two drops does not know a or c and falls as b grows, so b is its one root.
    fallen = loss[0] - loss[1:]
    low, high = EXPONENT_RANGE
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = fallen[1] / fallen[0]
    ratio_low, ratio_high = (float(np.divide(*drops(b)[::-1])) for b in (low, high))
    if not (fallen > 0).all() or not ratio_high < wanted < ratio_low:
        raise ValueError(
            f"no law a N^-b + c with b in {EXPONENT_RANGE} meets losses {loss.tolist()} at "
            f"{size.astype(int).tolist()} parameters; losses must fall ever more slowly with "
            f"size: check them, or use the source model's own losses as references"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if np.divide(*drops(middle)[::-1]) > wanted:
            low = middle
        else:
            high = middle
    b = (low + high) / 2
    scale = float(fallen[1] / drops(b)[1])  # a N0^-b
    return scale * float(size[0]) ** b, b, float(loss[0]) - scale


def read_reference(
    source: str | Path | Mapping[str, float], domains: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Reference losses in the order of ``domains``.

    Args:
        source: loss by domain, nats per token, or a YAML or JSON file that holds just that, or
            what ``megashear evaluate --output`` wrote.
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
            nearest = difflib.get_close_matches(str(name), domains, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"{where}: no domain {name!r}; {hint}the data have {list(domains)}")
    missing = [name for name in domains if name not in values]
    if missing:
        raise ValueError(
            f"{where}: no loss for {missing}; give one for every domain, such as the source "
            f"model's own loss there"
        )
    for name in domains:
        value = values[name]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(
                f"{where}: the loss of {name!r} is {value!r}; wanted a finite number of nats per "
                f"token"
            )
    return np.array([values[name] for name in domains], dtype=np.float64)


def _read_mapping(path: Path) -> Mapping[str, float]:
    import yaml

    if not path.is_file():
        raise ValueError(f"reference losses {path} do not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping; wanted `domain: loss`, a line for each domain")
    measured = values.get(MEASURED)
    return measured if isinstance(measured, dict) else values
