"""`python -m fastsd.training.emoji PACKAGE FOLDER`: emoji with their names, as a folder of pictures to train on.

PACKAGE is an unpacked npm package of Iconify: `npm pack @iconify-json/noto` (Google's Noto Emoji, Apache-2.0) or
`@iconify-json/fluent-emoji-flat` (Microsoft's, MIT). Each emoji becomes a PNG on white and a text file with its name.
Drawing them needs `pip install "fastsd[emoji]"`.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fastsd.errors import FastSDError, ImageError, ParameterError
from fastsd.images import to_rgb
from fastsd.wording import quoted

GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
"""Those that are pictures of things: faces, people, flags and signs come in many variants that a name hardly tells apart."""


def emoji(package: Path, groups: tuple[str, ...] = GROUPS) -> Iterator[tuple[str, str]]:
    """(name, SVG) of each emoji of the groups, in the package's order. ParameterError for another kind of folder."""
    icons, metadata = (_read(package / name) for name in ("icons.json", "metadata.json"))
    wanted = {name for group in groups for name in metadata.get("categories", {}).get(group, [])}
    size = {side: icons.get(side, 16) for side in ("left", "top", "width", "height")} | {"left": 0, "top": 0}
    for name, icon in icons["icons"].items():
        if name in wanted and not icon.get("hidden"):
            box = " ".join(str(icon.get(side, size[side])) for side in ("left", "top", "width", "height"))
            head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            yield name.replace("-", " "), f'{head} viewBox="{box}">{icon["body"]}</svg>'


def write_pictures(package: Path, folder: Path, resolution: int = 128) -> int:
    """The emoji as NAME.png and NAME.txt; returns how many. ImageError where one cannot be drawn."""
    try:
        import resvg_py
    except ImportError as error:
        raise ParameterError('emoji: drawing SVG needs resvg-py; pip install "fastsd[emoji]"') from error
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, svg in emoji(package):
        try:
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=resolution, height=resolution))
            drawn = to_rgb(Image.open(io.BytesIO(png)))
        except (ValueError, OSError) as error:
            raise ImageError(f"{name}: cannot be drawn: {error}") from error
        stem = name.replace(" ", "-")
        drawn.save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(f"{name}\na picture of {name}\nan emoji of {name}\n", encoding="utf-8")
        count += 1
    return count


def _read(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"package: {quoted(str(path.parent))} has no {path.name} of Iconify's; unpack one of its npm packages"
        ) from error
    return read


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsd.training.emoji", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("folder", type=Path, help="where the pictures and captions go")
    parser.add_argument("--resolution", type=int, default=128, help="pixels a side (default 128)")
    args = parser.parse_args(argv)
    try:
        print(f"{write_pictures(args.package, args.folder, args.resolution)} pictures in {args.folder}")
    except FastSDError as error:
        print(f"fastsd: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
