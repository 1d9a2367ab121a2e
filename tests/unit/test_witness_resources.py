# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's resource tree and reservations, sound and damaged."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import WitnessError
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk, x86_64
from guard.witness.reservations import Reservation, read_reservations
from guard.witness.resources import (
    BUSY,
    EXCLUSIVE,
    SYSTEM_RAM,
    Resource,
    Tree,
    read_tree,
    system_ram,
    virtio_mem_regions,
    walk_resources,
)
from tests.unit.witness_memory import DyingKernel

RAM = SYSTEM_RAM | BUSY
MANAGED = 0x02000000
MIB = 1 << 20

TREE: list[tuple[int, int, str, int, list[object]]] = [
    (0x0, 0xFFF, "Reserved", BUSY | 0x200, []),
    (0x1000, 0x9FBFF, "System RAM", RAM, []),
    (
        0x100000,
        0x7FFDFFFF,
        "System RAM",
        RAM,
        [
            (0x2000000, 0x3FFFFFF, "Kernel code", RAM, []),
            (0x50000000, 0x5FFFFFFF, "Crash kernel", BUSY | 0x200, []),
        ],
    ),
    (0xFEC00000, 0xFEC003FF, "IOAPIC 0", BUSY | 0x200, []),
    (
        0x140000000,
        0x17FFFFFFF,
        "virtio0",
        SYSTEM_RAM | EXCLUSIVE,
        [
            (0x140000000, 0x14FFFFFFF, "System RAM (virtio_mem)", RAM | MANAGED, []),
            (0x158000000, 0x15FFFFFFF, "System RAM (virtio_mem)", RAM | MANAGED, []),
        ],
    ),
    (0x180000000, 0x1BFFFFFFF, "virtio12", SYSTEM_RAM | EXCLUSIVE, []),
    (0x1C0000000, 0x1CFFFFFFF, "virtio-pmem", SYSTEM_RAM | EXCLUSIVE, []),
]


def walk_of(kernel: DyingKernel) -> PageWalk:
    return x86_64(kernel.mem, kernel.info())


def symbols_of(kernel: DyingKernel) -> dict[str, int]:
    return {name: address for _, name, address in kernel.symbols}


def test_the_tree_comes_back_in_the_order_of_proc_iomem() -> None:
    kernel = DyingKernel()
    root = kernel.iomem(TREE)
    problems = Problems()
    found = walk_resources(walk_of(kernel), root, problems)
    assert problems == []
    assert [(r.depth, r.name) for r in found] == [
        (0, "Reserved"),
        (0, "System RAM"),
        (0, "System RAM"),
        (1, "Kernel code"),
        (1, "Crash kernel"),
        (0, "IOAPIC 0"),
        (0, "virtio0"),
        (1, "System RAM (virtio_mem)"),
        (1, "System RAM (virtio_mem)"),
        (0, "virtio12"),
        (0, "virtio-pmem"),
    ]
    assert found[1] == Resource(0x1000, 0x9FC00, "System RAM", RAM, 0)


def test_system_ram_is_what_the_kernel_would_put_into_its_header() -> None:
    kernel = DyingKernel()
    found = walk_resources(walk_of(kernel), kernel.iomem(TREE), Problems())
    assert [(r.start, r.end) for r in system_ram(found)] == [
        (0x1000, 0x9FC00),
        (0x100000, 0x7FFE0000),
        (0x140000000, 0x150000000),
        (0x158000000, 0x160000000),
    ]
    assert [(r.name, r.start, r.end) for r in virtio_mem_regions(found)] == [
        ("virtio0", 0x140000000, 0x180000000),
        ("virtio12", 0x180000000, 0x1C0000000),
    ]


def test_adjacent_system_ram_stays_apart() -> None:
    rows = [Resource(0, 4096, "System RAM", RAM, 0), Resource(4096, 8192, "System RAM (kmem)", RAM | MANAGED, 0)]
    assert system_ram(rows) == rows


def find_next(rows: list[Resource], start: int) -> Resource | None:
    """find_next_iomem_res() of kernel/resource.c, with inclusive ends as there."""
    for row in rows:
        if row.end - 1 < start or row.flags & RAM != RAM:
            continue
        return row._replace(start=max(start, row.start))
    return None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.booleans()), max_size=12))
def test_system_ram_follows_the_kernels_own_search(raw: list[tuple[int, int, bool]]) -> None:
    # Preorder of a tree with ranges nested in, or behind, those before them.
    rows: list[Resource] = []
    for start, size, ram in sorted(raw, key=lambda r: (r[0], -r[1])):
        row = Resource(start, start + size, "", RAM if ram else BUSY, 0)
        if all(row.start >= r.end or row.end <= r.end for r in rows):
            rows.append(row)
    expected, start = [], 0
    while (found := find_next(rows, start)) is not None:
        expected.append(found)
        start = found.end
    assert system_ram(rows) == expected


def place_node(kernel: DyingKernel, at: int, **values: int) -> None:
    fields = {"start": 0x1000, "end": 0x1FFF, "name": 0, "flags": RAM, "parent": 0, "sibling": 0, "child": 0}
    kernel.write(at, kernel.resource(**(fields | values)))


@pytest.mark.parametrize("link", ["sibling", "child"])
@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_a_cycle_in_the_tree_is_reported_and_ends_there(link: str, back_to: int) -> None:
    kernel = DyingKernel()
    nodes = [kernel.variable("iomem_resource", bytes(64)), kernel.heap(bytes(64)), kernel.heap(bytes(64))]
    place_node(kernel, nodes[0], child=nodes[1])
    place_node(kernel, nodes[1], sibling=nodes[2])
    place_node(kernel, nodes[2], **{link: nodes[back_to]})
    problems = Problems()
    found = walk_resources(walk_of(kernel), nodes[0], problems)
    assert len(found) == 2
    assert len(problems) == 1
    assert "cycle" in problems[0]


def test_a_bad_pointer_loses_its_branch_only() -> None:
    kernel = DyingKernel()
    root, one, two, three = (kernel.heap(bytes(64)) for _ in range(4))
    place_node(kernel, root, child=one)
    place_node(kernel, one, child=0xDEAD000000000100, sibling=two)
    place_node(kernel, two, child=three, name=0xFFFF800000000000)
    place_node(kernel, three, sibling=kernel.page_offset + (1 << 30))
    problems = Problems()
    found = walk_resources(walk_of(kernel), root, problems)
    assert [r.depth for r in found] == [0, 0, 1]
    assert found[1].name == ""
    assert len(problems) == 3


def test_a_node_with_start_behind_end_is_left_out_with_its_children() -> None:
    kernel = DyingKernel()
    root, one, two, three = (kernel.heap(bytes(64)) for _ in range(4))
    place_node(kernel, root, child=one)
    place_node(kernel, one, start=0x2000, end=0x1000, child=three, sibling=two)
    place_node(kernel, two, start=0, end=(1 << 64) - 1)
    problems = Problems()
    assert walk_resources(walk_of(kernel), root, problems) == [Resource(0, 1 << 64, "", RAM, 0)]
    assert len(problems) == 1


@pytest.mark.parametrize("link", ["sibling", "child"])
def test_a_tree_without_end_is_cut(link: str) -> None:
    kernel = DyingKernel()
    root = kernel.heap(bytes(64 * 3000), 64)
    place_node(kernel, root, child=root + 64)
    for number in range(1, 2999):
        place_node(kernel, root + 64 * number, **{link: root + 64 * (number + 1)})
    problems = Problems()
    found = walk_resources(walk_of(kernel), root, problems, max_nodes=1000)
    assert len(found) == (1000 if link == "sibling" else 32)
    assert len(problems) == 1


def test_a_root_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(WitnessError):
        walk_resources(walk_of(DyingKernel()), 0xDEAD000000000000, Problems())


Row = tuple[int, int, str, int, list[object]]


def tree_of(rows: list[Row]) -> tuple[Tree, Problems]:
    kernel = DyingKernel()
    root = kernel.iomem(rows)
    problems = Problems()
    return read_tree(walk_of(kernel), root, problems), problems


def test_a_tree_as_kernels_have_it_is_sound() -> None:
    tree, problems = tree_of(TREE)
    assert (tree.flaw, list(problems)) == (None, [])
    assert len(tree.resources) == 11


KMEM: Row = (0x140000000, 0x14FFFFFFF, "System RAM (kmem)", RAM | MANAGED, [])
MEM = 0x200


@pytest.mark.parametrize(
    "parents",
    [
        [],
        ["dax6.0"],
        ["Soft Reserved", "dax1.0"],
        ["hmem.0", "Soft Reserved", "dax0.0"],
        ["CXL Window 0", "region0", "dax0.0"],
        ["Persistent Memory", "dax0.0"],
        ["Persistent Memory (legacy)", "namespace12.0", "dax12.0"],
    ],
)
def test_system_ram_in_what_drivers_call_memory_is_sound(parents: list[str]) -> None:
    row: Row = KMEM
    for name in reversed(parents):
        row = (0x140000000, 0x17FFFFFFF, name, MEM, [row])
    assert tree_of([row])[0].flaw is None


@pytest.mark.parametrize(
    ("parents", "told"),
    [
        (["PCI Bus 0000:00"], 0),
        (["PCI Bus 0000:00", "0000:00:02.0", "dax0.0"], 0),
        (["CXL Window 0", "0000:0d:00.0"], 1),
        (["Reserved"], 0),
        (["ACPI Tables"], 0),
        (["somebody's driver"], 0),
        ([""], 0),
        (["dax0.0 "], 0),
        (["System RAM"], 0),  # by its name alone
    ],
)
def test_system_ram_in_anything_else_is_not(parents: list[str], told: int) -> None:
    row: Row = KMEM
    for name in reversed(parents):
        row = (0x140000000, 0x17FFFFFFF, name, MEM, [row])
    tree, problems = tree_of([row])
    where = f"{parents[told]!r} 0x140000000-0x17fffffff"
    assert tree.flaw == f"'System RAM (kmem)' 0x140000000-0x14fffffff lies in {where}, which is no memory"
    assert list(problems) == []
    assert len(tree.resources) == len(parents) + 1


def leaf(start: int, end: int) -> Row:
    return (start, end, "somewhere", MEM, [])


@pytest.mark.parametrize(
    "rows",
    [
        [leaf(0x2000, 0x2FFF), leaf(0x1000, 0x1FFF)],
        [leaf(0x1000, 0x2FFF), leaf(0x2000, 0x3FFF)],
        [leaf(0x1000, 0x1FFF), leaf(0x1000, 0x1FFF)],
        [leaf(0x1000, 1 << 46)],
        [leaf(1 << 46, (1 << 46) + 0xFFF)],
        [(0x2000, 0x4FFF, "parent", MEM, [leaf(0x1000, 0x2FFF)])],
        [(0x2000, 0x4FFF, "parent", MEM, [leaf(0x4000, 0x5FFF)])],
        [(0x2000, 0x4FFF, "parent", MEM, [leaf(0x3000, 0x3FFF), leaf(0x2000, 0x2FFF)])],
        [(0x2000, 0x4FFF, "parent", MEM, []), leaf(0x4000, 0x4FFF)],
    ],
)
def test_resources_that_no_kernel_lets_lie_like_that_are_a_flaw_and_no_problem(
    rows: list[Row],
) -> None:
    tree, problems = tree_of(rows)
    assert tree.flaw is not None
    assert "where its place in the tree is" in tree.flaw
    assert list(problems) == []


rows_of = st.recursive(
    st.just(()),
    lambda children: st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40), children), max_size=4).map(tuple),
    max_leaves=12,
)


def laid_out(rows: tuple[tuple[int, int, object], ...], start: int) -> tuple[list[object], int]:
    """Nested (gap before, least size, children) as a tree, from *start* on, and where it ends."""
    placed: list[object] = []
    for gap, size, children in rows:
        start += gap
        assert isinstance(children, tuple)
        inner, inner_end = laid_out(children, start)
        end = max(start + size, inner_end)
        placed.append((start, end - 1, "System RAM", RAM, inner))
        start = end
    return placed, start


@given(rows_of)
def test_whatever_is_nested_and_ascends_is_sound(rows: tuple[tuple[int, int, object], ...]) -> None:
    tree, _ = tree_of(laid_out(rows, 0)[0])  # type: ignore[arg-type]
    assert tree.flaw is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"sibling": 0xDEAD000000000100}, "cannot be read"),
        ({"child": 0xDEAD000000000100}, "cannot be read"),
        ({"start": 0x2000, "end": 0x1000}, "behind end"),
    ],
)
def test_what_was_left_out_of_a_tree_is_a_flaw(damage: dict[str, int], told: str) -> None:
    kernel = DyingKernel()
    root, one, two = (kernel.heap(bytes(64)) for _ in range(3))
    place_node(kernel, root, start=0, end=1 << 40, child=one)
    place_node(kernel, one, **({"sibling": two} | damage))
    place_node(kernel, two, start=0x2000, end=0x2FFF)
    problems = Problems()
    tree = read_tree(walk_of(kernel), root, problems)
    assert tree.flaw is not None
    assert told in tree.flaw
    assert problems == [f"iomem_resource: {tree.flaw}"]


@pytest.mark.parametrize("link", ["sibling", "child"])
def test_a_cycle_and_a_limit_are_flaws(link: str) -> None:
    kernel = DyingKernel()
    root = kernel.heap(bytes(64 * 100), 64)
    for number in range(99):
        at = root + 64 * number
        place_node(kernel, at, start=0, end=99, **{"child" if not number else link: at + 64})
    place_node(kernel, root + 64 * 99, **{link: root})
    tree = read_tree(walk_of(kernel), root, Problems())
    assert tree.flaw is not None  # siblings that do not ascend, or a tree of 99 levels
    limited = read_tree(walk_of(kernel), root, Problems(), max_nodes=10)
    assert limited.flaw is not None
    place_node(kernel, root, start=0, end=99, child=root)
    assert "cycle" in str(read_tree(walk_of(kernel), root, Problems()).flaw)


def test_a_name_that_cannot_be_read_is_a_flaw_only_around_system_ram() -> None:
    kernel = DyingKernel()
    root, one, two = (kernel.heap(bytes(64)) for _ in range(3))
    place_node(kernel, root, start=0, end=1 << 40, child=one)
    place_node(kernel, one, child=two, name=0xFFFF800000000000, flags=MEM)
    place_node(kernel, two, flags=MEM)
    assert read_tree(walk_of(kernel), root, Problems()).flaw is None
    place_node(kernel, two, flags=RAM)
    assert "no memory" in str(read_tree(walk_of(kernel), root, Problems()).flaw)


def crashk(kernel: DyingKernel, name: str, start: int, end: int) -> None:
    kernel.variable(name, kernel.resource(start, end, 0, 0x200, 0, 0, 0))


def test_reservations_are_read_and_empty_ones_left_out() -> None:
    kernel = DyingKernel()
    crashk(kernel, "crashk_res", 0x70000000, 0x7BFFFFFF)
    crashk(kernel, "crashk_low_res", 0, 0)
    kernel.variable(
        "crashk_cma_ranges", struct.pack("<8Q", 0x100000000, 0x10FFFFFFF, 0x120000000, 0x127FFFFFF, *[0] * 4)
    )
    kernel.variable("crashk_cma_cnt", struct.pack("<i", 2))
    problems = Problems()
    assert read_reservations(walk_of(kernel), symbols_of(kernel), problems) == [
        Reservation("crashk_res", 0x70000000, 0x7C000000),
        Reservation("crashk_cma_ranges[0]", 0x100000000, 0x110000000),
        Reservation("crashk_cma_ranges[1]", 0x120000000, 0x128000000),
    ]
    assert problems == []


def test_a_kernel_without_cma_ranges_or_any_reservation_is_no_problem() -> None:
    kernel = DyingKernel()
    problems = Problems()
    assert read_reservations(walk_of(kernel), symbols_of(kernel), problems) == []
    crashk(kernel, "crashk_res", 0x70000000, 0x7BFFFFFF)
    assert len(read_reservations(walk_of(kernel), symbols_of(kernel), problems)) == 1
    assert problems == []


@pytest.mark.parametrize("count", [-1, 65, 0x7FFFFFFF])
def test_reservations_that_make_no_sense_are_reported_one_by_one(count: int) -> None:
    kernel = DyingKernel()
    crashk(kernel, "crashk_res", 0x7BFFFFFF, 0x70000000)
    crashk(kernel, "crashk_low_res", 0x1000000, 0x1FFFFFF)
    kernel.variable("crashk_cma_ranges", bytes(64))
    kernel.variable("crashk_cma_cnt", struct.pack("<i", count))
    problems = Problems()
    found = read_reservations(walk_of(kernel), symbols_of(kernel), problems)
    assert found == [Reservation("crashk_low_res", 0x1000000, 0x2000000)]
    assert [p.split(":")[0] for p in problems] == ["crashk_res", "crashk_cma_ranges"]


def test_a_cma_range_with_start_behind_end_is_left_out() -> None:
    kernel = DyingKernel()
    kernel.variable("crashk_cma_ranges", struct.pack("<4Q", 2, 1, 0x1000, 0x1FFF))
    kernel.variable("crashk_cma_cnt", struct.pack("<i", 2))
    problems = Problems()
    found = read_reservations(walk_of(kernel), symbols_of(kernel), problems)
    assert found == [Reservation("crashk_cma_ranges[1]", 0x1000, 0x2000)]
    assert len(problems) == 1
