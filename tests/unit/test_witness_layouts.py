# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where structures lie that vmcoreinfo says nothing of: by the dead kernel's BTF if it is sound, else as ever."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from guard.witness.dead_kernel import DeadKernel
from guard.witness.layouts import FIXED, unpacker
from guard.witness.resources import BUSY, SYSTEM_RAM
from tests.unit.made_btf import MadeBtf
from tests.unit.witness_memory import DyingKernel

RAM = SYSTEM_RAM | BUSY
RESOURCE = {"start": 0, "end": 8, "name": 16, "flags": 24, "sibling": 48, "child": 56}
MOVED = {"name": 0, "start": 8, "end": 16, "child": 32, "sibling": 40, "flags": 64}


def kernel_btf(resource: Mapping[str, int] = RESOURCE, size: int = 64, start_width: int = 8) -> MadeBtf:
    """The BTF of a kernel whose struct resource has these members, and else what every kernel has."""
    made = MadeBtf()
    byte, word, long = made.integer("char", 1), made.integer("unsigned int", 4), made.integer("unsigned long", 8)
    start = long if start_width == 8 else word
    members = [(name, start if name == "start" else long, at * 8) for name, at in resource.items()]
    made.structure("resource", size, members)
    made.structure("range", 16, [("start", long, 0), ("end", long, 64)])
    entry = made.structure("e820_entry", 20, [("addr", long, 0), ("size", long, 64), ("type", word, 128)])
    made.structure("e820_table", 64004, [("nr_entries", word, 0), ("entries", made.array(entry, 3200), 32)])
    name = made.array(byte, 65)
    fields = ("sysname", "nodename", "release", "version", "machine", "domainname")
    made.structure("new_utsname", 390, [(field, name, 65 * 8 * i) for i, field in enumerate(fields)])
    return made


def with_btf(kernel: DyingKernel, section: bytes) -> None:
    at = kernel.image(section, 1)  # as the linker leaves it
    kernel.symbols += [("R", "__start_BTF", at), ("R", "__stop_BTF", at + len(section))]


def place_resource(kernel: DyingKernel, at: int, offsets: Mapping[str, int], size: int, **values: int) -> None:
    data = bytearray(b"\xee" * size)
    for name, offset in offsets.items():
        struct.pack_into("<Q", data, offset, values.get(name, 0))
    kernel.write(at, bytes(data))


def one_bank(kernel: DyingKernel, offsets: Mapping[str, int], size: int) -> None:
    """iomem_resource with one System RAM below it."""
    root, bank = kernel.variable("iomem_resource", bytes(size)), kernel.heap(bytes(size))
    name = kernel.heap(b"System RAM\0")
    place_resource(kernel, root, offsets, size, end=(1 << 46) - 1, child=bank)
    place_resource(kernel, bank, offsets, size, start=0x100000, end=0x1FFFFF, name=name, flags=RAM)


def dead(kernel: DyingKernel) -> DeadKernel:
    return DeadKernel(kernel.mem, kernel.finish())


def test_btf_that_says_what_is_known_says_nothing_new() -> None:
    kernel = DyingKernel()
    with_btf(kernel, kernel_btf().section())
    one_bank(kernel, RESOURCE, 64)
    witness = dead(kernel)
    assert witness.layouts() == FIXED
    assert [(r.start, r.end, r.name) for r in witness.system_ram()] == [(0x100000, 0x200000, "System RAM")]
    assert witness.problems == []


def test_a_kernel_without_btf_is_read_as_ever() -> None:
    kernel = DyingKernel()
    one_bank(kernel, RESOURCE, 64)
    witness = dead(kernel)
    assert witness.layouts() is FIXED
    assert len(witness.system_ram()) == 1
    assert witness.problems == []


def test_a_structure_that_has_changed_is_read_by_btf_and_told_once() -> None:
    kernel = DyingKernel()
    with_btf(kernel, kernel_btf(MOVED, 72).section())
    one_bank(kernel, MOVED, 72)
    place_resource(kernel, kernel.variable("crashk_res", bytes(72)), MOVED, 72, start=0x4000000, end=0x4FFFFFF)
    witness = dead(kernel)
    assert [(r.start, r.end, r.name) for r in witness.system_ram()] == [(0x100000, 0x200000, "System RAM")]
    assert [(r.start, r.end) for r in witness.reservations()] == [(0x4000000, 0x5000000)]
    assert witness.problems == [
        "struct resource is 72 bytes with name at 0, start at 8, end at 16, child at 32, sibling at 40, flags at 64 by "
        "the dead kernel's BTF, not 64 bytes with start at 0, end at 8, name at 16, flags at 24, sibling at 48, "
        "child at 56; BTF is believed"
    ]


@pytest.mark.parametrize(
    "made",
    [
        kernel_btf({**RESOURCE, "flags": 4}),  # on another member
        kernel_btf({**RESOURCE, "child": 60}),  # beyond the end
        kernel_btf({name: at for name, at in RESOURCE.items() if name != "sibling"}),
        kernel_btf(start_width=4),
        kernel_btf(size=1 << 16),
    ],
    ids=["overlap", "outside", "missing", "width", "size"],
)
def test_a_layout_that_makes_no_sense_is_told_and_not_believed(made: MadeBtf) -> None:
    kernel = DyingKernel()
    with_btf(kernel, made.section())
    one_bank(kernel, RESOURCE, 64)
    witness = dead(kernel)
    assert len(witness.system_ram()) == 1
    (line,) = witness.problems
    assert line.startswith("struct resource is ")
    assert line.endswith("; BTF is not believed")


def test_damaged_btf_is_told_in_one_line_and_costs_nothing_else() -> None:
    kernel = DyingKernel()
    section = bytearray(kernel_btf().section())
    section[24 + 4 + 3] = 0xFF
    with_btf(kernel, bytes(section))
    one_bank(kernel, RESOURCE, 64)
    witness = dead(kernel)
    assert len(witness.system_ram()) == 1
    assert witness.e820() == []
    assert [line for line in witness.problems if "BTF" in line] == [
        "dead kernel's BTF not known, fixed layouts are taken: BTF: type 1 at 0x0 is of no known kind"
    ]


def test_btf_that_cannot_be_read_is_told_in_one_line() -> None:
    kernel = DyingKernel()
    start = 0xFFFFC90000000000
    kernel.symbols += [("R", "__start_BTF", start), ("R", "__stop_BTF", start + 0x400000)]
    one_bank(kernel, RESOURCE, 64)
    witness = DeadKernel(kernel.mem, kernel.finish("absolute"))
    assert len(witness.system_ram()) == 1
    (line,) = witness.problems
    assert line.startswith("dead kernel's BTF not known, fixed layouts are taken: page walk: 0xffffc90000000000 is not")


def test_values_come_in_the_order_asked_for() -> None:
    assert unpacker(FIXED["e820_entry"], "type", "addr")(bytes(range(20))) == (
        int.from_bytes(bytes(range(16, 20)), "little"),
        int.from_bytes(bytes(range(8)), "little"),
    )
