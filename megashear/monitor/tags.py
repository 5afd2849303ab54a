"""The table of TensorBoard's tags: the name and the meaning of each."""

from __future__ import annotations

import re
from collections.abc import Callable

MEANINGS: dict[str, str] = {}
"""Meaning of every tag, in one sentence. A tag with ``<kind>`` or the like stands for one tag of
each kind. TensorBoard's text tab shows this table; docs/monitoring.md says more."""


def _tag(name: str, meaning: str) -> str:
    """Enter a tag in the table and return its name."""
    MEANINGS[name] = meaning
    return name


def _tags(pattern: str, meaning: str) -> Callable[[str], str]:
    """Enter a pattern in the table and return what makes a tag of it for a given word."""
    begin, end = re.split("<[a-z]+>", _tag(pattern, meaning))
    return lambda word: f"{begin}{word}{end}"


LM_LOSS = _tag(
    "train/lm-loss",
    "Loss on training text, nats per token, mean over the log window; falls, but rises while "
    "pruning closes more and more.",
)
loss_term = _tags(
    "train/term/<name>", "A further term of the loss on training text, mean over the log window."
)
GRAD_NORM = _tag("train/grad-norm", "Gradient norm of the weights, before clipping.")
LEARNING_RATE = _tag("train/learning-rate", "Learning rate of the weights.")
SKIPPED_STEPS = _tag(
    "train/skipped-steps", "Steps not taken, because loss or gradient was not finite; 0 is healthy."
)
PENALTY = _tag("prune/penalty", "What the constraint adds to the loss; small after the warm-up.")
expected_sparsity = _tags(
    "prune/expected-sparsity/<kind>",
    "Share of units that the masks expect to close; near the target.",
)
target_sparsity = _tags(
    "prune/target-sparsity/<kind>", "Share of units that the schedule wants closed at this step."
)
linear_multiplier = _tags("prune/lambda1/<kind>", "Linear multiplier of the constraint; settles.")
quadratic_multiplier = _tags(
    "prune/lambda2/<kind>", "Quadratic multiplier; rises, at most to --lambda2-max."
)
EXPECTED_PARAMETERS = _tag(
    "prune/expected-parameters", "Parameters of the whole model that the masks expect to keep."
)
ACTUAL_PARAMETERS = _tag(
    "prune/actual-parameters", "Parameters of the whole model that gates open in evaluation keep."
)
TARGET_PARAMETERS = _tag(
    "prune/target-parameters", "Parameters of the target; the other two meet it."
)
expected_size = _tags(
    "prune/expected-size/<kind>", "Sum of a row's chances to be open, units, mean over rows."
)
actual_size = _tags(
    "prune/actual-size/<kind>", "Gates of a row that evaluation leaves open, mean over rows."
)
target_size = _tags(
    "prune/target-size/<kind>", "Units of a row that the schedule wants open at this step."
)
undecided = _tags(
    "prune/undecided/<kind>",
    "Share of gates whose chance to be open is between .1 and .9; falls once the target stands.",
)
churn = _tags(
    "prune/churn/<kind>", "Share of gates that changed side since the last evaluation; falls to 0."
)
rounding = _tags(
    "prune/rounding/<kind>", "Share of gates that rounding to the target changes; near 0."
)
MASK_GRAD_NORM = _tag(
    "prune/grad-norm", "Gradient norm of log_alpha and multipliers, before clipping."
)
MASK_LEARNING_RATE = _tag("prune/learning-rate", "Learning rate of log_alpha and multipliers.")
mask_image = _tags(
    "prune/mask/<kind>", "Picture of what is kept, blue, and pruned, vermilion (Images)."
)
log_alpha = _tags(
    "prune/log-alpha/<kind>", "Distribution of log_alpha (Histograms); two hills, at the clamps."
)
mixture_weight = _tags(
    "mix/weight/<domain>", "Share of the samples to come that the domain is owed."
)
mixture_share = _tags("mix/share/<domain>", "Share of the samples drawn so far.")
mixture_epoch = _tags("mix/epoch/<domain>", "Times the domain's text was read.")
eval_loss = _tags("eval/loss/<domain>", "Held-out loss, nats per token, on the run's subsample.")
EVAL_MEAN_LOSS = _tag("eval/mean-loss", "Mean held-out loss over domains, each counted once.")
eval_error = _tags("eval/standard-error/<domain>", "Standard error of the domain's held-out loss.")
EVAL_MEAN_ERROR = _tag("eval/mean-standard-error", "Standard error of the mean held-out loss.")
full_loss = _tags(
    "eval/full-loss/<domain>", "Held-out loss over all held-out text, once, at the end."
)
FULL_MEAN_LOSS = _tag(
    "eval/full-mean-loss", "Mean over domains of the loss over all held-out text."
)
eval_excess = _tags(
    "eval/excess/<domain>", "Held-out loss less the reference loss; domains draw together."
)
EXACT_MEAN_LOSS = _tag(
    "eval/exact-mean-loss", "Held-out mean loss under exactly the target's gates."
)
DISCRETISATION_GAP = _tag(
    "eval/discretisation-gap", "eval/exact-mean-loss less eval/mean-loss; near 0 at the end."
)
RELAXED_MEAN_LOSS = _tag(
    "eval/relaxed-mean-loss", "Held-out mean loss under gates sampled as in training."
)
task_score = _tags("eval/task/<name>", "Score in a downstream task, by task and metric.")
SAVE_SECONDS = _tag(
    "system/save-seconds", "Seconds from the beginning of a save until the checkpoint is visible."
)
SAVE_STALL_SECONDS = _tag(
    "system/save-stall-seconds", "Seconds for which training stood still during a save."
)
TOKENS_PER_SECOND = _tag(
    "system/tokens-per-second", "Tokens a second over all processes, training alone."
)
TOKENS_PER_SECOND_PER_DEVICE = _tag(
    "system/tokens-per-second-per-device", "Tokens a second of one process, training alone."
)
SECONDS_PER_STEP = _tag(
    "system/seconds-per-step", "Seconds a step takes, training alone, mean over the log window."
)
MODEL_FLOPS_UTILISATION = _tag(
    "system/model-flops-utilisation", "Arithmetic the model needs over the device's peak (MFU)."
)
part_seconds = _tags("system/step-seconds/<part>", "Time of a step by part, mean over ranks.")
_tag("system/evaluation-share", "Share of the wall time since this start that evaluations took.")
_tag("system/checkpoint-share", "Share of the wall time since this start that saving took.")
MEMORY_RESIDENT = _tag(
    "system/memory-resident", "GB that a process has on its host, of the rank that has most."
)
MEMORY_ALLOCATED = _tag(
    "system/memory-allocated",
    "Peak GB of tensors on a GPU so far, of the rank that has most.",
)
MEMORY_RESERVED = _tag(
    "system/memory-reserved",
    "Peak GB that torch's allocator took, of the rank that has most.",
)


def part_share(part: str) -> str:
    """Return the tag of the share of the wall time for which training stood still for a part."""
    return f"system/{part}-share"


MEMORY = {
    "allocated": MEMORY_ALLOCATED,
    "reserved": MEMORY_RESERVED,
    "resident": MEMORY_RESIDENT,
}
"""Tags of memory by the names of `device.memory_in_use`."""
PAUSES = ("evaluation", "checkpoint")
"""What training stands still for; see `part_share`."""
STEP_PARTS = ("data", "forward-backward", "communication", "optimizer")
"""What the time of a step goes to; see `part_seconds`."""
