# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU fw_cfg, as the qemu_fw_cfg module shows it: the boot memory map and where the crashed kernel's VMCOREINFO note
is.

etc/e820 is an array of little-endian {u64 address, u64 length, u32 type} without header (QEMU
hw/i386/e820_memory_layout.h). It survives kexec unchanged, so a capture kernel still sees the true boot map;
hot-plugged DIMMs and virtio-mem are not in it. etc/vmcoreinfo is {u16 host_format, u16 guest_format, u32 size, u64
paddr} (QEMU docs/specs/vmcoreinfo.rst), written by the module of a kernel that is not a kdump kernel (Linux
drivers/firmware/qemu_fw_cfg.c), hence by the crashed one."""

from __future__ import annotations

from struct import Struct

from . import e820, files, report
from .report import Finding, Problems, SourceReport

_FOLDER = "sys/firmware/qemu_fw_cfg"
_E820_ENTRY = Struct("<QQI")
_VMCOREINFO = Struct("<HHIQ")
_FORMAT_ELF = 1

# The module reads with byte-wise port I/O and starts over from byte 0 for each page, so time grows with the square of
# the size.
_MAX_RAW = 16384

_MAX_NOTE = 1 << 20


def read(root: str) -> SourceReport:
    """Findings: the boot map's ranges by type, and one of kind VMCOREINFO if the crashed kernel registered its note."""
    path = files.under(root, _FOLDER)
    problems = Problems()
    if not files.is_folder(root, _FOLDER):
        problems.absent(path, "not a QEMU guest, or module qemu_fw_cfg is not loaded")
        return SourceReport("fw_cfg", path, (), problems.lines(), available=False)
    findings: list[Finding] = []
    boot_map = _read_raw(root, "etc/e820", problems)
    if boot_map is not None:
        findings += parse_e820(boot_map, _raw(root, "etc/e820"), problems)
    note = _read_raw(root, "etc/vmcoreinfo", problems)
    if note is not None:
        findings += parse_vmcoreinfo(note, _raw(root, "etc/vmcoreinfo"), problems)
    available = boot_map is not None or note is not None
    return SourceReport("fw_cfg", path, tuple(findings), problems.lines(), available)


def parse_e820(data: bytes, path: str, problems: Problems) -> list[Finding]:
    """The entries of an etc/e820 blob, of all types; *path* names it in problems. They may overlap: what of it is RAM
    tells SourceReport.ram()."""
    findings: list[Finding] = []
    rest = len(data) % _E820_ENTRY.size
    if rest:
        problems.add(
            f"{path}: has {len(data)} bytes, expected a multiple of {_E820_ENTRY.size}; the last {rest} are ignored"
        )
    for offset in range(0, len(data) - rest, _E820_ENTRY.size):
        start, length, kind = _E820_ENTRY.unpack_from(data, offset)
        number = offset // _E820_ENTRY.size
        report.add_range(
            findings,
            problems,
            f"{path}: entry {number} at offset {offset}",
            start,
            start + length,
            e820.BY_NUMBER.get(kind, report.UNKNOWN),
            f"e820 entry {number}, type {kind}",
        )
    return findings


def parse_vmcoreinfo(data: bytes, path: str, problems: Problems) -> list[Finding]:
    """At most one finding: the note's bytes; *path* names the blob in problems."""
    findings: list[Finding] = []
    if len(data) != _VMCOREINFO.size:
        problems.add(f"{path}: has {len(data)} bytes, expected {_VMCOREINFO.size}; ignored")
        return findings
    _, guest_format, size, paddr = _VMCOREINFO.unpack(data)
    if guest_format == 0:
        problems.add(f"{path}: no kernel has registered a note (module qemu_fw_cfg was not loaded before the crash)")
    elif guest_format != _FORMAT_ELF:
        problems.add(f"{path}: guest_format at offset 2 is {guest_format}, expected {_FORMAT_ELF} (ELF note); ignored")
    elif not 0 < size <= _MAX_NOTE:
        problems.add(f"{path}: note size at offset 4 is {size}, expected 1 to {_MAX_NOTE}; ignored")
    elif paddr == 0:
        problems.add(f"{path}: note address at offset 8 is 0; ignored")
    else:
        where = f"{path}: note address at offset 8"
        report.add_range(findings, problems, where, paddr, paddr + size, report.VMCOREINFO, "registered by the guest")
    return findings


def _raw(root: str, name: str) -> str:
    return files.under(root, f"{_FOLDER}/by_name/{name}/raw")


def _read_raw(root: str, name: str, problems: Problems) -> bytes | None:
    """The blob called *name*, if its size attribute (absent from some recorded machines) does not forbid to read it."""
    folder = f"{_FOLDER}/by_name/{name}"
    if not files.is_folder(root, folder):
        problems.absent(files.under(root, folder))
        return None
    stated = None
    # raw itself states a size of 0 on a live system.
    text = files.read_line(root, f"{folder}/size", Problems())
    if text is not None:
        stated = files.decimal(text)
        if stated is None:
            problems.add(f"{files.under(root, folder)}/size: expected a number, found {report.shown(text)}; ignored")
        elif stated > _MAX_RAW:
            problems.add(f"{files.under(root, folder)}/size: is {stated}, expected at most {_MAX_RAW}; raw is not read")
            return None
    data = files.read_file(root, f"{folder}/raw", _MAX_RAW, problems)
    if data is not None and stated is not None and len(data) != stated:
        problems.add(f"{_raw(root, name)}: has {len(data)} bytes, expected {stated} (attribute size); used as it is")
    return data
