"""What TensorBoard's text tab says of a run: how to read it, its tags, settings, versions."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from megashear.monitor.tags import MEANINGS

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
