"""Builds this rank's chunks of a LLaMA as GPTModels of megatron-core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal
from torch import Tensor

from megashear.config import ModelConfig, ParallelConfig, TransformerImpl
from megashear.config.defaults import INIT_METHOD_STD, SEED
from megashear.models import weight_table
from megashear.models.core import RotaryTable, VocabularyPadding, rotary_frequencies
from megashear.models.cross_entropy import vocab_parallel_cross_entropy
from megashear.models.specs import block_spec
from megashear.parallel import device
from megashear.parallel.groups import ParallelGroups
from megashear.shape import ModelShape

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
"""Names in a GPTModel of the two matrices with a row for every token."""

_STAGE_SEED = 100
"""Distance between the seeds of neighbouring stages. Source: Megatron-LM's initialisation."""


def check_layout(shape: ModelShape, parallel: ParallelConfig, *, role: str = "model") -> None:
    """Refuse a shape that the layout cannot divide.

    Args:
        shape: the shape to divide.
        parallel: the layout.
        role: the shape's role for the message: model, source, target.

    Raises:
        ValueError: with the extent, the size that does not divide it, and sizes that do.
    """
    shape.check_division(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual=parallel.num_virtual_stages_per_pipeline_rank,
        role=role,
    )


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    variant: TransformerImpl,
    init_method_std: float = INIT_METHOD_STD,
) -> TransformerConfig:
    """Return megatron-core's configuration of a LLaMA of this shape, layout and kind of layers."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    recompute = model.recompute_granularity
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        # makes megatron-core call our SwiGLU as it would call Transformer Engine's activations
        use_te_activation_func=variant != "transformer_engine",
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        # also makes megatron-core sum the gradients of these norms over tensor ranks, because each
        # of them sees only its own heads
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # no fused kernels that need Apex or Transformer Engine
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        # gradients of weights go straight into DDP's buffer, by Transformer Engine, Apex or
        # `kernel_choice.add_product`
        gradient_accumulation_fusion=True,
        persist_layer_norm=False,
        use_cpu_initialization=not device.has_cuda(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.bf16,
        init_method=init_method_normal(init_method_std),
        output_layer_init_method=scaled_init_method_normal(init_method_std, shape.num_layers),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=recompute,
        recompute_method=model.recompute_method if recompute else None,
        recompute_num_layers=model.recompute_num_layers if recompute else None,
        deterministic_mode=model.deterministic_mode,
        **pipeline_settings(parallel),
    )


def pipeline_settings(parallel: ParallelConfig) -> dict[str, bool]:
    """Return fields of TransformerConfig that keep the gradients of a pipeline right.

    Batched sends under the interleaved schedule with two stages, and outputs deallocated while
    sends overlap, both give wrong gradients without an error (docs/megatron_core.md).
    """
    return {
        "batch_p2p_comm": False,
        "overlap_p2p_comm": parallel.overlap_p2p_communication,
        "deallocate_pipeline_outputs": parallel.pipeline_model_parallel_size > 1
        and not parallel.overlap_p2p_communication,
    }


def build_llama(
    shape: ModelShape,
    groups: ParallelGroups,
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    variant: TransformerImpl,
    init_method_std: float = INIT_METHOD_STD,
    seed: int = SEED,
    tokens_count_alike: bool = False,
) -> list[DistributedDataParallel]:
    """Build this rank's chunks, wrapped for data parallelism. Collective over the world.

    The wrapper allocates the gradients. `build_chunks` does not, for evaluations.

    Args:
        shape: the whole model.
        groups: ranks and groups of this process.
        parallel: the layout.
        model: precision, recompute.
        variant: kind of layers; masks need local ones.
        init_method_std: standard deviation of fresh weights.
        seed: seed of fresh weights.
        tokens_count_alike: whether the loss of a step is the mean over the counted tokens of its
            global batch, however many each microbatch has; else the mean over microbatches.

    Returns:
        One chunk, or one per virtual stage.

    Raises:
        ValueError: the shape does not divide.
    """
    chunks = build_chunks(
        shape,
        groups,
        parallel,
        model,
        variant=variant,
        init_method_std=init_method_std,
        seed=seed,
    )
    config = unwrap(chunks[0]).config
    config.calculate_per_token_loss = tokens_count_alike
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.bf16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
    )
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp,
            module=chunk,
            # Later chunks of an interleaved schedule reduce while earlier ones still compute, so
            # buckets would gain nothing. Source: Megatron-LM's get_model.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        # fresh weights must be equal in every replica
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = (
        [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    )
    return wrapped


def build_chunks(
    shape: ModelShape,
    groups: ParallelGroups,
    parallel: ParallelConfig,
    model: ModelConfig,
    *,
    variant: TransformerImpl,
    init_method_std: float = INIT_METHOD_STD,
    seed: int = SEED,
) -> list[torch.nn.Module]:
    """Build this rank's chunks without memory for gradients; see `build_llama`."""
    check_layout(shape, parallel)
    # each stage draws its own layers; tensor ranks of a stage draw alike and keep their slices
    device.seed_model_parallel(seed + _STAGE_SEED * groups.pipeline_rank)
    config = transformer_config(
        shape, parallel, model, variant=variant, init_method_std=init_method_std
    )
    return [
        _build_chunk(shape, groups, config, variant, number if groups.virtual_size > 1 else None)
        for number in range(groups.virtual_size)
    ]


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather the weights that other replicas stepped, without a forward pass of training.

    Whoever reads weights after a step, other than in the next step's forward pass, must call this
    first: megatron-core would evaluate and save old weights without an error. Collective over the
    data group under --overlap-param-gather. Otherwise the step has gathered them, and this does
    nothing.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside data-parallel and mixed-precision wrappers."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def own_layers(chunks: Sequence[torch.nn.Module]) -> tuple[int, ...]:
    """Return the global numbers, from 0, of the layers in this rank's chunks, rising."""
    layers = (layer for chunk in chunks for layer in unwrap(chunk).decoder.layers)
    return tuple(sorted(layer.layer_number - 1 for layer in layers))  # megatron counts from 1


def names_in_whole(gpt: GPTModel, shape: ModelShape) -> dict[str, str]:
    """Return for the name of each parameter of a chunk its name in the weight table.

    The table numbers layers globally, and it names the last stage's copy of a tied embedding as the
    embedding.
    """
    numbers = {str(n): str(layer.layer_number - 1) for n, layer in enumerate(gpt.decoder.layers)}
    names = {}
    for name, _ in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = numbers[parts[2]]
        is_copy = shape.tied_embeddings and name == OUTPUT
        names[name] = EMBEDDING if is_copy else ".".join(parts)
    return names


class Llama(GPTModel):
    """GPTModel with the cross entropy of `cross_entropy`."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the cross entropy of each token, float32 [b, s].

        Args:
            labels: int64 [b, s].
            logits: [s, b, vocab/tp]; overwritten, see `vocab_parallel_cross_entropy`.
        """
        by_place = labels.transpose(0, 1)  # [s, b]
        loss = vocab_parallel_cross_entropy(logits, by_place, self.pg_collection.tp)
        return loss.transpose(0, 1)


def _build_chunk(
    shape: ModelShape,
    groups: ParallelGroups,
    config: TransformerConfig,
    variant: TransformerImpl,
    vp_stage: int | None,
) -> torch.nn.Module:
    first = groups.is_first_stage and vp_stage in (None, 0)
    last = groups.is_last_stage and vp_stage in (None, groups.virtual_size - 1)
    gpt = Llama(
        config=config,
        transformer_layer_spec=block_spec(config, variant, vp_stage=vp_stage),
        vocab_size=weight_table.padded_vocab_size(shape, groups.tensor_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        vp_stage=vp_stage,
    )
    if variant == "transformer_engine":
        # megatron-core stretches only one kind of table, and with its own constants
        gpt.rotary_pos_emb.inv_freq = rotary_frequencies(shape).to(device.device())
    else:
        gpt.rotary_pos_emb = RotaryTable(shape, device.device())
    gpt.num_tokens = shape.vocab_size  # gpt.vocab_size counts the padding too
    if gpt.vocab_size != gpt.num_tokens:
        _close_padding(
            gpt, weight_table.own_vocab_size(shape, groups.tensor_size, groups.tensor_rank)
        )
    gpt.to(device.device())
    return Float16Module(config, gpt) if config.bf16 else gpt


def _close_padding(gpt: GPTModel, num_own: int) -> None:
    """Set the padding rows of this rank to zero, and keep them out of the loss."""
    with torch.no_grad():
        for name, weight in gpt.named_parameters():
            if name in (EMBEDDING, OUTPUT):
                weight[num_own:] = 0.0
    if gpt.post_process:
        gpt.output_layer.register_forward_hook(VocabularyPadding(num_own))
