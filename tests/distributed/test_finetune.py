"""Instruction tuning: transformers' loss of the assistant's tokens, at every layout; resumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megashear.__main__ import main
from megashear.checkpoint.description import find_iteration, read_description
from megashear.config import (
    ChatDataConfig,
    EvaluateRun,
    FinetuneRun,
    GenerateRun,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megashear.data.batch import DocumentBorders, MicroBatch
from megashear.data.conversations import ConversationSequences, HeldOutConversations
from megashear.data.loader import MixtureLoader
from megashear.data.manifest import read_manifest
from megashear.data.mixture import DomainMixture
from megashear.data.reference_loss import MEASURED
from megashear.models.llama import build_llama
from megashear.parallel.groups import ParallelGroups
from megashear.train import measure, run
from megashear.train.generate import generate, prepare_generate
from megashear.train.objectives import InstructionTuning
from megashear.train.points import mean_losses
from tests import reference_llama
from tests.chat import CHAT_ML, SEQUENCE, SHAPE, ChatRun, answers
from tests.distributed.masked_model import by_megatron_name
from tests.distributed.test_resume import HALF, WHOLE, differences, finished
from tests.ranks import run_ranks
from tests.tiny import (
    assemble,
    layout,
    megatron_weights,
    named_parameters,
    relative_error,
    set_weights,
)
from tests.unit.commands.conftest import _restore_logging  # noqa: F401 (autouse)

OTHER_KERNELS = 1e-5
"""Relative; float32 sums of other kernels, over at most 4 shards, in another order."""
BROKEN = 1e-3
"""Relative; whatever is broken here is off by more."""
GLOBAL_BATCH = 4
SPLIT = layout(tp=2)
Break = Callable[[MicroBatch], MicroBatch]


class Measured(NamedTuple):
    """One step's loss and gradients."""

    loss: float
    grads: dict[str, Tensor]


def loader(data: Path, size: int, groups: ParallelGroups) -> MixtureLoader:
    """Packed conversations, as a run reads them."""
    rows = ConversationSequences(data / "colours", SEQUENCE, 1, 0, is_packed=True)
    return MixtureLoader(
        [rows],
        DomainMixture([1.0]),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
        borders=DocumentBorders.of(ModelConfig(), are_packed=True),
    )


def ours(
    data: Path,
    parallel: ParallelConfig,
    *,
    size: int = 1,
    replicas: int = 1,
    broken: Break | None = None,
    tokens_count_alike: bool = True,
) -> Measured:
    def body(rank: int) -> dict[str, Any]:
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(
            *(SHAPE, groups, parallel, ModelConfig()),
            variant="local",
            tokens_count_alike=tokens_count_alike,
        )
        set_weights(chunks, megatron_weights(SHAPE), groups.tensor_rank, groups.tensor_size)
        objective = InstructionTuning(chunks)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        batches = loader(data, size, groups).next_batch()
        found = objective.forward_backward([broken(b) if broken else b for b in batches], 0)
        return {
            "tensor_rank": groups.tensor_rank,
            "data_rank": groups.data_rank,
            "grads": {n: p.main_grad.clone() for n, p in named_parameters(chunks).items()},
            "loss": mean_losses(found, [], groups)[0],
        }

    ranks = run_ranks(parallel.model_parallel_size * replicas, body)
    replica = [rank for rank in ranks if rank["data_rank"] == 0]
    grads = assemble([r["grads"] for r in replica], [r["tensor_rank"] for r in replica])
    return Measured(ranks[0]["loss"], grads)


@pytest.fixture(scope="module")
def theirs(chat_run: ChatRun) -> Measured:
    """Loss and gradients of transformers' model, with labels of -100 for all but the assistant."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.hidden_size,
            intermediate_size=SHAPE.ffn_hidden_size,
            num_hidden_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_attention_heads,
            num_key_value_heads=SHAPE.num_query_groups,
            head_dim=SHAPE.head_dim,
            rms_norm_eps=SHAPE.norm_epsilon,
            rope_theta=SHAPE.rotary_base,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    model.load_state_dict(reference_llama.random_weights(SHAPE))
    rows = ConversationSequences(chat_run.data / "colours", SEQUENCE, 1, 0, is_packed=True)
    stored = torch.stack([rows[n] for n in range(GLOBAL_BATCH)])
    documents = torch.stack([rows.documents(n) for n in range(GLOBAL_BATCH)])
    assert documents[0].max() >= 2, "several conversations share a sequence"
    # a token sees those before it in its own conversation, counted from 0
    apart = documents[:, :, None] == documents[:, None, :]
    sees = apart & torch.ones_like(apart).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    first = apart.int().argmax(dim=-1)
    output = model(
        input_ids=torch.where(stored < 0, -1 - stored, stored),
        labels=torch.where(stored < 0, -100, stored),
        attention_mask=mask[:, None],
        position_ids=torch.arange(SEQUENCE + 1) - first,
    )
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Measured(output.loss.item(), by_megatron_name(grads, SHAPE))


@pytest.mark.parametrize(
    ("parallel", "size", "replicas"),
    [
        pytest.param(layout(), 1, 1, id="one"),
        pytest.param(layout(tp=2, sp=True), 2, 1, id="tp2-sp"),
        pytest.param(layout(pp=2), 1, 2, id="pp2-dp2"),
        pytest.param(layout(pp=2, vpp=2), 2, 1, id="pp2-vpp2"),
    ],
)
def test_loss_and_gradients_are_transformers_on_the_same_packed_batch(
    chat_run: ChatRun, theirs: Measured, parallel: ParallelConfig, size: int, replicas: int
) -> None:
    found = ours(chat_run.data, parallel, size=size, replicas=replicas)
    assert found.loss == pytest.approx(theirs.loss, rel=OTHER_KERNELS)
    for name, grad in theirs.grads.items():
        assert relative_error(found.grads[name], grad) < OTHER_KERNELS, name


def off_by_one(batch: MicroBatch) -> MicroBatch:
    return replace(batch, loss_mask=batch.loss_mask.roll(1, dims=1))


def user_counted(batch: MicroBatch) -> MicroBatch:
    assert batch.documents is not None
    is_text = batch.documents < batch.documents.max(dim=1, keepdim=True).values
    return replace(batch, loss_mask=is_text.float())


def seeing_each_other(batch: MicroBatch) -> MicroBatch:
    return replace(batch, documents=None)


@pytest.mark.parametrize("broken", [off_by_one, user_counted, seeing_each_other])
def test_another_mask_is_noticed(chat_run: ChatRun, theirs: Measured, broken: Break) -> None:
    found = ours(chat_run.data, layout(), broken=broken)
    assert abs(found.loss / theirs.loss - 1) > BROKEN


def test_a_mean_of_means_is_noticed(chat_run: ChatRun, theirs: Measured) -> None:
    """Answers of one word would weigh as much as long ones."""
    found = ours(chat_run.data, layout(), tokens_count_alike=False)
    name = "output_layer.weight"
    assert relative_error(found.grads[name], theirs.grads[name]) > BROKEN


def configuration(
    chat_run: ChatRun, folder: Path, parallel: ParallelConfig | None = None, **train: Any
) -> FinetuneRun:
    return FinetuneRun(
        parallel=parallel or layout(),
        train=TrainConfig(
            **{
                "train_iters": WHOLE,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "seq_length": SEQUENCE,
                "log_interval": 1,
                "eval_interval": 2,
                "eval_sequences": 4,
                "text_samples": 0,
                "save": str(folder / "saved"),
                "load": str(chat_run.checkpoint),
                "tensorboard_dir": str(folder / "events"),
                **train,
            }
        ),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_iters=2),
        data=ChatDataConfig(data_path=str(chat_run.data), pack=True),
    )


def start(config: FinetuneRun, replicas: int = 1) -> None:
    """Run the command's function on forked ranks as torchrun would."""
    world_size = config.parallel.model_parallel_size * replicas

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        run.finetune(config)

    run_ranks(world_size, body)


@pytest.fixture(scope="module")
def uninterrupted(chat_run: ChatRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of packed conversations."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    start(configuration(chat_run, folder, SPLIT))
    return folder


def test_a_resumed_run_is_bit_equal(chat_run: ChatRun, uninterrupted: Path, tmp_path: Path) -> None:
    start(configuration(chat_run, tmp_path, SPLIT, exit_interval=HALF))
    start(configuration(chat_run, tmp_path, SPLIT, resume=True))
    whole, halves = finished(uninterrupted), finished(tmp_path)
    assert whole.counts["loader"]["mixture"]["drawn"] == [WHOLE * 8]
    assert whole.counts["loader"]["samples_per_epoch"][0] < WHOLE * 8, "an epoch ends on the way"
    assert differences(halves, whole) == set()

    # and other rows would be others
    other = configuration(chat_run, tmp_path, SPLIT, resume=True)
    other = replace(other, data=replace(other.data, pack=False))
    with pytest.raises(AssertionError, match=r"pack was True .* with the saved --pack"):
        start(other)


def test_a_run_and_the_evaluation_of_its_checkpoint_agree_packed_or_not(
    chat_run: ChatRun, uninterrupted: Path
) -> None:
    saved = uninterrupted / "saved"
    of_run = read_description(saved / f"iter_{WHOLE:07d}").known.held_out_loss
    evaluation = EvaluateRun(load=str(saved), data_path=str(chat_run.data))
    (found,) = run_ranks(1, lambda rank: measure.evaluate(evaluation))
    assert found[MEASURED] == pytest.approx(of_run["loss"], rel=OTHER_KERNELS)
    held_out = HeldOutConversations(chat_run.data / "colours_heldout", SEQUENCE, is_packed=False)
    rows = torch.stack([held_out[n] for n in range(len(held_out))])
    assert found["tokens"] == {"colours": int((rows[:, 1:] >= 0).sum())}


def test_a_small_model_learns_to_answer_and_exports_the_template(
    chat_run: ChatRun, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = configuration(
        *(chat_run, tmp_path), train_iters=100, micro_batch_size=8, eval_interval=0, text_samples=3
    )
    start(replace(config, optimizer=OptimizerConfig(lr=5e-3, lr_warmup_iters=5)))
    known = read_description(find_iteration(tmp_path / "saved")).known
    assert len(known.text_samples) == 3
    # questions that were held out: the form of the answer is learned, and some colours are known
    assert all(one.continuation.endswith(".") for one in known.text_samples)
    assert any(one.continuation == one.original for one in known.text_samples)
    exported = str(tmp_path / "hf")
    assert main(["convert", "--input", str(tmp_path / "saved"), "--output", exported]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    base = chat_run.checkpoint / "iter_0000000" / "tokenizer"
    assert transformers.AutoTokenizer.from_pretrained(base).chat_template != CHAT_ML
    assert tokenizer.chat_template == CHAT_ML

    ending = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.eos_token_id == [tokenizer.eos_token_id, ending]

    def reply(question: str) -> str:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(
            **prompt,
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
        answered = ids[0, prompt["input_ids"].shape[1] :]
        return str(tokenizer.decode(answered, skip_special_tokens=True))

    # asked as no conversation asks
    wanted = answers()
    replies = {thing: reply(f"Tell me, what colour has {thing}?") for thing in wanted}
    wrong = {thing: text for thing, text in replies.items() if text != wanted[thing]}
    assert len(wanted) == 12
    assert len(wrong) <= 3, wrong

    # and the command says the same
    asked = "Tell me, what colour has snow?"
    question = GenerateRun(load=str(tmp_path / "saved"), chat=True, prompt=(asked,))
    ((said,),) = run_ranks(1, lambda rank: generate(question))
    assert said == replies["snow"]
    with pytest.raises(ValueError, match="spells '</s>', which would be read as the template's"):
        prepare_generate(replace(question, prompt=("What is </s>?",)))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (Path(exported) / name).unlink()
    with pytest.raises(ValueError, match=r"has no chat template: .*; leave --chat out"):
        prepare_generate(replace(question, load=None, load_hf=exported))


def test_data_of_the_other_kind_are_refused(
    chat_run: ChatRun, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data-path", str(chat_run.data), "--load", str(chat_run.checkpoint), "--dry-run"]
    flags += ["--seq-length", str(SEQUENCE)]
    assert main(["pretrain", *flags, "--reweight", "constant"]) == 2
    assert "of which the assistant's words alone are learned: use `megashear finetune`" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as end:
        main(["finetune", *flags, "--pack"])
    assert end.value.code == 0
    with pytest.raises(ValueError, match="no conversations: preprocess conversations with --chat"):
        replace(read_manifest(chat_run.data), chat_format=None).check_chat()
    with pytest.raises(ValueError, match="whose causal attention ignores the mask between conv"):
        FinetuneRun(
            model=ModelConfig(transformer_impl="transformer_engine"),
            data=ChatDataConfig(data_path="data", pack=True),
        )
