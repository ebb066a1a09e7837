"""The code blocks of a Markdown page."""

from __future__ import annotations

import re

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code_blocks(text: str, *languages: str) -> list[str]:
    """Those of these languages, in the order of the page."""
    return [block for language, block in BLOCK.findall(text) if language in languages]
