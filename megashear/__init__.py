"""megashear: structured pruning of LLaMA models, model-parallel on megatron-core."""

__version__ = "0.1.0"
