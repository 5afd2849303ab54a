"""The command line as a whole: commands, errors, exit status."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import megashear
from megashear.__main__ import COMMANDS, main
from megashear.commands import outcome
from megashear.commands.preprocess import format_manifest
from megashear.data.manifest import DataManifest, DomainCounts

ROOT = Path(__file__).parents[3]
NEEDED = {
    "plan": ["--model", "llama2-7b", "--gpus", "8"],
    "preprocess": ["--input", "in", "--output", "out", "--tokenizer-model", "t"],
    "convert": ["--input", "in", "--output", "out"],
    "score": ["--load", "in", "--data-path", "data", "--output", "out"],
    "prune": ["--data-path", "data"],
    "cut": ["--load", "in", "--output", "out"],
    "pretrain": ["--data-path", "data"],
    "evaluate": ["--load", "in", "--data-path", "data"],
    "generate": ["--load", "in", "--prompt", "text"],
    "reference-loss": ["--losses", "losses.json", "--output", "out"],
    "report": ["run", "--images", "figures"],
    "inspect": ["checkpoint", "other", "--image", "masks.png"],
    "plot-mixture": ["--tensorboard-dir", "in", "--output", "out.png"],
}


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert all(line in printed.out for line in COMMANDS.values())
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(line in printed.err for line in COMMANDS.values())


def test_a_process_of_torchrun_does_not_print_what_nobody_can_mend(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megashear", "plan", *NEEDED["plan"], "--dry-run"],
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "model: llama2-7b" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megashear {megashear.__version__}\n"


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in COMMANDS.values())
    with pytest.raises(SystemExit) as end:
        main(["help", "cut"])
    assert end.value.code == 0
    assert "--exact-target" in capsys.readouterr().out
    assert main(["help", "cutt"]) == 2


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["prune", "--target-num-l"], ["--target-num-layers"]),
        (["pl"], ["plan", "plot-mixture"]),
        (["help", "conv"], ["convert"]),
        (["pretrain", "--lr-decay-style", "co"], ["cosine", "constant"]),
        (["pretrain", "--target-num-l"], []),  # a flag of prune
        (["prune", "--load", "co"], []),  # left to the shell's own files
    ],
)
def test_bash_completes_commands_flags_and_choices(
    words: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    line = " ".join(f"'{word}'" for word in ["megashear", *words])
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _megashear; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "-c", capsys.readouterr().out + ask], capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (wanted, "")


def test_completion_is_for_shells_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")
    assert main(["completion", "fish"]) == 2
    assert "found fish, wanted one of bash, zsh" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    message = "megashear: error: unknown command pretrian; nearest: pretrain; "
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("command", NEEDED)
def test_a_dry_run_prints_the_run_and_then_refuses_paths_that_lead_nowhere(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [command, *NEEDED[command], "--dry-run"]
    if command == "plan":  # reads nothing that is not there
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        argv[argv.index("--model") + 1] = "llama2-7x"
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f"# megashear {command} --config <this file>\n")
    wanted = r"--model llama2-7x is neither|--[a-z-]+ \S+ does not exist$"
    assert re.search(wanted, printed.err.rstrip("\n"))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_outputs_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in", "t", "run", "figures", "masks.png", "out", "out.png", "losses.json"):
        Path(name).touch()
    for name in ("checkpoint", "other"):
        Path(name).mkdir()
    for command, flag in (
        *(("preprocess", "--output"), ("convert", "--output"), ("cut", "--output")),
        *(("reference-loss", "--output"), ("plot-mixture", "--output")),
        *(("report", "--images"), ("inspect", "--image")),
    ):
        assert main([command, *NEEDED[command], "--dry-run"]) == 2
        assert re.search(rf"error: {flag} \S+ exists; choose another", capsys.readouterr().err)


def test_a_dry_run_of_a_run_that_is_resumed_does_not_ask_for_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("then.yaml").write_text("data-path: data\nsave: recovered\n")

    def error(*argv: str) -> str:
        assert main([*argv, "--load", "gone", "--save", "run", "--dry-run"]) == 2
        return capsys.readouterr().err

    pretrain, prune = ("pretrain", "--data-path", "data"), ("prune", "--data-path", "no")
    both = (*prune, "--then-pretrain", "then.yaml")
    assert "--load gone does not exist" in error(*pretrain, "--resume")  # nothing is saved yet
    Path("run/iter_0000003").mkdir(parents=True)
    assert "--load gone does not exist" in error(*pretrain)
    assert "no whole checkpoint in run" in error(*pretrain, "--resume")  # it was looked for there
    # pruning still reads its data, unless only continued pretraining is left
    assert "--data-path no does not exist" in error(*both, "--resume")
    Path("recovered/iter_0000001").mkdir(parents=True)
    assert "no whole checkpoint in recovered" in error(*both, "--resume")
    assert "--load gone does not exist" in error(*both)


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir", "--jsonl-log"])
def test_a_dry_run_refuses_outputs_that_cannot_be_written(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "source", "there"):
        Path(name).mkdir()
    Path("file").touch()
    Path("then.yaml").write_text(f"data-path: data\n{flag[2:]}: file/run\n")
    argv = ["--data-path", "data", "--load", "source", "--dry-run"]
    wanted = "file/run cannot be written: a file is in the way of a directory; choose another"
    assert main(["pretrain", *argv, flag, "file/run"]) == outcome.CANNOT_SAVE
    assert f"error: {flag} {wanted}" in capsys.readouterr().err
    assert main(["prune", *argv, "--then-pretrain", "then.yaml"]) == outcome.CANNOT_SAVE
    assert f"error: {flag} of --then-pretrain {wanted}" in capsys.readouterr().err
    assert main(["pretrain", *argv, flag, "there/run"]) == 2  # the source is refused next
    assert "no checkpoint at source" in capsys.readouterr().err
    if flag != "--jsonl-log":
        assert main(["pretrain", *argv, flag, "file"]) == outcome.CANNOT_SAVE
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "there")
        assert main(["pretrain", *argv, flag, "there"]) == outcome.CANNOT_SAVE
        assert "this user may not write there" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    check = "import sys; assert not {'torch', 'megatron', 'numpy'} & sys.modules.keys()"
    modules = ", ".join(f"megashear.commands.{name.replace('-', '_')}" for name in NEEDED)
    subprocess.run(
        [sys.executable, "-c", f"import megashear.__main__, {modules}; {check}"], check=True
    )


CHECKS = {"crash_test.py"}
"""Tools that try the software out, and are no command of it."""


@pytest.mark.parametrize("tool", sorted(ROOT.glob("tools/*.py")), ids=lambda tool: tool.name)
def test_tools_run_their_command(tool: Path) -> None:
    result = subprocess.run(
        [sys.executable, tool, "--lrr"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    wanted = "required: --output" if tool.name in CHECKS else "error: unknown flag --lrr"
    assert wanted in result.stderr


@pytest.mark.parametrize("kind", [ValueError, FileExistsError, FileNotFoundError])
def test_what_a_user_can_mend_is_one_line(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _failing(kind("no such data"))([]) == 2
    assert capsys.readouterr().err == "megashear prune: error: no such data\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        _failing(ZeroDivisionError())([])


def test_a_rank_leaves_an_error_to_the_first_of_its_host_and_prints_it_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for rank, local, wait, where in (
            ("0", "0", [], ""),
            ("3", "3", [outcome.PATIENCE_S], " on rank 3"),
            ("8", "0", [], " on rank 8"),  # of another host, whose log is another
        ):
            waited.clear()
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("LOCAL_RANK", local)
            assert _failing(ValueError("no such\ndata"))([]) == 2
            line = f"megashear prune: error{where}: no such data"
            assert (capsys.readouterr().err, waited) == (line + "\n", wait)
            assert json.loads(report.read_text())["message"] == line
    finally:
        signal.signal(signal.SIGTERM, handler)


def _failing(error: Exception) -> outcome.Main:
    @outcome.user_errors("megashear prune")
    def fail(argv: Sequence[str]) -> int:
        raise error

    return fail


@pytest.mark.parametrize("command", ["preprocess", "convert", "cut"])
def test_writers_refuse_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([command, *NEEDED[command]]) == 2
    message = f"megashear {command} runs in one process and torchrun started 4; use no torchrun\n"
    assert capsys.readouterr().err.endswith(message)


def test_convert_refuses_a_missing_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--input", f"{tmp_path}/none", "--output", f"{tmp_path}/out"]) == 2
    assert "--input" in (error := capsys.readouterr().err)
    assert error.endswith("none is not a directory, nor a .pt or .pth file of LLM-Shearing\n")


@pytest.mark.parametrize(
    ("kind", "flags", "function"),
    [
        ("Hugging Face directory", [], "to_checkpoint"),
        ("Megatron-LM checkpoint", [], "to_checkpoint"),
        ("LLM-Shearing file", [], "to_checkpoint"),
        ("checkpoint", [], "to_hf"),
        ("LLM-Shearing file", ["--output-format", "hf"], "to_hf"),
        ("checkpoint", ["--output-format", "checkpoint"], "to_checkpoint"),
    ],
)
def test_convert_finds_out_the_direction(
    kind: str,
    flags: list[str],
    function: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert = importlib.import_module("megashear.conversion.convert")
    sources = importlib.import_module("megashear.conversion.sources")
    source = sources.Source(kind=kind, path=tmp_path, named=tmp_path, weights={}, shape=None)
    monkeypatch.setattr(sources, "open_source", lambda path, **said: source)
    logits = {"relative_error": 2.34e-7, "bound": 1e-5}
    given: dict[str, object] = {}

    def converted(found: object, output: str, **options: object) -> dict[str, object]:
        assert found is source
        given.update(options)
        shown = logits if options["verify"] is not None else None
        return {"bytes": 2**30, "dtypes": ["float32"], "logits": shown}

    monkeypatch.setattr(convert, function, converted)
    needed = ["convert", "--input", str(tmp_path), "--output", "out", *flags]
    assert main(needed) == 0
    written = "Hugging Face directory" if function == "to_hf" else "checkpoint"
    assert capsys.readouterr().out.startswith(f"wrote out: {written} of the {kind} {tmp_path}, ")
    assert given["verify"] is None
    assert main([*needed, "--workers", "3", "--verify", "--verify-tokens", "5", "6"]) == 0
    assert capsys.readouterr().out.endswith(
        "differ by 2.3e-07 of their norm, at most 1e-05 is right\n"
    )
    assert (given["verify"], given["workers"], given["dtype"]) == ((5, 6), 3, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--input is not given; name --input and --output, or .* with --check"),
        (["--input", "x"], "--output is not given"),
        (["--check", "x", "--output", "y"], "--check x converts nothing: leave --output out"),
        (["--check", "x", "--input", "y", "--verify"], "leave --input, --verify out"),
        (["--check", "x", "--dtype", "float32"], "converts nothing: leave --dtype out"),
        (["--input", "x", "--output", "y", "--workers", "0"], "--workers is 0; wanted 1 to 4096"),
        (["--input", "x", "--output", "y", "--verify-tokens", "3"], "is for --verify, which is"),
        (["--check", "nowhere"], "nothing to check at nowhere: it is not a directory"),
    ],
)
def test_convert_refuses_flags_that_do_not_go_together(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_evaluate_prints_the_losses_and_where_they_lie(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = importlib.import_module("megashear.train.measure")
    monkeypatch.setattr(measure, "evaluate", lambda config: {"mean": 2.5})
    assert main(["evaluate", *NEEDED["evaluate"], "--output", "losses.json"]) == 0
    assert capsys.readouterr().out == '{\n  "mean": 2.5\n}\nwrote losses.json\n'


def test_generate_prints_texts_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("megashear.train.generate")
    monkeypatch.setattr(module, "generate", lambda config: [f"{p} end" for p in config.prompt])
    assert main(["generate", "--load", "in", "--prompt", "one", "two words"]) == 0
    assert capsys.readouterr().out == "one end\n----\ntwo words end\n"


def test_preprocess_reports_documents_and_tokens() -> None:
    counts = DomainCounts(
        name="c",
        documents=1200,
        tokens=34567,
        held_out_documents=24,
        held_out_tokens=700,
        source_bytes=1,
        skipped={"empty": 1100, "not a string": 2},
        text_bytes=141068,
    )
    other = dataclasses.replace(counts, name="prose", skipped={}, pretokenised_documents=3)
    manifest = DataManifest(
        directory=Path("data"),
        domains=(counts, other),
        vocab_size=64,
        bos_id=1,
        eos_id=2,
        prepend_bos=True,
        append_eod=True,
        held_out_fraction=0.02,
        json_key="text",
        dtype="uint16",
        tokenizer_fingerprint="",
    )
    assert format_manifest(manifest).splitlines() == [
        "c     | train 1,200 documents, 34,567 tokens | held out 24 documents, 700 tokens"
        " | 4.00 bytes/token | skipped 1,100 empty, 2 not a string",
        "prose | train 1,200 documents, 34,567 tokens | held out 24 documents, 700 tokens",
        "wrote data: 2 domains, 69,134 training tokens",
    ]
