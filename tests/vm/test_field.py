# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines as people have them, each crashed for real: firmware that tells nothing, too much, or something else than
the kernel made of it. The map must be the live kernel's own word from before the crash (tests/vm/field.py).

Each kind of machine is crashed with one kernel generation, such that all of them have their turn; with
``OLDMEM_ALL_KERNELS=1`` each with every one, and what is marked so below at all."""

from __future__ import annotations

import os

import pytest

from guard.ranges import Range, RangeSet
from tests.vm import field
from tests.vm.conftest import MakeGuest
from tests.vm.harness import GENERATIONS, Dimm, GiB, Guest, MiB

ALL = os.environ.get("OLDMEM_ALL_KERNELS") == "1"
LOW, HIGH = 512 * MiB, 4 * GiB
SOFT = (HIGH + 256 * MiB, HIGH + 512 * MiB)


def on_kernel(one: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernel", GENERATIONS if ALL else [one])


def plug(g: Guest, name: str) -> Range:
    """Puts a memory module into its slot and waits until all of it is online; where that is. A crash before that would
    find kexec locked by the update of its header (kernel/kexec_core.c:__crash_kexec()), and start no capture kernel."""
    dimm = g.plug(name)
    added = Range(dimm.paddr, dimm.paddr + dimm.size)
    block = int(g.sh("cat /sys/devices/system/memory/block_size_bytes"), 16)
    for number in range(added.start // block, added.end // block):
        g.sh(f"until grep -qx online /sys/devices/system/memory/memory{number}/state; do sleep 0.1; done", timeout=30)
    return added


def break_huge_pages(g: Guest) -> dict[str, int]:
    """A page of HugeTLB and a transparent huge page, each with an error in the middle; the first address of each."""
    # on so small a machine transparent huge pages are off (mm/huge_memory.c:hugepage_init())
    g.sh("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; echo 1 > /proc/sys/vm/nr_hugepages")
    words = field.python(g, "huge_pages.py").split()
    pages = {name: int(pfn) * field.PAGE for name, pfn in zip(words[::2], words[1::2], strict=True)}
    assert field.flagged(g, "thp")["thp"].covers(pages["thp"], pages["thp"] + field.HUGE)
    for start in pages.values():
        field.break_page(g, start + 7 * field.PAGE)
    return pages


@on_kernel("6.12")
def test_big_machine_of_a_cloud_with_hot_added_memory_and_errors_in_its_memory(guest: MakeGuest, kernel: str) -> None:
    size = 8 * GiB + 256 * MiB
    g = guest(
        kernel,
        memory=LOW + size,
        hint=False,
        fw_cfg=False,
        tables={"SRAT": field.azure_srat([(0, LOW), (HIGH, HIGH + size)], cpus=2)},
        dimms=[Dimm("d0", 256 * MiB)],
        testing=True,
    )
    g.put(field.SCRIPTS)
    g.load("c", "acpi_no_memhotplug")
    added = plug(g, "d0")
    pages, doomed = {}, []
    if field.can_break(g):
        pages = break_huge_pages(g)
        doomed = [int(field.python(g, "flags.py", "free", "1")) * field.PAGE]
    word = field.live_word(g, doomed)
    assert (word.ram | word.broken).covers(*added)
    if doomed:
        # bank 4, VAL UC EN MISCV ADDRV PCC, MCIP RIPV, an address that is good for a page (Intel SDM 3B, 17.3.2)
        g.monitor(f"mce 0 4 0xbe00000000000135 0x5 {doomed[0]:#x} 0x8c")
        g.wait_crashed()
    else:
        g.crash()

    before = g.allocated("ram")
    told = field.check_map(g, word)
    assert "search" not in " ".join(told["problems"])
    assert g.allocated("ram") - before < GiB, "memory was searched for what the kernel's own header tells"
    assert field.refused(told, "hwpoison", "machine check") == word.broken
    if pages:
        assert word.broken.covers(pages["hugetlb"], pages["hugetlb"] + field.HUGE)
        thp = RangeSet([(pages["thp"], pages["thp"] + field.HUGE)])
        assert (word.broken & thp).size == field.PAGE
    # trixie's makedumpfile takes this kernel's free pages for slab, and would save all of them
    field.collect(g, word, makedumpfile="makedumpfile-testing")


@on_kernel("7")
def test_micro_vm_whose_kernel_used_less_than_half_of_its_memory(guest: MakeGuest, kernel: str) -> None:
    memory, limit = 1536 * MiB, 640 * MiB
    g = guest(kernel, machine="microvm", memory=memory, below_4g=memory, fw_cfg=False, append=f"mem={limit}", smp=1)
    g.put(field.SCRIPTS)
    g.load("s")
    if field.can_break(g):
        for pfn in field.python(g, "flags.py", "free", "2").split():
            field.break_page(g, int(pfn) * field.PAGE)
    word = field.live_word(g)
    assert word.touched - RangeSet([(0, limit)]) == RangeSet()
    g.crash()

    told = field.check_map(g, word)
    assert not told["sources"]["fw_cfg"]["available"]
    assert field.refused(told, "hwpoison") == word.broken
    g.sh("modprobe qemu_fw_cfg")  # from here on firmware tells of all the memory that the machine has
    told = field.check_map(g, word)
    assert told["sources"]["fw_cfg"]["available"]
    assert field.refused(told, "hwpoison") == word.broken
    field.collect(g, word, "cp /proc/vmcore /dev/null")


@on_kernel("6.1")
def test_efi_machine_with_soft_reserved_memory_that_became_system_ram(guest: MakeGuest, kernel: str) -> None:
    start, end = SOFT
    g = guest(
        kernel,
        memory=LOW + SOFT[1] - HIGH,
        firmware="ovmf",
        hint=False,
        fw_cfg=False,
        append=f"memmap={end - start:#x}%{start:#x}-1+0xefffffff",  # what e820 calls RAM becomes soft reserved
    )
    g.put(field.SCRIPTS)
    g.sh("test -d /sys/firmware/efi && modprobe dax_hmem && modprobe device_dax && modprobe kmem")
    if g.sh("ls /sys/bus/dax/drivers/kmem/ | grep dax || true") == "":
        # up to 6.6 who wants its memory as RAM takes it from the driver device_dax
        g.sh("cd /sys/bus/dax/drivers; echo dax0.0 > device_dax/unbind; echo dax0.0 > kmem/new_id")
    g.sh("until grep -q 'System RAM (kmem)' /proc/iomem; do sleep 0.1; done", timeout=30)
    g.load("s")
    if field.can_break(g):
        field.break_page(g, start + 100 * field.PAGE)
    word = field.live_word(g)
    assert (word.ram | word.broken).covers(start, end)
    g.crash()

    told = field.check_map(g, word)
    assert field.refused(told, "hwpoison") == word.broken
    field.collect(g, word, "cp /proc/vmcore /dev/null")


def test_memory_module_that_no_firmware_table_knows_is_read_on_the_dead_kernels_word(guest: MakeGuest) -> None:
    g = guest(
        "7",
        dimms=[Dimm("d0", 256 * MiB)],
        fw_cfg=False,
        hint=False,
        tables={"SRAT": field.srat([(0, LOW), (HIGH, HIGH + 256 * MiB)], cpus=2)},
    )
    g.put(field.SCRIPTS)
    g.load("c", "acpi_no_memhotplug")
    added = plug(g, "d0")
    word = field.live_word(g)
    assert (word.ram | word.broken).covers(*added)
    g.crash()
    told = field.check_map(g, word)
    assert f"{added} was System RAM that no firmware table here calls RAM" in " ".join(told["problems"])
    field.collect(g, word, "cp /proc/vmcore /dev/null")


def test_memory_module_that_the_capture_kernel_took_for_itself_is_told_as_lost(guest: MakeGuest) -> None:
    # its slot is seen once more; without acpi_no_memhotplug the capture kernel brings it online, and even its own
    # /proc/vmcore ends there with EFAULT (arch/x86/mm/ioremap.c: "ioremap on RAM")
    g = guest(dimms=[Dimm("d0", 256 * MiB)])
    g.load("s")
    added = plug(g, "d0")
    g.crash()
    status, output = g.run("oldmem init")
    assert status == 4, output
    assert str(added) in output
