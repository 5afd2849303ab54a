"""Which fields of a Hugging Face config.json are read, are harmless, or change what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields that change what a model computes, and the values under which they change nothing here.
# Absent or null is always fine.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "quantization": (),
    "quantization_config": (),
    # other names for the same, of other tools: stock transformers reads none of them
    **dict.fromkeys(("rotary_percent", "rotary_pct", "rope_pct", "rotary_fraction"), (1.0,)),
    **dict.fromkeys(("rope_interleaved", "rotary_interleaved", "rope_traditional"), (False,)),
    **dict.fromkeys(("rope_ratio", "rope_condense_ratio", "rope_scaling_factor"), (1.0,)),
    **dict.fromkeys(("is_llama_config", "gated_mlp", "use_rope", "use_rotary_embeddings"), (True,)),
    **dict.fromkeys(("position_embedding_type", "position_embeddings"), ("rope", "rotary")),
    **dict.fromkeys(("norm_type", "normalization"), ("rmsnorm", "RMSNorm", "rms_norm", "rms")),
    **dict.fromkeys(("activation", "mlp_activation"), ("silu", "swiglu", "swish")),
    **dict.fromkeys(("hidden_activation", "activation_function"), ("silu", "swish")),
    **dict.fromkeys(("bias", "use_bias", "qkv_bias", "use_qkv_bias", "add_bias"), (False,)),
    **dict.fromkeys(("attention_out_bias", "lm_head_bias", "output_bias"), (False,)),
    **dict.fromkeys(("qk_layernorm", "qk_layer_norms", "use_parallel_residual"), (False,)),
    **dict.fromkeys(("parallel_attn", "alibi", "use_alibi", "use_dynamic_ntk"), (False,)),
    **dict.fromkeys(("use_logn_attn", "layer_sharing", "use_resampler"), (False,)),
    **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_nextn_predict_layers"), (0,)),
    "auto_map": (),
}
WAYS_OUT = {
    "quantization_config": "save the model in float32, bfloat16 or float16 first",
    "auto_map": "code from a model directory is never run: save the model as a stock "
    "LlamaForCausalLM",
    "quantization": "save the model in float32, bfloat16 or float16 first",
    "use_sliding_window": "layers that see a window each are not supported",
}
# Fields that `shape_of_config` and `convert` read.
READ = {
    "architectures",
    "model_type",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
# Fields without effect on what the model computes from tokens: how it was made and stored, how it
# is trained, which extras its forward pass returns, how text is drawn from it, classification.
# Names that begin with an underscore are bookkeeping of transformers and pass as well.
# Source: transformers `PreTrainedConfig`, releases 4 and 5, and the families' own configurations.
HARMLESS = {
    *("transformers_version", "torch_dtype", "dtype", "name_or_path", "attn_implementation"),
    *("attention_dropout", "hidden_dropout", "initializer_range", "use_cache", "pretraining_tp"),
    *("max_sequence_length", "model_max_length", "max_window_layers", "tokenizer_class", "prefix"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict"),
    *("return_dict_in_generate", "torchscript", "tf_legacy_loss", "use_bfloat16", "is_decoder"),
    *("tie_encoder_decoder", "tie_last_hidden_states", "keys_to_ignore_at_inference"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("task_specific_params", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "bad_words_ids", "max_length", "min_length", "max_new_tokens"),
    *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
    *("exponential_decay_length_penalty", "remove_invalid_values"),
    *("unsloth_fixed", "unsloth_version", "neftune_noise_alpha", "gradient_checkpointing"),
    # which kernel computes the same
    *("use_flash_attn", "use_flash_attention", "use_flash_attention_2", "flash_attention"),
    *("flash_attn_2_enabled", "use_sdpa", "use_xformers", "use_memory_efficient_attention"),
    # dropout and loss while training
    *("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "resid_dropout", "embedding_dropout"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "loss_type"),
    *("router_aux_loss_coef", "output_router_logits", "label_smoothing"),
    # how text is drawn, and notes of those who made the model
    *("transformers.js_config", "cache_implementation", "min_p", "num_logits_to_keep"),
    *("forced_decoder_ids", "renormalize_logits", "chat_template", "eos_token", "bos_token"),
    *("pad_token", "model_name", "license", "mergekit_version", "use_reentrant_checkpointing"),
}

KEPT: dict[str, float | bool] = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
"""Fields that are not used here and go back out as they came in, for those who train on; what is
written of a model that came without them."""


def kept_fields(config: Mapping[str, Any]) -> dict[str, float | bool]:
    """Return the `KEPT` fields of a config.json, as far as they are there and of their kind."""
    return {
        name: config[name]
        for name, default in KEPT.items()
        if isinstance(config.get(name), int | float)
        and isinstance(config[name], bool) == isinstance(default, bool)
    }
