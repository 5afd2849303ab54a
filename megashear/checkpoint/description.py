"""Find the iterations of a Megatron checkpoint, and read and write their descriptions."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megashear.checkpoint.details import HF_CONFIG, LINEAGE, RunDetails
from megashear.checkpoint.hf_fields import kept_fields
from megashear.files import durable, integrity
from megashear.files.integrity import DamagedError, FileSum
from megashear.files.regular import read_bytes
from megashear.files.structured import check_fields, read_json_object
from megashear.shape import ModelShape

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
"""Text file that names the newest whole iteration, as Megatron-LM writes it."""
TRACKER_BYTES = 64
"""Largest tracker file that is read, bytes."""
DESCRIPTION = "megashear.json"
TOKENIZER = "tokenizer"
"""Folder of an iteration with the tokenizer's files."""
EVALUATION = "evaluation.json"
"""File of losses measured after an iteration was saved; valid once the list of checksums has it."""
FORMAT = 2
"""Version of the format of these directories, raised when an older megashear cannot read it, or
must not trust it: from 2 on there is a list of checksums."""
FIRST_FORMAT = 1

_ITERATION = re.compile(r"iter_([0-9]{7,})")


class MisnamedError(DamagedError):
    """An iteration's directory was renamed, or is a link to another iteration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Content of ``megashear.json``: all that the tensors of a checkpoint do not say."""

    shape: ModelShape
    """Extents of the model."""
    iteration: int
    """Training steps that were done."""
    stage: str
    """Stage that made the checkpoint: "converted", "cut", "prune", "pretrain" ..."""
    tokenizer_sha256: str | None = None
    """Fingerprint of the tokenizer (`tokenizer_files.fingerprint`), if the checkpoint has one."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """``bos_token_id`` and the like, as Hugging Face's config.json has them."""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values that the stage adds."""

    @property
    def known(self) -> RunDetails:
        """Return the details with their types; `read_description` has refused all others."""
        return RunDetails.of(self.details)

    @property
    def lineage(self) -> dict[str, Any]:
        """Return the details of the pruning that a model came from; later stages keep them."""
        return {name: self.details[name] for name in LINEAGE if name in self.details}

    @property
    def hf_config(self) -> dict[str, Any]:
        """Return the part of the details that every later stage keeps for config.json.

        Even of a foreign checkpoint, it holds no more than `hf_fields.KEPT` names.
        """
        kept = kept_fields(self.known.hf_config)
        return {HF_CONFIG: kept} if kept else {}


def iteration_name(iteration: int) -> str:
    """Return the name of an iteration's directory, as Megatron-LM spells it."""
    return f"iter_{iteration:07d}"


def iterations(checkpoint: Path) -> dict[int, Path]:
    """Return the directories of all iterations by number, newest first, whole or not."""
    found = {
        int(name[1]): path
        for path in checkpoint.iterdir()
        if (name := _ITERATION.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def holds_iterations(checkpoint: Path | str | None) -> bool:
    """Return whether a directory holds any iteration, whole or not; False for None."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        return False
    return (Path(checkpoint) / TRACKER).is_file() or bool(iterations(Path(checkpoint)))


def candidates(checkpoint: Path | str, iteration: int | None = None) -> list[Path]:
    """Return the directories that a reader of a checkpoint may take, best first.

    Args:
        checkpoint: the checkpoint's directory, or directly one iteration's.
        iteration: the iteration to take; by default the one that the tracker names, then older
            ones, then newer ones that the tracker never named.

    Raises:
        ValueError: there is none, or not this one; those that exist are named.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"no checkpoint at {checkpoint}: it is not a directory")
    if iteration is None and is_iteration(checkpoint):
        return [checkpoint]
    found = iterations(checkpoint)
    if iteration is not None:
        if iteration not in found:
            names = ", ".join(path.name for path in found.values()) or "none"
            raise ValueError(
                f"checkpoint {checkpoint} has no {iteration_name(iteration)}; it has {names}"
            )
        return [found[iteration]]
    try:
        newest = latest_iteration(checkpoint)
    except ValueError as error:
        if not found:
            raise
        logger.warning("%s; going by the directories that are there", error)
        newest = None
    if not found:
        way_out = (
            f"; {TRACKER} names {iteration_name(newest)}, which is missing"
            if newest is not None
            else f": it has no {TRACKER}; it is a Hugging Face directory: convert it first, or, to "
            f"prune, pretrain or evaluate, name it with --load-hf"
            if (checkpoint / "config.json").is_file()
            else f": it has no {TRACKER}, nor is it a Hugging Face directory, with a config.json"
        )
        raise ValueError(f"no checkpoint at {checkpoint}{way_out}")
    if newest is not None and newest not in found:
        logger.warning(
            "%s names %s, which is missing", checkpoint / TRACKER, iteration_name(newest)
        )
    named = [path for number, path in found.items() if newest is None or number <= newest]
    return named + [path for path in found.values() if path not in named]


def find_iteration(
    checkpoint: Path | str, iteration: int | None = None, *, contents: bool = False
) -> Path:
    """Return the directory of one iteration of a checkpoint, by default the newest whole one.

    A damaged iteration is skipped with a warning, unless it was asked for by name or number.

    Args:
        checkpoint: the checkpoint's directory, or directly one iteration's.
        iteration: the iteration to take; by default the newest whole one.
        contents: compare the checksums of all files; otherwise those of small files, and the sizes
            of files that hold tensors.

    Raises:
        ValueError: there is none, or not this one; those that exist are named.
        DamagedError: the one asked for is damaged, or all are; each is named with its damage.
    """
    damage = []
    tried = candidates(checkpoint, iteration)
    for directory in tried:
        try:
            check_whole(directory, contents=contents)
        except DamagedError as error:
            if iteration is not None or directory == Path(checkpoint):
                raise
            damage.append(str(error))
            if directory != tried[-1]:
                logger.warning("skipping %s: %s", directory.name, error)
        else:
            return directory
    raise none_whole(checkpoint, damage)


def none_whole(checkpoint: Path | str, damage: Sequence[str]) -> DamagedError:
    """Return the error for a checkpoint whose iterations are all damaged, as ``damage`` says."""
    return DamagedError(
        f"no whole checkpoint in {checkpoint}; tried, newest first: {'; '.join(damage)}; copy one "
        f"there again, or start from another with --load"
    )


def check_whole(directory: Path, *, contents: bool = True) -> None:
    """Compare one iteration with its list of checksums.

    Args:
        directory: an iteration's directory.
        contents: read all files; otherwise compare only the sizes of files that hold tensors.

    Raises:
        DamagedError: a file is missing or not what was written.
        MisnamedError: the directory is named for another step.
        ValueError: the format is newer.
    """
    sums = checksums(directory)
    if sums is None:
        check_name(directory)
        return
    integrity.verify(directory, contents=contents)
    if not contents:
        integrity.verify(directory, [name for name in sums if not name.endswith(".distcp")])
    check_name(directory)


def checksums(directory: Path) -> dict[str, FileSum] | None:
    """Return the sums of an iteration's files by name; None where an older megashear wrote none.

    Raises:
        DamagedError: there should be a list, and it is missing or damaged.
    """
    if not (directory / integrity.CHECKSUMS).exists() and _format(directory) == FIRST_FORMAT:
        logger.warning("%s has no checksums, for an older megashear wrote it", directory)
        return None
    sums = integrity.read(directory)
    if DESCRIPTION not in sums:
        raise DamagedError(f"{directory} has no {DESCRIPTION}: not written by megashear")
    return sums


def is_iteration(directory: Path) -> bool:
    """Return whether a directory is one iteration, and not a checkpoint of several."""
    return (
        (directory / DESCRIPTION).is_file()
        or (directory / integrity.CHECKSUMS).is_file()
        or _ITERATION.fullmatch(directory.name) is not None
    )


def latest_iteration(checkpoint: Path) -> int | None:
    """Return the newest whole iteration by the tracker file; None before the first save.

    Raises:
        ValueError: the tracker holds anything but a number.
    """
    tracker = checkpoint / TRACKER
    if not tracker.is_file():
        return None
    text = read_bytes(tracker, TRACKER_BYTES).decode("utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{tracker} holds {text!r}, wanted the number of an iteration")
    return int(text)


def write_description(directory: Path, description: Description) -> None:
    """Write ``directory/megashear.json``, in one step.

    Raises:
        OSError: it cannot be written.
    """
    values = {"format": FORMAT, **dataclasses.asdict(description)}
    durable.replace(directory / DESCRIPTION, json.dumps(values, indent=2) + "\n")


def add_details(directory: Path, details: Mapping[str, Any]) -> None:
    """Add plain values to an iteration that is visible already, in one step and only once.

    Raises:
        DamagedError: its list of checksums is not whole.
        OSError: they cannot be written.
    """
    integrity.add(directory, EVALUATION, json.dumps(dict(details), indent=2) + "\n")


def read_description(directory: Path) -> Description:
    """Read ``directory/megashear.json``, and the details that were added later.

    Raises:
        DamagedError: the file is missing or broken, or a value has another type.
        ValueError: the format is newer, or megashear does not know the model.
    """
    path = directory / DESCRIPTION
    found, values = _format(directory), _values(path)
    if found not in (FIRST_FORMAT, FORMAT):
        raise ValueError(
            f"{path} is of format {found}, this megashear reads {FORMAT}; use the megashear that "
            f"wrote it"
        )
    del values["format"]
    later = directory / EVALUATION
    try:
        check_fields(Description, values)
        # a file that is not listed was not written to its end
        if later.is_file() and later.name in integrity.read(directory):
            values["details"] |= _values(later)
        values["shape"] = ModelShape(**values["shape"])
        description = Description(**values)
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is broken: {error}") from None
    try:
        RunDetails.of(description.details)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path}: in its details, {error}; copy the checkpoint again") from None
    return description


def check_name(directory: Path) -> None:
    """Refuse an iteration whose directory is named for another step; other names are free.

    Raises:
        MisnamedError: the directory is named for another step.
        DamagedError: the description cannot be read.
    """
    name = _ITERATION.fullmatch(directory.name)
    step = _values(directory / DESCRIPTION).get("iteration")
    if name is not None and isinstance(step, int) and step != int(name[1]):
        raise MisnamedError(
            f"{directory} is of step {step}, as its {DESCRIPTION} says: it was renamed, or is a "
            f"link; name it {iteration_name(step)}, or move it elsewhere"
        )


def _format(directory: Path) -> Any:
    """Return the format that megashear.json names."""
    path = directory / DESCRIPTION
    try:
        return _values(path)["format"]
    except KeyError:
        raise DamagedError(f"{path} is broken: no JSON object with a format in it") from None


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DamagedError(
            f"{path.parent} has no {path.name}: not written by megashear, or not to the end"
        )
    try:
        return read_json_object(path, "it")
    except ValueError as error:
        raise DamagedError(
            f"{path} is broken: no JSON object with a format in it ({error})"
        ) from None
