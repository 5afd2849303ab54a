"""Pages about `plan` show what the command prints; run as a module, this writes it."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megashear.__main__ import main
from megashear.config import ModelConfig, ParallelConfig
from megashear.planning.activations import attention_kept, loss_kept, mlp_kept
from megashear.planning.hardware import GPUS
from megashear.planning.memory import rank_memory, stage_parameters
from megashear.planning.shares import SHARES
from megashear.planning.time import Cluster, forward_seconds, step_time
from megashear.planning.work import Work
from megashear.shape import PRESETS
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)

DOCS = Path(__file__).parents[3] / "docs"
DOC = DOCS / "planning.md"
SHAPES = DOCS / "choosing-a-shape.md"
OUTPUT = re.compile(r"(<!-- output: megashear (.+?) -->\n\n```\n)(.*?)(```\n)", re.DOTALL)
REFUSED = re.compile(r"(^\$ megashear (.+?)\n)(  megashear plan: error: .+?\n)", re.MULTILINE)
SEVEN = Work(
    shape=PRESETS["llama2-7b"],
    parallel=ParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
    model=ModelConfig(bf16=True),
    seq_length=4096,
    micro_batch_size=1,
    num_microbatches=4,
    data_size=8,
    masks=frozenset({"hidden", "head", "intermediate"}),
)
"""The step that section 1 explains."""


def printed(command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main(shlex.split(command))
    return out.getvalue()


def outputs(text: str) -> list[tuple[str, str]]:
    """Return the commands in the text, with their output there."""
    shown = [(found[2], found[3]) for found in OUTPUT.finditer(text)]
    # indented, so that it is not taken for a command
    return shown + [(found[2], found[3].removeprefix("  ")) for found in REFUSED.finditer(text)]


@pytest.mark.parametrize(
    ("command", "shown"),
    [*outputs(DOC.read_text()), *outputs(SHAPES.read_text())],
    ids=lambda text: text[:40].replace(" ", "-"),
)
def test_the_document_shows_what_the_command_prints(command: str, shown: str) -> None:
    assert shown == printed(command), "python -m tests.unit.planning.test_planning_doc mends it"


def test_the_examples_are_found() -> None:
    commands = [command for command, _ in outputs(DOC.read_text())]
    assert len(commands) == 4
    commands += [command for command, _ in outputs(SHAPES.read_text())]
    assert len(commands) >= 6
    assert all(command.startswith("plan --model") for command in commands)


def table_row(text: str, line: str) -> str:
    """Return the last cell of the table row that begins with this name."""
    (row,) = re.findall(rf"^\| (?:\*\*)?{re.escape(line)}(?:\*\*)? \|.*$", text, re.MULTILINE)
    return row.rstrip("| ").rpartition("| ")[2].strip("* ")


@pytest.mark.parametrize(
    "part",
    ["weights", "gradients", "masters", "moments", "folded", "masks", "activations", "buffers"],
)
def test_the_bytes_explained_are_those_planned(part: str) -> None:
    text = DOC.read_text()
    assert f"P = {sum(stage_parameters(SEVEN, 0)):,} parameters" in text
    assert table_row(text, part) == f"{getattr(rank_memory(SEVEN, 0), part):,}"


def test_the_layer_explained_is_the_layer_planned() -> None:
    text = DOC.read_text()
    for line, kept in (("attention", attention_kept(SEVEN)), ("MLP", mlp_kept(SEVEN))):
        assert table_row(text, line) == f"{kept / 1e6:.1f}"
        section = text.partition("| kept by " + {"attention": "attention", "MLP": "the MLP"}[line])
        rows = section[2].partition("**" + line + "**")[0].splitlines()[2:]
        cells = [float(row.rstrip("| ").rpartition("| ")[2]) for row in rows if row.count("|") > 3]
        assert sum(cells) == pytest.approx(kept / 1e6, abs=0.05 * len(cells) + 0.05)
    assert f"The loss keeps {loss_kept(SEVEN) / 1e6:.1f} MB" in " ".join(text.split())


def test_the_seconds_explained_are_those_planned() -> None:
    text, gpu = DOC.read_text(), GPUS["A100-80G"]
    cluster = Cluster(gpu=gpu, num_gpus=8, gpus_per_node=8, network=gpu.network)
    time = step_time(SEVEN, cluster, mfu=0.28)
    assert table_row(text, "compute") == f"{time.compute:.3f}"
    assert float(table_row(text, "data")) == pytest.approx(time.data.exposed, abs=5e-4)
    assert f"{SEVEN.shape.training_flops(4096) / 1e9:.3f} GFLOP" in text
    assert f"{PRESETS['llama2-2.7b'].training_flops(4096) / 1e9:.3f} GFLOP" in text
    evaluating = 2 * 7 * 32 / 50 * forward_seconds(SEVEN, time)
    assert float(table_row(text, "evaluation")) == pytest.approx(evaluating, abs=5e-4)
    assert f"are {3200 * 32 * 4096 / 8 / 1844 / 3600:.1f} hours" in " ".join(text.split())
    assert f"are {48000 * 256 * 4096 / 8 / 4957 / 3600:.1f} hours" in " ".join(text.split())


def test_the_traffic_explained_is_the_traffic_planned() -> None:
    text = " ".join(DOC.read_text().split())
    shape, gpu = PRESETS["llama3.1-70b"], GPUS["H100-80G"]
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=8,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    work = replace(
        SEVEN, shape=shape, parallel=parallel, micro_batch_size=2, data_size=4, num_microbatches=4
    )
    cluster = Cluster(gpu=gpu, num_gpus=64, gpus_per_node=8, network=gpu.network)
    time = step_time(work, cluster, mfu=SHARES["H100-80G"][0].value)
    flops = 131072 * shape.training_flops(4096) / 64 / (SHARES["H100-80G"][0].value * 989e12)
    assert f"would take {flops:.2f} s on 64 GPUs" in text
    assert f"1/8 of a microbatch's .{800 * time.bubble:.0f} s" in text
    unit = 2 * 8192 * 8192 * 7 / 8
    assert f"units of {unit / 1e6:.1f} MB a microbatch" in text
    sent, exposed = time.tensor.sent / unit / 4, time.tensor.exposed * 450e9 * 0.75 / unit / 4
    assert f"are {exposed:.0f} exposed of {sent:.0f} units" in text
    hop = 2 * 8192 * 8192 / 8
    assert f"{time.pipeline.sent / hop / 4:.0f} sends of the residual stream" in text
    seconds = time.data.sent / (50e9 * 0.75)
    assert f"{time.data.sent / 1e9:.1f} GB go over 400 Gbit/s a GPU, .{seconds * 100:.0f} s" in text
    assert f"of {shape.training_flops(4096) / 1e9:.1f} GFLOP would take" in text
    assert f"are {18 * shape.num_params() / 2**30:,.0f} GiB" in text


def test_the_table_of_shares_is_the_one_that_is_used() -> None:
    text = DOC.read_text()
    for kinds, gpu in (
        ("A100, A800", "A800-80G"),
        ("H100, H800", "H100-80G"),
        ("H200", "H200-141G"),
    ):
        pruning, training = (f"{share.value:.2f}"[1:] for share in SHARES[gpu])
        assert f"| {kinds} | {pruning} | {training} |" in text


def test_the_table_of_gpus_is_the_one_that_is_used() -> None:
    text = DOC.read_text()
    for gpu in GPUS.values():
        row = (
            f"| {gpu.name} | {gpu.memory_gib:.1f} | {gpu.peak_flops / 1e12:,.0f} | "
            f"{gpu.node_link / 1e9:g} | {gpu.network / 1e9:g} | {gpu.memory_speed / 1e9:,.0f} |"
        )
        assert row in text


def write() -> None:
    """Write the present output of the commands into the documents."""
    for file in (DOC, SHAPES):
        text = file.read_text()
        text = OUTPUT.sub(lambda found: found[1] + printed(found[2]) + found[4], text)
        text = REFUSED.sub(lambda found: found[1] + "  " + printed(found[2]), text)
        file.write_text(text)


if __name__ == "__main__":
    write()
