"""What TensorBoard's text tab says of a run: how to read it, its tags, settings, versions."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

import yaml

READING, TAGS, SETTINGS, ENVIRONMENT = (
    f"about/{name}" for name in ("1-reading", "2-tags", "3-settings", "4-environment")
)
"""Tags of the texts, in the order of the tab."""

HINTS = """\
- **Custom Scalars** groups the curves by five questions; start there.
- **Smoothing** (the slider of the settings): 0 for everything but `train/lm-loss` and
  `train/grad-norm`, where .6 helps. Held-out losses, masks and weights of domains have few points,
  all of which count; smoothed, a change of theirs looks like a drift, and later than it was.
- **Colours** are those of runs, one for each directory; curves of one run in one chart differ in
  their symbols, which *Matches* below the chart names. Start TensorBoard on the directory above
  several runs to compare them; the box beside a run's name changes its colour.
- **Outliers**: TensorBoard leaves them out of a chart's frame until that is switched off.
- **Images** has the masks at every evaluation, **Histograms** their log_alpha.
"""

MEANINGS = {
    "train/lm-loss": "Loss on training text, nats per token, mean over the log window; falls, but "
    "rises while pruning closes more and more.",
    "train/term/<name>": "A further term of the loss on training text, mean over the log window.",
    "train/grad-norm": "Gradient norm of the weights, before clipping.",
    "train/learning-rate": "Learning rate of the weights.",
    "train/skipped-steps": "Steps not taken, for loss or gradient were not finite; 0 is healthy.",
    "prune/penalty": "What the constraint adds to the loss; small after the warm-up.",
    "prune/expected-sparsity/<kind>": "Share of units the masks expect to close; on its target.",
    "prune/target-sparsity/<kind>": "Share of units that shall be closed at this step.",
    "prune/lambda1/<kind>": "Linear multiplier of the constraint; settles.",
    "prune/lambda2/<kind>": "Quadratic multiplier; rises, at most to --lambda2-max.",
    "prune/expected-parameters": "Parameters of the whole model that the masks expect to keep.",
    "prune/actual-parameters": "Parameters of the whole model that gates open in evaluation keep.",
    "prune/target-parameters": "Parameters of the target; the other two meet it.",
    "prune/expected-size/<kind>": "Sum of a row's chances to be open, units, mean over rows.",
    "prune/actual-size/<kind>": "Gates of a row that evaluation leaves open, mean over rows.",
    "prune/target-size/<kind>": "Units that a row shall leave open at this step.",
    "prune/undecided/<kind>": "Share of gates whose chance to be open is between .1 and .9; falls "
    "once the target stands.",
    "prune/churn/<kind>": "Share of gates that changed side since the last evaluation; falls to 0.",
    "prune/rounding/<kind>": "Share of gates that rounding to the target changes; near 0.",
    "prune/grad-norm": "Gradient norm of log_alpha and multipliers, before clipping.",
    "prune/learning-rate": "Learning rate of log_alpha and multipliers.",
    "prune/mask/<kind>": "Picture of what is kept, blue, and pruned, vermilion (Images).",
    "prune/log-alpha/<kind>": "Distribution of log_alpha (Histograms); two hills, at the clamps.",
    "mix/weight/<domain>": "Share of the samples to come that the domain is owed.",
    "mix/share/<domain>": "Share of the samples drawn so far.",
    "mix/epoch/<domain>": "Times the domain's text was read.",
    "eval/loss/<domain>": "Held-out loss, nats per token, on the run's subsample.",
    "eval/mean-loss": "Mean of these over domains, each counted once.",
    "eval/standard-error/<domain>": "Standard error of the domain's held-out loss.",
    "eval/mean-standard-error": "Standard error of the mean held-out loss.",
    "eval/full-loss/<domain>": "Held-out loss over all held-out text, once, at the end.",
    "eval/full-mean-loss": "Mean of these over domains.",
    "eval/excess/<domain>": "Held-out loss less the reference; domains draw together.",
    "eval/exact-mean-loss": "Held-out mean loss under exactly the target's gates.",
    "eval/discretisation-gap": "How far that is above eval/mean-loss; near 0 at the end.",
    "eval/relaxed-mean-loss": "Held-out mean loss under gates sampled as in training.",
    "system/save-seconds": "How long a checkpoint took.",
    "system/save-stall-seconds": "How long training stood still for it.",
    "system/tokens-per-second": "Training alone, over all processes.",
    "system/tokens-per-second-per-device": "Training alone, per process.",
    "system/seconds-per-step": "Training alone, mean over the log window.",
    "system/model-flops-utilisation": "Arithmetic the model needs over the device's peak (MFU).",
    "system/step-seconds/<part>": "Time of a step by part, mean over ranks.",
    "system/evaluation-share": "Share of the wall time since this start that evaluations took.",
    "system/checkpoint-share": "Share of the wall time since this start that saving took.",
    "system/memory-resident": "GB that a process has on its host, of the rank that has most.",
    "system/memory-allocated": "Most GB that tensors took on a GPU so far, of that rank.",
    "system/memory-reserved": "Most GB that torch's allocator took from a GPU, of that rank.",
}
"""What every tag means, in a sentence; docs/monitoring.md says more."""


def notes(
    config: Mapping[str, Any], environment: Mapping[str, Any], *, sections: Collection[str]
) -> dict[str, str]:
    """Return the texts of a run by tag, as Markdown.

    Args:
        config: settings of the run by group, plain values.
        environment: versions, device, processes and command of this start; empty where not known.
        sections: of the tags that the run writes: ``prune`` where there are masks.
    """
    told = {tag: text for tag, text in MEANINGS.items() if tag.partition("/")[0] in sections}
    lines = [f"| `{tag}` | {text} |" for tag, text in told.items()]
    texts = {READING: HINTS, TAGS: "\n".join(["| tag | what it is |", "|---|---|", *lines])}
    flat: dict[str, Any] = {}
    for group, inside in config.items():
        flat |= inside if isinstance(inside, Mapping) else {group: inside}
    if flat:
        texts[SETTINGS] = _block(yaml.safe_dump(_plain(flat), sort_keys=False, allow_unicode=True))
    if environment:
        words = {**environment, "command": shlex.join(environment.get("command", []))}
        texts[ENVIRONMENT] = _block("\n".join(f"{name}: {value}" for name, value in words.items()))
    return texts


def _block(text: str) -> str:
    """Indent text, so that Markdown leaves it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
