"""The quickstart: the whole path on one machine, from text to a sheared Hugging Face model."""
