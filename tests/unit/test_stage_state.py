# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one stage tells the next: every fact comes back, damage is one line, the kernel's archive format carries it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import stage_state
from capture.stage_state import Meant
from guard.errors import Error
from guard.ranges import Range
from tests.unit.stage_parts import needs_cpio, needs_root, unpacked

addresses = st.integers(0, (1 << 64) - 1)
texts = st.text(st.characters(exclude_categories=[]))  # a command line can have bytes of no encoding
meants = st.builds(
    Meant,
    texts,
    st.none() | addresses,
    addresses,
    texts,
    st.none() | texts,
    st.tuples(addresses, addresses),
    st.lists(st.builds(Range, addresses, addresses)).map(tuple),
    st.booleans(),
)
MEANT = Meant("quiet", 0x1000, 4096, "/boot/vmlinuz", None, (0, 0), (), True)
OPTIONAL = "knows_note_align"


@given(meants)
def test_every_fact_comes_back(meant: Meant) -> None:
    found = stage_state.decode(meant.encode())
    assert found == meant
    assert all(isinstance(r, Range) for r in found.lost)


def refused(data: bytes) -> None:
    with pytest.raises(Error) as caught:
        stage_state.decode(data)
    start = "/etc/oldmem-stage/meant.json: not what the stage before writes: "
    assert str(caught.value).startswith(start)
    assert len(str(caught.value).splitlines()) == 1


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_one_clear_line(data: bytes) -> None:
    refused(data)


@given(meants, st.data())
def test_cut_file_is_one_clear_line(meant: Meant, data: st.DataObject) -> None:
    whole = meant.encode()
    refused(whole[: data.draw(st.integers(0, len(whole) - 1))])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(json_values)
def test_other_json_is_one_clear_line(value: Any) -> None:
    refused(json.dumps(value).encode())


@given(st.sampled_from([name for name in Meant._fields if name != OPTIONAL]))
def test_missing_fact_is_one_clear_line(name: str) -> None:
    facts = MEANT._asdict()
    del facts[name]
    refused(json.dumps(facts).encode())


@given(st.from_regex(r"\A[a-z_ ]{1,12}\Z").filter(lambda name: name not in Meant._fields), json_values)
def test_fact_that_nobody_wrote_is_one_clear_line(name: str, value: Any) -> None:
    refused(json.dumps(MEANT._asdict() | {name: value}).encode())


@pytest.mark.parametrize(
    ("name", "value"), [("cmdline", 7), ("elfcorehdr", "x"), ("size", None), ("kernel", None), ("initramfs", [])]
)
def test_fact_of_another_type_is_one_clear_line(name: str, value: Any) -> None:
    refused(json.dumps(MEANT._asdict() | {name: value}).encode())


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"given_up": [Infinity, 0]}', b'{"a\\nb": 1}'])
def test_json_of_a_strange_kind_is_one_clear_line(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("value", [None, 7, True, "", "x1", [], [1], [1, 2, 3], [None, 1], ["x", 1], {"a": 1}, [[], 1]])
def test_what_was_given_up_is_two_numbers_or_one_clear_line(value: Any) -> None:
    refused(json.dumps(MEANT._asdict() | {"given_up": value}).encode())


@pytest.mark.parametrize("value", [None, 7, "1", [1], [[]], [[1]], [[1, 2, 3]], [[1, "x"]], [[1, None]], [[0, 1], [0]]])
def test_what_was_lost_is_ranges_or_one_clear_line(value: Any) -> None:
    refused(json.dumps(MEANT._asdict() | {"lost": value}).encode())


def test_facts_of_a_stage_that_did_not_tell_its_note_align_are_taken() -> None:
    facts = MEANT._asdict()
    del facts[OPTIONAL]
    assert stage_state.decode(json.dumps(facts).encode()) == MEANT


FILES = {"meant.json": MEANT.encode(), "vmcore.head": bytes(range(256)) * 50, "why": b""}


@needs_root
@needs_cpio
def test_archive_unpacks_to_where_the_next_stage_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = unpacked(stage_state.archive(FILES), tmp_path / "root")
    monkeypatch.setattr(stage_state, "STATE", f"{root}{stage_state.STATE}")
    assert stage_state.read() == FILES


@needs_cpio
def test_archive_has_the_folders_and_the_console_that_a_mounted_dev_hides() -> None:
    done = subprocess.run(
        ["cpio", "-itv", "--quiet"], input=stage_state.archive(FILES), capture_output=True, check=True, timeout=60
    )
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
        ("drwxr-xr-x", "etc"),
        ("drwxr-xr-x", "etc/oldmem-stage"),
        *(("-rw-------", f"etc/oldmem-stage/{name}") for name in sorted(FILES)),
    ]
    assert lines[1][4:6] == ["5,", "1"]


def test_first_stage_has_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_state, "STATE", f"{tmp_path}/none")
    assert stage_state.read() == {}
    assert len(stage_state.archive({})) % 512 == 0


def test_state_that_cannot_be_read_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(stage_state, "STATE", str(tmp_path))
    with pytest.raises(Error, match=f"^{tmp_path}/folder: Is a directory$"):
        stage_state.read()
    monkeypatch.setattr(stage_state, "STATE", f"{tmp_path}/file")
    (tmp_path / "file").touch()
    with pytest.raises(Error, match=f"^{tmp_path}/file: Not a directory$"):
        stage_state.read()
