"""Settings that do not go together are refused; defaults and choices stand once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megashear import config
from megashear.commands.completion import configurations
from megashear.commands.settings import settings_of
from megashear.config import ParallelConfig, Reweight, TrainConfig
from megashear.data.reference_loss import METHODS
from megashear.data.reweight import SCORES
from megashear.report.kept import Mode

PACKAGE = Path(config.__file__).parents[1]
OWN_DEFAULTS = {
    "quickstart": "a run with a recipe of its own",
    "report": "the mode of a map, where no command asks",
    "shape": "fields of a model, which flags override",
}
"""Parts of megashear whose defaults are no flag's, and why."""


def choices(owner: type, key: str) -> tuple[str, ...]:
    return get_args(settings_of(owner)[key].wanted)


def test_choices_are_those_that_the_code_knows() -> None:
    assert get_args(Reweight) == (*SCORES, "constant", "schedule")
    assert {*choices(config.ReferenceLossRun, "method")} == {"auto", *METHODS}
    assert {*choices(config.InspectConfig, "mode")} == {*get_args(Mode)}
    for name in choices(config.PreprocessConfig, "tokens_dtype"):
        assert np.dtype(name).kind in "iu"


def test_no_builder_has_a_default_of_its_own_for_what_a_flag_says() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in {"config", *OWN_DEFAULTS}
        for line, name in repeated_defaults(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_a_default_that_stands_twice_is_noticed() -> None:
    text = "def build(a, seed=1234, *, json_key='text', keep=0, load=None): ...\nlr: float = 1e-4\n"
    assert list(repeated_defaults(text)) == [(1, "seed"), (1, "json_key"), (2, "lr")]


def repeated_defaults(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of parameters and fields with a flag's name and a value of their own.

    None, switches, 0, 1 and empty text mean "without" and are no choice that could be changed.
    """
    keys = {key for owner in configurations().values() for key in settings_of(owner)}
    for node in ast.walk(ast.parse(source)):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef):
            words, defaults = node.args.args, node.args.defaults
            pairs += zip([a.arg for a in words[len(words) - len(defaults) :]], defaults)
            pairs += zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            pairs = [(node.target.id, node.value)]
        for name, value in pairs:
            is_own = isinstance(value, ast.Constant) and value.value not in _WITHOUT
            if name in keys and is_own:
                assert isinstance(node, ast.FunctionDef | ast.AnnAssign)
                yield node.lineno, name


_WITHOUT = (None, True, False, 0, 1, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            "--overlap-param-gather gathers .* give --use-distributed-optimizer too",
        ),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            "give --overlap-grad-reduce too, or drop the flag",
        ),
        (
            {"ddp_bucket_size": 5},
            "--ddp-bucket-size 5 divides .*--overlap-grad-reduce is not given",
        ),
        (
            {"ddp_bucket_size": 0, "overlap_grad_reduce": True},
            "--ddp-bucket-size is 0; wanted 1 to 2147483647",
        ),
        ({"overlap_p2p_communication": True}, "needs --num-virtual-stages-per-pipeline-rank of at"),
    ],
)
def test_overlap_that_cannot_be(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**flags)


def test_evaluations_take_at_least_a_sequence() -> None:
    with pytest.raises(ValueError, match="--eval-micro-batch-size is 0; wanted 1 to 1048576"):
        TrainConfig(eval_micro_batch_size=0)
