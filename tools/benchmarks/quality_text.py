"""Make eight domains of real text, of unlike difficulty, from Debian's packages and from Python.

    python tools/benchmarks/quality_text.py --output runs/text

Every domain is a jsonl file in OUTPUT/text; OUTPUT/sources.json has the packages with their
versions, and the documents and bytes of every domain. Packages are fetched with `apt-get download`
and unpacked in a temporary folder: nothing is installed. Where that is not possible, the four
domains of the quickstart are made, which any Python installation has.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

from megashear.quickstart.text import python_code, write_domains

MOST_BYTES = 12_000_000
"""Most bytes of a domain: about 4 M tokens, so that no domain is most of the text."""
LONGEST_DOCUMENT = 16_000
"""Most characters of a document: a longer text is cut into several, because one of a megabyte
would be most of a held-out set."""
_CHUNK_LINES = 120
"""Lines of a document that is cut from one long text, such as a dictionary."""
_KERNEL = ("kernel", "mm", "block", "crypto", "lib", "net", "fs")
"""Folders of the Linux sources that are read: code that people wrote, without the drivers' long
tables of registers."""

Unpacked = dict[str, Path]
"""Folder of each package's files."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the domains, print their sizes, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="Directory; must not exist.")
    args = parser.parse_args(argv)
    if args.output.exists():
        print(f"--output {args.output} exists; choose another", file=sys.stderr)
        return 2
    for name, each in make_text(args.output)["domains"].items():
        print(f"{name:12} {each['documents']:6} documents {each['bytes'] / 1e6:6.1f} MB")
    return 0


def make_text(output: Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Write ``output/text/<domain>.jsonl`` and ``output/sources.json``; return what the latter has.

    Args:
        output: directory to make.
        most_bytes: most bytes of a domain.

    Raises:
        ValueError: neither packages nor this Python installation have text.
    """
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpacked = fetch(PACKAGES, Path(folder))
        except OSError as error:
            print(f"no packages ({error}): taking text of this Python", file=sys.stderr)
            sizes = write_domains(output / "text")
            domains = {name: {"bytes": size} for name, size in sizes.items()}
            versions = {}
        else:
            domains = {
                name: write_domain(
                    output / "text" / f"{name}.jsonl", documents(unpacked), most_bytes
                )
                for name, documents in DOMAINS.items()
            }
            versions = {name: version_of(each) for name, each in unpacked.items()}
    found = {"domains": domains, "packages": versions | {"python": platform.python_version()}}
    (output / "sources.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def fetch(packages: Sequence[str], folder: Path) -> Unpacked:
    """Download and unpack Debian packages of this machine's release.

    Raises:
        OSError: there is no apt-get here, or it cannot fetch one of them.
    """
    status = subprocess.run(
        ["apt-get", "download", "-qq", *packages], cwd=folder, stderr=subprocess.PIPE, check=False
    )
    if status.returncode:
        raise OSError(f"apt-get download: {status.stderr.decode().strip().splitlines()[:1]}")
    found = {}
    for archive in sorted(folder.glob("*.deb")):
        name = archive.name.split("_")[0]
        found[name] = folder / name
        found[name].mkdir()
        for part in (["-x"], ["-e"]):
            place = found[name] / ("files" if part == ["-x"] else "control")
            subprocess.run(["dpkg-deb", *part, archive, place], check=True)
    return found


def version_of(package: Path) -> str:
    """Return the version that a package's control file names."""
    lines = (package / "control/control").read_text(encoding="utf-8").splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Version:"))


def write_domain(path: Path, texts: Iterator[str], most_bytes: int) -> dict[str, int]:
    """Write a domain: equal documents once, in an order of their own, up to ``most_bytes``.

    Returns:
        Number of documents and of bytes.
    """
    # By their digests: any limit of bytes then takes documents of all folders.
    chosen = {
        hashlib.blake2b(piece.encode(), digest_size=16).digest(): piece
        for text in texts
        for piece in pieces(text)
        if piece.strip()
    }
    path.parent.mkdir(exist_ok=True)
    size = documents = 0
    with path.open("w", encoding="utf-8") as file:
        for _, text in sorted(chosen.items()):
            size += len(text.encode())
            if size > most_bytes:
                size -= len(text.encode())
                break
            file.write(json.dumps({"text": text}) + "\n")
            documents += 1
    return {"documents": documents, "bytes": size}


def pieces(text: str) -> Iterator[str]:
    """Yield parts of whole lines, each of at most `LONGEST_DOCUMENT` characters."""
    part: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if len(line) > LONGEST_DOCUMENT:
            continue  # data, not text
        if size + len(line) > LONGEST_DOCUMENT:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


# Domains


def kernel_code(packages: Unpacked) -> Iterator[str]:
    """Yield C of the Linux kernel, a document per file."""
    (archive,) = packages["linux-source-6.1"].rglob("linux-source-*.tar.xz")
    with tarfile.open(archive, "r|xz") as members:
        for member in members:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix in (".c", ".h") and path.parts[1] in _KERNEL:
                content = members.extractfile(member)
                assert content is not None
                yield from _decoded(content.read())


def manuals(packages: Unpacked) -> Iterator[str]:
    """Yield English manuals of programs, a document per page of HTML."""
    for name in ("postgresql-doc-15", "git-doc", "apache2-doc"):
        for path in sorted((packages[name] / "files").rglob("*.html")):
            # Apache's manual has a folder for each language; the others are in English
            if name != "apache2-doc" or "en" in path.parts:
                for text in _decoded(path.read_bytes()):
                    yield text_of_html(text)


def english_pages(packages: Unpacked) -> Iterator[str]:
    """Yield English manual pages, as roff."""
    for name in ("manpages", "manpages-dev"):
        yield from _man_pages(packages[name])


def translated_pages(packages: Unpacked) -> Iterator[str]:
    """Yield manual pages in German, French and Spanish, as roff."""
    for name in ("manpages-de", "manpages-fr", "manpages-es"):
        yield from _man_pages(packages[name])


def russian_pages(packages: Unpacked) -> Iterator[str]:
    """Yield manual pages in Russian, as roff."""
    yield from _man_pages(packages["manpages-ru"])


def prose(packages: Unpacked) -> Iterator[str]:
    """Yield essays, a document per chapter, and the jargon file."""
    for path in sorted((packages["anarchism"] / "files").rglob("*.html")):
        for text in _decoded(path.read_bytes()):
            yield text_of_html(text)
    for path in sorted((packages["jargon-text"] / "files").rglob("jargon.txt.gz")):
        for text in _decoded(gzip.decompress(path.read_bytes())):
            yield from _chunks(text)


def dictionary(packages: Unpacked) -> Iterator[str]:
    """Yield entries of three dictionaries in their order, many in a document."""
    for name in ("dict-gcide", "dict-wn", "dict-foldoc"):
        for path in sorted((packages[name] / "files").rglob("*.dict.dz")):
            for text in _decoded(gzip.decompress(path.read_bytes())):
                yield from _chunks(text)


def _python(_: Unpacked) -> Iterator[str]:
    yield from python_code()


DOMAINS: dict[str, Callable[[Unpacked], Iterator[str]]] = {
    "c": kernel_code,
    "python": _python,
    "manuals": manuals,
    "pages": english_pages,
    "translated": translated_pages,
    "russian": russian_pages,
    "prose": prose,
    "dictionary": dictionary,
}
PACKAGES = (
    *("linux-source-6.1", "postgresql-doc-15", "git-doc", "apache2-doc"),
    *("manpages", "manpages-dev", "manpages-de", "manpages-fr", "manpages-es", "manpages-ru"),
    *("anarchism", "jargon-text", "dict-gcide", "dict-wn", "dict-foldoc"),
)
"""Debian packages that the domains read; all are of Debian 12."""


# Formats


def text_of_html(page: str) -> str:
    """Return the text of a page without navigation, a line per block."""
    reader = _TextOfHTML()
    reader.feed(page)
    reader.close()
    blocks = "".join(reader.parts).split("\0")
    # a block with lines of its own, of code or a table of text, keeps its spaces
    lines = [each if "\1" in each else " ".join(each.split()) for each in blocks]
    kept = "\n".join(line for line in lines if line.strip())
    return kept.replace("\1", "\n").strip() + "\n"


_BLOCKS = {
    *("p", "div", "section", "article", "blockquote", "br", "hr", "h1", "h2", "h3", "h4", "h5"),
    *("h6", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table"),
}
_LEFT_OUT = {"head", "script", "style", "nav", "footer", "header"}
_NAVIGATION = {
    *("navheader", "navfooter", "toc", "top", "toplang", "bottomlang", "page-header"),
}
"""Classes and names of the parts that lead to other pages, and are alike on all."""


class _TextOfHTML(HTMLParser):
    """Text of a page; `\\0` ends a block, and `\\1` stands for a newline that counts."""

    @dataclass
    class _Skipped:
        tag: str
        depth: int = 1

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped: _TextOfHTML._Skipped | None = None
        self._in_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a block, or a part that is left out."""
        if self._skipped is not None:
            self._skipped.depth += tag == self._skipped.tag
            return
        words = {
            word
            for name, value in attrs
            if name in ("class", "id") and value
            for word in value.split()
        }
        if tag in _LEFT_OUT or (tag in _BLOCKS and words & _NAVIGATION):
            self._skipped = self._Skipped(tag)
        elif tag == "pre":
            self._in_pre += 1
            self.parts.append("\0")
        elif tag in _BLOCKS:
            self.parts.append("\1" if self._in_pre else "\0")

    def handle_endtag(self, tag: str) -> None:
        """End a block, or a part that is left out."""
        if self._skipped is not None:
            self._skipped.depth -= tag == self._skipped.tag
            if not self._skipped.depth:
                self._skipped = None
        elif tag == "pre":
            self._in_pre = max(0, self._in_pre - 1)
            self.parts.append("\0")
        elif tag in _BLOCKS and not self._in_pre:
            self.parts.append("\0")

    def handle_data(self, data: str) -> None:
        """Keep text; inside of ``pre`` its lines, too."""
        if self._skipped is None:
            self.parts.append(data.replace("\n", "\1") if self._in_pre else data)


def _man_pages(package: Path) -> Iterator[str]:
    for path in sorted((package / "files/usr/share/man").rglob("*.gz")):
        if path.is_file() and not path.is_symlink():
            for text in _decoded(gzip.decompress(path.read_bytes())):
                if not text.startswith(".so "):  # another page's second name
                    yield without_comments(text)


def without_comments(page: str) -> str:
    """Return a page of roff without its comments, which are the same licence on most pages."""
    marks = ('.\\"', "'\\\"", "'''")
    lines = page.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(marks))


def _decoded(content: bytes) -> Iterator[str]:
    """Yield the text, or nothing where it has another encoding than UTF-8."""
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError:
        return


def _chunks(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for first in range(0, len(lines), _CHUNK_LINES):
        yield "".join(lines[first : first + _CHUNK_LINES])


if __name__ == "__main__":
    sys.exit(main())
