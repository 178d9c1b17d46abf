"""Blocks of code in a page of Markdown, so that what pages show can be run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:`(?P<file>[\w.-]+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        language: of the fence.
        text: what it holds, with a final newline.
        file: the file that it is, where the sentence before it ends with that name and a colon.
    """

    language: str
    text: str
    file: str


def blocks(page: Path) -> list[Block]:
    """All that have a language, in order."""
    found = _BLOCK.finditer(page.read_text("utf-8"))
    return [Block(match["language"], match["text"], match["file"] or "") for match in found]
