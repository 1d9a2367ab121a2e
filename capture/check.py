# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verifying a vmcore with pyelftools, an ELF reader that shares nothing with our writer; and what makedumpfile makes of
one (check_kdump.py).

The rules are what collectors need: makedumpfile (elf_info.c), crash (netdump.c), drgn (libdrgn/program.c), and the
layout of fs/proc/vmcore.c."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from capture import check_kdump
from guard.errors import Error
from guard.ranges import RangeSet

PAGE = 4096


class Checked(NamedTuple):
    """What is wrong with a file, and what it has, as lines; *kinds* says what it is where that is no plain ELF core."""

    wrong: list[str]
    has: list[str]
    kinds: tuple[str, ...] = ()


def check(path: str) -> Checked:
    """Look at the vmcore at *path*. Raises Error if it is none at all, or pyelftools is needed and not there."""
    try:
        with open(path, "rb") as stream:
            return _check(path, stream)
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None


def _check(path: str, stream: BinaryIO, inside: bool = False) -> Checked:
    """*inside* of a flattened file is no other one."""
    head = stream.read(PAGE)
    if head.startswith(check_kdump.FLATTENED) and not inside:
        wrong: list[str] = []
        with check_kdump.Flattened(stream, wrong) as whole:
            has = [f"{whole.records} records, {whole.size} bytes when put together"]
            kind = "a flattened file of makedumpfile, which makedumpfile -R puts together"
            if wrong:  # what it is put together to would be wrong too
                return Checked(wrong, has, (kind,))
            found = _check(path, io.BufferedReader(whole, 1 << 20), inside=True)
        return Checked(found.wrong, has + found.has, (kind, *found.kinds))
    if head.startswith(check_kdump.SIGNATURES):
        stream.seek(0)
        found = Checked([], [], ("a kdump-compressed file of makedumpfile",))
        check_kdump.check(stream, found.wrong, found.has)
        return found
    stream.seek(0)
    return _check_elf(path, stream)


def _check_elf(path: str, stream: BinaryIO) -> Checked:
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise Error("check needs pyelftools: pip install oldmem[check]") from None
    wrong: list[str] = []
    has: list[str] = []
    try:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        elf = ELFFile(stream)
        if elf["e_type"] != "ET_CORE":
            raise Error(f"{path}: offset 0x10: e_type is {elf['e_type']}, expected ET_CORE")
        segments = list(elf.iter_segments())
        _check_segments(segments, size, wrong, has)
        _check_notes(segments, wrong, has)
    except (OSError, Error):
        raise
    except Exception as e:  # pyelftools checks little of what it reads: damage comes as an error of any kind
        raise Error(f"{path}: {' '.join(str(e).split()) or 'ends within the ELF header'}{_kind(stream)}") from None
    return Checked(wrong, has)


def _kind(stream: BinaryIO) -> str:
    """What the file is instead of an ELF file, if that can be told."""
    from capture import file_kind

    stream.seek(0)
    kind = file_kind.of(stream.read(PAGE))
    return f" ({kind.name}: {kind.advice})" if kind and "ELF" not in kind.name else ""


def _check_segments(segments: Sequence[object], size: int, wrong: list[str], has: list[str]) -> None:
    headers = [s.header for s in segments]  # type: ignore[attr-defined]
    notes = [h for h in headers if h["p_type"] == "PT_NOTE"]
    loads = [h for h in headers if h["p_type"] == "PT_LOAD"]
    if len(notes) != 1 or headers[0]["p_type"] != "PT_NOTE":
        wrong.append(f"{len(notes)} PT_NOTE, expected one, as program header 0 (crash reads no other)")
    if not loads:
        wrong.append("no PT_LOAD: the file has no memory")
    # The kernel and we put pages at pages of the file. makedumpfile -E puts them anywhere, but all by the same distance
    distances = Counter((h["p_offset"] - h["p_paddr"]) % PAGE for h in loads if h["p_filesz"] and h["p_offset"])
    usual = distances.most_common(1)[0][0] if distances else 0
    for i, h in enumerate(headers):
        end = h["p_offset"] + h["p_filesz"]
        if end > size:
            wrong.append(f"program header {i}: data ends at {end:#x}, the file at {size:#x}")
        if h["p_type"] != "PT_LOAD":
            continue
        if h["p_filesz"] > h["p_memsz"]:
            wrong.append(f"program header {i}: p_filesz {h['p_filesz']:#x} is more than p_memsz {h['p_memsz']:#x}")
        if not h["p_filesz"]:  # all of it was left out, and where it is says nothing
            continue
        if h["p_offset"] == 0:
            wrong.append(f"program header {i}: p_offset 0 means 'not in the file' to makedumpfile and crash")
        elif (h["p_offset"] - h["p_paddr"]) % PAGE != usual:
            wrong.append(
                f"program header {i}: p_offset {h['p_offset']:#x} and p_paddr {h['p_paddr']:#x} differ in page"
            )
    stored = sorted((h["p_offset"], h["p_offset"] + h["p_filesz"], i) for i, h in enumerate(headers) if h["p_filesz"])
    for (_, end, i), (start, _, j) in pairwise(stored):
        if start < end:
            wrong.append(f"program headers {min(i, j)} and {max(i, j)} share the file from {start:#x} on")
    ram = _check_memory(loads, wrong)
    has.append(f"{len(loads)} PT_LOAD, {ram >> 20} MiB of RAM")
    left_out = sum(h["p_memsz"] - h["p_filesz"] for h in loads if h["p_filesz"] < h["p_memsz"])
    if left_out:
        has.append(f"pages of {left_out >> 20} MiB were left out (p_filesz below p_memsz), as makedumpfile -E does")
    if usual:
        has.append("memory is not at whole pages of the file: it can be read, but not mapped")


def _check_memory(loads: Sequence[object], wrong: list[str]) -> int:
    """Tell where PT_LOADs overlap; returns how many bytes of memory there are."""
    spans = [(h["p_vaddr"] - h["p_paddr"], h["p_paddr"], h["p_paddr"] + h["p_memsz"]) for h in loads]  # type: ignore[index]
    # kernel text overlaps the direct map's PT_LOADs on purpose; it comes first, and is mapped at another distance
    mapped: Counter[int] = Counter()
    for distance, start, end in spans:
        mapped[distance] += end - start
    direct = mapped.most_common(1)[0][0] if mapped else 0
    text = 0
    while text < len(spans) and spans[text][0] != direct:
        text += 1
    for part in (spans[:text], spans[text:]):
        for (_, _, end), (_, start, _) in pairwise(sorted(part, key=lambda span: span[1:])):
            if start < end:
                wrong.append(f"PT_LOADs overlap at {start:#x}")
    return RangeSet(span[1:] for span in spans).size


def _check_notes(segments: Sequence[object], wrong: list[str], has: list[str]) -> None:
    cpus, release = 0, None
    for segment in segments:
        if segment.header["p_type"] != "PT_NOTE":  # type: ignore[attr-defined]
            continue
        for note in segment.iter_notes():  # type: ignore[attr-defined]
            cpus += note["n_name"] == "CORE" and note["n_type"] in ("NT_PRSTATUS", 1)
            if note["n_name"] == "VMCOREINFO":
                text = note["n_descdata"]
                lines = (text if isinstance(text, bytes) else text.encode("latin-1")).split(b"\n")
                release = next((x[10:].decode("ascii", "replace") for x in lines if x.startswith(b"OSRELEASE=")), "")
    if release is None:
        wrong.append("no VMCOREINFO note: makedumpfile filters nothing and drgn does not take it for a kernel")
    if not cpus:
        wrong.append("no NT_PRSTATUS note: registers are unknown")
    has.append(f"{cpus} NT_PRSTATUS, VMCOREINFO of {release}" if release else f"{cpus} NT_PRSTATUS, no VMCOREINFO")
