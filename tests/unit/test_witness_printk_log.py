# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's log, as its ring buffer has it: sound, wrapped, torn, damaged."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ReadError, WitnessError
from guard.witness.memory import Problems
from guard.witness.pagewalk import x86_64
from guard.witness.printk_log import CONT, Log, Record, told
from guard.witness.vmcoreinfo import Vmcoreinfo
from tests.unit.printk_ring import COMMITTED, KEYS, RESERVED, Ring
from tests.unit.witness_memory import DyingKernel, RandomMemory


def log_of(ring: Ring, **keys: str) -> Log:
    kernel = DyingKernel()
    ring.place(kernel)
    kernel.keys |= keys
    return Log(x86_64(kernel.mem, kernel.info()), kernel.info())


def test_records_come_back_oldest_first_with_all_that_is_known_of_them() -> None:
    ring = Ring()
    ring.write(b"Linux version", caller=0, level=5)
    ring.write(b"", caller=17)
    ring.write(b"from user space", caller=300, level=3, facility=1)
    ring.write(b"continued", caller=0x80000003, flags=CONT, state=COMMITTED)
    assert list(log_of(ring)) == [
        Record(0, 0, 0, b"Linux version", 5, 0, 2),
        Record(1, 1000, 17, b"", 6, 0, 2),
        Record(2, 2000, 300, b"from user space", 3, 1, 2),
        Record(3, 3000, 0x80000003, b"continued", 6, 0, CONT),
    ]


def test_log_in_which_nothing_was_written_yet_is_empty() -> None:
    log = log_of(Ring())
    assert (list(log), log.damaged, log.unfinished) == ([], 0, 0)


texts = st.binary(min_size=0, max_size=300) | st.sampled_from([8, 16, 24, 120, 248]).map(bytes)


@settings(deadline=None)
@given(
    st.lists(st.tuples(texts, st.booleans()), max_size=120),
    st.integers(2, 7),
    st.integers(10, 12),
    st.booleans(),
    st.integers(1, 200),
)
def test_whatever_the_kernel_wrote_and_still_has_is_read(
    written: list[tuple[bytes, bool]], count_bits: int, size_bits: int, exact: bool, limit: int
) -> None:
    """Through any number of wraps of ids and positions, with texts at the ring's end and beyond it."""
    ring = Ring(count_bits, size_bits, exact)
    for text, finished in written:
        ring.write(text, state=COMMITTED if finished else RESERVED)
    log = log_of(ring)
    expected = [(r.sequence, r.text) for r in ring.live if r.finished]
    assert [(r.sequence, r.text) for r in log] == expected
    assert (log.damaged, log.unfinished) == (0, sum(not r.finished for r in ring.live))
    first = ring.sequence - limit
    assert [(r.sequence, r.text) for r in log.newest(limit)] == [e for e in expected if e[0] >= first]


def test_text_that_ends_with_the_ring_is_read_where_it_is() -> None:
    ring = Ring(size_bits=10)
    for _ in range(4):
        ring.write(bytes(range(248)))
    assert ring.head_lpos == 0
    assert [r.text for r in log_of(ring)] == [bytes(range(248))] * 4


@pytest.mark.parametrize("text", [b"needle", b"n"])
@pytest.mark.parametrize("size_bits", [11, 19])
def test_text_is_found_anywhere_in_the_ring(text: bytes, size_bits: int) -> None:
    assert not log_of(Ring(size_bits=size_bits)).mentions(text)
    last = (1 << size_bits) - len(text)
    for at in (0, min(last, (1 << 17) - 3), min(last, (1 << 17) + 1), last):
        ring = Ring(size_bits=size_bits)
        ring.data[at : at + len(text)] = text
        assert log_of(ring).mentions(text)


def damaged(ring: Ring, part: bytearray, at: int, value: int) -> list[int]:
    """Sequence numbers of what is left where one number is changed."""
    struct.pack_into("<Q", part, at, value)
    log = log_of(ring)
    left = [r.sequence for r in log]
    assert log.damaged == 3 - len(left)
    problems = Problems()
    told(log, problems)
    assert len(problems) == (len(left) < 3)
    return left


@pytest.mark.parametrize("value", [8, 3, 1 << 62 | 5, (1 << 64) - 1])
@pytest.mark.parametrize("field", ["state", "begin", "end", "text"])
def test_a_record_that_is_not_what_its_descriptor_says_is_left_out_and_counted(field: str, value: int) -> None:
    ring = Ring()
    for text in (b"one", b"two", b"three"):
        ring.write(text)
    if field == "text":
        assert damaged(ring, ring.data, 16, value) == [0, 2]
    elif field == "state" and value >> 62 == 3:
        struct.pack_into("<Q", ring.descs, 24, value)
        assert [r.sequence for r in log_of(ring)] == [0, 2]  # reusable: given up, as the kernel does it
    else:
        at = 24 + ("state", "begin", "end").index(field) * 8
        assert damaged(ring, ring.descs, at, value) == [0, 2]


def test_a_text_longer_than_its_room_is_left_out() -> None:
    ring = Ring()
    for text in (b"one", b"two", b"three"):
        ring.write(text)
    struct.pack_into("<H", ring.infos, 88 + 16, 9)
    log = log_of(ring)
    assert [r.text for r in log] == [b"one", b"three"]
    assert log.damaged == 1


def test_texts_that_cannot_be_read_cost_only_their_records() -> None:
    ring = Ring(count_bits=10, size_bits=14)
    for number in range(200):
        ring.write(b"%050d" % number)
    kernel = DyingKernel()
    _, _, data = ring.place(kernel)
    kernel.mem.drop(data - kernel.page_offset + 4096)
    log = Log(x86_64(kernel.mem, kernel.info()), kernel.info())
    left = [r.sequence for r in log]
    assert left == [*range(64), *range(128, 200)]  # 64 bytes each
    assert log.damaged == 64
    assert not log.mentions(b"%050d" % 70)


def test_descriptors_that_cannot_be_read_are_counted() -> None:
    ring = Ring(count_bits=13, size_bits=14)
    for number in range(100):
        ring.write(b"%d" % number)
    kernel = DyingKernel()
    descs, _, _ = ring.place(kernel)
    kernel.mem.drop(descs - kernel.page_offset)
    log = Log(x86_64(kernel.mem, kernel.info()), kernel.info())
    assert list(log) == []
    assert log.damaged >= 100


def test_level_is_unknown_where_its_place_is() -> None:
    ring = Ring()
    ring.write(b"text")
    (record,) = log_of(ring, **{"OFFSET(printk_info.caller_id)": "24"})
    assert (record.text, record.level, record.facility, record.flags) == (b"text", None, None, None)


NEEDED = [
    key for key in KEYS if key.startswith("OFFSET(pr") and not any(x in key for x in ("fail", "dev_info", "_lpos)"))
]
NEEDED += ["OFFSET(prb_desc.text_blk_lpos)", "SIZE(prb_desc)", "SIZE(printk_info)"]


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("value", [None, "100000", str((1 << 64) - 1)])
def test_layout_that_is_not_told_or_cannot_be_is_one_error(key: str, value: str | None) -> None:
    kernel = DyingKernel()
    Ring().place(kernel)
    if value is None:
        del kernel.keys[key]
    else:
        kernel.keys[key] = value
    walk, info = x86_64(kernel.mem, kernel.info()), kernel.info()
    with pytest.raises(WitnessError, match="vmcoreinfo"):
        Log(walk, info)


def test_kernel_without_the_ring_buffer_is_told() -> None:
    kernel = DyingKernel()
    walk, info = x86_64(kernel.mem, kernel.info()), kernel.info()
    with pytest.raises(WitnessError, match=r"no OFFSET\(prb_desc"):
        Log(walk, info)


@pytest.mark.parametrize(("count_bits", "size_bits"), [(0, 11), (27, 11), (6, 3), (6, 32), (1 << 31, 11), (5, 11)])
def test_rings_of_impossible_size_are_refused(count_bits: int, size_bits: int) -> None:
    ring = Ring()
    for number in range(100):
        ring.write(b"%d" % number)
    ring.count_bits, ring.size_bits = count_bits, size_bits
    kernel = DyingKernel()
    ring.place(kernel)
    walk, info = x86_64(kernel.mem, kernel.info()), kernel.info()
    with pytest.raises(WitnessError, match="prb at"):
        Log(walk, info)


class Bounds:
    """Memory that knows what the ring's three arrays are, and nothing of what lies beside them."""

    def __init__(self, kernel: DyingKernel, ring: Ring) -> None:
        self.mem, places = kernel.mem, ring.place(kernel)
        self.allowed = [
            (at - kernel.page_offset, at - kernel.page_offset + len(part))
            for at, part in zip(places, (ring.descs, ring.infos, ring.data), strict=True)
        ]
        self.start = min(start for start, _ in self.allowed)

    def read(self, paddr: int, size: int) -> bytes:
        if paddr >= self.start:
            assert any(start <= paddr and paddr + size <= end for start, end in self.allowed), hex(paddr)
        return self.mem.read(paddr, size)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_bytes_are_never_read_out_of_bounds_and_never_raise(data: st.DataObject) -> None:
    ring = Ring(4, 10)
    for number in range(data.draw(st.integers(0, 40))):
        ring.write(b"%d" % number * data.draw(st.integers(1, 60)))
    words = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 3, 8, 1 << 63, (1 << 64) - 8, 1 << 10])
    for part in (ring.descs, ring.infos, ring.data):
        for _ in range(data.draw(st.integers(0, 8))):
            struct.pack_into("<Q", part, data.draw(st.integers(0, len(part) - 8)), data.draw(words))
    if data.draw(st.booleans()):
        ring.head_id = data.draw(words) & ring.head_id | data.draw(st.integers(0, 31))
    kernel = DyingKernel()
    kernel.heap(bytes(4096), 1 << 20)
    memory = Bounds(kernel, ring)
    try:
        log = Log(x86_64(memory, kernel.info()), kernel.info())
    except WitnessError:
        return
    found = list(log)
    assert len(found) + log.damaged + log.unfinished <= 1 << 4
    assert all(len(r.text) < 1 << 10 for r in found)
    log.mentions(b"1234")


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=8, max_size=200), st.sampled_from([0, 8, 16]))
def test_random_bytes_as_a_log_end_quickly(content: bytes, shift: int) -> None:
    kernel = DyingKernel()
    keys = KEYS | {"SYMBOL(prb)": f"{kernel.text_vaddr + shift:x}"}
    info = Vmcoreinfo("".join(f"{key}={value}\n" for key, value in (kernel.keys | keys).items()).encode())
    memory = RandomMemory(content)
    try:
        log = Log(x86_64(memory, info), info)
    except (WitnessError, ReadError):
        return
    for _ in log.newest(100):
        pass
    assert memory.reads < 1000
