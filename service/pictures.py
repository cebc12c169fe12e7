"""What the pictures that ckpt writes share: their look, and the files that they go to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape as as_xml

from ckpt.core.errors import UsageError
from ckpt.core.printable import escape
from ckpt.service.export import new_file, write_at

_LIGHT = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .title { font-size: 16px; font-weight: 600 }
  .axis { fill: #57606a }
  .ground { fill: #ffffff }
  .grid { stroke: #d0d7de }
"""
_DARK = """
  text { fill: #e6edf3 }
  .axis { fill: #9198a1 }
  .ground { fill: #0d1117 }
  .grid { stroke: #3d444d }
"""


def check_output(destination: Path) -> None:
    """Refuse to write a picture over what is none.

    Raises:
        UsageError: ``output-invalid`` unless the name ends in ``.svg``.
    """
    if destination.suffix.lower() != ".svg":
        raise UsageError(
            "output-invalid",
            f"{escape(str(destination))} is no .svg file",
            hint="a picture is written as SVG: --output picture.svg",
        )


def write_picture(picture: str, destination: Path) -> None:
    """Write an SVG document as a file, in place of one that is there."""
    check_output(destination)
    body = picture.encode()
    with new_file(destination, len(body), force=True) as handle:
        write_at(handle, 0, body)


def document(
    title: str, width: int, height: int, light: str, dark: str, shapes: Iterable[str]
) -> str:
    """A titled SVG document of this size in pixels; ``light`` and ``dark`` are the rules of its
    own for a light and a dark page."""
    style = f"{_LIGHT}{light}  @media (prefers-color-scheme: dark) {{{_DARK}{dark}  }}\n"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">',
        f"<title>{as_xml(title)}</title>",
        f"<style>{style}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
        text(20, 32, title, "title"),
        *shapes,
    ]
    return "\n".join([*lines, "</svg>\n"])


def text(x: float, y: float, said: str, name: str = "name", anchor: str = "start") -> str:
    """A line of text that begins, ends or has its middle at a point."""
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{as_xml(said)}</text>'
    )
