"""Facts of megatron-core 0.16.1 that megashear relies on; docs/megatron_core.md says why.

Pipelines and optimizers have their own files: tests/distributed/test_megatron_*.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megashear.config import ModelConfig, OptimizerConfig
from megashear.models.llama import build_llama, transformer_config, unwrap
from megashear.parallel import cpu_megatron, device
from megashear.parallel.groups import ParallelGroups
from megashear.train.optim import build_optimizer
from tests.ranks import run_ranks
from tests.tiny import SOURCE, layout, megatron_weights, relative_error, set_weights

FLOAT32 = 2e-6
"""Relative: sums of equal products in another order; measured up to 4e-8."""
ROOT = Path(__file__).parents[1]


def gpt_model(variant: Any = "local", **model: Any) -> Any:
    """Return a whole tiny model, on the only rank."""
    parallel_state.destroy_model_parallel()
    groups = ParallelGroups.create(layout())
    chunks = build_llama(SOURCE, groups, layout(), ModelConfig(**model), variant=variant)
    set_weights(chunks, megatron_weights(), 0, 1)
    return unwrap(chunks[0])


# --- what has a stand-in

CUDA_LITERALS = [
    ("pipeline_parallel.schedules", "forward_backward_no_pipelining", 'device="cuda"'),
    ("pipeline_parallel.schedules", "forward_backward_pipelining_with_interleaving", '"cuda"'),
    ("pipeline_parallel.schedules", "forward_backward_pipelining_without_interleaving", '"cuda"'),
    (
        "pipeline_parallel.p2p_communication",
        "P2PCommunicator._communicate",
        "device=torch.cuda.current_device()",
    ),
    (
        "models.common.embeddings.rotary_pos_embedding",
        "RotaryEmbedding.get_emb",
        "to(device=torch.cuda.current_device())",
    ),
    ("tensor_parallel.mappings", "_gather_along_first_dim", "device=torch.cuda.current_device()"),
    (
        "tensor_parallel.mappings",
        "_reduce_scatter_along_first_dim",
        "device=torch.cuda.current_device()",
    ),
    (
        "tensor_parallel.layers",
        "LinearWithGradAccumulationAndAsyncCommunication",
        "device=torch.cuda.current_device()",
    ),
    ("distributed.param_and_grad_buffer", "_ParamAndGradBuffer", "torch.cuda.current_device()"),
    ("optimizer.optimizer", "MixedPrecisionOptimizer", "device='cuda'"),
    ("optimizer.optimizer", "FP32Optimizer", "device='cuda'"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params", "'torch.cuda.BFloat16Tensor'"),
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", "'torch.cuda.FloatTensor'"),
    ("tensor_parallel.random", "_get_all_rng_states", "_get_cuda_rng_state"),
]


@pytest.mark.parametrize(("module", "name", "literal"), CUDA_LITERALS)
def test_cuda_is_named_where_there_is_a_stand_in(module: str, name: str, literal: str) -> None:
    cpu_megatron.install()
    owner: Any = importlib.import_module(f"megatron.core.{module}")
    assert isinstance(owner.torch, cpu_megatron._StandIn) != device.has_cuda()
    for part in name.split("."):
        owner = getattr(owner, part)
    assert literal in inspect.getsource(inspect.unwrap(owner))


@pytest.mark.skipif(device.has_cuda(), reason="there is no stand-in where CUDA is")
def test_no_module_that_names_cuda_escapes_the_stand_in() -> None:
    # a module that is imported after the stand-in was installed keeps the real torch
    cpu_megatron.install()
    escaped = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.core")
        and getattr(module, "torch", None) is torch
        and re.search(r"""["']cuda|cuda\.current_device""", inspect.getsource(module))
    ]
    assert escaped == []


def test_psutil_and_einops_are_used_and_not_declared() -> None:
    requirements = importlib.metadata.requires("megatron-core") or []
    declared = {
        re.split(r"[^\w-]", line)[0].lower() for line in requirements if "extra ==" not in line
    }
    assert "torch" in declared
    ours = (ROOT / "setup.py").read_text(encoding="utf-8")
    core = Path(inspect.getfile(importlib.import_module("megatron.core"))).parent
    for name, file in {
        "psutil": "dist_checkpointing/strategies/filesystem_async.py",
        "einops": "parallel_state.py",
    }.items():
        assert name not in declared
        assert f"import {name}" in (core / file).read_text(encoding="utf-8")
        assert f'"{name}>=' in ours


def test_the_writer_fails_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    # it fails in a helper process, and the parent waits for ever
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert filesystem_async._process_memory() > 0
    monkeypatch.setattr(filesystem_async, "HAVE_PSUTIL", False)
    with pytest.raises(RuntimeError, match="psutil is not installed"):
        filesystem_async._process_memory()
    writer = inspect.getsource(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
    assert writer.index("_process_memory()") < writer.index("try:")  # its error reaches no queue


def test_every_test_that_the_documentation_names_exists() -> None:
    text = (ROOT / "docs" / "megatron_core.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    files = (ROOT / "tests").rglob("test_*.py")
    defined = {
        name
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 30
    assert named - defined == set()


# --- layers


def test_the_tensor_group_is_passed_to_mlp_only_not_to_its_subclasses() -> None:
    from megatron.core.transformer.mlp import MLP

    from megashear.models import specs

    real = MLP.__init__

    def body(rank: int) -> list[bool]:
        seen = []

        def watched(self: Any, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs.get("tp_group") is not None)
            real(self, *args, **kwargs)

        MLP.__init__ = watched
        gpt_model()
        specs.MLP = type("OwnMLP", (MLP,), {})
        gpt_model()
        return seen

    layers = SOURCE.num_layers
    assert run_ranks(1, body) == [[True] * layers + [False] * layers]


@pytest.mark.parametrize(("method", "again"), [("uniform", 4), ("block", 3)])
def test_full_recompute_carries_attention_mask_with_each_microbatch(
    monkeypatch: pytest.MonkeyPatch, method: str, again: int
) -> None:
    seen: list[tuple[int, int]] = []
    given: list[tuple[Any, Any]] = []
    real = TransformerLayer.forward

    def watched(layer: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((kwargs["attention_mask"], kwargs["context_mask"]))
        return real(layer, *args, **kwargs)

    def before(layer: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        seen.append((int(kwargs["attention_mask"]), int(kwargs["context_mask"])))
        return args, kwargs | {"attention_mask": None, "context_mask": None}

    monkeypatch.setattr(TransformerLayer, "forward", watched)

    def body(rank: int) -> list[tuple[int, int]]:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": 1 if method == "uniform" else again,
        }
        model = gpt_model(**recompute)
        for (
            layer
        ) in model.decoder.layers:  # the layer takes both by name, and what the hook returns counts
            layer.register_forward_pre_hook(before, with_kwargs=True)
        tokens = torch.arange(8)[None]
        outputs = [
            model(
                tokens,
                tokens,
                torch.tensor([stream]),
                extra_block_kwargs={"context_mask": torch.tensor([stream + 1])},
            )
            for stream in (5, 9)
        ]
        for output in outputs:  # the first microbatch's backward, long after the second's forward
            output.sum().backward()
        assert set(given) == {(None, None)}
        return seen

    once = SOURCE.num_layers
    wanted = [5] * once + [9] * once + [5] * again + [9] * again
    assert run_ranks(1, body) == [[(stream, stream + 1) for stream in wanted]]


def test_layers_are_numbered_from_1_over_all_stages() -> None:
    def body(rank: int) -> list[list[int]]:
        parallel = layout(pp=2, vpp=2)
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local")
        return [[layer.layer_number for layer in unwrap(c).decoder.layers] for c in chunks]

    assert run_ranks(2, body) == [[[1], [3]], [[2], [4]]]


def test_the_mlp_takes_the_gate_first_and_the_up_projection_second() -> None:
    def body(rank: int) -> tuple[Tensor, ...]:
        mlp = gpt_model().decoder.layers[1].mlp
        x = torch.randn(5, 2, SOURCE.hidden_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return x, mlp.linear_fc1.weight.clone(), mlp.linear_fc2.weight.clone(), mlp(x)[0]

    [(x, fc1, fc2, y)] = run_ranks(1, body)
    first, second = fc1.chunk(2)
    assert relative_error(y, F.silu(x @ first.T) * (x @ second.T) @ fc2.T) < FLOAT32
    assert relative_error(y, F.silu(x @ second.T) * (x @ first.T) @ fc2.T) > 0.1


def test_the_mlp_gives_its_activation_the_whole_output_of_fc1() -> None:
    def body(rank: int) -> tuple[torch.Tensor, ...]:
        mlp = gpt_model().decoder.layers[0].mlp
        seen: list[torch.Tensor] = []

        def activation(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.chunk(2, dim=-1)[1]

        mlp.activation_func.forward = activation
        x = torch.randn(5, 2, SOURCE.hidden_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = mlp(x)[0]
            return seen[0], mlp.linear_fc1(x)[0], y, mlp.linear_fc2(seen[0].chunk(2, dim=-1)[1])[0]

    [(given, fc1, y, fc2)] = run_ranks(1, body)
    assert torch.equal(given, fc1)
    assert torch.equal(y, fc2)


def test_attention_without_a_rotary_table_leaves_queries_and_keys() -> None:
    from megatron.core.transformer.attention import SelfAttention

    def body(rank: int) -> list[bool]:
        gpt = gpt_model()
        attention = gpt.decoder.layers[0].self_attention
        x = torch.randn(5, 2, SOURCE.hidden_size, generator=torch.Generator().manual_seed(1))
        found = []
        for table in (None, gpt.rotary_pos_emb(5)):
            seen: list[torch.Tensor] = []

            def core(query: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
                seen.append(query)  # noqa: B023
                return query.flatten(-2)

            attention.core_attention.forward = core
            with torch.no_grad():
                SelfAttention.forward(attention, x, None, rotary_pos_emb=table)
                plain = attention.get_query_key_value_tensors(x)[0]
            found.append(torch.equal(seen[0], plain))
        return found

    assert run_ranks(1, body) == [[True, False]]


def test_rotary_tables_are_stretched_with_constants_of_megatron_core() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel

    named = inspect.signature(GPTModel.__init__).parameters
    assert [name for name in named if "scaling" in name] == ["rope_scaling", "rope_scaling_factor"]
    constants = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    assert constants["original_max_position_embeddings"].default == 8192

    def body(rank: int) -> None:
        rotary = gpt_model(bf16=True).rotary_pos_emb
        assert rotary.inv_freq.dtype == torch.float32
        assert "inv_freq" not in dict(rotary.named_buffers())
        assert rotary.get_emb(3).dtype == torch.float32
        before = rotary.get_freqs_non_repeated(3)
        rotary.inv_freq = rotary.inv_freq / 2
        assert torch.equal(rotary.get_freqs_non_repeated(3), before / 2)

    run_ranks(1, body)


def test_query_key_and_value_are_interleaved_by_group() -> None:
    def body(rank: int) -> tuple[Any, ...]:
        attention = gpt_model().decoder.layers[0].self_attention
        x = torch.randn(5, 2, SOURCE.hidden_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return x, attention.linear_qkv.weight.clone(), attention.get_query_key_value_tensors(x)

    [(x, weight, (query, key, value))] = run_ranks(1, body)
    groups, d = SOURCE.num_query_groups, SOURCE.head_dim
    each = weight.unflatten(0, (groups, -1))  # [groups, (heads per group + 2) * d, h]
    per_group = SOURCE.num_attention_heads // groups * d
    q, k, v = (rows.flatten(0, 1) for rows in each.split([per_group, d, d], dim=1))
    for found, rows in ((query, q), (key, k), (value, v)):
        assert relative_error(found, (x @ rows.T).unflatten(-1, (-1, d))) < FLOAT32
    stacked = weight.split([groups * per_group, groups * d, groups * d])  # the twin
    assert relative_error(key, (x @ stacked[1].T).unflatten(-1, (-1, d))) > 0.1


def test_the_model_asks_for_its_loss_with_labels_by_sequence_and_logits_by_place() -> None:
    from megatron.core.models.gpt import GPTModel

    from megashear.models.llama import Llama

    seen: list[tuple[torch.Size, torch.Size]] = []
    real = GPTModel.compute_language_model_loss

    def body(rank: int) -> tuple[Tensor, Tensor, list[tuple[torch.Size, torch.Size]]]:
        gpt = gpt_model()
        tokens, places = torch.arange(6).view(2, 3), torch.arange(3).expand(2, 3)

        def theirs(model: Any, labels: Tensor, logits: Tensor) -> Tensor:
            seen.append((labels.shape, logits.shape))
            return real(model, labels, logits)

        with torch.no_grad():
            ours = gpt(tokens, places, None, labels=tokens)
            Llama.compute_language_model_loss = theirs  # type: ignore[method-assign]
            return ours, gpt(tokens, places, None, labels=tokens), seen

    [(ours, theirs, [(labels, logits)])] = run_ranks(1, body)
    assert labels == (2, 3)
    assert logits == (3, 2, SOURCE.vocab_size)
    assert ours.shape == theirs.shape == (2, 3)
    assert relative_error(ours, theirs) < FLOAT32


@pytest.mark.parametrize("tp", [1, 2])
def test_linears_add_gradients_of_weights_to_their_buffer(tp: int) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    def body(rank: int) -> tuple[Tensor, Tensor, bool]:
        groups = ParallelGroups.create(layout(tp=tp))
        config = transformer_config(SOURCE, layout(tp=tp), ModelConfig(), variant="local")
        built = ColumnParallelLinear(
            6, 8, config=config, init_method=torch.nn.init.zeros_, bias=False,
            tp_group=groups.tensor,
        )  # fmt: skip
        weight = built.weight
        weight.main_grad = torch.ones_like(weight)
        weight.grad_added_to_main_grad = False
        x = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(1))
        y, _ = built(x)
        y.backward(torch.full_like(y, 0.5))
        wanted = 1.0 + 0.5 * x.flatten(0, 1).sum(dim=0).expand_as(weight)
        return weight.main_grad, wanted, weight.grad_added_to_main_grad

    for found, wanted, added in run_ranks(tp, body):
        assert relative_error(found, wanted) < FLOAT32
        assert added  # the hook of DDP checks this, or it would add the placeholder too


@pytest.mark.parametrize("tied", [False, True])
def test_modules_read_what_hides_their_weight_and_what_it_says_of_its_gradient(tied: bool) -> None:
    def body(rank: int) -> None:
        groups = ParallelGroups.create(layout())
        shape = dataclasses.replace(SOURCE, tied_embeddings=tied)
        chunks = build_llama(shape, groups, layout(), ModelConfig(), variant="local")
        gpt = unwrap(chunks[0])
        linear = gpt.decoder.layers[0].mlp.linear_fc2
        embedding, head = gpt.embedding.word_embeddings, gpt.output_layer
        shown = {}
        for name, module in (("linear", linear), ("embedding", embedding)):
            parameter = module.weight
            shown[name] = (2.0 * parameter.detach()).requires_grad_()
            shown[name].main_grad = torch.zeros_like(parameter)
            shown[name].grad_added_to_main_grad = False
            shown[name].zero_out_wgrad = True
            module.__dict__["weight"] = shown[name]
        tokens = torch.arange(6)[None]
        gpt(tokens, tokens, None, labels=tokens).sum().backward()
        # linear: the gradient is added to the buffer of the tensor, and zeros are returned
        assert shown["linear"].main_grad.any()
        assert shown["linear"].grad_added_to_main_grad
        assert not shown["linear"].grad.any()
        assert not linear._parameters["weight"].main_grad.any()
        # embedding: the gradient is returned; the tied output layer reads the hiding tensor
        assert shown["embedding"].grad.any()
        assert shown["embedding"].main_grad.any() == tied
        assert not embedding._parameters["weight"].main_grad.any()
        del linear.__dict__["weight"], embedding.__dict__["weight"]
        assert linear.weight is linear._parameters["weight"]
        if not tied:
            assert head.weight.main_grad.any()

    run_ranks(1, body)


@pytest.mark.parametrize(
    ("added", "zero_out", "wanted"), [(True, False, 0.0), (False, False, 3.0), (True, True, 3.0)]
)
def test_the_hook_of_ddp_comes_after_a_parameter_s_gradient_and_adds_it_unless_told(
    added: bool, zero_out: bool, wanted: float
) -> None:
    def body(rank: int) -> tuple[list[str], float]:
        groups = ParallelGroups.create(layout(overlap_grad_reduce=True))
        chunks = build_llama(
            SOURCE, groups, layout(overlap_grad_reduce=True), ModelConfig(), variant="local"
        )
        weight: Any = unwrap(chunks[0]).decoder.layers[0].mlp.linear_fc2.weight
        order = []

        class Shown(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, parameter: Tensor) -> Tensor:
                return parameter.detach()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                order.append("function")
                weight.grad_added_to_main_grad, weight.zero_out_wgrad = added, zero_out
                return gradient

        group = chunks[0].param_to_bucket_group[weight]
        group.register_grad_ready = lambda *given: order.append("reduction")
        (3.0 * Shown.apply(weight)).sum().backward()
        return order, float(weight.main_grad.unique())

    assert run_ranks(1, body) == [(["function", "reduction"], wanted)]


def test_masters_hang_on_their_weights_whole_or_a_rank_s_stretch_of_them() -> None:
    def body(rank: int) -> tuple[bool, int, int]:
        found = []
        for sharded in (False, True):
            parallel_state.destroy_model_parallel()
            parallel = layout(use_distributed_optimizer=sharded)
            chunks = build_llama(
                SOURCE, ParallelGroups.create(parallel), parallel, ModelConfig(bf16=True),
                variant="local",
            )  # fmt: skip
            weights: list[Any] = list(unwrap(chunks[0]).parameters())
            assert not any(hasattr(weight, "main_param") for weight in weights)
            build_optimizer(chunks, OptimizerConfig(), bf16=True, sharded=sharded)
            found.append(weights)
        plain, shared = found
        whole = all(
            weight.main_param.dtype == torch.float32
            and torch.equal(weight.main_param.bfloat16(), weight)
            and not hasattr(weight, "main_param_sharded")
            for weight in plain
        )
        assert all(weight.main_param_sharded for weight in shared)
        held = sum(w.main_param.numel() for w in shared if w.main_param is not None)
        return whole, held, sum(weight.numel() for weight in shared)

    found = run_ranks(2, body)
    assert all(whole for whole, _, _ in found)
    assert all(0 < held < size for _, held, size in found)
    assert sum(held for _, held, _ in found) == found[0][2]


@pytest.mark.parametrize("asked", [False, True])
def test_weights_are_gathered_by_a_hook_of_their_own_module_or_when_asked_for(asked: bool) -> None:
    def body(rank: int) -> list[set[float]]:
        parallel = layout(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
        groups = ParallelGroups.create(parallel)
        chunks = build_llama(SOURCE, groups, parallel, ModelConfig(), variant="local")
        layer = unwrap(chunks[0]).decoder.layers[0]
        weight: Any = layer.mlp.linear_fc2.weight
        with torch.no_grad():
            weight.fill_(float(rank))  # ranks differ until the weight is gathered
        found = []

        def before(*given: Any) -> None:
            group = chunks[0].param_to_bucket_group[weight]
            for _ in range(2 * asked):  # the second time there is nothing to do
                group.finish_param_sync()
            found.append(set(weight.unique().tolist()))

        layer.register_forward_pre_hook(before)
        layer(torch.zeros(6, 1, SOURCE.hidden_size), attention_mask=None)
        return [*found, set(weight.unique().tolist())]

    (first, gathered), other = run_ranks(2, body)
    assert [first, gathered] == ([gathered] * 2 if asked else [{0.0}, gathered])
    assert other == ([gathered] * 2 if asked else [{1.0}, gathered])


def test_the_fused_cross_entropy_rounds_its_gradient_to_bfloat16() -> None:
    from megatron.core.fusions import fused_cross_entropy

    compiled = fused_cross_entropy.calculate_gradients
    plain = getattr(compiled, "_torchdynamo_orig_callable", compiled)  # no compiler is needed
    softmax = torch.full((2, 1, 4), 0.25)
    gradient = plain(
        softmax, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool), torch.tensor([1, 2])
    )
    assert gradient.dtype == torch.bfloat16


def test_megatron_norms_refuse_sequence_parallelism() -> None:
    # why megashear has its own RMSNorm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=40,
        num_attention_heads=8,
        normalization="RMSNorm",
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config, 40)


# --- checkpoints


def test_saving_needs_a_process_group(tmp_path: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    def body(rank: int) -> None:
        entries = {"x": dist_checkpointing.ShardedTensor.from_rank_offsets("x", torch.ones(3))}
        dist.destroy_process_group()
        with pytest.raises(ValueError, match="process group"):
            dist_checkpointing.save(entries, str(tmp_path))

    run_ranks(1, body)


def test_a_vocabulary_of_another_size_would_be_loaded() -> None:
    def body(rank: int) -> set[str]:
        entries = gpt_model().sharded_state_dict()
        return {n for n, entry in entries.items() if getattr(entry, "allow_shape_mismatch", False)}

    loose = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert run_ranks(1, body) == [loose]


def test_linears_add_empty_byte_entries_that_a_checkpoint_must_have_if_asked_for(
    tmp_path: Path,
) -> None:
    from megatron.core import dist_checkpointing

    from megashear.checkpoint.weights import without_extra_state

    def body(rank: int) -> list[str]:
        entries = gpt_model().sharded_state_dict()
        extra = [name for name in entries if name.endswith("_extra_state")]
        (tmp_path / "without").mkdir()
        dist_checkpointing.save(without_extra_state(entries), str(tmp_path / "without"))
        # `except Exception` does not catch it
        with pytest.raises(CheckpointException, match=r"Missing key.*_extra_state"):
            dist_checkpointing.load(entries, str(tmp_path / "without"))
        dist_checkpointing.load(without_extra_state(entries), str(tmp_path / "without"))
        return extra

    [extra] = run_ranks(1, body)
    assert {name.split(".")[-2] for name in extra} >= {"linear_qkv", "linear_proj", "linear_fc1"}
    assert not issubclass(CheckpointException, Exception)


def test_forked_ranks_inherit_the_writers_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    # a process that saved before it forked must forget its queue, or ranks share one
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", "the parent's")
    assert (
        run_ranks(2, lambda rank: filesystem_async._get_write_results_queue())
        == ["the parent's"] * 2
    )


# --- data


@pytest.mark.parametrize(("cache", "beside"), [("", False), (None, True)])
def test_gpt_dataset_writes_beside_the_text_unless_the_cache_is_empty(
    tmp_path: Path, cache: str | None, beside: bool
) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    from megashear.data.sequences import _NoTokenizer

    prefix = str(tmp_path / "text")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in range(0, 60, 20):
        builder.add_document(torch.arange(start, start + 20), [20])
    builder.finalize(f"{prefix}.idx")
    text = IndexedDataset(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=8,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=cache,
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sequences = GPTDataset(
            text, prefix, np.arange(3, dtype=np.int32), None, Split.train, config
        )
    assert len(sequences) == (60 - 1) // 8
    assert Path(prefix, "cache").exists() == beside
    # the method below __getitem__ returns the text alone, one token longer
    for place in range(len(sequences)):
        tokens, _ = sequences._query_document_sample_shuffle_indices(place)
        assert tokens.dtype == np.int64
        assert tokens[:-1].tolist() == sequences[place]["tokens"].tolist()
        assert tokens[1:].tolist() == sequences[place]["labels"].tolist()
