"""Downstream tasks of lm-evaluation-harness: found, loaded, and those of the paper."""
