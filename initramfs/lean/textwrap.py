# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image's textwrap, in place of the standard library's 11 KB: argparse breaks the lines of its help with it."""

from __future__ import annotations


def wrap(
    text: str, width: int = 70, initial_indent: str = "", subsequent_indent: str = "", **_more: object
) -> list[str]:
    """*text* in lines of at most *width* columns, broken at blanks; a word that is longer has a line of its own."""
    lines: list[str] = []
    line, indent = "", initial_indent
    for word in text.split():
        if line and len(indent) + len(line) + 1 + len(word) > width:
            lines.append(indent + line)
            line, indent = "", subsequent_indent
        line = f"{line} {word}" if line else word
    return [*lines, indent + line] if line else lines


def fill(text: str, width: int = 70, **more: str) -> str:
    return "\n".join(wrap(text, width, **more))
