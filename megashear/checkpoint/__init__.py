"""Runs and Hugging Face directories on disk; conversion and the cut."""
