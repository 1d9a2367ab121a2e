# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cpio writer: what it writes is read back by a reader of its own here, and by the cpio tool as an outside
judge."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import newc
from capture.newc import Entry
from guard.errors import Error

FILE, DIR, LINK, CHAR = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o600


def read_back(data: bytes) -> tuple[list[Entry], list[int], list[int]]:
    """Entries, inode numbers and times in *data*, by the format's description and nothing of the writer."""
    entries: list[Entry] = []
    inodes: list[int] = []
    times: list[int] = []
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        field = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + field[11]]
        assert name.endswith(b"\0")
        start = -(-(at + 110 + field[11]) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert not data[start:].strip(b"\0")
            return entries, inodes, times
        content = data[start : start + field[6]]
        entries.append(Entry(os.fsdecode(name[:-1]), field[1], content, (field[9], field[10])))
        inodes.append(field[0])
        times.append(field[5])
        at = -(-(start + field[6]) // 4) * 4


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=40)
entries = st.dictionaries(
    names.filter(lambda name: name != newc.TRAILER),
    st.one_of(
        st.tuples(st.just(FILE), st.binary(max_size=70), st.just((0, 0))),
        st.tuples(st.just(LINK), st.binary(min_size=1, max_size=9), st.just((0, 0))),
        st.tuples(st.just(DIR), st.just(b""), st.just((0, 0))),
        st.tuples(st.just(CHAR), st.just(b""), st.tuples(st.integers(0, 4095), st.integers(0, 2**20))),
    ),
).map(lambda members: [Entry(path, *rest) for path, rest in members.items()])


@given(entries)
def test_whatever_is_written_is_read_back(members: list[Entry]) -> None:
    data = newc.archive(members)
    found, inodes, times = read_back(data)
    assert found == sorted(members)
    assert inodes == list(range(1, len(members) + 1))
    assert set(times) <= {0}
    assert len(data) % newc.BLOCK == 0


@given(entries.flatmap(lambda members: st.tuples(st.just(members), st.permutations(members))))
def test_bytes_do_not_depend_on_the_order_of_adding(pair: tuple[list[Entry], list[Entry]]) -> None:
    assert newc.archive(pair[0]) == newc.archive(pair[1])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio tool")
def test_the_cpio_tool_lists_types_modes_sizes_and_devices(tmp_path: Path) -> None:
    data = newc.archive(
        [
            Entry("dev", DIR),
            Entry("dev/console", CHAR, b"", (5, 1)),
            Entry("dev/loop0", stat.S_IFBLK | 0o660, b"", (7, 0)),
            Entry("etc/odd", FILE, b"12345"),
            Entry("init", stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
            Entry("bin", LINK, b"usr/bin"),
        ]
    )
    listing = subprocess.run(
        ["cpio", "-itv", "--quiet"], input=data, capture_output=True, check=True, env={"TZ": "UTC"}
    )
    lines = [line.split() for line in listing.stdout.decode().splitlines()]
    assert all(line[2:4] == ["root", "root"] and "1970" in line for line in lines)
    told = {line[-3] if line[0][0] == "l" else line[-1]: (line[0], line[4:6]) for line in lines}
    assert told["dev"][0] == "drwxr-xr-x"
    assert told["dev/console"] == ("crw-------", ["5,", "1"])
    assert told["dev/loop0"] == ("brw-rw----", ["7,", "0"])
    assert (told["etc/odd"][0], told["etc/odd"][1][0]) == ("-rw-r--r--", "5")
    assert told["init"][0] == "-rwxr-xr-x"
    assert told["bin"][0] == "lrwxrwxrwx"
    assert lines[[line[0][0] for line in lines].index("l")][-3:] == ["bin", "->", "usr/bin"]


@pytest.mark.parametrize("path", ["", "/etc", "a\0b", newc.TRAILER])
def test_a_path_the_format_cannot_carry_is_refused(path: str) -> None:
    with pytest.raises(Error, match="not a usable path"):
        newc.archive([Entry(path, FILE)])


def test_a_path_given_twice_is_refused() -> None:
    with pytest.raises(Error, match="etc: twice"):
        newc.archive([Entry("etc", DIR), Entry("etc", FILE, b"x")])


links = st.lists(
    st.tuples(names.filter(lambda name: name != newc.TRAILER), st.integers(1, 3)), unique_by=lambda m: m[0]
)


@given(links, st.lists(st.binary(min_size=1, max_size=9), min_size=4, max_size=4))
def test_members_of_one_number_are_read_back_with_it_and_the_archive_is_whole_blocks(
    members: list[tuple[str, int]], data: list[bytes]
) -> None:
    parts: list[bytes] = []
    expected: list[Entry] = []
    seen: set[int] = set()
    for path, ino in members:
        entry = Entry(path, FILE, b"" if ino in seen else data[ino])
        seen.add(ino)
        parts.append(newc.member(ino, entry, linked=True))
        expected.append(entry)
    whole = b"".join(parts) + newc.trailer(sum(map(len, parts)))
    assert read_back(whole) == (expected, [ino for _, ino in members], [0] * len(members))
    assert len(whole) % newc.BLOCK == 0
    assert all(int(part[6 + 8 * 4 : 6 + 8 * 5], 16) == 2 for part in parts)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio tool")
def test_the_cpio_tool_makes_one_file_of_linked_members_and_its_data_are_the_first_ones(tmp_path: Path) -> None:
    parts = [
        newc.member(1, Entry("one", FILE, b"data"), True),
        newc.member(2, Entry("other", FILE, b"more"), True),
        newc.member(1, Entry("two", FILE), True),
        newc.member(3, Entry("alone", FILE)),
        newc.member(1, Entry("three", FILE), True),
    ]
    data = b"".join(parts) + newc.trailer(sum(map(len, parts)))
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True, timeout=60)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert content == {"one": b"data", "two": b"data", "three": b"data", "other": b"more", "alone": b""}
    inodes = {name: (tmp_path / name).stat().st_ino for name in content}
    assert inodes["one"] == inodes["two"] == inodes["three"]
    assert len(set(inodes.values())) == 3


def test_file_of_more_than_the_format_counts_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    with pytest.raises(Error, match=r"^core: 4294967296 bytes do not fit the cpio format"):
        newc.member(1, Entry("core", FILE, Huge()))
