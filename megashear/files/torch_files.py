"""Map files of torch.save into memory and read them without running what is in them."""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.files.pointers import refuse_pointer
from megashear.files.regular import open_regular

_ZIP = b"PK"
"""First bytes of the format that torch.save writes since release 1.6, which can be mapped."""


class Unread:
    """Placeholder of an object that is not needed, which is neither imported nor made."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@contextlib.contextmanager
def only_known(known: Sequence[tuple[type, str]] = ()) -> Iterator[None]:
    """Let torch.load with ``weights_only`` make tensors, plain values and what is named here.

    Importing megatron-core adds a dozen classes to torch's list for the whole process; what a file
    may hold must not depend on that.

    Args:
        known: what to make, by the full name that a file wants.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(known))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def unread(names: Iterable[str]) -> list[tuple[type, str]]:
    """Return entries for `only_known` that read the objects of these names as `Unread`."""
    # each name its own class, for torch knows what it lets pass by identity too
    return [(type(Unread.__name__, (Unread,), {}), name) for name in names]


def load_mapped(path: Path, *, passed_over: Collection[str] = ()) -> Any:
    """Read a torch.save file: plain containers, and tensors that remain on disk until used.

    Args:
        path: the file.
        passed_over: packages whose objects may lie beside the tensors; each is read as `Unread`.

    Raises:
        ValueError: no such file, an old format, a damaged file, or one that wants anything else
            when it is read (the thing is named).
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    refuse_pointer(path)
    with open_regular(path) as file:
        if file.read(len(_ZIP)) != _ZIP:
            raise ValueError(
                f"{path} is not in the format that torch.save writes since release 1.6; load it "
                f"where it is trusted, and save it again"
            )
    try:
        with only_known():
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known = [name for name in wanted if name.partition(".")[0] in passed_over]
        with only_known(unread(known)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # only this part of torch's message: the rest explains how to load the file anyway
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to load {found[1]}" if found else "is no plain torch.save file"
        raise ValueError(
            f"{path} {what} when it is read; only tensors and plain values are, because anything "
            f"else could run code; refused"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        # the list of a zip archive is at its end
        way_out = (
            "save its tensors by name with torch.save, where it can be loaded"
            if zipfile.is_zipfile(path)
            else "it is truncated or damaged: download or write it again"
        )
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as weights by name: "
            f"{str(error).splitlines()[0]}; {way_out}"
        ) from None


def tensors_of(found: Any, where: str) -> dict[str, Tensor]:
    """Return tensors by name, where ``found`` is a mapping of nothing else.

    Raises:
        ValueError: it is not; ``where`` names it.
    """
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{where} holds a {type(found).__name__}, not weights by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {name} is a {type(tensor).__name__}, not a tensor")
    return {name: tensor.detach() for name, tensor in found.items()}
