"""Take a picture of a page in headless Chromium, with few enough colours to be small.

python tools/docs/screenshot.py "http://localhost:6006/#images" images.png --size 1400x2400
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
COLOURS = 256
"""Colours of the picture: enough for text, curves and masks, with a third of the bytes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Take the picture and print its size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="URL of the page; quote it, because # begins a comment.")
    parser.add_argument("output", type=Path, help="PNG to write; must not exist.")
    parser.add_argument("--size", default="1400x2400", help="Width x height of the window, pixels.")
    parser.add_argument(
        "--wait", type=int, default=20, help="Seconds to wait for what the page loads."
    )
    args = parser.parse_args(argv)
    if args.output.exists():
        print(f"{args.output} exists; choose another or remove it first", file=sys.stderr)
        return 2
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"none of {', '.join(BROWSERS)} is on the PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as profile:
        taken = Path(profile) / "page.png"
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--disable-quic", f"--user-data-dir={profile}"),
                f"--virtual-time-budget={1000 * args.wait}",
                f"--window-size={args.size.replace('x', ',')}",
                *(f"--screenshot={taken}", args.url),
            ],
            check=True,
            capture_output=True,
        )
        with Image.open(taken) as page:
            small = page.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        small.save(args.output, optimize=True)
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
