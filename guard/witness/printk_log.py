# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dead kernel's log: the lockless ring buffer that printk() has written to since 5.10.

Layout: kernel/printk/printk_ringbuffer.h and the long comment at the top of printk_ringbuffer.c; VMCOREINFO has all
sizes and offsets (log_buf_vmcoreinfo_setup(), kernel/printk/printk.c). A ring of descriptors, numbered by ids that go
up and wrap at 62 bits, says in which state each record is and which stretch of the ring of texts is its own. Positions
in that ring go up too and wrap at 64 bits; a stretch that does not fit before the ring's end lies at its start. Each
begins with the id of its descriptor. An array beside the descriptors has time, length and caller.

The record log that was there before 5.10 (log_buf, log_first_idx) is not read: such kernels have no SYMBOL(prb), and
no log here."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from guard.errors import ReadError, WitnessError
from guard.witness.memory import Problems
from guard.witness.pagewalk import PageWalk
from guard.witness.vmcoreinfo import Vmcoreinfo

# struct printk_info.flags, include/linux/printk.h and kernel/printk/internal.h
NEWLINE, CONT = 2, 8
HW_ERR = b"[Hardware Error]: "
"""What stands before all that is said of broken hardware (include/linux/printk.h)."""

_STATE_SHIFT = 62
_ID_MASK = (1 << _STATE_SHIFT) - 1
_LPOS_MASK = (1 << 64) - 1
_RESERVED, _COMMITTED, _FINALIZED, _REUSABLE = range(4)
_MAX_TEXT_BITS = 31
"""LOG_BUF_LEN_MAX: 2 GiB."""
_MAX_COUNT_BITS = _MAX_TEXT_BITS - 5
"""An average text is taken to be 32 bytes (PRB_AVGBITS)."""
_MAX_STRUCT = 4096
_PIECE = 1 << 17
"""Bytes of a ring read at a time; no text is longer than 64 KiB, for printk_info.text_len has 16 bits."""
_ID_SIZE = 8


class Record(NamedTuple):
    """One record. *sequence* counts from the start of that kernel, *ts_nsec* is its local clock. *caller* is a thread's
    id, or with bit 31 set a processor's number. *text* is as the kernel wrote it: no prefix, no newline at the end
    unless it is in the middle, bytes of any kind.

    *level* (0 to 7), *facility* (0: the kernel itself) and *flags* are None where VMCOREINFO cannot tell them."""

    sequence: int
    ts_nsec: int
    caller: int
    text: bytes
    level: int | None
    facility: int | None
    flags: int | None


class _Layout(NamedTuple):
    """VMCOREINFO's word on the structures; offsets and sizes in bytes."""

    desc_size: int
    state: int
    begin: int
    next: int
    info_size: int
    sequence: int
    ts_nsec: int
    text_len: int
    caller: int


class Log:
    """The log of the kernel that *info* describes, opened: the rings are where they were said to be, and can be read in
    any number of passes. Raises WitnessError or ReadError where there is none, or what tells of it makes no sense.

    After a pass, *unfinished* is how many records their writer had reserved and not finished, and *damaged* how many
    were not what their descriptor says, or could not be read; the pass left both kinds out."""

    def __init__(self, walk: PageWalk, info: Vmcoreinfo) -> None:
        self._walk = walk
        self.unfinished = self.damaged = 0
        self._layout = _layout(info)
        ring = walk.read_u64(_need(info.symbol("prb"), "SYMBOL(prb)"))
        descs = ring + _offset(info, "printk_ringbuffer.desc_ring")
        texts = ring + _offset(info, "printk_ringbuffer.text_data_ring")
        counter = info.offset("atomic_long_t.counter") or 0
        count_bits = walk.read_u32(descs + _offset(info, "prb_desc_ring.count_bits"))
        self._size_bits = walk.read_u32(texts + _offset(info, "prb_data_ring.size_bits"))
        if not (0 < count_bits <= _MAX_COUNT_BITS and 3 < self._size_bits <= _MAX_TEXT_BITS):
            raise WitnessError(
                f"prb at {ring:#x}: 2^{count_bits} records in 2^{self._size_bits} bytes, at most 2^{_MAX_COUNT_BITS} "
                f"in 2^{_MAX_TEXT_BITS} were expected"
            )
        self._count = 1 << count_bits
        self._descs = walk.read_u64(descs + _offset(info, "prb_desc_ring.descs"))
        self._infos = walk.read_u64(descs + _offset(info, "prb_desc_ring.infos"))
        self._texts = walk.read_u64(texts + _offset(info, "prb_data_ring.data"))
        head = walk.read_u64(descs + _offset(info, "prb_desc_ring.head_id") + counter) & _ID_MASK
        self._tail = walk.read_u64(descs + _offset(info, "prb_desc_ring.tail_id") + counter) & _ID_MASK
        self._records = (head - self._tail & _ID_MASK) + 1
        if self._records > self._count:
            raise WitnessError(
                f"prb at {ring:#x}: ids from {self._tail:#x} to {head:#x} are more than its {self._count} records"
            )

    def mentions(self, text: bytes) -> bool:
        """Whether *text* stands anywhere in the ring of texts, in a record that is there or one that was. Much cheaper
        than a pass over the records. What cannot be read does not mention it."""
        size = 1 << self._size_bits
        step = _PIECE - len(text)
        for at in range(0, size, step):
            try:
                if text in self._walk.read(self._texts + at, min(_PIECE, size - at)):
                    return True
            except (WitnessError, ReadError):
                continue
        return False

    def __iter__(self) -> Iterator[Record]:
        """All records, oldest first."""
        return self.newest(self._count)

    def newest(self, limit: int) -> Iterator[Record]:
        """Those of the last *limit* records that can be had, oldest first."""
        self.unfinished = self.damaged = 0
        layout = self._layout
        texts = _Window(self._walk, self._texts, 1 << self._size_bits)
        step = _PIECE // max(layout.desc_size, layout.info_size)
        done = max(0, self._records - limit)
        while done < self._records:
            first = (self._tail + done) % self._count
            count = min(step, self._records - done, self._count - first)
            try:
                descs = self._walk.read(self._descs + first * layout.desc_size, count * layout.desc_size)
                infos = self._walk.read(self._infos + first * layout.info_size, count * layout.info_size)
            except (WitnessError, ReadError):
                self.damaged += count
            else:
                for number in range(count):
                    desc_id = self._tail + done + number & _ID_MASK
                    at, info_at = number * layout.desc_size, number * layout.info_size
                    record = self._record(desc_id, descs, at, infos, info_at, texts)
                    if record is not None:
                        yield record
            done += count

    def _record(self, desc_id: int, descs: bytes, at: int, infos: bytes, info_at: int, texts: _Window) -> Record | None:
        layout = self._layout
        (state,) = struct.unpack_from("<Q", descs, at + layout.state)
        kind = state >> _STATE_SHIFT
        if kind == _REUSABLE:
            return None  # its text was given up; so is the one before the first record that there ever was
        if state & _ID_MASK != desc_id:
            self.damaged += 1
            return None
        if kind == _RESERVED:
            self.unfinished += 1
            return None
        (begin,) = struct.unpack_from("<Q", descs, at + layout.begin)
        (end,) = struct.unpack_from("<Q", descs, at + layout.next)
        (length,) = struct.unpack_from("<H", infos, info_at + layout.text_len)
        text = b""
        if not begin & end & 1:  # FAILED_LPOS, NO_LPOS: a record without text
            try:
                text = self._text(desc_id, begin, end, length, texts)
            except (WitnessError, ReadError):
                self.damaged += 1
                return None
        (sequence,) = struct.unpack_from("<Q", infos, info_at + layout.sequence)
        (ts_nsec,) = struct.unpack_from("<Q", infos, info_at + layout.ts_nsec)
        (caller,) = struct.unpack_from("<I", infos, info_at + layout.caller)
        level = facility = flags = None
        if layout.caller == layout.text_len + 4:
            # two bytes without a key between text_len and caller_id: facility, then flags in 5 bits and level in 3
            facility, bits = infos[info_at + layout.text_len + 2], infos[info_at + layout.text_len + 3]
            level, flags = bits >> 5, bits & 0x1F
        return Record(sequence, ts_nsec, caller, text, level, facility, flags)

    def _text(self, desc_id: int, begin: int, end: int, length: int, texts: _Window) -> bytes:
        """The first *length* bytes of the text between the positions *begin* and *end*."""
        bits = self._size_bits
        mask = (1 << bits) - 1
        start, room = begin & mask, end - begin & _LPOS_MASK
        if begin >> bits != (end - 1 & _LPOS_MASK) >> bits:
            # It lies at the ring's start as a whole, and what was left before the ring's end is not used. One that ends
            # with the ring exactly is no such thing; only kernels with is_blk_wrapped() make it.
            if end >> bits != (begin >> bits) + 1 & _LPOS_MASK >> bits:
                raise WitnessError("no stretch of the ring")
            start, room = 0, end & mask
        if not _ID_SIZE + length <= room <= mask or (begin | end) % _ID_SIZE:
            raise WitnessError("no stretch of the ring")
        found = texts.read(start, _ID_SIZE + length)
        if int.from_bytes(found[:_ID_SIZE], "little") != desc_id:
            raise WitnessError("the text of another record")
        return found[_ID_SIZE:]


class _Window:
    """A ring's bytes, of which one piece is kept: texts that follow each other lie one behind the other."""

    def __init__(self, walk: PageWalk, vaddr: int, size: int) -> None:
        self._walk, self._vaddr, self._size = walk, vaddr, size
        self._at, self._piece = 0, b""

    def read(self, at: int, size: int) -> bytes:
        """*size* bytes, all of them inside the ring; raises WitnessError or ReadError."""
        if at + size > self._size:
            raise WitnessError("beyond the end of the ring")
        if not self._at <= at or at + size > self._at + len(self._piece):
            try:
                self._piece = self._walk.read(self._vaddr + at, min(_PIECE, self._size - at))
                self._at = at
            except (WitnessError, ReadError):
                return self._walk.read(self._vaddr + at, size)
        return self._piece[at - self._at : at - self._at + size]


def _layout(info: Vmcoreinfo) -> _Layout:
    lpos = _offset(info, "prb_desc.text_blk_lpos")
    layout = _Layout(
        _need(info.size("prb_desc"), "SIZE(prb_desc)"),
        _offset(info, "prb_desc.state_var") + (info.offset("atomic_long_t.counter") or 0),
        lpos + _offset(info, "prb_data_blk_lpos.begin"),
        lpos + _offset(info, "prb_data_blk_lpos.next"),
        _need(info.size("printk_info"), "SIZE(printk_info)"),
        _offset(info, "printk_info.seq"),
        _offset(info, "printk_info.ts_nsec"),
        _offset(info, "printk_info.text_len"),
        _offset(info, "printk_info.caller_id"),
    )
    in_desc = max(layout.state, layout.begin, layout.next) + 8
    in_info = max(layout.sequence + 8, layout.ts_nsec + 8, layout.text_len + 2, layout.caller + 4)
    if not (in_desc <= layout.desc_size <= _MAX_STRUCT and in_info <= layout.info_size <= _MAX_STRUCT):
        raise WitnessError(
            f"vmcoreinfo: prb_desc of {layout.desc_size} bytes with fields up to {in_desc} and printk_info of "
            f"{layout.info_size} with fields up to {in_info} are not plausible"
        )
    return layout


def _offset(info: Vmcoreinfo, name: str) -> int:
    offset = _need(info.offset(name), f"OFFSET({name})")
    if offset > _MAX_STRUCT:
        raise WitnessError(f"vmcoreinfo: OFFSET({name}) is {offset}, at most {_MAX_STRUCT} was expected")
    return offset


def _need(value: int | None, key: str) -> int:
    if value is None:
        raise WitnessError(f"vmcoreinfo has no {key}: no log")
    return value


def told(log: Log, problems: Problems) -> None:
    """A line in *problems* on what the last pass over *log* left out because of damage."""
    if log.damaged:
        problems.note(f"prb: {log.damaged} records of the log are damaged or cannot be read, they are left out")
