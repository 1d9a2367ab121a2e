# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines for older collectors, and what a makedumpfile that no line helps is said to do."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import compatibility
from capture.compatibility import missing, with_lines, wrong
from guard.witness.vmcoreinfo import Vmcoreinfo, note_of

NEW = b"OSRELEASE=7.3.4\nOFFSET(page.compound_info)=8\nNUMBER(phys_base)=4096\nCRASHTIME=1760000000\n"
TYPES = (
    b"NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=-184549376\nNUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)=-201326592\n"
    b"NUMBER(PAGE_UNACCEPTED_MAPCOUNT_VALUE)=-150994944\n"
)
BITS = b"NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=-2049\n"  # 6.10: ~0x800


def info_of(desc: bytes) -> Vmcoreinfo:
    return Vmcoreinfo(desc, note_of(desc), 0x11000000)


def test_renamed_key_is_served_under_its_old_name_too() -> None:
    added = missing(info_of(NEW))
    assert [(one.line, one.whom) for one in added] == [("OFFSET(page.compound_head)=8", "makedumpfile up to 1.7.9")]
    served = with_lines(info_of(NEW), added)
    assert served.desc == NEW + b"OFFSET(page.compound_head)=8\n"
    assert served.note == note_of(served.desc)
    assert struct.unpack_from("<III", served.note) == (11, len(served.desc), 0)
    assert len(served.note) % 4 == 0
    assert served.paddr is None, "old memory has another one"


@pytest.mark.parametrize(
    "desc",
    [
        NEW.replace(b"compound_info", b"compound_head"),
        NEW + b"OFFSET(page.compound_head)=16\n",
        b"OSRELEASE=6.12.0\n",
        b"",
    ],
)
def test_note_that_has_the_old_name_or_not_the_new_one_is_left_alone(desc: bytes) -> None:
    assert missing(info_of(desc)) == []


@given(st.binary(max_size=40).filter(lambda tail: b"\n" not in tail))
def test_lines_come_behind_the_last_whole_one_whatever_follows_it(tail: bytes) -> None:
    served = with_lines(info_of(NEW + tail), missing(info_of(NEW)))
    assert served.desc == NEW + b"OFFSET(page.compound_head)=8\n" + tail


@given(st.lists(st.sampled_from([*NEW.splitlines(), *TYPES.splitlines(), b"x=y"]), unique=True))
def test_no_value_is_changed(lines: list[bytes]) -> None:
    before = info_of(b"".join(line + b"\n" for line in lines))
    after = with_lines(before, missing(before))
    assert {key: after.texts[key] for key in before.texts} == before.texts
    assert list(after.texts)[: len(before.texts)] == list(before.texts)


KEYS = "".join(f"NUMBER(PAGE_{name}_MAPCOUNT_VALUE)=\0" for name in ("BUDDY", "OFFLINE")).encode()
V172 = b"\x7fELF VMCOREINFO\0" + KEYS + b"OFFSET(page.compound_head)=\0'-E' option is disable, \0"
V176 = V172 + b"NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)=\0NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=\0"
V177 = V176.replace(b"disable, ", b"disabled, ")
V178 = V177 + b"NUMBER(PAGE_UNACCEPTED_MAPCOUNT_VALUE)=\0"
LATER = V178 + b"OFFSET(page.compound_info)=\0"
SLAB, HUGETLB, FREE, TAILS = "slab pages for user data", "HugeTLB", "free and offline", "tail"


@pytest.mark.parametrize(
    ("program", "desc", "expected"),
    [
        (V172, NEW + TYPES, [SLAB, HUGETLB, TAILS]),
        (V176, NEW + TYPES, [FREE, TAILS]),
        (V177, NEW + TYPES, [TAILS]),
        (V178, NEW + TYPES, [TAILS]),
        (LATER, NEW + TYPES, []),
        (V178, NEW + TYPES + b"OFFSET(page.compound_head)=8\n", []),
        (V172, BITS, [SLAB]),
        (V176, BITS, []),
        (V172, b"OSRELEASE=6.1.0\nNUMBER(PG_slab)=9\nOFFSET(page.compound_head)=8\n", []),
        (b"#!/bin/sh\nexec /opt/makedumpfile", NEW + TYPES, []),
        (b"", NEW + TYPES, []),
    ],
)
def test_makedumpfile_is_named_by_what_it_does_not_know(
    program: bytes, desc: bytes, expected: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "makedumpfile"
    path.write_bytes(program)
    lines = wrong(info_of(desc), str(path))
    assert len(lines) == len(expected)
    for line, what in zip(lines, expected, strict=True):
        assert line.startswith(f"{path} is too old for this kernel: it ")
        assert what in line


def test_program_that_is_not_there_or_too_large_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(info_of(NEW), str(tmp_path / "makedumpfile")) == []
    (tmp_path / "makedumpfile").write_bytes(V172)
    assert wrong(info_of(NEW), str(tmp_path / "makedumpfile"))
    monkeypatch.setattr(compatibility, "MOST_PROGRAM", 10)
    assert wrong(info_of(NEW), str(tmp_path / "makedumpfile")) == []


def test_script_is_taken_for_the_makedumpfile_that_it_starts(tmp_path: Path) -> None:
    for folder in ("bin", "opt"):
        (tmp_path / folder).mkdir()
    program, script = (tmp_path / folder / "makedumpfile" for folder in ("opt", "bin"))
    program.write_bytes(V176)
    script.write_text(f'#!/bin/sh\nexec /opt/lib/ld.so --library-path /opt/lib {program} "$@"\n')
    (line,) = wrong(info_of(NEW), str(script))
    assert line.startswith(f"{program} is too old for this kernel: ")
    script.write_text(f"#!/bin/sh\nexec {script}\n")
    assert wrong(info_of(NEW), str(script)) == []
