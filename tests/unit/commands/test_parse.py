"""Flags and YAML make the same run; what neither understands is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.commands.outcome import UsageError
from megashear.commands.parse import parse, to_yaml
from megashear.commands.settings import Setting, build, flatten, groups_of, settings_of
from megashear.config import NamedNumbers, PreprocessConfig, PruneRun
from tests.unit.commands.test_settings import RUNS

NEEDED = ["--data-path", "text"]
NAMED = st.builds(
    "{}={}".format, st.from_regex(r"[a-c][a-c= -]{0,3}", fullmatch=True), st.floats(0, 1)
)


def prune(*argv: str) -> PruneRun:
    return parse(PruneRun, argv, prog="megashear prune", description="Learn masks.")


def written(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def _another(setting: Setting) -> tuple[Any, list[str]]:
    """A value other than the default, and the words that give it."""
    flag, default = setting.flag, setting.default
    value: object
    if setting.wanted is bool:
        return not default, ["--no-" + flag[2:] if default else flag]
    if setting.wanted == tuple[float, ...]:
        return (0.67, 0.045), [flag, ".67", ".045"]
    if setting.wanted == NamedNumbers:
        return (0.67, "cc=.2"), [flag, ".67", "cc=.2"]
    if setting.wanted == tuple[str, ...]:
        return ("a", "b"), [flag, "a", "b"]
    if setting.wanted == tuple[int, ...]:
        return (3, 5), [flag, "3", "5"]
    if setting.range is not None:
        middle = (setting.range.least + min(setting.range.most, 4096)) / 2
        value = middle if setting.accepts(0.5) else int(middle)
    else:
        value = next(v for v in (7, 0.5, "text", *_choices(setting)) if _fits(setting, v))
    return value, [flag, str(value)]


def _choices(setting: Setting) -> list[str]:
    return re.findall(r"'([\w-]+)'", str(setting.wanted))


def _fits(setting: Setting, value: object) -> bool:
    return value != setting.default and setting.accepts(value)


@pytest.mark.parametrize("run", RUNS)
def test_every_setting_is_a_flag(run: type, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner in (run, *groups_of(run).values()):
        if hasattr(owner, "__post_init__"):  # values are judged elsewhere
            monkeypatch.setattr(owner, "__post_init__", lambda self: None)
    others = {setting.key: _another(setting) for setting in settings_of(run).values()}
    with_dashes = [word for _, words in others.values() for word in words]
    with_underscores = ["--" + w[2:].replace("-", "_") if w[:2] == "--" else w for w in with_dashes]
    for argv in (with_dashes, with_underscores):
        config: object = parse(run, argv, prog="megashear x", description="x")
        assert flatten(config) == {key: value for key, (value, _) in others.items()}


def test_help_is_short_and_help_all_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {}
    for word in ("-h", "--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            prune("--bf16", word)
        assert end.value.code == 0
        flags[word] = set(re.findall(r"^\W*(--[a-z][a-z0-9-]*)", capsys.readouterr().out, re.M))
    every = {s.flag for s in settings_of(PruneRun).values()} | {"--config", "--dry-run"}
    assert flags["--help-all"] == every
    assert flags["-h"] == flags["--help"]
    assert {"--data-path", "--target-num-layers", "--config"} <= flags["--help"]
    assert flags["--help"].isdisjoint({"--adam-eps", "--wandb-entity", "--ddp-bucket-size"})
    assert len(flags["--help"]) < len(every) / 2


def test_help_gives_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        prune("--data-path", "text", "--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "Learn masks." in text
    assert "--seq-length INT Tokens per sequence. Takes 1 to 16777216. (default: 128)" in text
    assert "--sequence-parallel, --no-sequence-parallel" in text
    assert "--data-path STR Directory that `megashear preprocess` wrote. (required)" in text
    assert "--dry-run" in text
    assert "--config" in text


def test_the_file_is_read_and_flags_override_it(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "data-path: --text\nlr: 1e-3\nseq_length: 64\nsequence-parallel: yes\n"
        "domain_weights: [.67, 0.045]\nmin_lr: null\nbf16: true\n",
    )
    # Either alone is no valid run: sequence parallelism needs tensor parallelism.
    run = prune("--config", file, "--tensor-model-parallel-size", "2", "--seq-length=32")
    assert run.data.data_path == "--text"
    assert run.data.domain_weights == (0.67, 0.045)
    assert run.optimizer.lr == 1e-3
    assert run.optimizer.min_lr is None
    assert run.train.seq_length == 32
    assert run.parallel.sequence_parallel
    assert run.model.bf16
    again = prune(
        f"--config={file}", "--no-sequence-parallel", "--no-bf16", "--domain_weights", "1"
    )
    assert not again.parallel.sequence_parallel
    assert not again.model.bf16
    assert again.data.domain_weights == (1.0,)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert prune(*NEEDED, "--config", written(tmp_path, "# nothing\n")) == prune(*NEEDED)


def test_dry_run_prints_what_gives_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*NEEDED, "--domain-weights", ".5", ".25", "--adam-eps", "1e-9", "--mask-lr", "3"]
    with pytest.raises(SystemExit) as end:
        prune(*argv, "--dry-run")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert prune("--config", written(tmp_path, printed)) == prune(*argv)


@settings(max_examples=30, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {
            "data_path": st.text("-ab \u00e9'\"#:/{[", min_size=1).filter(str.strip),
            "lr": st.floats(1e-12, 1e3),
            "train_iters": st.integers(1, 10**9),
            "bf16": st.booleans(),
            "domain_weights": st.lists(st.floats(0, 1) | NAMED, max_size=3).map(tuple),
            "reweight": st.sampled_from(["signed", "clipped", "bandit", "constant"]),
            "save": st.none() | st.sampled_from(["runs/a b", "~", "1", "yes"]),
        }
    )
)
def test_yaml_of_any_run_gives_it_back(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = build(PruneRun, values)
    text = to_yaml(run, prog="megashear prune")
    assert prune("--config", written(tmp_path_factory.mktemp("yaml"), text)) == run


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{cc: .67, wiki: 3e-1}", ("cc=0.67", "wiki=3e-1")),
        ("[.67, .33]", (0.67, 0.33)),
        ("[0.4, wiki=.3]", (0.4, "wiki=.3")),
        ("0.4", (0.4,)),
        ("{1: .5}", ("1=0.5",)),
    ],
)
def test_numbers_by_name_come_as_a_mapping_too(
    text: str, wanted: tuple[float | str, ...], tmp_path: Path
) -> None:
    run = prune(*NEEDED, "--config", written(tmp_path, f"domain_cap: {text}\n"))
    assert run.data.domain_cap == wanted


def test_other_ranks_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    for argv in (["--help"], [*NEEDED, "--dry-run"]):
        with pytest.raises(SystemExit) as end:
            prune(*argv)
        assert end.value.code == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seq-lenght", "3"], r"unknown flag --seq-lenght; nearest known: --seq-length;"),
        (["--seq_lenght=3"], r"unknown flag --seq-lenght; nearest known: --seq-length;"),
        (["--no-lr"], r"unknown flag --no-lr; nearest known: "),
        (["--config", "none.yaml"], r"--config none.yaml does not exist"),
        (["--micro-batch-size", "0"], r"^--micro-batch-size is 0; wanted 1 to 1048576$"),
        (["--reset-position-ids"], r"^--reset-position-ids without --reset-attention-mask .*drop"),
        (
            ["--reset-attention-mask", "--transformer-impl", "transformer_engine"],
            r"^--reset-attention-mask does not work .*use --transformer-impl local$",
        ),
        (["--bf16", "yes"], r"^'yes' follows no flag that takes it; flags begin with --$"),
        (["--bf16=yes"], r"^--bf16 takes no value and has 'yes'; give --bf16 to turn it on, --no-"),
        (["x=1"], r"^'x=1' follows no flag that takes it"),
        (["--domain-weights", ".5", "--eval-iters"], r"^unknown flag --eval-iters"),
        (["--num-workers", "-1"], r"^--num-workers is -1; wanted 0 to 256$"),
        (["--lr", "fast"], r"^--lr is 'fast'; wanted a number$"),
        (["--train-iters=1.5"], r"^--train-iters is '1.5'; wanted a whole number$"),
        (["--reweight", "often"], r"^--reweight is 'often'; wanted one of signed, clipped, ban"),
        (["--min-lr", "--bf16"], r"^--min-lr has no value; wanted a number$"),
        (["--seed"], r"^--seed has no value; wanted a whole number$"),
        (["--sequence-parallel"], r"^--sequence-parallel splits .* or drop the flag$"),
    ],
)
def test_wrong_flags_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prune(*NEEDED, *argv)


@pytest.mark.parametrize(
    "flag", ["--save", "--data-path", "--load", "--tensorboard-dir", "--config"]
)
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_path_is_not_the_working_directory(flag: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is '{text}', wanted text that is not empty"):
        prune(*NEEDED, flag, text)


def test_every_text_of_every_command_is_refused_where_it_is_empty(tmp_path: Path) -> None:
    tried = 0
    for run in RUNS:
        every = settings_of(run).values()
        needed = {s.key: "x" if s.accepts("x") else ["x"] for s in every if s.is_needed}
        for setting in every:
            if not (setting.accepts("") or setting.accepts([""])) or setting.range is not None:
                continue
            if setting.default == "" or setting.wanted == NamedNumbers:
                continue
            tried += 1
            value: object = "" if setting.accepts("") else ["a", ""]
            file = written(tmp_path, yaml.safe_dump(needed | {setting.key: value}))
            with pytest.raises(UsageError, match=f"^{setting.flag} is '', wanted text"):
                parse(run, ["--config", file], prog="megashear", description="")
    assert tried > 40


def test_a_wrong_value_is_reported_by_its_own_flag_whatever_else_is_wrong() -> None:
    # --data-path is missing, and sequence parallelism needs tensor parallelism
    for argv, message in (
        (["--sequence-parallel", "--mask-lr", "nan"], r"^--mask-lr is nan; wanted 1e-30 to 10000$"),
        (["--sequence-parallel", "--lr", "x"], r"^--lr is 'x'; wanted a number$"),
        (["--sequence-parallel"], r"^--data-path is needed and not given; `megashear prune --help"),
        ([*NEEDED, "--sequence-parallel"], r"^--sequence-parallel splits the sequence over"),
    ):
        with pytest.raises(UsageError, match=message):
            prune(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_path: x\nseq_lenght: 3", r"run.yaml line 2: unknown key seq_lenght; .* seq_length"),
        ("train:\n  lr: 3", r"run.yaml line 1: unknown key train; nearest known: "),
        ("lr: fast", r"run.yaml line 1: lr is 'fast'; wanted a number$"),
        ("train_iters: 1.5", r"line 1: train_iters is 1.5; wanted a whole number$"),
        ("bf16: 1", r"line 1: bf16 is 1; wanted true or false$"),
        ("save: [a]", r"line 1: save is \['a'\]; wanted text or null$"),
        (
            "reweight: off",
            r"reweight is False; wanted one of signed, clipped, bandit, constant, schedule$",
        ),
        ("lr: 1\nlr: 2", r"run.yaml line 2: lr is there twice"),
        ("seq-length: 1\nseq_length: 2", r"run.yaml line 2: seq_length is there twice"),
        ("- lr", r"run.yaml does not hold a mapping"),
        ("lr: [", r"run.yaml is not YAML: .*line 1"),
        ("lr: !!python/name:os.system x", r"run.yaml is not YAML: "),
    ],
)
def test_wrong_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prune(*NEEDED, "--config", written(tmp_path, text))


def test_megatrons_name_of_the_text_key_is_understood(tmp_path: Path) -> None:
    needed = ["--input", "in", "--output", "out", "--tokenizer-model", "t"]

    def key(*argv: str) -> str:
        words = [*needed, *argv]
        return parse(PreprocessConfig, words, prog="megashear preprocess", description="").json_key

    assert key() == "text"
    assert key("--json-keys", "body") == key("--json_keys=body") == key("--json-key=body") == "body"
    assert key("--config", written(tmp_path, "json_keys: body\n")) == "body"
    with pytest.raises(UsageError, match="json_key is there twice"):
        key("--config", written(tmp_path, "json_keys: body\njson_key: text\n"))
