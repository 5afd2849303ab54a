"""Texts at the end of a run are continued at every layout as its checkpoint continues them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megashear.checkpoint.description import find_iteration, read_description
from megashear.config import GenerateRun, Masks, ParallelConfig
from megashear.data.held_out import HeldOutSet
from megashear.data.manifest import read_manifest
from megashear.parallel.launch import distributed
from megashear.report.record import read_run
from megashear.report.run_section import run_section
from megashear.tokenizer.choice import load_tokenizer
from megashear.train.sampling import Sampling
from megashear.train.stored_model import find_model
from megashear.train.text_samples import beginnings
from tests.distributed.test_resume import configuration, start
from tests.ranks import run_ranks
from tests.text_run import SEQUENCE, TextRun
from tests.tiny import layout


def continued(text: TextRun, saved: Path, masks: Masks) -> list[str]:
    """The texts as one process continues them from the checkpoint."""
    manifest = read_manifest(text.data)
    sets = [HeldOutSet(manifest.held_out_prefix(name), SEQUENCE) for name in manifest.names]
    prompts = [one.prompt for one in beginnings(manifest.names, sets, 3)]
    asked = GenerateRun(load=str(saved), prompt=("",), masks=masks)
    tokenizer = load_tokenizer(text.tokenizer)

    def body(rank: int) -> list[str]:
        with distributed(asked.parallel, asked.model) as groups:
            stored = find_model(load=str(saved), load_hf=None, masks=masks)
            _, reader = stored.open_reader(groups, asked)
            new = reader.continue_texts(
                prompts,
                most_new=48,
                is_done=lambda tokens: tokens[-1] == tokenizer.eos_id,
                sampling=Sampling(),
            )
            return [tokenizer.decode([*text, *more]) for text, more in zip(prompts, new)]

    return run_ranks(1, body)[0]


@pytest.mark.parametrize(
    ("stage", "parallel", "replicas", "number"),
    [
        pytest.param("prune", layout(tp=2), 1, 1, id="prune-tp2"),
        # the second replica has no text
        pytest.param("pretrain", layout(pp=2), 2, 1, id="pretrain-pp2-dp2"),
        pytest.param("prune", layout(pp=2, vpp=2), 1, 1, id="prune-pp2-vpp2"),
        pytest.param("lagrangian", layout(), 1, 3, id="lagrangian"),
    ],
)
def test_a_run_writes_what_its_checkpoint_writes(
    text: TextRun, tmp_path: Path, stage: str, parallel: ParallelConfig, replicas: int, number: int
) -> None:
    start(configuration(text, stage, parallel, tmp_path, text_samples=number), replicas)
    saved = tmp_path / "saved"
    samples = read_description(find_iteration(saved)).known.text_samples
    assert [one.domain for one in samples] == list(read_manifest(text.data).names)[:number]
    found = [sample.prompt + sample.continuation for sample in samples]
    assert found == continued(text, saved, "exact")[:number]
    assert all(sample.continuation for sample in samples)
    if stage == "lagrangian":  # the twin: the masks are far from the target yet
        assert found != continued(text, saved, "expected")

    section = run_section(read_run(saved), "run", None)
    page = "".join(str(part) for part in section.parts)
    assert "What the model writes" in page


def test_none_are_written_where_none_are_wanted(text: TextRun, tmp_path: Path) -> None:
    start(configuration(text, "pretrain", layout(), tmp_path, text_samples=0), 1)
    record = read_run(tmp_path / "saved")
    assert record.description is not None
    assert record.description.known.text_samples == []
    parts = run_section(record, "run", None).parts
    assert "What the model writes" not in "".join(map(str, parts))
