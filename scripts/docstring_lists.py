"""A Griffe extension: lines of a docstring such as `rows: what they are` become a Markdown list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*(?:\n(?!\w+(?:, \w+)*: |\n).*)*)", re.M)


class DocstringLists(griffe.Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    first, *others = text.split("\n\n")
    return "\n\n".join([first, *map(_listed, others)])


def _listed(paragraph: str) -> str:
    if not ENTRY.match(paragraph):
        return paragraph
    return ENTRY.sub(
        lambda found: f"- `{found['names']}`: " + " ".join(found["text"].split()), paragraph
    )
