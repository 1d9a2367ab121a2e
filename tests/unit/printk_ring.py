# SPDX-License-Identifier: LGPL-2.1-or-later
"""A printk ring buffer under construction, written as kernel/printk/printk_ringbuffer.c writes it: ids and positions
start where the kernel's do, just before they wrap; what has no room pushes the oldest out; what does not fit before
the ring's end goes to its start."""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from tests.unit.witness_memory import DyingKernel

ID_MASK, LPOS_MASK = (1 << 62) - 1, (1 << 64) - 1
RESERVED, COMMITTED, FINALIZED, REUSABLE = range(4)
DESC_SIZE, INFO_SIZE = 24, 88
KEYS = {
    "SIZE(printk_ringbuffer)": "80",
    "OFFSET(printk_ringbuffer.desc_ring)": "0",
    "OFFSET(printk_ringbuffer.text_data_ring)": "40",
    "OFFSET(printk_ringbuffer.fail)": "72",
    "SIZE(prb_desc_ring)": "40",
    "OFFSET(prb_desc_ring.count_bits)": "0",
    "OFFSET(prb_desc_ring.descs)": "8",
    "OFFSET(prb_desc_ring.infos)": "16",
    "OFFSET(prb_desc_ring.head_id)": "24",
    "OFFSET(prb_desc_ring.tail_id)": "32",
    "SIZE(prb_desc)": str(DESC_SIZE),
    "OFFSET(prb_desc.state_var)": "0",
    "OFFSET(prb_desc.text_blk_lpos)": "8",
    "SIZE(prb_data_blk_lpos)": "16",
    "OFFSET(prb_data_blk_lpos.begin)": "0",
    "OFFSET(prb_data_blk_lpos.next)": "8",
    "SIZE(printk_info)": str(INFO_SIZE),
    "OFFSET(printk_info.seq)": "0",
    "OFFSET(printk_info.ts_nsec)": "8",
    "OFFSET(printk_info.text_len)": "16",
    "OFFSET(printk_info.caller_id)": "20",
    "OFFSET(printk_info.dev_info)": "24",
    "SIZE(prb_data_ring)": "32",
    "OFFSET(prb_data_ring.size_bits)": "0",
    "OFFSET(prb_data_ring.data)": "8",
    "OFFSET(prb_data_ring.head_lpos)": "16",
    "OFFSET(prb_data_ring.tail_lpos)": "24",
    "SIZE(atomic_long_t)": "8",
    "OFFSET(atomic_long_t.counter)": "0",
}


class Written(NamedTuple):
    """A record that the ring still has."""

    desc_id: int
    begin: int
    text: bytes
    finished: bool
    sequence: int


class Ring:
    """The ring, with 2**count_bits records in 2**size_bits bytes. With *exact*, a text may end with the ring, as since
    the kernel has is_blk_wrapped(); before, such a text went to the ring's start."""

    def __init__(self, count_bits: int = 6, size_bits: int = 11, exact: bool = True) -> None:
        self.count_bits, self.size_bits, self.exact = count_bits, size_bits, exact
        count, size = 1 << count_bits, 1 << size_bits
        self.descs, self.infos, self.data = bytearray(DESC_SIZE * count), bytearray(INFO_SIZE * count), bytearray(size)
        self.head_id = self.tail_id = -(count + 1) & ID_MASK
        self.head_lpos = self.tail_lpos = -size & LPOS_MASK
        self._desc(self.head_id, REUSABLE, 1, 1)
        self.sequence = 0
        self.live: deque[Written] = deque()

    def _desc(self, desc_id: int, state: int, begin: int, end: int) -> None:
        at = desc_id % (1 << self.count_bits) * DESC_SIZE
        struct.pack_into("<QQQ", self.descs, at, state << 62 | desc_id, begin, end)

    def _wrap(self, lpos: int) -> int:
        return (lpos & LPOS_MASK) >> self.size_bits

    def _end(self, begin: int, size: int) -> int:
        """get_next_lpos()"""
        end = begin + size & LPOS_MASK
        if self._wrap(begin) == self._wrap(end - self.exact):
            return end
        return (end >> self.size_bits << self.size_bits) + size & LPOS_MASK

    def _push(self) -> None:
        """The oldest record gives up its text: desc_push_tail(), data_push_tail()."""
        old = self.live.popleft()
        begin, end = struct.unpack_from("<QQ", self.descs, old.desc_id % (1 << self.count_bits) * DESC_SIZE + 8)
        self._desc(old.desc_id, REUSABLE, begin, end)
        if not begin & 1:
            self.tail_lpos = end

    def write(
        self,
        text: bytes,
        caller: int = 0x80000000,
        level: int = 6,
        facility: int = 0,
        flags: int = 2,
        state: int = FINALIZED,
    ) -> None:
        """Reserve, write, commit. An empty text takes no room (NO_LPOS)."""
        count, size = 1 << self.count_bits, 1 << self.size_bits
        desc_id = self.head_id + 1 & ID_MASK
        if self.live and (desc_id - self.live[0].desc_id & ID_MASK) >= count:
            self._push()
        if (desc_id - self.tail_id & ID_MASK) >= count:
            self.tail_id = self.tail_id + 1 & ID_MASK
        self.head_id = desc_id
        begin = end = 3
        if text:
            needed = -(-(8 + len(text)) // 8) * 8
            assert needed <= size // 2
            begin, end = self.head_lpos, self._end(self.head_lpos, needed)
            while end - self.tail_lpos & LPOS_MASK > size:
                self._push()
            at = begin if self._wrap(begin) == self._wrap(end - 1) else end - needed
            struct.pack_into(f"<Q{len(text)}s", self.data, at % size, desc_id, text)
            self.head_lpos = end
        self._desc(desc_id, state, begin, end)
        info = struct.pack(
            "<QQHBBI", self.sequence, self.sequence * 1000, len(text), facility, level << 5 | flags, caller
        )
        at = desc_id % count * INFO_SIZE
        self.infos[at : at + len(info)] = info
        self.live.append(Written(desc_id, begin, text, state in (COMMITTED, FINALIZED), self.sequence))
        self.sequence += 1

    def place(self, kernel: DyingKernel) -> tuple[int, int, int]:
        """Put it all into *kernel*; the addresses of descriptors, infos and texts."""
        descs, infos = (kernel.heap(bytes(part), 4096) for part in (self.descs, self.infos))
        data = kernel.heap(bytes(self.data), 4096)
        desc_ring = struct.pack("<I4xQQQQ", self.count_bits, descs, infos, self.head_id | FINALIZED << 62, self.tail_id)
        data_ring = struct.pack("<I4xQQQ", self.size_bits, data, self.head_lpos, self.tail_lpos)
        ring = kernel.image(desc_ring + data_ring + bytes(8))
        kernel.keys |= KEYS | {"SYMBOL(prb)": f"{kernel.pointer('prb', ring):x}"}
        return descs, infos, data
