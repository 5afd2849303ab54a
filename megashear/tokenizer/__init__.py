"""Tokenizers: the ids of text, whatever files they come in."""
