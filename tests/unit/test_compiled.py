# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compiled guards: the format byte by byte, reading back what was written, and files that are none."""

from __future__ import annotations

import json
import os
import struct
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import cli
from guard._core import ffi, lib
from guard.compiled import compile_guard, open_guard, write_guard
from guard.errors import Error, SourceError
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet
from guard.registry import Registry, Rule, bitmap_rule, deny_rule
from tests.unit.guard_files import END, PAGE, damages, registries, sealed, shown


def example(name: str = "balloon") -> Registry:
    registry = Registry()
    registry.register(deny_rule(name, RangeSet([(4 * PAGE, 8 * PAGE), (9 * PAGE, 10 * PAGE)]), "given back"))
    registry.register(bitmap_rule("device", Range(64 * PAGE, 164 * PAGE), 2 * PAGE, bytes([0xAA] * 9), "unplugged"))
    return registry


def opened(data: bytes, folder: Path) -> Registry:
    path = folder / "guard"
    path.write_bytes(data)
    return open_guard(str(path))


def wrong(data: bytes, folder: Path) -> str:
    """The one line, without the path, that says why *data* is no guard."""
    with pytest.raises(SourceError) as caught:
        opened(data, folder)
    line = str(caught.value)
    assert line.startswith(f"{folder}/guard: ")
    assert line.isprintable()
    return line.removeprefix(f"{folder}/guard: ")


def test_file_is_what_the_table_in_the_design_says() -> None:
    data = compile_guard(example())
    assert struct.unpack_from("=8sIIQIIQQQQ", data) == (
        *(b"OLDMEMGD", 0x01020304, 1, len(data), 12, 2),
        *(64 + 2 * 80, len("balloon given back device unplugged "), 0, 0),
    )
    assert struct.unpack_from("=7Q6I", data, 64) == (4, 10, 0, 1 << 52, 0, 2, 320, 224, 7, 232, 10, 1, 0)
    assert struct.unpack_from("=7Q6I", data, 144) == (64, 164, 64, 164, 2, 50, 384, 243, 6, 250, 9, 0, 0)
    assert data[224:320] == b"balloon\0given back\0device\0unplugged\0".ljust(96, b"\0")
    assert struct.unpack_from("=4Q", data, 320) == (4, 8, 9, 10)
    assert struct.unpack_from("=Q", data, 384) == (0xAAAAAAAAAAAAAAAA & (1 << 50) - 1,)
    assert data[352:384] == bytes(32)
    assert data[392:448] == bytes(56)
    assert len(data) == 456
    assert sealed(data) == data


@pytest.mark.parametrize(
    ("data", "expected"), [(bytes(32), 0xF6E9BE5D70632CF5), (bytes(range(64)), 0xF7C67301DB6713F0)]
)
def test_checksum_is_xxh64(data: bytes, expected: int) -> None:
    """The values are those of the xxHash project's own program."""
    assert lib.guardfile_sum(ffi.from_buffer("char[]", data), len(data)) == expected


@settings(deadline=None)
@given(registries())
def test_guard_that_is_read_back_answers_as_the_registry_and_is_written_as_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> None:
    data = compile_guard(registry)
    again = opened(data, tmp_path_factory.getbasetemp())
    assert compile_guard(again) == data
    assert [r.name for r in again] == [shown(r.name) for r in registry]
    assert [(r.domain, r.deny) for r in again] == [(r.domain, r.deny) for r in registry]
    assert [r.reason for r in again] == [shown(r.reason) for r in registry]

    def runs(of: Registry) -> list[tuple[Range, str | None]]:
        return [(run, shown(rule.name) if rule else None) for run, rule in of.verdicts(0, 3 * END * PAGE)]

    assert runs(again) == runs(registry)


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_page_size_is_kept(page_size: int, tmp_path: Path) -> None:
    registry = Registry(page_size)
    registry.register(deny_rule("r", RangeSet([(page_size, 2 * page_size)]), "no", page_size))
    again = opened(compile_guard(registry), tmp_path)
    assert again.page_size == page_size
    assert [again.pfn_is_ram(pfn) for pfn in range(3)] == [True, False, True]


def test_bits_behind_the_end_of_a_bitmap_do_not_get_into_the_file() -> None:
    def compiled(last: int) -> bytes:
        registry = Registry()
        registry.register(bitmap_rule("device", Range(0, 3 * PAGE), PAGE, bytes([last]), "unplugged"))
        return compile_guard(registry)

    assert compiled(0xFA) == compiled(0x02)


def test_texts_are_one_line_in_the_file_whatever_they_were(tmp_path: Path) -> None:
    registry = Registry()
    registry.register(deny_rule("a\nb\0", RangeSet(), "\x1b[31mred\udc80 ü"))
    (rule,) = opened(compile_guard(registry), tmp_path)
    assert (rule.name, rule.reason) == ("a\\nb\\x00", "\\x1b[31mred\\udc80 ü")


def test_more_rules_than_a_guard_can_have_are_an_error() -> None:
    registry = Registry()
    for i in range(4097):
        registry.register(deny_rule(str(i), RangeSet(), ""))
    with pytest.raises(Error, match="4097 rules: a compiled guard has at most 4096"):
        compile_guard(registry)


def test_pages_that_no_file_may_have_are_an_error_and_leave_none(tmp_path: Path) -> None:
    registry = Registry()
    pages = PageSet(0, 1 << 52, array("Q", [5, 7, 3, 4]), 2, 0, 12)
    registry.register(Rule("odd", Range(0, 100 * PAGE), pages, True, "made by hand"))
    with pytest.raises(Error, match=r"these rules cannot be compiled: rule 0: runs at 0x.* do not ascend"):
        write_guard(registry, str(tmp_path / "guard"))
    assert list(tmp_path.iterdir()) == []


def test_half_a_million_runs_take_less_than_20_mb(tmp_path: Path) -> None:
    runs = array("Q", (pfn for start in range(0, 1 << 34, 1 << 15) for pfn in (start, start + 100)))
    registry = Registry()
    pages = PageSet(0, 1 << 52, runs, len(runs) // 2, 0, 12)
    registry.register(Rule("allow", Range(0, 64 << 40), pages, False, "64 TiB in a million transitions"))
    write_guard(registry, str(tmp_path / "guard"))
    assert len(runs) == 1 << 20
    assert os.path.getsize(tmp_path / "guard") < 20e6
    assert open_guard(str(tmp_path / "guard")).next_refused(1 << 15, 1 << 34) == (1 << 15) + 100


def test_every_cut_and_every_flipped_bit_is_one_line(tmp_path: Path) -> None:
    data = compile_guard(example())
    for size in range(len(data)):
        assert wrong(data[:size], tmp_path)
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert wrong(bytes(changed), tmp_path)
    assert "has 0x1c9 bytes where its header says 0x1c8" in wrong(data + b"\0", tmp_path)


def changed(at: int, layout: str, *values: int) -> bytes:
    data = bytearray(compile_guard(example()))
    struct.pack_into(f"={layout}", data, at, *values)
    return sealed(bytes(data))


DAMAGES: dict[str, tuple[int, str, tuple[int, ...], str]] = {
    "magic": (0, "B", (0,), "is no compiled guard: it does not begin with OLDMEMGD"),
    "order": (8, "I", (0x04030201,), "was written on a machine of the other byte order"),
    "no order": (8, "I", (7,), "byte order mark at 0x8 is 0x7, not 0x1020304"),
    "version": (12, "I", (2,), "is of version 2; version 1 is understood"),
    "page shift": (24, "I", (70,), "page shift at 0x18 is 70, not 12 to 16"),
    "rules": (28, "I", (4097,), "has 4097 rules at 0x1c; up to 4096 are understood"),
    "more rules": (28, "I", (1000,), "1000 rules and 0x24 bytes of texts at 0xe0 do not fit"),
    "texts": (32, "Q", (232,), "2 rules and 0x24 bytes of texts at 0xe8 do not fit"),
    "texts size": (40, "Q", ((1 << 64) - 1,), "2 rules and 0xffffffffffffffff bytes of texts at 0xe0 do not fit"),
    "reserved": (48, "Q", (1,), "reserved bytes at 0x30 are not zero"),
    "domain": (64, "Q", (11,), "rule 0: pfns [0xb, 0xa) or [0, 0x10000000000000) are not possible"),
    "domain end": (72, "Q", ((1 << 52) + 1,), "rule 0: pfns [0x4, 0x10000000000001) or"),
    "pages a bit": (176, "Q", (1 << 63,), "rule 1: 0x32 bits of 0x8000000000000000 pages are not the pfns"),
    "no pages a bit": (176, "Q", (0,), "rule 1: array of 0x32 at 0x180 does not lie where it belongs"),
    "runs": (104, "Q", (1 << 62,), "rule 0: array of 0x4000000000000000 at 0x140 does not lie where it belongs"),
    "data": (112, "Q", (328,), "rule 0: array of 0x2 at 0x148 does not lie where it belongs, at 0x140"),
    "name": (120, "I", (225,), "rule 0: text of 0x7 bytes at 0xe1 does not lie where it belongs, at 0xe0"),
    "name size": (124, "I", (0xFFFFFFFF,), "rule 0: text of 0xffffffff bytes at 0xe0 does not lie"),
    "longer name": (124, "I", (9,), "rule 0: text at 0xe0 has the control character 0"),
    "shorter name": (124, "I", (6,), "rule 0: text at 0xe0 does not end with a NUL"),
    "flags": (136, "I", (2,), "rule 0: unknown flags 0x2"),
    "newline": (226, "B", (10,), "rule 0: text at 0xe0 has the control character 0xa"),
    "behind the texts": (300, "B", (1,), "bytes at 0x104, behind the texts, belong to nothing"),
    "run": (328, "Q", (4,), "rule 0: runs at 0x140 do not ascend in [0, 0x10000000000000)"),
    "touching runs": (336, "Q", (8,), "rule 0: runs at 0x140 do not ascend"),
    "run's end": (344, "Q", (1 << 53,), "rule 0: runs at 0x140 do not ascend"),
    "behind the runs": (360, "B", (1,), "rule 0: bytes behind its array are not zero"),
    "last bit": (384, "Q", (1 << 50,), "rule 1: bits behind the last of its bitmap are set"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_told_where_the_checksum_is_right(damage: str, tmp_path: Path) -> None:
    at, layout, values, line = DAMAGES[damage]
    assert wrong(changed(at, layout, *values), tmp_path).startswith(line)


def test_wrong_checksum_is_told(tmp_path: Path) -> None:
    data = compile_guard(example())
    flipped = data[:230] + b"X" + data[231:]
    assert "is damaged: its checksum is 0x" in wrong(flipped, tmp_path)


def test_two_rules_of_one_name_are_told(tmp_path: Path) -> None:
    data = compile_guard(example("device "))
    assert "a rule named 'device' is registered already" in wrong(
        sealed(data.replace(b"device \0given back\0device\0", b"device\0given back \0device\0")
               .replace(struct.pack("=4I", 224, 7, 232, 10), struct.pack("=4I", 224, 6, 231, 11))), tmp_path
    )  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(damages(compile_guard(example())))
def test_damage_under_a_right_checksum_is_refused_or_answers_and_ends(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    try:
        registry = opened(data, tmp_path_factory.getbasetemp())
    except SourceError:
        return
    pages = 400 * registry.page_size
    covered = sum(run.size for run, _ in registry.verdicts(0, pages))
    assert covered == pages
    if data[224:260] == compile_guard(example())[224:260]:  # texts that are no UTF-8 are not given back as they were
        assert compile_guard(registry) == data


@given(st.binary(max_size=200))
def test_bytes_that_are_no_guard_are_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    assert wrong(data, tmp_path_factory.getbasetemp())


def test_what_is_no_file_is_told_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, line in (
        (tmp_path / "fifo", "is no compiled guard: it is no regular file"),
        (tmp_path, "is no compiled guard: it is no regular file"),
        (Path("/dev/zero"), "is no compiled guard: it is no regular file"),
        (tmp_path / "nothing", "No such file or directory"),
    ):
        with pytest.raises(SourceError) as caught:
            open_guard(str(path))
        assert str(caught.value) == f"{path}: {line}"


def test_writing_replaces_a_file_in_one_step_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target, link = tmp_path / "guard", tmp_path / "link"
    link.symlink_to(target)
    write_guard(example("first"), str(target))
    with open(target, "rb") as earlier:
        write_guard(example("second"), str(link))
        assert earlier.read() == compile_guard(example("first"))
    assert link.is_symlink()
    assert target.read_bytes() == compile_guard(example("second"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guard", "link"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("{}/fifo", "{}/fifo: is no regular file, and will not be replaced by one"),
        ("{}/nothing/guard", "{}/nothing/guard: No such file or directory"),
        ("{}", "{}: is no regular file, and will not be replaced by one"),
    ],
)
def test_where_no_guard_can_be_written_is_one_line(path: str, line: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Error) as caught:
        write_guard(example(), path.format(tmp_path))
    assert str(caught.value) == line.format(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "fifo"]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A recorded machine: 32 MiB of RAM, of which the capture kernel has 8."""
    folder = tmp_path / "machine"
    (folder / "root/proc").mkdir(parents=True)
    (folder / "root/proc/iomem").write_text("00001000-0009fbff : System RAM\n01000000-017fffff : System RAM\n")
    with open(folder / "ram.raw", "wb") as image:
        image.truncate(32 << 20)
    ram = [{"image": "ram.raw", "offset": 0, "paddr": 0, "size": 32 << 20}]
    (folder / "machine.json").write_text(json.dumps({"format": 1, "arch": "x86_64", "ram": ram, "virtio_mem": []}))
    return folder


def test_command_writes_the_rules_of_a_machine(
    machine: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guard"
    assert cli.run(["guard", "-q", "--machine", str(machine), "-o", str(path)]) == cli.DONE
    registry = open_guard(str(path))
    assert not registry.pfn_is_ram(0x1000000 >> 12)
    assert registry.pfn_is_ram(0x1800000 >> 12)
    refuser = registry.refuser(0x1000000 >> 12)
    assert refuser is not None
    assert refuser.name == "capture kernel"
    capfdbinary.readouterr()
    with open(1, "w", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run(["guard", "-q", "--machine", str(machine), "-o", "-"]) == cli.DONE
    assert capfdbinary.readouterr().out == path.read_bytes()


def test_command_that_cannot_write_is_status_1_and_one_line(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["guard", "-q", "--machine", str(machine), "-o", str(machine)]) == cli.FAILED
    assert capsys.readouterr().err == f"oldmem: {machine}: Is a directory\n"
