# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verifying a vmcore with pyelftools, an ELF reader that shares nothing with our writer.

The rules are what collectors need: makedumpfile (elf_info.c), crash (netdump.c), drgn (libdrgn/program.c), and the
layout of fs/proc/vmcore.c."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from guard.errors import Error


def check(path: str) -> tuple[list[str], list[str]]:
    """What is wrong with the vmcore at *path*, and what it has, as lines. Raises Error if it is no ELF core at all
    or pyelftools is not there."""
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise Error("check needs pyelftools: pip install oldmem[check]") from None
    wrong: list[str] = []
    has: list[str] = []
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            elf = ELFFile(stream)
            if elf["e_type"] != "ET_CORE":
                raise Error(f"{path}: offset 0x10: e_type is {elf['e_type']}, expected ET_CORE")
            segments = list(elf.iter_segments())
            _check_segments(segments, size, wrong, has)
            _check_notes(segments, wrong, has)
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None
    except Error:
        raise
    except Exception as e:  # pyelftools checks little of what it reads: damage comes as an error of any kind
        raise Error(f"{path}: {' '.join(str(e).split()) or 'ends within the ELF header'}") from None
    return wrong, has


def _check_segments(segments: Sequence[object], size: int, wrong: list[str], has: list[str]) -> None:
    headers = [s.header for s in segments]  # type: ignore[attr-defined]
    notes = [h for h in headers if h["p_type"] == "PT_NOTE"]
    loads = [h for h in headers if h["p_type"] == "PT_LOAD"]
    if len(notes) != 1 or headers[0]["p_type"] != "PT_NOTE":
        wrong.append(f"{len(notes)} PT_NOTE, expected one, as program header 0 (crash reads no other)")
    if not loads:
        wrong.append("no PT_LOAD: the file has no memory")
    for i, h in enumerate(headers):
        end = h["p_offset"] + h["p_filesz"]
        if end > size:
            wrong.append(f"program header {i}: data ends at {end:#x}, the file at {size:#x}")
        if h["p_type"] == "PT_LOAD" and (h["p_offset"] - h["p_paddr"]) % 4096:
            wrong.append(
                f"program header {i}: p_offset {h['p_offset']:#x} and p_paddr {h['p_paddr']:#x} differ in page"
            )
        if h["p_type"] == "PT_LOAD" and h["p_offset"] == 0:
            wrong.append(f"program header {i}: p_offset 0 means 'not in the file' to makedumpfile and crash")
    stored = sorted((h["p_offset"], h["p_offset"] + h["p_filesz"], i) for i, h in enumerate(headers) if h["p_filesz"])
    for (_, end, i), (start, _, j) in pairwise(stored):
        if start < end:
            wrong.append(f"program headers {min(i, j)} and {max(i, j)} share the file from {start:#x} on")
    # kernel text overlaps the direct map's PT_LOAD on purpose; it comes first and is mapped at another distance
    distances = [h["p_vaddr"] - h["p_paddr"] for h in loads]
    memory = loads[1:] if loads and distances[0] != distances[-1] else loads
    ram = sorted((h["p_paddr"], h["p_paddr"] + h["p_memsz"]) for h in memory)
    for (_, end), (start, _) in pairwise(ram):
        if start < end:
            wrong.append(f"PT_LOADs overlap at {start:#x}")
    has.append(f"{len(loads)} PT_LOAD, {sum(end - start for start, end in ram) >> 20} MiB of RAM")


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
