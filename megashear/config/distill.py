"""Learning from a larger model while a small one is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megashear.bounds import COMMON, Between, check_bounds

_Weight = Annotated[float, Between(0, 1e6)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """A teacher, and what its divergence weighs in the loss."""

    distill_from: Annotated[str | None, COMMON] = None
    """Teacher: a checkpoint without masks, or a Hugging Face directory. The loss is then the
    Kullback-Leibler divergence of the model's next token from the teacher's, over the whole
    vocabulary. It has the layout and precision of the run. While masks are learned, give the model
    that --load or --load-hf names."""
    distill_weight: _Weight = 1.0
    """Weight of the divergence in the loss at the first step."""
    distill_final_weight: _Weight | None = None
    """Weight of the divergence at the last step, reached linearly; --distill-weight unless
    given."""
    distill_temperature: Annotated[float, Between(1e-2, 1e2)] = 1.0
    """Temperature of both softmaxes. The divergence is multiplied by its square, so that gradients
    keep their size."""
    lm_loss_weight: _Weight | None = None
    """Weight of the cross entropy of the text beside the divergence; 0 unless given. It is measured
    in any case. Needs --distill-from, without which it is the only loss."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.distill_from is None:
            for name, is_given in {
                "--distill-weight": self.distill_weight != 1.0,
                "--distill-final-weight": self.distill_final_weight is not None,
                "--distill-temperature": self.distill_temperature != 1.0,
                "--lm-loss-weight": self.lm_loss_weight is not None,
            }.items():
                if is_given:
                    raise ValueError(
                        f"{name} needs --distill-from, which is not given; name a teacher, or "
                        f"leave {name} out"
                    )
        elif self.distill_weight == self.last_weight == 0:
            raise ValueError(
                f"--distill-weight is 0 throughout, so that --distill-from {self.distill_from} "
                f"would only cost time; leave both out"
            )
        elif not self.lm_loss_weight and 0 in (self.distill_weight, self.last_weight):
            raise ValueError(
                f"--distill-weight {self.distill_weight} to {self.last_weight} and "
                f"--lm-loss-weight 0 leave steps without a loss; give one of them more than 0"
            )

    @property
    def last_weight(self) -> float:
        """Return the weight of the divergence at the last step."""
        if self.distill_final_weight is None:
            return self.distill_weight
        return self.distill_final_weight
