"""What text a run reads, and how losses move the weights of domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megashear.bounds import COMMON, Between, Part, Share, check_bounds

NamedNumbers = tuple[float | str, ...]
"""Numbers, or words ``name=number``; in YAML also a mapping of names to numbers, or one number."""
WhenExhausted = Literal["repeat", "redistribute", "stop"]
"""Fate of a domain whose text was read once: the text is read again in another order, the domain's
share goes to the others, or nothing more is drawn."""
Reweight = Literal["signed", "clipped", "bandit", "constant", "schedule"]
"""How evaluations move the weights of domains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The domains, how they start out, and how losses move their weights."""

    data_path: str
    """Directory that `megashear preprocess` wrote."""
    domain_weights: Annotated[Annotated[NamedNumbers, Between(0, 1e6)], COMMON] = ()
    """Starting weight of each domain, as name=weight or in the order of the data directory; by
    tokens if empty."""
    data_exhausted: WhenExhausted = "repeat"
    """What happens when a domain's text was read once: repeat it in another order, redistribute
    its share over the other domains in proportion, or stop the run (it saves and evaluates)."""
    num_workers: Annotated[int, Between(0, 256)] = 2
    """Processes per rank that read training sequences ahead; 0 reads in the rank itself. What is
    read does not depend on it."""
    reweight: Annotated[Reweight, COMMON] = "signed"
    """How evaluations move the weights: by excess loss (signed, or clipped at 0 as in the paper),
    bandit, or not at all (constant, or schedule: by the phases of --domain-phases)."""
    domain_phases: str | None = None
    """With --reweight schedule: YAML list of phases, each with start_step, start_sample or
    start_token, and weights."""
    domain_floor: Annotated[NamedNumbers, Between(0, 1)] = ()
    """Least share of a domain, one number for all and name=share where one differs."""
    domain_cap: Annotated[NamedNumbers, Between(0, 1)] = ()
    """Largest share of a domain, one number for all and name=share where one differs."""
    dominant_share: Share = 0.6
    """Share of the mixture from which one domain is warned of."""
    reference_loss: Annotated[str | None, COMMON] = None
    """YAML of `domain: loss`, what each domain's loss should be, or what `megashear reference-loss`
    or `megashear evaluate --output` wrote; needed unless --reweight is constant or schedule."""
    reweight_eta: Annotated[float, Between(0, 1e3)] = 1.0
    """Step size of the exponential update of the weights."""
    reweight_smoothing: Part = 1e-4
    """Share of the uniform distribution mixed into each update."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.domain_phases is None) is (self.reweight == "schedule"):
            raise ValueError(
                "--reweight schedule follows the phases of --domain-phases, which is not given"
                if self.domain_phases is None
                else f"--domain-phases {self.domain_phases} is followed by --reweight schedule "
                f"only, not by {self.reweight}; give one with the other"
            )
        if self.domain_phases is not None and self.domain_weights:
            raise ValueError(
                f"--domain-weights and --domain-phases {self.domain_phases} both say how the "
                f"mixture starts; leave --domain-weights out, the first phase begins at 0"
            )
