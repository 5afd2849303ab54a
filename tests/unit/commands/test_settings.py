"""Settings know every field's type, help and default."""

import dataclasses

import pytest

from megashear import config
from megashear.commands.settings import build, flatten, nearest, settings_of, type_name

RUNS = [
    config.PruneRun,
    config.PretrainRun,
    config.EvaluateRun,
    config.ReferenceLossRun,
    config.PlotMixtureConfig,
    config.PreprocessConfig,
    config.ConvertConfig,
    config.CutConfig,
    config.QuickstartConfig,
]


@pytest.mark.parametrize("run", RUNS)
def test_every_setting_has_help(run: type) -> None:
    assert [s.key for s in settings_of(run).values() if not s.help] == []


def test_a_missing_help_text_is_noticed() -> None:
    assert settings_of(_Unexplained)["name"].help == ""


@dataclasses.dataclass
class _Unexplained:
    name: str = ""


def test_settings_keep_the_groups_of_a_run() -> None:
    settings = settings_of(config.PruneRun)
    assert settings["tensor_model_parallel_size"].group == "parallel"
    assert settings["tensor_model_parallel_size"].flag == "--tensor-model-parallel-size"
    assert settings["data_path"].default is dataclasses.MISSING


def test_flatten_is_the_inverse_of_build() -> None:
    values = {"data_path": "text", "lr": 3e-4, "mask_lr": 0.5, "tensor_model_parallel_size": 2}
    run = build(config.PruneRun, values)
    assert run.masks.mask_lr == 0.5
    assert build(config.PruneRun, flatten(run)) == run
    assert {key: flatten(run)[key] for key in values} == values


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("train_iters", 3, True),
        ("train_iters", 3.5, False),
        ("train_iters", True, False),
        ("train_iters", "3", False),
        ("lr", 3, True),
        ("lr", "1e-4", True),  # YAML 1.1 reads it as text
        ("lr", "fast", False),
        ("lr", False, False),
        ("min_lr", None, True),
        ("lr", None, False),
        ("bf16", True, True),
        ("bf16", 1, False),
        ("reweight", "bandit", True),
        ("domain_cap", [0.4, "cc=.5"], True),
        ("domain_cap", [[0.4]], False),
        ("reweight", False, False),  # YAML 1.1 reads `off` so
        ("domain_weights", [0.5, 1], True),
        ("domain_weights", 0.5, False),
        ("domain_weights", [[0.5]], False),
        ("data_path", "text", True),
        ("data_path", 7, False),
    ],
)
def test_values_must_be_of_the_type(key: str, value: object, fits: bool) -> None:
    assert settings_of(config.PruneRun)[key].accepts(value) is fits


def test_types_are_named_for_people() -> None:
    wanted = {key: type_name(s.wanted) for key, s in settings_of(config.PruneRun).items()}
    assert wanted["train_iters"] == "a whole number"
    assert wanted["min_lr"] == "a number or null"
    assert wanted["domain_weights"] == "a list, each item a number or text"
    assert wanted["lr_decay_style"] == "one of cosine, linear, constant"
    assert wanted["bf16"] == "true or false"


def test_nearest_always_names_one() -> None:
    assert nearest("seq_lenght", settings_of(config.PruneRun)) == "seq_length"
    assert nearest("zzz", ["prune", "cut"]) in ("prune", "cut")
