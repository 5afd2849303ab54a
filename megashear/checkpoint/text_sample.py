"""TextSample: a text as a run's model continues it, as the run's last checkpoint keeps it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megashear.files.structured import check_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSample:
    """A held-out text, what a model makes of its beginning, and how it really goes on."""

    domain: str
    prompt: str
    """Beginning of the text, which the model read."""
    continuation: str
    """What the model wrote, the likeliest token each time."""
    original: str
    """What follows in the text, as long as the continuation may be."""

    @classmethod
    def read(cls, values: Any) -> TextSample:
        """Return an entry of a checkpoint.

        Raises:
            TypeError: a value has another type than its field, or is missing.
        """
        check_fields(cls, values)
        names = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
