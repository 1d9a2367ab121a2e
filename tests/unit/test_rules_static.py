# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ranges that the user denies or allows, on the command line and in files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import Error
from guard.ranges import RangeSet
from guard.registry import Registry
from guard.rules import static

PAGE = 4096
LAST = (1 << 64) - 1


@given(st.lists(st.tuples(st.integers(0, LAST), st.integers(0, LAST)).map(sorted), min_size=1, max_size=5))
def test_ranges_are_hexadecimal_with_inclusive_ends(spans: list[list[int]]) -> None:
    words = [f"{first:x}-{last:#x}" for first, last in spans]
    assert static.parse(words) == RangeSet((first, last + 1) for first, last in spans)


def test_file_has_a_range_a_line_with_words_and_comments_behind(tmp_path: Path) -> None:
    file = tmp_path / "ranges"
    file.write_text("# bad DIMM\n\n  1000-1fff : System RAM\n0x3000-0x3fff# other\n")
    assert static.parse([str(file), "5000-5fff"]) == RangeSet([(0x1000, 0x2000), (0x3000, 0x4000), (0x5000, 0x6000)])


@pytest.mark.parametrize(
    "word", ["", "1000", "1000-", "-1000", "2000-1000", "x-y", "1000-10000000000000000", "no/file"]
)
def test_word_that_is_neither_range_nor_file_is_one_line(word: str) -> None:
    with pytest.raises(Error, match=f"^{re.escape(word)}: neither a range "):
        static.parse([word])


@pytest.mark.parametrize("line", ["1000", "2000-1000", "System RAM", "\xff-\xff"])
def test_line_that_is_no_range_is_told_by_file_and_number(line: str, tmp_path: Path) -> None:
    file = tmp_path / "ranges"
    file.write_bytes(b"1000-1fff\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(Error, match=rf"^{re.escape(str(file))}:2: .* is no range, expected one like"):
        static.parse([str(file)])


def test_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Error, match=f"^{re.escape(str(tmp_path))}: Is a directory$"):
        static.parse([str(tmp_path)])


def test_denied_pages_are_those_touched_and_allowed_ones_those_wholly_inside() -> None:
    registry = Registry()
    registry.register(static.deny(RangeSet([(PAGE + 1, 2 * PAGE + 1)])))
    registry.register(static.allow(RangeSet([(0, 4 * PAGE + 1)])))
    assert [registry.pfn_is_ram(pfn) for pfn in range(6)] == [True, False, False, True, False, False]
    assert [rule.name if (rule := registry.refuser(pfn)) else "" for pfn in range(6)] == [
        *("", "denied", "denied", ""),
        *("allowed", "allowed"),
    ]
