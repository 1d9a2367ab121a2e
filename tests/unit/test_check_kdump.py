# SPDX-License-Identifier: LGPL-2.1-or-later
"""`oldmem check` on what makedumpfile writes that is no ELF: kdump-compressed files and flattened ones."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import cli
from capture.check import check
from capture.check_kdump import Flattened
from guard.errors import Error
from tests.unit.test_check import LEFT_OUT, filtered, patch

PAGE = 4096
INFO = b"OSRELEASE=7.3.0-test\nPAGESIZE=4096\n"
SPAN = 70000
"""Pages from 0 on: their bitmaps take three blocks each."""


def compressed(pages: dict[int, bytes], order: str = "<", version: int = 6, there: set[int] | None = None) -> bytes:
    """A kdump-compressed file with these pages, each as it is or, where shorter, taken for compressed."""
    machine = b"x86_64" if order == "<" else b"s390x"
    uts = b"".join(text.ljust(65, b"\0") for text in (b"Linux", b"node", b"7.3.0-test", b"#1", machine, b""))
    one = -(-SPAN // 8 // PAGE)
    head = b"KDUMP   " + struct.pack(f"{order}i", version) + uts
    head = head.ljust(424, b"\0") + struct.pack(f"{order}IiiIIIIII", 1, PAGE, 1, 2 * one, SPAN, 0, 0, 0, 0)
    sub = struct.pack(f"{order}QiiQQQQQQQQQQQ", 0, 31, 0, 0, 0, PAGE + 104, len(INFO), 0, 0, 0, 0, 0, 0, SPAN)
    bitmaps = []
    for numbers in (there if there is not None else set(pages) | {1, 2}, set(pages)):
        bits = sum(1 << n for n in numbers)
        bitmaps.append(bits.to_bytes(one * PAGE, "little"))
    start = (2 + 2 * one) * PAGE
    at = start + 24 * len(pages)
    descs = data = b""
    for _, content in sorted(pages.items()):
        descs += struct.pack(f"{order}QIIQ", at + len(data), len(content), 0 if len(content) == PAGE else 1, 0)
        data += content
    return head.ljust(PAGE, b"\0") + (sub + INFO).ljust(PAGE, b"\0") + b"".join(bitmaps) + descs + data


def flattened(data: bytes, piece: int = 5000) -> bytes:
    out = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(PAGE, b"\0")
    pieces = [(at, data[at : at + piece]) for at in range(0, len(data), piece)]
    # makedumpfile writes the header once more at the end
    for at, content in [(0, bytes(100)), *pieces]:
        out += struct.pack(">qq", at, len(content)) + content
    return out + struct.pack(">qq", -1, -1)


GOOD = compressed({0: b"a" * PAGE, 7: b"bc", 40000: b"d" * 17, 69999: b"e" * PAGE})
DESC = (2 + 2 * 3) * PAGE


def write(folder: Path, data: bytes) -> str:
    (folder / "vmcore").write_bytes(data)
    return str(folder / "vmcore")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [3, 5, 6, 9])
def test_sound_kdump_file_is_named_and_nothing_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], order: str, version: int
) -> None:
    path = write(tmp_path, compressed({3: b"xy", 69000: bytes(PAGE)}, order, version))
    machine = "x86_64" if order == "<" else "s390x"
    wrong, has, kinds = check(path)
    assert (wrong, kinds) == ([], ("a kdump-compressed file of makedumpfile",))
    assert has == [f"version {version}, kernel 7.3.0-test of {machine}", "2 of 4 pages of 4096 bytes were dumped"]
    assert cli.run(["check", path]) == 0
    assert capsys.readouterr().err == f"oldmem: {path}: a kdump-compressed file of makedumpfile\n"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:-1], r"page descriptor 3 at 0x8048: data at .*, but the file ends at"),
        (lambda data: data[:DESC], r"4 page descriptors end at 0x8060, the file at 0x8000"),
        (lambda data: data[: 3 * PAGE], r"the bitmaps end at 0x8000, the file at 0x3000"),
        (lambda data: data[:PAGE], r"the sub header at 0x1000 ends with the file"),
        (lambda data: data[:100], r"the header ends at 0x64, expected 0x1d0 bytes"),
        (patch(8, "<i", 0), "offset 0x8: version"),
        (patch(424, "<I", 9), "offset 0x1a8: status 0x9: the dump is incomplete"),
        (patch(428, "<i", 1000), "offset 0x1ac: block size 1000"),
        (patch(432, "<i", -1), "offset 0x1b0: -1 blocks of sub header"),
        (patch(436, "<I", 4), "offset 0x1b4: 4 blocks of bitmaps are too few for 70000 pages, twice"),
        (patch(PAGE + 96, "<Q", 1 << 60), "too few for 1152921504606846976 pages"),
        (patch(PAGE + 32, "<Q", 1 << 40), r"VMCOREINFO at 0x10000000000\+0x\w+, but the file ends at"),
        (patch(PAGE + 32, "<Q", PAGE), r"VMCOREINFO at 0x1000 does not begin with OSRELEASE="),
        (patch(PAGE + 40, "<Q", 0), "no VMCOREINFO"),
        (patch(PAGE + 48, "<QQ", 1 << 40, 8), r"ELF notes at 0x10000000000\+0x8, but"),
        (patch(DESC + 8, "<I", PAGE + 1), r"page descriptor 0 at 0x8000: 4097 bytes with flags 0x0"),
        (patch(DESC + 12, "<I", 0x4000), r"page descriptor 0 at 0x8000: 4096 bytes with flags 0x4000"),
        (patch(DESC + 24 + 12, "<I", 0), r"page descriptor 1 at 0x8018: 2 bytes with flags 0x0"),
        (lambda _: compressed({9: b"x"}, there={8}), "page 0x9 was dumped, but the first bitmap does not have it"),
    ],
)
def test_each_damage_of_a_kdump_file_is_told(spoil: Callable[[bytes], bytes], told: str, tmp_path: Path) -> None:
    path = write(tmp_path, spoil(GOOD))
    wrong = check(path).wrong
    assert [line for line in wrong if re.search(told, line)], wrong
    assert cli.run(["check", path]) == 1


def test_lines_on_very_many_bad_descriptors_are_few(tmp_path: Path) -> None:
    made = compressed(dict.fromkeys(range(2000), b"x"))
    wrong = check(write(tmp_path, made[: DESC + 24 * 2000])).wrong
    assert len(wrong) == 33
    assert wrong[-1] == "and more"


@pytest.mark.parametrize("inside", [GOOD, filtered(LEFT_OUT)])
def test_flattened_file_is_named_and_what_is_in_it_is_checked(
    inside: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, flattened(inside))
    direct = check(write(tmp_path, inside))
    found = check(write(tmp_path, flattened(inside)))
    assert (found.wrong, found.has[1:]) == (direct.wrong, direct.has) == ([], direct.has)
    assert cli.run(["check", path]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"oldmem: {path}: a flattened file of makedumpfile, which makedumpfile -R puts together")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:-16], "ends at .* without an end record: it was cut off"),
        (lambda data: data[:-20], "bytes for offset .*, the file ends at"),
        (lambda data: data[: PAGE + 3], "without an end record"),
        (lambda data: data + b"more", "4 bytes behind the end record at"),
        (patch(PAGE, ">q", -5), r"record at 0x1000: 100 bytes for offset -0x5"),
        (patch(PAGE + 8, ">q", 0), r"record at 0x1000: 0 bytes"),
        (patch(PAGE + 8, ">q", 1 << 62), r"record at 0x1000: 4611686018427387904 bytes"),
        (lambda data: data[:PAGE] + struct.pack(">qq", -1, -1), "."),
    ],
)
def test_each_damage_of_a_flattened_file_is_told(
    spoil: Callable[[bytes], bytes], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, spoil(flattened(GOOD)))
    assert cli.run(["check", path]) == 1
    out, err = capsys.readouterr()
    assert re.search(told, out + err)


def test_flattened_file_in_a_flattened_file_is_no_vmcore(tmp_path: Path) -> None:
    with pytest.raises(Error, match="Magic number"):
        check(write(tmp_path, flattened(flattened(GOOD))))


@given(
    st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=90)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200)), max_size=8),
)
def test_flattened_file_reads_as_what_is_written_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, bytes]], asked: list[tuple[int, int]]
) -> None:
    data = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(PAGE, b"\0")
    model = bytearray()
    for at, content in records:
        data += struct.pack(">qq", at, len(content)) + content
        model.extend(bytes(max(0, at + len(content) - len(model))))
        model[at : at + len(content)] = content
    path = tmp_path_factory.getbasetemp() / "flattened"
    path.write_bytes(data + struct.pack(">qq", -1, -1))
    wrong: list[str] = []
    with path.open("rb") as file, Flattened(file, wrong) as whole:
        assert (wrong, whole.size) == ([], len(model))
        for at, size in asked:
            whole.seek(at)
            assert whole.read(size) == bytes(model[at : at + size])


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5),
)
def test_no_damage_raises_anything_but_its_own_error(
    tmp_path_factory: pytest.TempPathFactory, flat: bool, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(flattened(GOOD) if flat else GOOD)
    for at, change in changes:
        at %= (16 if at % 3 == 0 else PAGE + 200 if at % 3 == 1 else len(data)) if at % 7 else 512
        data[at : at + len(change)] = change
    path = write(tmp_path_factory.getbasetemp(), bytes(data))
    try:
        wrong, has, _ = check(path)
    except Error as e:
        wrong, has = [str(e)], []
    assert len(wrong) <= 40
    assert all("\n" not in line for line in (*wrong, *has))
