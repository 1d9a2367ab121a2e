# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ELF notes of the kernel's own /proc/vmcore, and where old memory has the same bytes.

At boot the capture kernel reads the header that it was given with elfcorehdr=, and merges what each of its PT_NOTEs
leads to into one, up to an empty note each (fs/proc/vmcore.c:merge_note_headers_elf64()). Drivers put their device
dumps in front of that (vmcore_add_device_dump(); include/uapi/linux/vmcore.h: type 0x700, name "LINUX", with its
header whole pages). So /proc/vmcore has the contents of every note. The header itself, which lies in the crash
reservation, has their physical addresses (kernel/crash_core.c:crash_prepare_elf64_headers(): a PT_NOTE for each CPU,
then one for VMCOREINFO)."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from capture.arch import Note
from capture.sources import report
from guard import procvmcore
from guard.errors import ReadError, SourceError
from guard.procvmcore import EHDR_SIZE, PHDR_SIZE, PN_XNUM, PT_NOTE
from guard.witness.vmcoreinfo import HEADER_SIZE, NOTE_NAME, Vmcoreinfo

if TYPE_CHECKING:
    from capture.machine import Machine
    from guard.witness.crash_notes import CpuNotes
    from guard.witness.memory import Memory, Problems

NT_PRSTATUS, NT_VMCOREDD = 1, 0x700  # include/uapi/linux/elf.h
CORE, VMCOREINFO = b"CORE", NOTE_NAME.rstrip(b"\0")

_NHDR = struct.Struct("<III")  # Elf64_Nhdr: sizes of name and descriptor, type; both padded to 4 bytes behind it
_MAX_NOTES = 1 << 17  # 8192 CPUs with a dozen each
_MAX_PREPARED = EHDR_SIZE + PN_XNUM * PHDR_SIZE
_MAX_BEHIND = 1 << 20  # bytes behind one PT_NOTE of the prepared header; kernels have less than three pages there
_MAX_BEHIND_ALL = 64 << 20


class ElfNote(NamedTuple):
    """One note: its name without the NUL, its type, all its bytes (header and padding too), and the physical address
    where old memory has them, if that is known."""

    name: bytes
    kind: int
    data: memoryview
    paddr: int | None = None

    @property
    def is_cpu(self) -> bool:
        """The first of those that one CPU left."""
        return self.name == CORE and self.kind == NT_PRSTATUS

    @property
    def is_vmcoreinfo(self) -> bool:
        return self.name == VMCOREINFO and self.kind == 0


class Listed(NamedTuple):
    """What a PT_NOTE of the prepared header leads to: physical address and size in bytes."""

    paddr: int
    size: int


def size_at(data: bytes | memoryview, at: int, end: int) -> int:
    """Bytes of the note at *at*; 0 for an empty one, which ends notes, and where it does not end before *end*."""
    if at + _NHDR.size > end:
        return 0
    namesz, descsz, _ = _NHDR.unpack_from(data, at)
    size = int(_NHDR.size + ((namesz + 3) & -4) + ((descsz + 3) & -4))
    return size if namesz and at + size <= end else 0


def parse(data: bytes | memoryview, where: str, problems: Problems, paddr: int | None = None) -> list[ElfNote]:
    """The notes in *data*, as far as they can be told apart; *where* names it in the line that tells what cannot.
    *paddr* is where old memory has them."""
    view, at, end = memoryview(data).toreadonly(), 0, len(data)
    found: list[ElfNote] = []
    while size := size_at(view, at, end):
        if len(found) == _MAX_NOTES:
            break
        namesz, _, kind = _NHDR.unpack_from(view, at)
        name = bytes(view[at + _NHDR.size : at + _NHDR.size + min(namesz, 64)]).rstrip(b"\0")
        found.append(ElfNote(name, kind, view[at : at + size], None if paddr is None else paddr + at))
        at += size
    if any(view[at : at + _MAX_BEHIND]):
        why = f"more than {_MAX_NOTES} notes" if len(found) == _MAX_NOTES else "no note that fits"
        problems.note(f"{where}: {why} at byte {at:#x}; {end - at} bytes from there on are left out")
    return found


def of_kernel(machine: Machine, problems: Problems) -> list[ElfNote]:
    """The notes of the kernel's own /proc/vmcore; an empty list if it made none."""
    if machine.core_header is None:
        return []
    head = next((p for p in machine.core_header.phdrs if p.type == PT_NOTE), None)
    if head is None or not head.filesz:
        return []
    where = f"notes of {procvmcore.PATH}"
    if head.filesz > procvmcore.MAX_HEADER:
        problems.note(f"{where}: {head.filesz:#x} bytes, at most {procvmcore.MAX_HEADER:#x} were expected; not used")
        return []
    try:
        data = machine.read_core(head.filesz, head.offset)
    except SourceError as e:
        problems.note(f"{e}: its notes are not used")
        return []
    return parse(memoryview(data), where, problems)


def prepared_at(machine: Machine) -> int | None:
    """Physical address of the header that the kernel was booted with; None if the command line names none."""
    return next((f.start for f in machine.reports["cmdline"].findings if f.kind == report.ELFCOREHDR), None)


def listed_by(mem: Memory, addr: int) -> list[Listed]:
    """What the PT_NOTEs of the prepared header at physical address *addr* lead to. Raises SourceError."""
    name = f"prepared header at {addr:#x}"

    def read(size: int, offset: int) -> bytes:
        if offset + size > min(_MAX_PREPARED, (1 << 64) - addr):
            raise SourceError(f"{name}: {size} bytes at offset {offset:#x} are beyond its end")
        try:
            return mem.read(addr + offset, size)
        except ReadError as e:
            raise SourceError(f"{name}: {e}") from None

    header = procvmcore.parse_header(read, name)
    return [Listed(p.offset, p.memsz) for p in header.phdrs if p.type == PT_NOTE]


def located(notes: Sequence[ElfNote], listed: Sequence[Listed], mem: Memory) -> list[ElfNote]:
    """*notes*, each with its physical address where old memory still has at one of *listed* what the kernel read there.
    The kernel kept their order, so what does not fit in it is left as it is."""
    found = list(notes)
    places: dict[int, list[int]] = {}
    for i, note in enumerate(found):
        if len(note.data) <= _MAX_BEHIND and note.kind != NT_VMCOREDD:
            places.setdefault(hash(bytes(note.data)), []).append(i)
    reached, left = 0, _MAX_BEHIND_ALL
    for paddr, room in listed:
        left -= min(room, _MAX_BEHIND)
        if left < 0:
            break
        sizes, data = _notes_at(mem, paddr, min(room, _MAX_BEHIND))
        candidates = places.get(hash(data[: sizes[0]]), []) if sizes else []
        for i in candidates[bisect_left(candidates, reached) :]:
            at = paddr
            if _same(found[i : i + len(sizes)], sizes, data):
                for j in range(i, i + len(sizes)):
                    found[j] = found[j]._replace(paddr=at)
                    at += len(found[j].data)
                reached = i + len(sizes)
                break
    return found


def of_memory(listed: Sequence[Listed], mem: Memory, problems: Problems) -> list[ElfNote]:
    """What the kernel would have merged, from old memory: for where it made no /proc/vmcore of the prepared header."""
    found: list[ElfNote] = []
    for paddr, room in listed:
        _, data = _notes_at(mem, paddr, min(room, _MAX_BEHIND))
        found += parse(data, f"notes at {paddr:#x}", problems, paddr)
        if len(found) > _MAX_NOTES:
            break
    return found


def _notes_at(mem: Memory, paddr: int, room: int) -> tuple[list[int], bytes]:
    """Sizes of the notes at *paddr*, and their bytes."""
    try:
        data = mem.read(paddr, room) if room else b""
    except ReadError:
        return [], b""
    sizes, at = [], 0
    while size := size_at(data, at, room):
        sizes.append(size)
        at += size
    return sizes, data[:at]


def _same(notes: Sequence[ElfNote], sizes: Sequence[int], data: bytes) -> bool:
    return [len(n.data) for n in notes] == list(sizes) and b"".join(n.data for n in notes) == data


def vmcoreinfo(notes: Sequence[ElfNote]) -> Vmcoreinfo | None:
    """The VMCOREINFO among *notes*."""
    for note in notes:
        if note.is_vmcoreinfo:
            (size,) = struct.unpack_from("<4xI", note.data)
            data = bytes(note.data)
            return Vmcoreinfo(data[HEADER_SIZE : HEADER_SIZE + size], data, note.paddr)
    return None


def with_vmcoreinfo(notes: Sequence[ElfNote], info: Vmcoreinfo | None) -> list[ElfNote]:
    """*notes* with *info* in place of the VMCOREINFO that is there, or as the last one."""
    if info is None:
        return list(notes)
    new = ElfNote(VMCOREINFO, 0, memoryview(info.note), info.paddr)
    if not any(n.is_vmcoreinfo for n in notes):
        return [*notes, new]
    first = next(i for i, n in enumerate(notes) if n.is_vmcoreinfo)
    return [new if i == first else n for i, n in enumerate(notes)]


def completed(
    notes: Sequence[ElfNote], cpus: Sequence[CpuNotes], listed: Sequence[Listed], remarks: Problems
) -> list[ElfNote]:
    """*notes* of the kernel with those of *cpus*, the dead kernel's own records, that it lacks: of CPUs that came after
    its header was made. Both are in the order of CPUs, and what both have is recognised by its bytes, so that its place
    is known too; of a CPU whose record is another now, the kernel's note, read at boot, counts."""
    saved = [cpu for cpu in cpus if cpu.notes]
    groups = _groups(notes)
    known = {place.paddr for place in listed}
    where = _matches([b"".join(n.data for n in notes[a:b]) for a, b in groups], [cpu.notes for cpu in saved])
    first = next((i for i, n in enumerate(notes) if n.kind != NT_VMCOREDD), len(notes))
    at = groups[0][0] if groups else first
    result, insert = list(notes), []
    following = 0  # the next group that no record has been found for
    for i, cpu in enumerate(saved):
        match, record = where[i], parse(cpu.notes, f"notes of CPU {cpu.cpu}", remarks, cpu.paddr)
        if match is None:
            border = next((m for m in where[i + 1 :] if m is not None), len(groups))
            if following < border and (not known or cpu.paddr in known):
                remarks.note(f"CPU {cpu.cpu}: its note in memory is not what this kernel read at boot, which is kept")
                match = following
            else:
                if groups:
                    remarks.note(f"CPU {cpu.cpu}: its note is not in {procvmcore.PATH}; it is added")
                insert.append((at, record))
                continue
        else:
            result[groups[match][0] : groups[match][0] + len(record)] = record
        at, following = groups[match][1], match + 1
    for at, new in reversed(insert):
        result[at:at] = new
    return result


def _groups(notes: Sequence[ElfNote]) -> list[tuple[int, int]]:
    """Which of *notes* are of one CPU, each: NT_PRSTATUS, and what follows of its kind (Xen's of that CPU too)."""
    groups: list[tuple[int, int]] = []
    for i, note in enumerate(notes):
        if note.is_cpu:
            groups.append((i, i + 1))
        elif groups and groups[-1][1] == i and _adjacent(notes[i - 1], note):
            groups[-1] = (groups[-1][0], i + 1)
    return groups


def _adjacent(note: ElfNote, following: ElfNote) -> bool:
    """Does *following* lie behind *note* in the same buffer, by address or, where none is known, by its kind?"""
    if note.paddr is not None and following.paddr is not None:
        return note.paddr + len(note.data) == following.paddr
    return not following.name.startswith(VMCOREINFO) and following.kind != NT_VMCOREDD


def _matches(groups: Sequence[bytes], records: Sequence[bytes]) -> list[int | None]:
    """For each of *records* the one of *groups* that begins with the same bytes; ascending."""
    places: dict[bytes, list[int]] = {}
    for i, group in enumerate(groups):
        places.setdefault(group[:_PRSTATUS_SIZE], []).append(i)
    found: list[int | None] = []
    reached = 0
    for record in records:
        candidates = places.get(record[:_PRSTATUS_SIZE], [])
        candidates = candidates[bisect_left(candidates, reached) :]
        match = next((i for i in candidates if groups[i].startswith(record)), None)
        found.append(match)
        reached = reached if match is None else match + 1
    return found


_PRSTATUS_SIZE = 356
"""Bytes of a CPU's note on x86_64, enough to tell one from another."""


def joined(notes: Sequence[ElfNote]) -> tuple[Note, ...]:
    """*notes* for a header; those that are neighbours in old memory as one."""
    result: list[Note] = []
    for note in notes:
        last = result[-1] if result else None
        if last and last.paddr is not None and last.paddr + len(last.data) == note.paddr:
            result[-1] = Note(bytes(last.data) + bytes(note.data), last.paddr)
        else:
            result.append(Note(note.data, note.paddr))
    return tuple(result)
