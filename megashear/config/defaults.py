"""Defaults that flags share with the functions they reach."""

from __future__ import annotations

from typing import Final

SEED = 1234
"""Seed of the data order, the mask noise and fresh weights."""
INIT_METHOD_STD = 0.02
"""Standard deviation of fresh weights."""
ADAM_BETAS = (0.9, 0.95)
"""Decays of Adam's first and second moment, of weights and of masks."""
ADAM_EPS = 1e-8
CLIP_GRAD = 1.0
"""Largest norm of a gradient."""
LAMBDA2_MAX = 500.0
"""Bound of the quadratic multipliers of the sparsity constraint."""
TIMEOUT_MINUTES = 10.0
"""Minutes without progress after which a rank counts as hung."""

JSON_KEY: Final = "text"
"""Key of the text in a line of JSON."""
HELD_OUT_FRACTION = 0.02
"""Share of documents that are held out."""
TOKENS_DTYPE: Final = "uint16"
"""Type of the token ids in MDS shards, as LLM-Shearing writes them."""
MAX_DOCUMENT_MB = 100
"""Longest document that is read, MB: some 25 million tokens. A longer one is seldom meant, and
takes some 10 bytes of memory for each of its own."""
MOST_DOCUMENT_MB = 2000
"""Longest limit of a document, MB: its tokens are counted in an int32."""
