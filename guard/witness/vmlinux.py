# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ELF file of the dead kernel, as its build or its debug package has it: symbols, banner, build ID, types.

It is what a user gives where the dead kernel's VMCOREINFO note is missing or cut. pyelftools reads sections and DWARF,
so this is for an analyst's machine and never part of a capture initramfs; types come from .BTF where there is one,
which is a hundred times faster."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Protocol

from guard.errors import Error, WitnessError
from guard.witness import btf
from guard.witness.btf import Layout
from guard.witness.kaslr import Landmarks
from guard.witness.pagewalk import START_KERNEL_MAP

_SYMBOL = struct.Struct("<IBBHQQ")
_SHF_ALLOC = 2
_MAX_BANNER = 512
_NEEDED = ("_stext", "init_top_pgt", "linux_banner")
_MAX_SECTION = 1 << 28


class Types(Protocol):
    """What BTF and DWARF both tell of the types that they were opened for. Raises WitnessError if damaged."""

    def layout(self, name: str, members: Iterable[str]) -> Layout | None:
        """Of the struct, union or typedef *name*; None if there is none."""

    def enum(self, name: str) -> dict[str, int] | None:
        """The enumerators of enum *name*; None if there is none."""


class Vmlinux:
    """The vmlinux at *path*. Raises Error, one line with *path* and what was expected, if it cannot be used.

    *symbols* are addresses as linked of those of *names* that it has, with their sizes (0: not known); *types* is None
    where it has neither BTF nor DWARF."""

    def __init__(self, path: str, names: frozenset[str], types: Iterable[str]) -> None:
        try:
            from elftools.elf.elffile import ELFFile
        except ImportError:
            raise Error("--vmlinux needs pyelftools: pip install oldmem[check]") from None
        self.path = path
        try:
            with open(path, "rb") as stream:
                magic = stream.read(4)
                if magic != b"\x7fELF":
                    raise Error(
                        f"{path}: begins with {magic!r}, expected the ELF file vmlinux (not bzImage or vmlinuz; "
                        "scripts/extract-vmlinux leaves no symbols)"
                    )
                self._read(ELFFile(stream), names, sorted(set(types)))
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        except WitnessError as error:
            raise Error(f"{path}: is cut or damaged: {error}; expected a whole vmlinux") from None
        except Error:
            raise
        except Exception as error:  # pyelftools checks little of what it reads: damage comes as an error of any kind
            what = " ".join(str(error).split()) or type(error).__name__
            raise Error(f"{path}: is cut or damaged: {what}; expected a whole vmlinux") from None

    def _read(self, elf: Any, names: frozenset[str], types: list[str]) -> None:
        path = self.path
        if elf.elfclass != 64 or not elf.little_endian or elf["e_machine"] != "EM_X86_64":
            raise Error(f"{path}: ELF{elf.elfclass} file for {elf['e_machine']}, expected ELF64 for EM_X86_64")
        table = elf.get_section_by_name(".symtab")
        strings = elf.get_section_by_name(".strtab")
        if table is None or strings is None:
            raise Error(f"{path}: has no symbol table, expected a vmlinux that is not stripped")
        self.symbols = _symbols(_data(table), _data(strings), names | {*_NEEDED, "panic_cpu", "sme_me_mask"})
        lacking = [name for name in _NEEDED if self.symbols.get(name, (0, 0))[0] < START_KERNEL_MAP]
        if lacking:
            raise Error(f"{path}: no symbol {' or '.join(lacking)}, expected the vmlinux of an x86_64 kernel")
        self.banner = self._loaded(elf, self.address("linux_banner"))
        words = self.banner.split(b" ", 3)
        if words[:2] != [b"Linux", b"version"] or len(words) < 4:
            raise Error(f"{path}: linux_banner is {self.banner[:40]!r}, expected one that begins with Linux version")
        self.release = words[2].decode("ascii", "backslashreplace")
        self.build_id = _build_id(elf)
        self.types: Types | None = None
        if section := elf.get_section_by_name(".BTF"):
            data = _data(section)
            self.types = btf.Btf(btf.of_bytes(data), len(data), types)
        elif elf.get_section_by_name(".debug_info"):
            from guard.witness.dwarf import Dwarf

            self.types = Dwarf(elf, types)

    def _loaded(self, elf: Any, vaddr: int) -> bytes:
        """The string at *vaddr*, as the file would have it loaded."""
        for section in elf.iter_sections("SHT_PROGBITS"):
            at = vaddr - section["sh_addr"]
            if section["sh_flags"] & _SHF_ALLOC and 0 <= at < section["sh_size"]:
                elf.stream.seek(section["sh_offset"] + at)
                text: bytes = elf.stream.read(min(_MAX_BANNER, section["sh_size"] - at))
                return text.partition(b"\0")[0]
        raise Error(f"{self.path}: no section has {vaddr:#x}, where linux_banner should be; expected a whole vmlinux")

    def address(self, name: str) -> int:
        """The address that the symbol *name* was linked for. Raises KeyError if there is none."""
        return self.symbols[name][0]

    @property
    def landmarks(self) -> Landmarks:
        addresses = {name: address for name, (address, _) in self.symbols.items()}
        return Landmarks(
            self.banner,
            addresses["linux_banner"],
            addresses["init_top_pgt"],
            addresses.get("panic_cpu"),
            addresses.get("sme_me_mask"),
        )


def _data(section: Any) -> bytes:
    if section["sh_size"] > _MAX_SECTION:
        raise WitnessError(f"section {section.name} has {section['sh_size']} bytes")
    data: bytes = section.data()
    if len(data) != section.data_size:
        raise WitnessError(f"section {section.name} has {len(data)} of {section.data_size} bytes")
    return data


def _symbols(table: bytes, strings: bytes, names: frozenset[str]) -> dict[str, tuple[int, int]]:
    """Address and size of those of *names* that are defined. Of several the first global one counts, else the first."""
    wanted = {name.encode(): name for name in names}
    lengths = frozenset(map(len, wanted))
    found: dict[str, tuple[int, int]] = {}
    is_global: dict[str, bool] = {}
    for at, info, _other, section, value, size in _SYMBOL.iter_unpack(table[: len(table) // 24 * 24]):
        if not section:
            continue
        end = strings.find(b"\0", at)
        if end - at not in lengths:
            continue
        name = wanted.get(strings[at:end])
        if name is not None and (name not in found or (info >> 4 and not is_global[name])):
            found[name], is_global[name] = (value, size), bool(info >> 4)
    return found


def _build_id(elf: Any) -> str | None:
    for section in elf.iter_sections("SHT_NOTE"):
        data, at = _data(section), 0
        while at + 12 <= len(data):
            namesz, descsz, kind = struct.unpack_from("<III", data, at)
            start = at + 12 + (namesz + 3 & ~3)
            if (kind, data[at + 12 : at + 16]) == (3, b"GNU\0"):
                return data[start : start + descsz].hex()
            at = start + (descsz + 3 & ~3)
    return None
