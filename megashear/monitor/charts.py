"""Which curves stand together: the charts of TensorBoard's custom scalars."""

from __future__ import annotations

from collections.abc import Sequence

from megashear.monitor import tags

Charts = dict[str, dict[str, list[str]]]
"""Tags by chart, by category."""


def charts(
    *,
    domains: Sequence[str] = (),
    has_references: bool = False,
    terms: Sequence[str] = (),
    more: Charts | None = None,
) -> Charts:
    """Return the charts of a run, in the order of the questions that one has.

    Charts of one name are the same in every run: TensorBoard shows those that differ beside each
    other.

    Args:
        domains: of the mixture.
        has_references: whether losses are compared with references.
        terms: names of further terms of the loss.
        more: charts of the objective's own.
    """
    found: Charts = {
        "1 does it learn": {
            "loss: training and held-out": [tags.LM_LOSS, tags.EVAL_MEAN_LOSS],
            **{f"{name}, a term of the loss": [tags.loss_term(name)] for name in terms},
            "held-out loss by domain": [tags.eval_loss(name) for name in domains],
            "gradient norm": [tags.GRAD_NORM],
            "learning rate": [tags.LEARNING_RATE],
            "skipped steps": [tags.SKIPPED_STEPS],
        }
    }
    found["4 what does it read"] = {
        "weights of the domains": [tags.mixture_weight(name) for name in domains],
        "epochs of the domains": [tags.mixture_epoch(name) for name in domains],
    }
    if has_references:
        found["4 what does it read"] |= {
            "excess loss of the domains": [tags.eval_excess(name) for name in domains],
            **{
                f"{name}: weight against excess loss": [
                    tags.mixture_weight(name),
                    tags.eval_excess(name),
                ]
                for name in domains
            },
        }
    found["5 what does it cost"] = {
        "tokens per second and device": [tags.TOKENS_PER_SECOND_PER_DEVICE],
        "model FLOPs utilisation": [tags.MODEL_FLOPS_UTILISATION],
        "seconds of a step, by part": [tags.part_seconds(part) for part in tags.STEP_PARTS],
        "share of the wall time": [tags.part_share(part) for part in tags.PAUSES],
        "memory, GB": [tags.MEMORY_ALLOCATED, tags.MEMORY_RESERVED, tags.MEMORY_RESIDENT],
        "checkpoints, seconds": [tags.SAVE_SECONDS, tags.SAVE_STALL_SECONDS],
    }
    found |= more or {}
    return {question: found[question] for question in sorted(found)}


def mask_charts(kinds: Sequence[str], *, multipliers: bool = True) -> Charts:
    """Return the charts of masks.

    Args:
        kinds: of masks.
        multipliers: whether the masks have a penalty with multipliers.
    """
    of_penalty = {
        "what the constraint adds to the loss": [tags.PENALTY],
        "linear multipliers": [tags.linear_multiplier(kind) for kind in kinds],
        "quadratic multipliers": [tags.quadratic_multiplier(kind) for kind in kinds],
    }
    return {
        "2 do the masks reach the target": {
            "parameters: expected, actual, target": [
                tags.EXPECTED_PARAMETERS,
                tags.ACTUAL_PARAMETERS,
                tags.TARGET_PARAMETERS,
            ],
            **{
                f"size of {kind}: expected, actual, target": [
                    tags.expected_size(kind),
                    tags.actual_size(kind),
                    tags.target_size(kind),
                ]
                for kind in kinds
            },
            "gradient norm of the masks": [tags.MASK_GRAD_NORM],
            **(of_penalty if multipliers else {}),
        },
        "3 are they settled": {
            "undecided gates, share": [tags.undecided(kind) for kind in kinds],
            "gates that changed side, share": [tags.churn(kind) for kind in kinds],
            "gates that the exact target rounds, share": [tags.rounding(kind) for kind in kinds],
            "loss: relaxed, expected size, exact target": [
                tags.RELAXED_MEAN_LOSS,
                tags.EVAL_MEAN_LOSS,
                tags.EXACT_MEAN_LOSS,
            ],
        },
    }


def sections(found: Charts) -> frozenset[str]:
    """Return the sections of the tags that charts show: ``train``, ``eval`` and the like."""
    tags_shown = (
        tag for of_category in found.values() for each in of_category.values() for tag in each
    )
    return frozenset(tag.partition("/")[0] for tag in tags_shown)
