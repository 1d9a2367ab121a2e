# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever changes between two reads of old memory: no errors but our own, an end within a bounded number of reads,
nothing readable that firmware and devices do not vouch for, and no note that contradicts itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import record_pages, report
from capture.dump import DYNAMIC, Dump, build
from capture.image_machine import ImageMachine
from capture.recorded import load
from guard.errors import Error, ReadError, WitnessError
from guard.physmem import ExactMemory, Touched
from guard.procvmcore import PT_LOAD
from guard.ranges import RangeSet
from guard.witness import owners
from guard.witness.btf import Btf
from guard.witness.dead_kernel import DeadKernel
from guard.witness.proof import prove
from guard.witness.vmcoreinfo import note_at
from tests.fuzz.changing import KINDS, Changing, Kind, ends
from tests.fuzz.test_fuzz_s390x import DEVICE, RAM, Machine
from tests.image import field
from tests.unit.made_btf import MadeBtf
from tests.unit.printk_ring import Ring
from tests.unit.test_witness_dead_kernel import complete_kernel, everything
from tests.unit.witness_memory import VMEMMAP, FakeMemory, vmcoreinfo_note

PAGE = 4096
NOTE_AT = 0x11000000
NAMES, MEMBERS = ("page", "atomic_long_t", "pageflags"), ("flags", "lru", "counter")

seeds = st.integers(0, (1 << 32) - 1)
kinds = st.sampled_from(KINDS)
modes = st.sampled_from([("cut", "dynamic"), ("kernel", "dynamic"), ("cut", "preloaded")])
fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def exact_reads(changing: Changing) -> Iterator[None]:
    """All that the witness reads of a machine changes; what the vmcore is read by does not."""
    read = ExactMemory.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactMemory, "read", lambda m, at, size: changing.read(lambda a, n: read(m, a, n), at, size))
        yield


def check_note(note: bytes) -> None:
    namesz, descsz, kind = struct.unpack_from("<III", note)
    assert (namesz, kind) == (11, 0)
    assert len(note) == 24 + (descsz + 3 & -4)


def ask_for_everything(dump: Dump) -> None:
    assert all("\n" not in line for line in dump.problems)
    assert len(dump.problems) < 400
    if dump.mode == DYNAMIC:
        listed = RangeSet((p.paddr, p.paddr + p.memsz) for p in dump.core.phdrs if p.type == PT_LOAD)
        assert not listed - dump.envelope.all.outer_pages(PAGE)
    assert report.map_text(dump)
    report.as_json(report.map_json(dump))
    report.as_json(report.guard_json(dump))
    with suppress(Error):
        report.compare_text(dump.compare())
    with suppress(Error):
        record_pages.choose(dump, with_log=False, force=False)
    if dump.arch.info and dump.machine.arch.name == "x86_64":
        check_note(dump.arch.info.note)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return field.unpack(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="module")
def s390x(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Machine(tmp_path_factory.mktemp("s390x")).folder


@settings(fuzz, max_examples=50)
@given(seed=seeds, kind=kinds, how=modes, told=st.booleans())
def test_real_kernels_memory_changes_while_it_is_read(
    crashed: Path, seed: int, kind: Kind, how: tuple[str, str], told: bool
) -> None:
    vouched = RangeSet([field.LOW, field.HIGH, field.WINDOW])
    with ends(), exact_reads(Changing(seed, kind)), suppress(Error):
        machine = ImageMachine(load(str(crashed)))
        machine.touched = Touched(PAGE)
        if not told:
            machine.vmcoreinfo_paddr = None
        dump = build(machine, *how)
        try:
            assert not dump.readable() - vouched
            ask_for_everything(dump)
        finally:
            dump.close()


class MadeKernel:
    """One with all records, a note, a log and struct pages; not to be changed."""

    def __init__(self) -> None:
        kernel, _ = complete_kernel()
        kernel.memmap([0])
        kernel.pointer("vmcoreinfo_note", kernel.page_offset + NOTE_AT)
        ring = Ring(count_bits=5, size_bits=12)
        for number in range(40):
            ring.write(b"[Hardware Error]: CPU 0: Machine Check Exception: 5 Bank %d: be00000001010091" % number)
        ring.place(kernel)
        kernel.symbols = [s for s in kernel.symbols if s[1] != "_end"]
        kernel.mem.write(NOTE_AT, vmcoreinfo_note(kernel.finish().desc + b"CRASHTIME=1760000000\n"))
        self.mem = kernel.mem


class ChangingMemory(FakeMemory):
    def __init__(self, sound: FakeMemory, changing: Changing) -> None:
        super().__init__()
        self._sound, self._changing = sound, changing

    def read(self, paddr: int, size: int) -> bytes:
        return self._changing.read(self._sound.read, paddr, size)


@pytest.fixture(scope="module")
def made() -> MadeKernel:
    return MadeKernel()


def hear(mem: FakeMemory) -> None:
    info = note_at(mem, NOTE_AT)
    check_note(info.note)
    prove(mem, info, RangeSet([(0x70000000, 0x7C000000)]))
    dead = DeadKernel(mem, info)
    everything(dead)
    dead.marks(RangeSet([(0, 1 << 26)]))
    dead.machine_checks()
    owners.look(dead.walk, info, VMEMMAP, RangeSet([(0, 1 << 24)]))
    assert all("\n" not in line for line in dead.problems)


@settings(fuzz, max_examples=400)
@given(seed=seeds, kind=kinds)
def test_made_kernels_memory_changes_while_it_is_read(made: MadeKernel, seed: int, kind: Kind) -> None:
    with ends(), suppress(WitnessError, ReadError):
        hear(ChangingMemory(made.mem, Changing(seed, kind)))


def large_btf() -> bytes:
    """Of more types than are passed over at once when one is looked for, and more bytes than are read at a time."""
    made = MadeBtf()
    long = made.integer("unsigned long", 8)
    for number in range(150):
        made.one_of_each_kind()
        made.structure(f"number_{number}", 64, [(f"member_{n}", long, n * 64) for n in range(40)])
    inner = made.structure("", 16, [("lru", made.array(long, 2), 0)], "UNION")
    made.structure("page", 64, [("flags", long, 0), ("", inner, 64)])
    made.add("TYPEDEF", "atomic_long_t", made.structure("", 8, [("counter", long, 0)]))
    made.enum("pageflags", {"PG_locked": 0, "PG_lru": 5})
    return made.section()


BTF = large_btf()


def read_btf(offset: int, size: int) -> bytes:
    assert offset + size <= len(BTF)
    return BTF[offset : offset + size]


@settings(fuzz, max_examples=600)
@given(seed=seeds, kind=kinds)
def test_btf_changes_while_it_is_read(seed: int, kind: Kind) -> None:
    changing = Changing(seed, kind)
    with ends(), suppress(WitnessError):
        btf = Btf(lambda offset, size: changing.read(read_btf, offset, size), len(BTF), NAMES)
        for name in NAMES:
            with suppress(WitnessError):
                btf.layout(name, MEMBERS)
            with suppress(WitnessError):
                btf.enum(name)


@settings(fuzz, max_examples=100)
@given(seed=seeds, kind=kinds, layout=st.sampled_from(["kernel", "cut"]))
def test_s390x_machines_memory_changes_while_it_is_read(s390x: Path, seed: int, kind: Kind, layout: str) -> None:
    with ends(), exact_reads(Changing(seed, kind)), suppress(Error):
        dump = build(ImageMachine(load(str(s390x))), layout)
        try:
            assert not dump.readable() - RangeSet([*RAM, *DEVICE.runs()])
            ask_for_everything(dump)
        finally:
            dump.close()


def test_what_does_not_change_passes_the_same_checks(crashed: Path, made: MadeKernel) -> None:
    never = Kind(again=True, every=1 << 62)
    changing = Changing(0, never)
    hear(ChangingMemory(made.mem, changing))
    btf = Btf(lambda offset, size: changing.read(read_btf, offset, size), len(BTF), NAMES)
    assert btf.enum("pageflags") == {"PG_locked": 0, "PG_lru": 5}
    with exact_reads(changing):
        dump = build(ImageMachine(load(str(crashed))))
        ask_for_everything(dump)
        assert dump.problems == []
        dump.close()
    assert (changing.changed, changing.reads > 500) == (0, True)
