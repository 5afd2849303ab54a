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
    """The domains, their starting weights, and how losses move the weights."""

    data_path: str
    """Directory that `megashear preprocess` wrote."""
    domain_weights: Annotated[Annotated[NamedNumbers, Between(0, 1e6)], COMMON] = ()
    """Starting weight of each domain, as name=weight or in the order of the data directory. In
    proportion to tokens unless given."""
    data_exhausted: WhenExhausted = "repeat"
    """What to do when a domain's text was read once: repeat the text in another order, redistribute
    the domain's share over the others in proportion, or stop the run, which then evaluates and
    saves."""
    num_workers: Annotated[int, Between(0, 256)] = 2
    """Processes per rank that read training sequences ahead; 0 reads in the rank itself. Every
    number reads the same sequences."""
    reweight: Annotated[Reweight, COMMON] = "signed"
    """How evaluations move the weights: by the loss above the reference, signed or clipped at 0 as
    in the paper; bandit, which forgets earlier evaluations; constant, not at all; or schedule, by
    the phases of --domain-phases."""
    domain_phases: str | None = None
    """YAML file for --reweight schedule: a list of phases, each with weights and one of start_step,
    start_sample and start_token."""
    domain_floor: Annotated[NamedNumbers, Between(0, 1)] = ()
    """Least share of a domain: one number for all domains, and name=share for one that differs."""
    domain_cap: Annotated[NamedNumbers, Between(0, 1)] = ()
    """Largest share of a domain: one number for all domains, and name=share for one that
    differs."""
    dominant_share: Share = 0.6
    """Share of the mixture above which a domain causes a warning."""
    reference_loss: Annotated[str | None, COMMON] = None
    """File of the loss that each domain should reach, nats per token: YAML of `domain: loss`, or
    the output of `megashear reference-loss` or `megashear evaluate`. Needed unless --reweight is
    constant or schedule."""
    reweight_eta: Annotated[float, Between(0, 1e3)] = 1.0
    """Step size of the exponential update of the weights."""
    reweight_smoothing: Part = 1e-4
    """Share of the uniform distribution that each update mixes in."""

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
                f"mixture starts; leave --domain-weights out, because the first phase begins at 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatDataConfig(DataConfig):
    """The domains of conversations, their starting weights, and how losses move the weights."""

    reweight: Annotated[Reweight, COMMON] = "constant"
    """How evaluations move the weights: constant, not at all; or as in `megashear pretrain`, which
    has the other values."""
    pack: Annotated[bool, COMMON] = False
    """Lay as many conversations into a sequence as it has room for, none of which sees another, in
    place of one. Costs a mask of (sequence length)^2 bytes for each sequence in flight."""
