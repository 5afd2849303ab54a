"""Tasks in place at every layout: scores and log-likelihoods of the harness's own `hf` model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate as evaluate_by_harness
from lm_eval.models.huggingface import HFLM

from megashear.checkpoint.shear import cut_checkpoint
from megashear.config import EvaluateRun, ParallelConfig
from megashear.models import next_token
from megashear.parallel.launch import distributed
from megashear.tasks.find import LoadedTasks, find_tasks
from megashear.train import harness, reading
from megashear.train.reading import Passage
from megashear.train.sampling import Sampling
from megashear.train.schedule import ForwardPass
from megashear.train.tasks import prepare_tasks
from tests import local_tasks
from tests.distributed.test_cut import prune_half_way
from tests.distributed.test_generate import TARGET
from tests.local_tasks import CHOICE, READ, SAY
from tests.ranks import run_ranks
from tests.stock import Stock
from tests.text_run import SHAPE, TextRun
from tests.tiny import layout

OTHER_KERNELS = 1e-4
"""Absolute, nats: sums of some dozen float32 log-probabilities, of other kernels."""
BROKEN = 0.01
"""Nats; whatever is broken here is off by more."""

NO_TASKS = "--(tokenizer-model|no-prepend-bos) is for --tasks, which is not given; leave it out"

Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks.write(tmp_path_factory.mktemp("made") / "tasks")


@pytest.fixture(scope="module")
def tasks(folder: Path) -> LoadedTasks:
    """All tasks, loaded once; forked ranks inherit them."""
    return find_tasks([f"{CHOICE},{SAY}", READ], include_path=str(folder)).load()


@pytest.fixture(scope="module")
def by_harness(stock: Stock, tasks: LoadedTasks) -> Results:
    model = HFLM(pretrained=str(stock.hf), device="cpu", dtype="float32", batch_size=2)
    return evaluate_by_harness(lm=model, task_dict=tasks.begin(), bootstrap_iters=0)


def configured(checkpoint: Path, folder: Path, **more: Any) -> EvaluateRun:
    given: dict[str, Any] = {
        "load": str(checkpoint),
        "tasks": (CHOICE, SAY, READ),
        "include_path": str(folder),
        "micro_batch_size": 2,
    }
    return EvaluateRun(**(given | more))


def in_place(
    config: EvaluateRun,
    tasks: LoadedTasks,
    parallel: ParallelConfig,
    *,
    replicas: int = 1,
    broken: Callable[[], None] | None = None,
) -> Results:
    """Results at a layout, of rank 0."""
    config = dataclasses.replace(config, parallel=parallel)
    world_size = replicas * parallel.model_parallel_size

    def body(rank: int) -> Results:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if broken is not None:
            broken()
        with distributed(config.parallel, config.model) as groups:
            return prepare_tasks(config).measure(tasks, groups, has_samples=True)

    found = run_ranks(world_size, body)
    assert all(answers(each) == answers(found[0]) for each in found), "ranks differ"
    return found[0]


def answers(results: Results) -> dict[tuple[str, int, int], list[Any]]:
    """What was answered to each request, by task, document and number of the request."""
    return {
        (task, sample["doc_id"], number): list(flat(answer))
        for task, samples in results["samples"].items()
        for sample in samples
        for number, answer in enumerate(sample["resps"])
    }


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from flat(each)
    else:
        yield value


def scores(results: Results) -> dict[tuple[str, str], Any]:
    return {
        (task, metric): value
        for task, found in results["results"].items()
        for metric, value in found.items()
        if "stderr" not in metric and isinstance(value, int | float)
    }


def largest_difference(one: Results, other: Results) -> float:
    """Of log-likelihoods of answers, nats; infinite where words or greediness differ."""
    found, wanted = answers(one), answers(other)
    assert found.keys() == wanted.keys()
    largest = 0.0
    for key, values in wanted.items():
        assert len(found[key]) == len(values)
        for mine, theirs in zip(found[key], values):
            if isinstance(theirs, float):
                largest = max(largest, abs(mine - theirs))
            elif mine != theirs:
                return float("inf")
    return largest


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("parallel", "replicas"),
    [
        pytest.param(layout(tp=2), 1, id="tp2"),
        pytest.param(layout(pp=2), 1, id="pp2"),
        pytest.param(layout(tp=2, pp=2), 1, id="tp2-pp2"),
        pytest.param(layout(tp=2, pp=2, vpp=2, sp=True), 1, id="tp2-sp-pp2-vpp2"),
        pytest.param(layout(), 2, id="dp2"),
        pytest.param(layout(), 3, id="dp3"),
    ],
)
def test_answers_and_scores_are_those_of_the_harness(
    stock: Stock,
    folder: Path,
    tasks: LoadedTasks,
    by_harness: Results,
    parallel: ParallelConfig,
    replicas: int,
) -> None:
    found = in_place(configured(stock.checkpoint, folder), tasks, parallel, replicas=replicas)
    assert largest_difference(found, by_harness) < OTHER_KERNELS
    assert {task for task, _ in scores(by_harness)} == {CHOICE, SAY, READ}
    assert scores(found) == pytest.approx(scores(by_harness), rel=OTHER_KERNELS)
    assert found["n-shot"] == by_harness["n-shot"] == {CHOICE: 1, SAY: 0, READ: 0}


def test_a_hugging_face_directory_answers_as_its_checkpoint(
    stock: Stock, folder: Path, tasks: LoadedTasks, by_harness: Results
) -> None:
    config = configured(stock.checkpoint, folder, load=None, load_hf=str(stock.hf))
    assert largest_difference(in_place(config, tasks, layout()), by_harness) < OTHER_KERNELS


def test_choices_of_one_token_are_read_once_and_scored_as_alone(stock: Stock, folder: Path) -> None:
    context = [1, 300, 310, 320, 330]
    passages = [
        Passage([*context, 340], 1),
        Passage([*context, 341], 2),  # another number of scored tokens
        Passage([7, 8, 9, 10], 2),
        Passage([*context, 341], 1),
        Passage([7, 8, 9, 340], 2),
        Passage([*context, 400], 1),
        Passage([*context, 340], 1),  # the same once more
    ]
    config = configured(stock.checkpoint, folder)

    def body(rank: int) -> tuple[Any, Any, list[int]]:
        num_read = []
        with distributed(config.parallel, config.model) as groups:
            _, reader = prepare_tasks(config).model.open_reader(groups, config)
            read = ForwardPass.read

            def counted(model: ForwardPass, batches: Any, measure: Any) -> Any:
                num_read.extend(int(n) for batch in batches for n in batch.positions)
                return read(model, batches, measure)

            ForwardPass.read = counted  # type: ignore[assignment]
            together = reader.score(passages)
            seen = sorted({*num_read})
            return together, [reader.score([passage])[0] for passage in passages], seen

    ((together, alone, seen),) = run_ranks(1, body)
    assert seen == [0, 1, 2]
    for found, wanted in zip(together, alone):
        assert found.log_probability == pytest.approx(wanted.log_probability, abs=OTHER_KERNELS)
        assert found.is_greedy == wanted.is_greedy
    assert len({round(score.log_probability, 3) for score in alone}) == 6
    assert sum(score.is_greedy for score in together) < len(passages)


def test_empty_texts_are_answered_and_leave_others_as_they_were(stock: Stock, folder: Path) -> None:
    config = configured(stock.checkpoint, folder, micro_batch_size=3, prepend_bos=False)
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
    continued = [("Return", " the"), ("Return", ""), (" ", "x"), ("", " the"), ("Return the", " x")]

    def body(rank: int) -> tuple[Any, ...]:
        with distributed(config.parallel, config.model) as groups:
            prepared = prepare_tasks(config)
            model, reader = prepared.model.open_reader(groups, config)
            ends = model.end_tokens(prepared.tokenizer)
            lm = harness.ReadingModel(reader, prepared.tokenizer, ends, prepend_bos=False)
            with_bos = harness.ReadingModel(reader, prepared.tokenizer, ends, prepend_bos=True)

            def said(*texts: str, by: Any = lm) -> list[str]:
                asked = [SimpleNamespace(args=(text, settings)) for text in texts]
                return by.generate_until(asked)

            def scored(*pairs: tuple[str, str]) -> list[tuple[float, bool]]:
                return lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])

            texts = ("Return the", "", "One of")
            alone = [*said(texts[0]), *said("", by=with_bos), *said(texts[2])]
            with pytest.raises(AssertionError, match="a text without tokens"):  # the twin
                reader.continue_texts(
                    [[7, 8], [], [9]], most_new=1, is_done=bool, sampling=Sampling()
                )
            return said(*texts), alone, scored(*continued), [scored(each)[0] for each in continued]

    ((texts, alone, together, each),) = run_ranks(1, body)
    assert texts == alone
    assert len({*texts}) == 3
    assert together[1] == each[1] == (0.0, True)
    for n in (0, 2, 3, 4):
        assert together[n] == (pytest.approx(each[n][0], abs=OTHER_KERNELS), each[n][1])
        assert together[n][0] < -BROKEN


def test_no_number_of_likeliest_tokens_stands_for_all() -> None:
    drawn = {"do_sample": True, "temperature": 0.5}
    for top_k in (0, -1, None):
        assert harness._sampling(drawn | {"top_k": top_k}).top_k is None
    assert harness._sampling(drawn | {"top_k": 2}) == Sampling(temperature=0.5, top_k=2)
    assert harness._sampling(drawn | {"do_sample": False}).temperature == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_path": "data"}, r"--data-path data is for losses and --tasks made_choice made_sa"),
        ({"tasks": ()}, r"--data-path is not given; name the directory .* or tasks with --tasks"),
        ({"tasks": (), "data_path": "data"}, "--include-path is for --tasks, which is not given"),
        ({"tasks": (), "data_path": "d", "include_path": None, "tokenizer_model": "t"}, NO_TASKS),
        ({"tasks": (), "data_path": "d", "include_path": None, "prepend_bos": False}, NO_TASKS),
        ({"seq_length": 128}, r"--seq-length 128 is for the held-out text .* made_say .*leave it"),
        ({"num_fewshot": -1}, "--num-fewshot is -1; wanted 0 to 1000"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(Path("model"), Path("tasks"), **given)


def test_a_task_that_generates_more_than_the_model_reads_is_refused(
    stock: Stock, folder: Path
) -> None:
    long = find_tasks([SAY], include_path=str(folder)).load()
    long.tasks["tasks"][SAY].config.generation_kwargs["max_gen_toks"] = 64
    with pytest.raises(AssertionError, match=r"ValueError: a task generates up to 64 tokens"):
        in_place(configured(stock.checkpoint, folder), long, layout())


def start_early() -> None:
    """Score one token before the continuation too."""
    passage = harness.Passage
    harness.Passage = lambda tokens, n: passage(tokens, min(n + 1, len(tokens) - 1))  # type: ignore


def leave_a_shard_out() -> None:
    """Leave the exponentials of tensor rank 1 out of the sum."""
    reduce = next_token.flat_all_reduce

    def without(tensors: list[Tensor], group: Any, op: Any = dist.ReduceOp.SUM) -> list[Tensor]:
        if op == dist.ReduceOp.SUM and dist.get_rank(group) == 1:
            tensors = [torch.zeros_like(tensors[0]), *tensors[1:]]
        return reduce(tensors, group, op)

    next_token.flat_all_reduce = without  # type: ignore[assignment]


def swap_replicas() -> None:
    """Take the scores of one replica for those of the other."""
    summed = reading.ordered_sum

    def swapped(tensors: list[Tensor], group: Any) -> list[Tensor]:
        (whole,) = summed(tensors, group)
        if dist.get_world_size(group) == 2 and whole.dim() == 2:
            pairs = len(whole) // 2
            whole[: 2 * pairs] = whole[: 2 * pairs].view(pairs, 2, 2).flip(1).flatten(0, 1)
        return [whole]

    reading.ordered_sum = swapped  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("parallel", "replicas", "broken"),
    [
        pytest.param(layout(), 1, start_early, id="off-by-one"),
        pytest.param(layout(tp=2), 1, leave_a_shard_out, id="shard"),
        pytest.param(layout(), 2, swap_replicas, id="replicas"),
    ],
)
def test_what_is_broken_is_noticed(
    stock: Stock,
    folder: Path,
    tasks: LoadedTasks,
    by_harness: Results,
    parallel: ParallelConfig,
    replicas: int,
    broken: Callable[[], None],
) -> None:
    config = configured(stock.checkpoint, folder)
    found = in_place(config, tasks, parallel, replicas=replicas, broken=broken)
    assert largest_difference(found, by_harness) > BROKEN


def test_a_pruning_run_under_exact_masks_answers_as_its_cut(
    text: TextRun, folder: Path, tasks: LoadedTasks, tmp_path: Path
) -> None:
    at = layout(pp=2)
    run_ranks(2, lambda rank: prune_half_way(tmp_path / "pruned", SHAPE, TARGET, at))
    run_ranks(
        1,
        lambda rank: cut_checkpoint(tmp_path / "pruned", tmp_path / "cut", exact_target=True),
    )
    config = configured(tmp_path / "pruned", folder, tokenizer_model=str(text.tokenizer))
    cut = in_place(dataclasses.replace(config, load=str(tmp_path / "cut")), tasks, layout())
    masked = in_place(config, tasks, layout(tp=2))
    assert largest_difference(masked, cut) < OTHER_KERNELS
    assert masked["config"]["model_args"]["masks"] == "exact"
    other = in_place(dataclasses.replace(config, masks="expected"), tasks, layout())
    assert largest_difference(other, cut) > BROKEN
