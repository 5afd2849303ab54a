"""Models in the formats of Hugging Face, Megatron-LM and LLM-Shearing, read and written."""
