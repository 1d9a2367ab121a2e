# SPDX-License-Identifier: LGPL-2.1-or-later
"""The front door: all records of a small dead kernel, each read once, and never an exception whatever is damaged."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import WitnessError
from guard.ranges import RangeSet
from guard.witness.dead_kernel import WANTED, DeadKernel
from guard.witness.resources import BUSY, EXCLUSIVE, SYSTEM_RAM
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.witness_memory import PRSTATUS, RULES, DyingKernel, FakeMemory, RandomMemory


def complete_kernel(rule: str = "base relative", levels: int = 4) -> tuple[DyingKernel, Vmcoreinfo]:
    kernel = DyingKernel(levels=levels, page_offset=0xFF11000040000000 if levels == 5 else 0xFFFF9A8040000000)
    ram = SYSTEM_RAM | BUSY
    kernel.iomem(
        [
            (0x100000, 0x7FFDFFFF, "System RAM", ram, []),
            (
                0x140000000,
                0x17FFFFFFF,
                "virtio0",
                SYSTEM_RAM | EXCLUSIVE,
                [(0x140000000, 0x147FFFFFF, "System RAM (virtio_mem)", ram, [])],
            ),
        ]
    )
    kernel.variable("crashk_res", kernel.resource(0x70000000, 0x7BFFFFFF, 0, 0x200, 0, 0, 0))
    kernel.pointer("page_offset_base", kernel.page_offset)
    table = (1).to_bytes(4, "little") + (0x100000).to_bytes(8, "little") + (0x7FEE0000).to_bytes(8, "little")
    kernel.pointer("e820_table_firmware", kernel.heap(table + (1).to_bytes(4, "little")))
    kernel.per_cpu_notes([PRSTATUS, PRSTATUS], vmalloc=0xFFFFC90000000000 if levels == 4 else 0)
    kernel.sections({0: 7, 40: 3})
    kernel.uts("6.12.0-test")
    return kernel, kernel.finish(rule)


def everything(dead: DeadKernel) -> list[object]:
    return [
        dead.symbols(),
        dead.release(),
        dead.text(),
        dead.page_offset(),
        dead.iomem(),
        dead.system_ram(),
        dead.virtio_mem_regions(),
        dead.reservations(),
        dead.cpu_notes(),
        dead.e820(),
        dead.sections(),
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [4, 5])
def test_all_records_of_a_sound_kernel_are_read(rule: str, levels: int) -> None:
    kernel, info = complete_kernel(rule, levels)
    dead = DeadKernel(kernel.mem, info)
    assert dead.release() == "6.12.0-test"
    assert dead.text() == (kernel.text_vaddr, kernel.text_paddr, 0x5000000)
    assert dead.page_offset() == kernel.page_offset
    assert [(r.start, r.end) for r in dead.system_ram()] == [(0x100000, 0x7FFE0000), (0x140000000, 0x148000000)]
    assert [(r.start, r.end) for r in dead.virtio_mem_regions()] == [(0x140000000, 0x180000000)]
    assert dead.reservations() == [("crashk_res", 0x70000000, 0x7C000000)]
    assert [(n.cpu, n.notes) for n in dead.cpu_notes()] == [(0, PRSTATUS), (1, PRSTATUS)]
    assert dead.e820() == [(0x100000, 0x7FFE0000, 1)]
    sections = dead.sections()
    assert sections is not None
    assert sections.online == RangeSet([(0, 1 << 27)])
    assert dead.problems == []


def test_nothing_is_read_before_it_is_asked_for_and_nothing_twice() -> None:
    kernel, info = complete_kernel()
    kernel.mem.reads = 0
    dead = DeadKernel(kernel.mem, info)
    assert kernel.mem.reads == 0
    first = everything(dead)
    assert 0 < kernel.mem.reads < 300
    kernel.mem.reads = 0
    assert everything(dead) == first
    assert kernel.mem.reads == 0


def test_without_kallsyms_what_vmcoreinfo_tells_is_still_read() -> None:
    kernel, _ = complete_kernel()
    kernel.keys = {key: value for key, value in kernel.keys.items() if "kallsyms" not in key}
    dead = DeadKernel(kernel.mem, kernel.info())
    assert dead.release() == "6.12.0-test"
    assert dead.sections() is not None
    assert (dead.text(), dead.iomem(), dead.cpu_notes(), dead.e820(), dead.reservations()) == (None, [], [], [], [])
    assert dead.page_offset() == 0xFFFF888000000000
    assert sum("no kallsyms" in line for line in dead.problems) == 1
    assert all("\n" not in line for line in dead.problems)


@pytest.mark.parametrize(
    "value", [0, 0x40000000, 0xFFFF9A8040001000, 0xFFFF9A8080000000, 0xFFFF9A0000000000, 0x00FF800000000000]
)
def test_a_wrong_page_offset_base_is_replaced_by_the_constant(value: int) -> None:
    kernel, info = complete_kernel()
    at = next(address for _, name, address in kernel.symbols if name == "page_offset_base")
    kernel.write(at, value.to_bytes(8, "little"))
    dead = DeadKernel(kernel.mem, info)
    assert dead.page_offset() == 0xFFFF888000000000
    assert len(dead.problems) == 1
    assert "0xffff888000000000 is taken" in dead.problems[0]


def test_a_kernel_that_is_another_than_vmcoreinfo_says_is_reported() -> None:
    kernel, _ = complete_kernel()
    kernel.keys["OSRELEASE"] = "5.10.0-other"
    dead = DeadKernel(kernel.mem, kernel.info())
    assert dead.release() == "6.12.0-test"
    assert "5.10.0-other" in dead.problems[0]


def test_vmcoreinfo_without_a_page_walk_is_refused_at_construction() -> None:
    with pytest.raises(WitnessError):
        DeadKernel(FakeMemory(), Vmcoreinfo(b"OSRELEASE=6.12\n"))


def test_problems_of_vmcoreinfo_are_told_by_the_front_door() -> None:
    kernel, info = complete_kernel()
    dead = DeadKernel(kernel.mem, Vmcoreinfo(info.desc + b"SYMBOL(cut)=ffff"))
    assert "without a newline" in dead.problems[0]


def test_no_damage_to_a_page_makes_any_record_raise() -> None:
    """Each page of the dead kernel in turn: unreadable, all ones, all zero, random."""
    rng = random.Random(7)
    kernel, info = complete_kernel()
    for number, content in list(kernel.mem.pages.items()):
        for damage in (None, b"\xff" * 4096, bytes(4096), rng.randbytes(4096)):
            if damage is None:
                kernel.mem.drop(number * 4096)
            else:
                kernel.mem.write(number * 4096, damage)
            kernel.mem.reads = 0
            dead = DeadKernel(kernel.mem, info)
            everything(dead)
            assert kernel.mem.reads < 20_000
        kernel.mem.pages[number] = content
    dead = DeadKernel(kernel.mem, info)
    everything(dead)
    assert dead.problems == []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_bytes_make_any_record_raise(data: st.DataObject) -> None:
    kernel, info = complete_kernel()
    pages = sorted(kernel.mem.pages)
    for _ in range(data.draw(st.integers(1, 8))):
        paddr = data.draw(st.sampled_from(pages)) * 4096 + data.draw(st.integers(0, 4095))
        kernel.mem.write(paddr, data.draw(st.binary(min_size=1, max_size=8)))
    kernel.mem.reads = 0
    dead = DeadKernel(kernel.mem, info)
    everything(dead)
    assert kernel.mem.reads < 20_000
    assert len(dead.problems) <= 65


@settings(max_examples=100, deadline=None)
@given(content=st.binary(min_size=8, max_size=8192))
def test_random_memory_behind_a_sound_vmcoreinfo_never_raises(content: bytes) -> None:
    _, info = complete_kernel()
    mem = RandomMemory(content)
    everything(DeadKernel(mem, info))
    assert mem.reads < 400_000


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_values_in_vmcoreinfo_make_any_record_raise(data: st.DataObject) -> None:
    kernel, _ = complete_kernel()
    huge = st.sampled_from(
        ["0", "1", "fff", "ffffffffffffffff", "18446744073709551615", "-1", "ffff888000000000", "99999"]
    )
    for key in data.draw(st.sets(st.sampled_from(sorted(kernel.keys)), min_size=1, max_size=3)):
        kernel.keys[key] = data.draw(huge)
    try:
        dead = DeadKernel(kernel.mem, kernel.info())
    except WitnessError:
        return
    everything(dead)


def test_all_wanted_symbols_are_used_by_some_record() -> None:
    assert {"iomem_resource", "crash_notes", "e820_table_firmware", "crashk_cma_cnt", "_end"} <= WANTED
    assert len(WANTED) < 64
