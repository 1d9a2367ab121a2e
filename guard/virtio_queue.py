# SPDX-License-Identifier: LGPL-2.1-or-later
"""A split virtqueue with its request buffers, all in one pinned page.

Layout: virtio specification, "Split Virtqueues"; include/uapi/linux/virtio_ring.h. Slot i is the descriptor pair
(2i request, 2i+1 reply) with its buffers; a round offers slots 0..n-1 and is over before the next one starts. What the
device writes into the page is untrusted."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from .errors import DeviceError
from .pinned import PAGE_SIZE, PinnedPage

DESC_SIZE = 16
DESC_F_NEXT, DESC_F_WRITE = 1, 2
AVAIL_F_NO_INTERRUPT = 1
USED_ELEM_SIZE = 8

# sched_yield(2) goes through __schedule(), which executes a full memory barrier (membarrier(2) rests on that). The
# device runs on another CPU, and not every architecture keeps stores in order as x86 does.
memory_barrier = os.sched_yield


class QueueLayout(NamedTuple):
    """Where the parts of the queue lie in its page (byte offsets), and how many requests one round carries."""

    entries: int
    avail: int
    used: int
    buffers: int
    stride: int
    slots: int


def queue_layout(page_size: int, max_entries: int, request_size: int, reply_size: int) -> QueueLayout:
    """The largest queue, a power of two up to *max_entries*, whose page also holds the buffers (sizes in bytes) of
    each descriptor pair. Raises DeviceError if there is none."""
    stride = (request_size + reply_size + 7) & ~7
    entries = (1 << min(max_entries, 1024).bit_length()) >> 1
    while entries >= 2:
        avail = DESC_SIZE * entries
        used = (avail + 6 + 2 * entries + 3) & ~3
        buffers = (used + 6 + USED_ELEM_SIZE * entries + 7) & ~7
        if buffers + stride * (entries // 2) <= page_size:
            return QueueLayout(entries, avail, used, buffers, stride, entries // 2)
        entries //= 2
    raise DeviceError(f"a queue of {max_entries} entries cannot carry a request of {request_size} bytes")


class SplitQueue:
    """The driver's side of the queue in *page*, for requests and replies of fixed size in bytes."""

    def __init__(self, page: PinnedPage, max_entries: int, request_size: int, reply_size: int) -> None:
        self.layout = queue_layout(PAGE_SIZE, max_entries, request_size, reply_size)
        self._view = page.view
        # Ring indices are read and written as one 16-bit access; struct would go byte by byte.
        self._words = page.view.cast("H")
        self._request_size = request_size
        self._reply_size = reply_size
        self._avail_idx = self._used_idx = 0

    def prepare(self, paddr: int) -> tuple[int, int, int]:
        """Empty the queue, whose page lies at *paddr*; returns the physical addresses of its three parts."""
        layout, view = self.layout, self._view
        view[:] = bytes(PAGE_SIZE)
        for slot in range(layout.slots):
            request = paddr + self._buffer(slot)
            reply = request + self._request_size
            head = 2 * slot
            descriptor = struct.pack("<QIHH", request, self._request_size, DESC_F_NEXT, head + 1)
            view[DESC_SIZE * head : DESC_SIZE * (head + 1)] = descriptor
            descriptor = struct.pack("<QIHH", reply, self._reply_size, DESC_F_WRITE, 0)
            view[DESC_SIZE * (head + 1) : DESC_SIZE * (head + 2)] = descriptor
        struct.pack_into("<H", view, layout.avail, AVAIL_F_NO_INTERRUPT)
        self._avail_idx = self._used_idx = 0
        return paddr, paddr + layout.avail, paddr + layout.used

    def _buffer(self, slot: int) -> int:
        return self.layout.buffers + self.layout.stride * slot

    def offer(self, requests: list[bytes]) -> None:
        """Make *requests* (at most layout.slots) available to the device; it looks once it is notified."""
        for slot, request in enumerate(requests):
            at = self._buffer(slot)
            self._view[at : at + self._request_size] = request
            at += self._request_size
            # All ones, so that a reply which the device never wrote is not mistaken for VIRTIO_MEM_RESP_ACK, zero.
            self._view[at : at + self._reply_size] = b"\xff" * self._reply_size
            entry = (self._avail_idx + slot) % self.layout.entries
            struct.pack_into("<H", self._view, self.layout.avail + 4 + 2 * entry, 2 * slot)
        memory_barrier()
        self._avail_idx = (self._avail_idx + len(requests)) & 0xFFFF
        self._words[self.layout.avail // 2 + 1] = self._avail_idx
        memory_barrier()

    def answered(self) -> int:
        """How many answers the device claims to have given in this round, so far."""
        return (self._words[self.layout.used // 2 + 1] - self._used_idx) & 0xFFFF

    def take(self, offered: int, answered: int) -> list[bytes | None]:
        """The replies to the *offered* requests of this round, in their order, cut to the length that the device says
        it wrote; None where there is none. Raises DeviceError if the used ring breaks the rules of the queue."""
        if answered > offered:
            raise DeviceError(f"the used index ran ahead: {answered} answers to {offered} requests")
        memory_barrier()
        replies: list[bytes | None] = [None] * offered
        for i in range(answered):
            at = self.layout.used + 4 + USED_ELEM_SIZE * ((self._used_idx + i) % self.layout.entries)
            ident, length = struct.unpack_from("<II", self._view, at)
            slot = ident // 2
            if ident % 2 or slot >= offered:
                raise DeviceError(f"the used ring names descriptor {ident:#x}, which was not offered")
            if replies[slot] is not None:
                raise DeviceError(f"the used ring names descriptor {ident:#x} twice")
            if length > self._reply_size:
                raise DeviceError(f"the used ring tells of {length} bytes in a reply of {self._reply_size}")
            at = self._buffer(slot) + self._request_size
            replies[slot] = bytes(self._view[at : at + length])
        self._used_idx = (self._used_idx + answered) & 0xFFFF
        return replies

    def close(self) -> None:
        """Let go of the page, so that it can be unmapped."""
        self._words.release()
