# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where stage 2 has come up: is the kernel's vmcore the one that was meant, what it lacks, and the way back. Files
stand in for /proc/vmcore and /dev/mem, and nothing is gone to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import arrival, boot_image, elfcore, kexec, stage_state
from capture.arrival import Arrival
from capture.elfcore import Load
from capture.header_place import Window
from capture.kexec import Image, Loaded
from capture.stage_state import Meant
from guard import procvmcore
from guard.errors import Error
from guard.ranges import Range
from tests.unit.stage_parts import MIB, PAGE, bz_image, open_files
from tests.unit.witness_memory import PRSTATUS

CORE = elfcore.build(62, PRSTATUS, [Load(MIB, 0, 5 * PAGE), Load(4 * MIB + 100, 0, PAGE)], 4)
MEANT = Meant("quiet elfcorehdr=0x6bff0000", 0x5000, CORE.size, "/boot/vmlinuz", None, (0, 0), ())
P_ALIGN = range(64 + 48, 64 + 56)
"""Where the header has the p_align of its PT_NOTE."""


def arrived(meant: Meant | None = MEANT, original: bytes = b"") -> Arrival:
    """Stage 2, told that *original* was where its header lies."""
    state = {stage_state.HEAD: CORE.header, stage_state.ORIGINAL: original}
    return Arrival("2", state if meant is None else {stage_state.MEANT: meant.encode(), **state})


def verified(data: bytes, meant: Meant = MEANT) -> str:
    """Of a /proc/vmcore with *data*."""
    fd = os.memfd_create("vmcore")
    try:
        os.write(fd, data)
        return arrived(meant).verify(f"/proc/self/fd/{fd}").replace(f"/proc/self/fd/{fd}", "vmcore")
    finally:
        os.close(fd)


WHOLE = CORE.header + bytes(CORE.size - len(CORE.header))


def test_vmcore_that_begins_and_ends_as_was_meant_is_right() -> None:
    assert verified(WHOLE) == ""
    assert verified(WHOLE, MEANT._replace(knows_note_align=False)) == ""
    assert verified(CORE.header + b"x" * (CORE.size - len(CORE.header))) == ""


@given(st.integers(0, len(CORE.header) - 1), st.integers(1, 255))
def test_any_other_byte_of_the_header_is_noticed_and_told(at: int, change: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= change
    assert verified(bytes(data)) == f"vmcore: offset {at:#x}: not the header that was meant"


@pytest.mark.parametrize("at", [0, *range(P_ALIGN.start - 3, P_ALIGN.stop + 3), len(CORE.header) - 1])
def test_only_the_alignment_of_notes_may_differ_where_nothing_told_it(at: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= 1
    wrong = "" if at in P_ALIGN else f"vmcore: offset {at:#x}: not the header that was meant"
    assert verified(bytes(data), MEANT._replace(knows_note_align=False)) == wrong


@settings(deadline=None)
@given(st.integers(0, CORE.size + 3 * PAGE).filter(lambda size: size != CORE.size))
def test_vmcore_of_another_size_is_noticed(size: int) -> None:
    wrong = verified(WHOLE[:size].ljust(size, b"\0"))
    if size < len(CORE.header):
        assert wrong == f"vmcore: ends at {size:#x}, expected {len(CORE.header)} bytes at 0x0"
    else:
        assert wrong == f"vmcore: {size} bytes, expected {CORE.size}"


def test_vmcore_that_the_kernel_did_not_make_or_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    absent = arrived().verify(f"{tmp_path}/vmcore")
    assert absent == f"{tmp_path}/vmcore: the kernel made none: it did not take the header"
    assert arrived().verify(str(tmp_path)) == f"{tmp_path}: Is a directory"


def test_without_word_of_what_was_meant_nothing_can_be_told() -> None:
    missing = r"^/etc/oldmem-stage/meant.json is not there: nothing tells what was meant$"
    with pytest.raises(Error, match=missing):
        arrived(None).verify()
    with pytest.raises(Error, match=missing):
        _ = arrived(None).incomplete
    with pytest.raises(Error, match="not what the stage before writes"):
        Arrival("2", {stage_state.MEANT: b"{"}).verify()
    with pytest.raises(Error, match=r"^/etc/oldmem-stage/vmcore.head is not there"):
        Arrival("2", {stage_state.MEANT: MEANT.encode()}).verify()


def test_what_the_vmcore_lacks_is_told_line_by_line() -> None:
    assert arrived().incomplete == []
    lost = (Range(0x1000, 0x3000), Range(MIB, 2 * MIB))
    assert arrived(MEANT._replace(given_up=(3, 5 * PAGE), lost=lost)).incomplete == [
        "3 runs of readable memory, 20480 bytes, had no room in the header",
        "0x1000-0x2fff was RAM and is left out: nothing tells its state",
        "0x100000-0x1fffff was RAM and is left out: nothing tells its state",
    ]


def test_reports_of_the_stage_before_are_laid_down(tmp_path: Path) -> None:
    folder = tmp_path / "run/oldmem"
    state = {stage_state.MAP: b'{"map": 1}\n'}
    Arrival("2", state).report(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "map.json": b'{"map": 1}\n',
        "guard.json": b"{}\n",
    }
    with pytest.raises(Error, match=f"^{folder}/map.json[^\n]*: Not a directory$"):
        Arrival("2", state).report(f"{folder}/map.json/x")


# ---- the way back


class Way:
    """Stands in for kexec, and files for what it is given. *events* are the calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.images: list[tuple[Image, bytes]] = []
        self.kernel, self.initrd, self.mem = folder / "vmlinuz", folder / "initrd", folder / "mem"
        self.kernel.write_bytes(bz_image(os.uname().release))
        self.initrd.write_bytes(b"the initramfs of the distribution")
        self.mem.write_bytes(b"s" * 16 * PAGE)
        self.root = folder / "root"
        monkeypatch.setattr(boot_image, "_ROOTS", (str(self.root),))
        monkeypatch.setattr(boot_image, "_root_kind", lambda: "ext4")
        self.meant = MEANT._replace(kernel=str(self.kernel), initramfs=str(self.initrd))
        for name in ("load", "unload", "jump"):
            monkeypatch.setattr(kexec, name, getattr(self, name))
        monkeypatch.setattr(os, "sync", lambda: self.events.append("sync"))
        monkeypatch.setattr(arrival, "Window", self.window)
        self.mapped: list[tuple[int, int]] = []

    def window(self, addr: int, size: int) -> Window:
        self.mapped.append((addr, size))
        return Window(addr, size, str(self.mem))

    def load(self, image: Image, want_segments: bool) -> Loaded:
        self.events.append("load")
        self.images.append((image, os.pread(image.initramfs, 1 << 20, 0)))
        assert not want_segments
        assert self.mem.read_bytes().strip(b"s") == b"", "what cannot be undone comes last"
        return Loaded("test", None)

    def unload(self) -> None:
        self.events.append("unload")

    def jump(self) -> None:
        self.events.append("jump")
        raise Error("no way there")


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    return Way(tmp_path, monkeypatch)


def test_way_back_is_the_capture_kernel_with_the_header_and_command_line_that_it_had(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    meant = way.meant._replace(cmdline='a="b c" elfcorehdr=0x5000 oldmem.stage=x -- init')
    original = b"o" * (PAGE + 5)
    with pytest.raises(Error, match=r"^no way there$"):
        arrived(meant, original).go_back("offset 0x40: wrong")
    assert way.events == ["load", "sync", "jump", "unload"]
    assert way.mem.read_bytes() == b"s" * 5 * PAGE + original + b"s" * (10 * PAGE - 5)
    assert way.mapped == [(0x5000, 2 * PAGE)]
    ((image, initramfs),) = way.images
    assert (image.kernel, image.cmdline) == (
        str(way.kernel),
        'a="b c" elfcorehdr=0x5000 oldmem.stage=back -- init',
    )
    assert initramfs == stage_state.archive({stage_state.WHY: b"offset 0x40: wrong"}) + way.initrd.read_bytes()
    assert open_files() == before


@pytest.mark.parametrize("original", [b"", b"original"])
def test_memory_is_left_alone_where_the_prepared_header_stayed(original: bytes, way: Way) -> None:
    meant = way.meant._replace(elfcorehdr=None if original else 0x5000)
    with pytest.raises(Error, match="no way there"):
        arrived(meant, original).go_back("wrong")
    assert way.mapped == []
    assert way.mem.read_bytes() == b"s" * 16 * PAGE
    assert "jump" in way.events


def test_header_that_cannot_be_put_back_is_not_gone_back_to(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = arrived(way.meant._replace(elfcorehdr=64 * PAGE), b"original")
    with pytest.raises(Error, match="0x40000-0x40fff cannot be mapped"):
        lost.go_back("wrong")
    monkeypatch.setattr(Window, "write", lambda self, data: False)
    with pytest.raises(Error, match=r"^the prepared header could not be put back at 0x5000$"):
        arrived(way.meant, b"original").go_back("wrong")
    assert way.events == ["load", "unload"] * 2


def test_files_that_are_not_mounted_yet_are_looked_for_elsewhere(way: Way) -> None:
    release = os.uname().release
    (way.root / "boot").mkdir(parents=True)
    kernel = way.kernel.rename(way.root / f"boot/vmlinuz-{release}")
    way.initrd.rename(way.root / f"boot/initrd-{release}-kdump")
    with pytest.raises(Error, match="no way there"):
        arrived(way.meant).go_back("wrong")
    ((image, initramfs),) = way.images
    assert image.kernel == str(kernel)
    assert initramfs.endswith(b"the initramfs of the distribution")


def test_without_kernel_or_initramfs_there_is_no_way_back(way: Way) -> None:
    way.initrd.unlink()
    with pytest.raises(Error, match=r"^no initramfs: none of .*, and / is ext4; --initramfs names it$"):
        arrived(way.meant).go_back("wrong")
    way.kernel.write_bytes(bz_image("another"))
    with pytest.raises(Error, match=f"^{way.kernel}: is of kernel another, expected the running one"):
        arrived(way.meant).go_back("wrong")
    way.kernel.unlink()
    with pytest.raises(Error, match=r"^no image of this kernel \("):
        arrived(way.meant).go_back("wrong")
    assert way.events == []


# ---- settling


class Settled:
    """What settle() said, with a command line and a vmcore of the test's."""

    def __init__(self, way: Way, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.way, self.vmcore, self.folder = way, folder / "vmcore", folder / "run"
        self.vmcore.write_bytes(WHOLE)
        self.line = "quiet oldmem.stage=2"
        self.state = {stage_state.MEANT: way.meant.encode(), stage_state.HEAD: CORE.header}
        self.said: list[str] = []
        self.warned: list[str] = []
        real_verify, real_report = Arrival.verify, Arrival.report

        def verify(of: Arrival) -> str:
            way.events.append("verify")
            return real_verify(of, str(self.vmcore))

        monkeypatch.setattr(arrival, "running_cmdline", lambda: self.line)
        monkeypatch.setattr(stage_state, "read", lambda: self.state)
        monkeypatch.setattr(arrival, "load_driver", lambda: way.events.append("driver"))
        monkeypatch.setattr(Arrival, "verify", verify)
        monkeypatch.setattr(Arrival, "report", lambda of: real_report(of, str(self.folder)))

    def settle(self) -> list[str] | None:
        return arrival.settle(self.said.append, self.warned.append)


@pytest.fixture
def settled(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settled:
    return Settled(way, tmp_path, monkeypatch)


def test_first_stage_settles_nothing(settled: Settled) -> None:
    settled.line = "quiet -- oldmem.stage=2"
    assert settled.settle() is None
    assert settled.said == settled.warned == settled.way.events == []


def test_stage_2_as_it_was_meant_is_told_with_what_it_lacks(settled: Settled) -> None:
    settled.state[stage_state.MEANT] = settled.way.meant._replace(given_up=(1, PAGE)).encode()
    assert settled.settle() == ["1 runs of readable memory, 4096 bytes, had no room in the header"]
    (said,) = settled.said
    assert said.startswith("the kernel serves the guarded vmcore at /proc/vmcore, report in ")
    assert settled.warned == []
    assert sorted(os.listdir(settled.folder)) == ["guard.json", "map.json"]
    assert settled.way.events == ["driver", "verify"]
    settled.state[stage_state.MEANT] = settled.way.meant.encode()
    assert settled.settle() == []


def test_stage_2_that_is_not_what_was_meant_goes_back(settled: Settled) -> None:
    settled.vmcore.unlink()
    assert settled.settle() is None
    assert settled.way.events == ["driver", "verify", "load", "sync", "jump", "unload"]
    wrong = f"{settled.vmcore}: the kernel made none: it did not take the header"
    no_way = "no way there; the vmcore is put in place here"
    assert settled.warned == [f"stage 2 is not what was meant: {wrong}; going back", no_way]
    assert settled.said == []
    assert not settled.folder.exists()


def test_capture_kernel_that_was_come_back_to_goes_on_as_a_first_stage(settled: Settled) -> None:
    settled.line = "quiet oldmem.stage=back"
    settled.state = {stage_state.WHY: "vmcore: 7 bytes \u2026".encode()}
    assert settled.settle() is None
    settled.state = {}
    assert settled.settle() is None
    assert settled.warned == [
        "came back from stage 2: vmcore: 7 bytes \u2026",
        "came back from stage 2: it left no word",
    ]
    assert settled.way.events == []


def test_stage_2_whose_state_cannot_be_read_serves_by_itself(settled: Settled, monkeypatch: pytest.MonkeyPatch) -> None:
    settled.state = {}
    assert settled.settle() is None

    def unreadable() -> dict[str, bytes]:
        raise Error("/etc/oldmem-stage: Input/output error")

    monkeypatch.setattr(stage_state, "read", unreadable)
    assert settled.settle() is None
    assert settled.warned == [
        "/etc/oldmem-stage/meant.json is not there: nothing tells what was meant; the vmcore is put in place here",
        "/etc/oldmem-stage: Input/output error; the vmcore is put in place here",
    ]
    assert not {"load", "jump"} & set(settled.way.events)


def test_driver_is_loaded_only_where_the_kernel_knows_that_it_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, calls = tmp_path / "modprobe", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(procvmcore, "PATH", f"{tmp_path}/vmcore")
    arrival.load_driver()
    assert not calls.exists()
    (tmp_path / "vmcore").touch()
    arrival.load_driver()
    assert calls.read_text() == "-q virtio_mem\n"
