# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dump is made of where something is missing: no firmware tables, devices that do not answer, memory that no
source shows. A machine in memory stands in for the live one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import dump as dump_module
from capture import recorded
from capture.dump import Dump, build
from capture.image_machine import ImageMachine
from capture.machine import Machine
from capture.memory_map import Device
from capture.x86_64 import X86_64
from guard.errors import Error, SourceError
from guard.physmem import PREAD, Segment, only
from guard.ranges import Range, RangeSet
from guard.witness.resources import Resource
from tests.image.machines import vmcore_header

MIB = 1 << 20
RAM = (1 * MIB, 64 * MIB)
REGION = (256 * MIB, 320 * MIB)
BLOCK = 2 * MIB


class FakeMachine(Machine):
    """16 MiB-wise marked memory; below *root* what firmware tells."""

    def __init__(self, root: Path, core: bytes = b"", devices: list[Device] | None = None) -> None:
        super().__init__(str(root), "x86_64")
        self.devices = devices or []
        memory = os.memfd_create("memory")
        os.truncate(memory, REGION[1])
        for at in range(0, REGION[1], 4 * MIB):
            os.pwrite(memory, struct.pack("<Q", at | 1), at)
        self._fds.append(memory)
        self._segments = [Segment(*span, memory, span[0], PREAD, "memory") for span in (RAM, (REGION[0], 64 * MIB))]
        self._segments = [s._replace(size=63 * MIB if s.paddr == MIB else 64 * MIB) for s in self._segments]
        self.asked: list[RangeSet] = []
        if core:
            (root / "vmcore").write_bytes(core)
            self._open_core(str(root / "vmcore"), "/proc/vmcore")

    def open_segments(self, wanted: RangeSet) -> list[Segment]:
        self.asked.append(wanted)
        self.source = "memory"
        return only(self._segments, wanted)


Fake = Callable[..., FakeMachine]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    made: list[FakeMachine] = []

    def make(e820: bool = True, **more: object) -> FakeMachine:
        if e820:
            folder = tmp_path / "sys/firmware/qemu_fw_cfg/by_name/etc/e820"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "raw").write_bytes(struct.pack("<QQI", 0, RAM[1], 1))
        made.append(FakeMachine(tmp_path, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def device(name: str = "0000:00:04.0", bitmap: bytes | None = b"\x0f", **more: object) -> Device:
    found = Device(name, Range(*REGION), 64 * MIB, BLOCK, 4 * BLOCK, 4 * BLOCK, 0, bitmap, "no answer within 2 s")
    return found._replace(**more)  # type: ignore[arg-type]


def loads(dump: Dump) -> list[tuple[int, int]]:
    return [(p.paddr, p.paddr + p.memsz) for p in dump.core.phdrs if p.type == 1]


def test_memory_is_dumped_without_a_dead_kernel_to_ask(fake: Fake) -> None:
    dump = build(fake())
    assert loads(dump) == [RAM]
    assert any("no VMCOREINFO note" in line for line in dump.problems)
    at = dump.core.extents[0].offset
    assert dump.vmcore.read(at + 3 * MIB, 8) == struct.pack("<Q", 4 * MIB | 1)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Error, match="machine architecture aarch64: headers are built for x86_64 and s390x only"):
        Machine(str(tmp_path), "aarch64")


def test_no_source_of_ram_is_an_error_that_names_what_was_tried(fake: Fake, tmp_path: Path) -> None:
    table = tmp_path / "sys/firmware/acpi/tables/SRAT"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"SRAT" + bytes(60))
    with pytest.raises(SourceError, match="no source tells where the dead machine's RAM was: ") as caught:
        build(fake(e820=False))
    for reason in ("qemu_fw_cfg: absent", "tables/SRAT: length at offset 4 is 0", "DMI: absent"):
        assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_source_of_ram_is_an_error_with_a_reason_where_all_could_be_read(fake: Fake) -> None:
    machine = fake(e820=False)
    machine.reports |= {name: report._replace(problems=()) for name, report in machine.reports.items()}
    with pytest.raises(SourceError) as caught:
        build(machine)
    assert str(caught.value) == (
        "no source tells where the dead machine's RAM was: by fw_cfg, smbios, srat there is none, or something else "
        "lies there"
    )


def test_preloaded_header_stands_in_for_firmware_and_that_is_told(fake: Fake) -> None:
    dump = build(fake(e820=False, core=vmcore_header([(2 * MIB, 32 * MIB)])))
    assert loads(dump) == [(2 * MIB, 32 * MIB)]
    assert any("the preloaded header's PT_LOADs are taken for it" in line for line in dump.problems)


def test_no_file_is_asked_for_anything_outside_of_the_envelope(fake: Fake) -> None:
    machine = fake(devices=[device()])
    build(machine)
    assert machine.asked == [RangeSet([(0, RAM[1]), REGION])]


def test_device_that_gave_no_answer_costs_its_region_only(fake: Fake) -> None:
    dump = build(fake(devices=[device(bitmap=None), device("0000:00:05.0", region=Range(512 * MIB, 576 * MIB))]))
    assert loads(dump) == [RAM, (512 * MIB, 520 * MIB)]
    assert dump.memory.read(REGION[0], 4096) == bytes(4096)


def test_device_that_gave_nonsense_is_told_with_its_name(fake: Fake) -> None:
    dump = build(fake(devices=[device(problems=("virtio-pci: 2 STATE requests: an unknown state",))]))
    assert "0000:00:04.0: virtio-pci: 2 STATE requests: an unknown state" in dump.problems
    assert loads(dump) == [RAM, (REGION[0], REGION[0] + 4 * BLOCK)]


def test_two_devices_that_claim_one_region_are_no_trouble(fake: Fake) -> None:
    dump = build(fake(devices=[device(), device("0000:00:05.0", bitmap=b"\x3c")]))
    assert loads(dump) == [RAM, (REGION[0] + 2 * BLOCK, REGION[0] + 4 * BLOCK)]


def test_device_that_claims_boot_ram_takes_nothing_but_its_region(fake: Fake) -> None:
    lie = device(region=Range(32 * MIB, 96 * MIB), bitmap=b"\1")
    assert loads(build(fake(devices=[lie]))) == [(MIB, 34 * MIB)]


@pytest.mark.parametrize("start", [1 << 52, 1 << 63, (1 << 64) - 64 * MIB])
def test_device_far_beyond_any_memory_is_carried_in_the_header_and_reads_as_zeros(start: int, fake: Fake) -> None:
    dump = build(fake(devices=[device(region=Range(start, start + 64 * MIB))]))
    assert loads(dump)[-1] == (start, start + 4 * BLOCK)
    assert dump.lost() == RangeSet([(start, start + 4 * BLOCK)])
    assert dump.vmcore.read(dump.core.extents[-1].offset, 8 * MIB) == bytes(8 * MIB)
    assert dump.vmcore.read(dump.vmcore.size - 10, 100) == bytes(10)


def test_memory_that_no_source_shows_is_told_as_lost_and_is_zeros(fake: Fake) -> None:
    machine = fake()
    del machine._segments[0]
    dump = build(machine)
    assert dump.lost() == RangeSet([RAM])
    assert dump.vmcore.read(dump.core.extents[0].offset, 4096) == bytes(4096)


def test_machine_is_closed_when_the_dump_fails(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = fake()
    fd = machine._fds[0]
    monkeypatch.setattr(dump_module, "Vmcore", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        build(machine)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("mode", ["dynamic", "preloaded"])
def test_memory_of_the_capture_kernel_is_never_read_as_the_dead_machines(mode: str, fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/iomem").write_text("00001000-0009ffff : System RAM\n02000000-02ffffff : System RAM\n")
    dump = build(fake(core=vmcore_header([(MIB, 32 * MIB), (48 * MIB, 64 * MIB)])), mode=mode)
    assert dump.memory.read(32 * MIB, 4096) == bytes(4096)
    assert dump.memory.read(48 * MIB, 8) == struct.pack("<Q", 48 * MIB | 1)


def inside(draw: st.DrawFn, most: int, low: int = 0, high: int = 64 * MIB) -> list[tuple[int, int]]:
    """Up to *most* disjoint ranges at borders that are no pages'."""
    near = st.builds(lambda page, by: page * 4096 + by, st.integers(low >> 12, (high >> 12) - 2), st.integers(0, 4095))
    borders = sorted(draw(st.sets(near, max_size=2 * most)))
    return list(zip(borders[::2], borders[1::2], strict=False))


@st.composite
def borders(draw: st.DrawFn) -> tuple[list[tuple[int, int]], ...]:
    """Lines of /proc/iomem, PT_LOADs of the kernel's header, images."""
    return inside(draw, 3), inside(draw, 4, MIB), inside(draw, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(borders(), st.sampled_from(["dynamic", "preloaded"]))
def test_borders_inside_of_pages_fail_in_neither_mode(
    fake: Fake, tmp_path: Path, drawn: tuple[list[tuple[int, int]], ...], mode: str
) -> None:
    lines, listed, _ = drawn
    (tmp_path / "proc").mkdir(exist_ok=True)
    text = "".join(f"{a:08x}-{b - 1:08x} : System RAM\n" for a, b in lines) or "70000000-70000fff : System RAM\n"
    (tmp_path / "proc/iomem").write_text(text)
    core = vmcore_header(listed or [(MIB, 2 * MIB)])
    dump = build(fake(core=core), mode=mode)
    for s in dump.memory.segments:
        assert not (s.paddr | s.size) % 4096
    for a, b in lines:
        paddr = max(a & -4096, MIB)
        # what is this kernel's is read only where its own file has what it displaced, and then from there
        assert dump.memory.read(paddr, 8) == bytes(8) or b <= MIB
    if mode == "preloaded":
        assert dump.core.header == core
    dump.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(borders(), st.sampled_from(["dynamic", "preloaded"]))
def test_images_that_begin_and_end_inside_of_pages_show_their_whole_pages(
    tmp_path: Path, drawn: tuple[list[tuple[int, int]], ...], mode: str
) -> None:
    lines, listed, images = drawn
    images = [part for a, b in images or [(0x800, 0x3800)] for part in ((a, (a + b) // 2), ((a + b) // 2, b))]
    root = tmp_path / "root/proc"
    root.mkdir(parents=True, exist_ok=True)
    (root / "iomem").write_text("".join(f"{a:08x}-{b - 1:08x} : System RAM\n" for a, b in lines) or "0-fff : x\n")
    (root / "vmcore").write_bytes(vmcore_header(listed or [(MIB, 2 * MIB)]))
    with open(tmp_path / "ram.raw", "wb") as file:
        file.truncate(64 * MIB)
    ram = [{"image": "ram.raw", "offset": a, "paddr": a, "size": b - a} for a, b in images if a < b]
    (tmp_path / "machine.json").write_text(json.dumps({"format": 1, "arch": "x86_64", "ram": ram, "root": "root"}))
    dump = build(ImageMachine(recorded.load(str(tmp_path))), mode=mode)
    whole = RangeSet(page for image in images for page in RangeSet([image]).inner_pages(4096))
    assert not dump.memory.covered - whole - dump.machine.own.outer_pages(4096)
    dump.close()


def test_device_that_nothing_locates_costs_all_that_was_hot_plugged(fake: Fake) -> None:
    machine = fake()
    machine.unlocated = [("0000:00:04.0", False)]
    dump = build(machine)
    assert "nothing tells where the memory of 0000:00:04.0 is: no hot-plugged memory is read" in dump.problems
    assert loads(dump) == [RAM]


def test_device_that_nothing_locates_ends_it_where_firmware_does_not_tell_boot_ram(fake: Fake) -> None:
    machine = fake(e820=False, core=vmcore_header([(2 * MIB, 32 * MIB)]))
    machine.unlocated = [("0000:00:04.0", False)]
    with pytest.raises(Error, match=r"nothing tells where the memory of 0000:00:04\.0 is: what is unplugged"):
        build(machine)


class SilentKernel:
    """A dead kernel whose records say nothing of virtio-mem: damaged, or lying."""

    def virtio_mem_regions(self) -> list[Resource]:
        return []

    iomem = virtio_mem_regions


def test_dead_kernel_that_hides_a_device_does_not_open_the_hotplug_window(fake: Fake) -> None:
    dump = build(fake())
    dump.registry.opened = False
    dump.envelope = dump.envelope._replace(window=RangeSet([REGION]))
    dump.machine.unlocated = [("0000:00:04.0", False)]
    assert isinstance(dump.arch, X86_64)
    dump.arch._locate_devices(dump, SilentKernel())  # type: ignore[arg-type]
    assert dump.envelope.window == RangeSet()
    assert not dump.registry.pfn_is_ram(REGION[0] // 4096)
    assert [(d.region, d.bitmap) for d in dump.machine.devices] == [(Range(*REGION), None)]


def test_machine_whose_ram_all_lies_in_what_a_bus_claims_is_not_given_up(fake: Fake, tmp_path: Path) -> None:
    """A board whose resources cover its RAM: one source calls it RAM, and the dead kernel could confirm it."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/iomem").write_text("00001000-0009ffff : System RAM\n00100000-3fffffff : pnp 00:01\n")
    dump = build(fake())
    assert dump.envelope.disputed == RangeSet([RAM])
    assert loads(dump) == []
    assert dump.lost() == RangeSet([RAM])
