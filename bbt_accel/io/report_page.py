"""A report as one HTML page that needs no other file and no other host: sortable tables, its plot
with hover values.
"""

from __future__ import annotations

import json
import string
from collections.abc import MutableMapping, Sequence
from html import escape
from importlib.resources import files
from itertools import count
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from markdown_it.token import Token
    from matplotlib.artist import Artist

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
COLOURS = {"#000000": "ink", "#ffffff": "paper", "#7f7f7f": "grey"}
"""Colours of a plot that differ between light and dark, by the CSS variable that holds them."""


def hover(artist: Artist, values: Sequence[str]) -> None:
    """Name the values of a drawn line's markers, in their order, or of a single shape; the page
    shows them.
    """
    artist.set_gid(
        json.dumps(list(values))
    )  # which the SVG has as an id: nothing else of an artist gets there


def report_page(markdown: str, plot: str | None = None, plot_name: str = "") -> str:
    """A page of a report's Markdown, without other tags than Markdown's.

    plot: the SVG that replaces the image `plot_name`.
    """
    from markdown_it import MarkdownIt

    tables = count(1)

    def table_open(self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
        before = [
            t.content
            for t, opened in zip(tokens[1:index], tokens, strict=False)
            if opened.type == "heading_open"
        ]
        title = f"Table {next(tables)}: {before[-1] if before else 'report'}"
        return (
            f'<div class="scroll" role="region" aria-label="{escape(title)}" tabindex="0"><table>'
        )

    def image(
        self: Any, tokens: Sequence[Token], index: int, options: Any, env: MutableMapping[str, Any]
    ) -> str:
        caption = escape(tokens[index].content)
        if plot is None or tokens[index].attrs["src"] != plot_name:
            return caption
        return f'<span class="plot" role="img" aria-label="{caption}">{themed(plot)}</span>'

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", table_open)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    parser.add_render_rule("image", image)
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "Report")
    template = string.Template(
        files("bbt_accel.io").joinpath("report_page.html").read_text(encoding="utf-8")
    )
    return template.substitute(title=escape(title), body=parser.render(markdown))


def themed(svg: str) -> str:
    """matplotlib's SVG for a page: no wider than that, in the page's colours, with the values of
    `hover`.
    """
    ElementTree.register_namespace("", SVG.strip("{}"))
    root = ElementTree.fromstring(svg)
    root.set("style", f"width: {root.attrib.pop('width')}")
    root.attrib.pop("height")
    root.remove(root.find(f"{SVG}metadata"))  # type: ignore[arg-type]
    for element in root.iter():
        if link := element.attrib.pop(LINK, None):
            element.set("href", link)
        for colour, variable in COLOURS.items():
            if colour in element.get("style", ""):
                element.set("style", element.attrib["style"].replace(colour, f"var(--{variable})"))
    for group in root.iter(f"{SVG}g"):
        if group.get("id", "").startswith("["):
            values = json.loads(group.attrib.pop("id"))
            marks = group.findall(f".//{SVG}use") or group.findall(f"{SVG}path")
            for mark, value in zip(marks, values, strict=True):
                mark.set("data-hover", value)
    return ElementTree.tostring(root, encoding="unicode")
