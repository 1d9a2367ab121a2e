# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which shared libraries an ELF file needs, found as ld.so(8) finds them, on this system or inside a sysroot.

Layouts: elf(5); search order and DT_RPATH/DT_RUNPATH rules: ld.so(8). Nothing is executed, so files of another release
or another architecture are as good as the host's own."""

from __future__ import annotations

import glob
import os
import struct
from typing import NamedTuple

from guard.errors import Error

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 0, 1, 5, 15, 29
MAX_LINKS = 40


class Elf:
    """The parts of an ELF file that decide what it needs. *path* is only for messages. Raises Error on anything
    else."""

    __slots__ = ("_data", "_order", "interp", "is64", "machine", "needed", "path", "rpath", "runpath")

    def __init__(self, data: bytes, path: str) -> None:
        if data[:4] != b"\x7fELF" or len(data) < 52 or data[4] not in (1, 2) or data[5] not in (1, 2):
            raise Error(f"{path}: not an ELF file")
        self.path = path
        self._data = data
        self.is64 = data[4] == 2
        self._order = "<" if data[5] == 1 else ">"
        self.interp: str | None = None
        self.needed: list[str] = []
        self.rpath: list[str] = []
        self.runpath: list[str] = []
        try:
            (self.machine,) = self._unpack("H", 18)
            self._read_program_headers()
        except (struct.error, IndexError, ValueError):
            raise Error(f"{path}: damaged ELF file: a header points outside the file") from None

    @property
    def abi(self) -> tuple[int, bool, str]:
        """What must be equal between a program and its libraries: machine, word size, byte order."""
        return (self.machine, self.is64, self._order)

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        if offset > len(self._data):
            raise IndexError
        return struct.unpack_from(self._order + layout, self._data, offset)

    def _string(self, offset: int) -> str:
        end = self._data.index(b"\0", offset) if offset < len(self._data) else -1
        if end < 0:
            raise IndexError
        return self._data[offset:end].decode()

    def _read_program_headers(self) -> None:
        (phoff,) = self._unpack("Q", 32) if self.is64 else self._unpack("I", 28)
        phentsize, phnum = self._unpack("HH", 54 if self.is64 else 42)
        loads: list[tuple[int, int, int]] = []
        dynamic: tuple[int, int] | None = None
        for number in range(phnum):
            at = phoff + number * phentsize
            if self.is64:
                kind, _, offset, vaddr, _, filesz = self._unpack("IIQQQQ", at)
            else:
                kind, offset, vaddr, _, filesz = self._unpack("IIIII", at)
            if kind == PT_LOAD:
                loads.append((vaddr, filesz, offset))
            elif kind == PT_DYNAMIC:
                dynamic = (offset, filesz)
            elif kind == PT_INTERP:
                self.interp = self._string(offset)
        if dynamic is not None:
            self._read_dynamic(*dynamic, loads)

    def _read_dynamic(self, offset: int, size: int, loads: list[tuple[int, int, int]]) -> None:
        layout, step = ("qQ", 16) if self.is64 else ("iI", 8)
        entries: list[tuple[int, int]] = []
        for at in range(offset, offset + size, step):
            tag, value = self._unpack(layout, at)
            if tag == DT_NULL:
                break
            entries.append((tag, value))
        tables = [value for tag, value in entries if tag == DT_STRTAB]
        if not tables:
            return
        strings = next((off + tables[0] - va for va, filesz, off in loads if va <= tables[0] < va + filesz), None)
        if strings is None:
            raise IndexError
        for tag, value in entries:
            if tag == DT_NEEDED:
                self.needed.append(self._string(strings + value))
            elif tag in (DT_RPATH, DT_RUNPATH):
                folders = [folder for folder in self._string(strings + value).split(":") if folder]
                if tag == DT_RPATH:
                    self.rpath = folders
                else:
                    self.runpath = folders

    def sections(self) -> dict[str, bytes]:
        """Contents of the sections by name; of several with one name, the last. Raises Error when the table is
        damaged."""
        try:
            (shoff,) = self._unpack("Q", 40) if self.is64 else self._unpack("I", 32)
            shentsize, shnum, shstrndx = self._unpack("HHH", 58 if self.is64 else 46)
            if not shoff or not shnum:
                return {}
            places: list[tuple[int, int, int, int]] = []
            for number in range(shnum):
                at = shoff + number * shentsize
                name, kind = self._unpack("II", at)
                start, size = self._unpack("QQ", at + 24) if self.is64 else self._unpack("II", at + 16)
                places.append((name, kind, start, size))
            names = places[shstrndx][2]
            nobits = 8
            return {
                self._string(names + name): b"" if kind == nobits else self._data[start : start + size]
                for name, kind, start, size in places
            }
        except (struct.error, IndexError, ValueError):
            raise Error(f"{self.path}: damaged ELF file: its section table points outside the file") from None


class Library(NamedTuple):
    """A library as it is asked for (*name*) and the file that answers it (*path*, on the host, symbolic links
    resolved)."""

    name: str
    path: str


class Closure(NamedTuple):
    """What a program needs: its loader (path as PT_INTERP has it, None for a static program) and its libraries."""

    interp: Library | None
    libraries: list[Library]


def read_elf(path: str) -> Elf:
    """The ELF file at *path*. Raises Error when it cannot be read or is not one."""
    try:
        with open(path, "rb") as file:
            return Elf(file.read(), path)
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from None


class Searcher:
    """Finds libraries under *root* ("/" or a sysroot: a folder tree of another system, whose absolute links stay
    inside)."""

    def __init__(self, root: str = "/") -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise Error(f"{root}: not a folder")
        self._folders: list[str] | None = None

    def locate(self, path: str) -> str | None:
        """The host path of the file that *path* (absolute, as seen inside the root) leads to; None if there is none."""
        # A tree unpacked from packages without base-files lacks the merged-/usr links lib -> usr/lib and the like.
        for candidate in (path, f"/usr{path}"):
            found = self._follow(candidate)
            if found is not None and os.path.isfile(found):
                return found
        return None

    def _follow(self, path: str) -> str | None:
        pending = [part for part in path.split("/") if part][::-1]
        done: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            if part == ".":
                continue
            if part == "..":
                done = done[:-1]
                continue
            here = os.path.join(self.root, *done, part)
            if os.path.islink(here):
                links += 1
                if links > MAX_LINKS:
                    return None
                target = os.readlink(here)
                if target.startswith("/"):
                    done = []
                pending.extend([piece for piece in target.split("/") if piece][::-1])
            else:
                done.append(part)
        return os.path.join(self.root, *done)

    def inside(self, path: str) -> str:
        """*path* of the host as seen inside the root; raises Error when it lies outside."""
        real = os.path.realpath(path)
        if self.root == "/":
            return real
        if not real.startswith(self.root + "/"):
            raise Error(f"{path}: not inside the sysroot {self.root}")
        return real[len(self.root) :]

    def folders(self) -> list[str]:
        """The folders that ld.so searches after the file's own paths: /etc/ld.so.conf, then the built-in ones."""
        if self._folders is None:
            found = self._conf("/etc/ld.so.conf", set())
            for pattern in ("lib/*-linux-*", "usr/lib/*-linux-*"):
                for folder in sorted(glob.glob(os.path.join(glob.escape(self.root), pattern))):
                    found.append("/" + os.path.relpath(folder, self.root))
            found += ["/lib64", "/usr/lib64", "/lib", "/usr/lib"]
            self._folders = list(dict.fromkeys(found))
        return self._folders

    def _conf(self, path: str, seen: set[str]) -> list[str]:
        real = self.locate(path)
        if real is None or real in seen:
            return []
        seen.add(real)
        found: list[str] = []
        with open(real, encoding="utf-8", errors="replace") as file:
            lines = [line.split("#")[0].split() for line in file]
        for words in lines:
            if words[:1] == ["include"]:
                for pattern in words[1:]:
                    absolute = os.path.join(os.path.dirname(path), pattern)
                    matches = glob.glob(glob.escape(self.root.rstrip("/")) + absolute)
                    for match in sorted(matches):
                        found += self._conf("/" + os.path.relpath(match, self.root), seen)
            elif words and words[0].startswith("/"):
                found.append(words[0].rstrip("/"))
        return found

    def closure(self, path: str) -> Closure:
        """Loader and libraries of the ELF file at *path* (a host path), breadth first as ld.so loads them.

        Raises Error naming the library and who needs it when one is not found."""
        top = read_elf(path)
        interp: Library | None = None
        if top.interp is not None:
            found = self.locate(top.interp)
            if found is None:
                raise Error(f"{path}: its loader {top.interp} is not under {self.root}")
            interp = Library(top.interp, found)
        libraries: dict[str, str] = {}
        # The third item: DT_RPATH folders of the files that led here; unlike those of DT_RUNPATH they are inherited.
        queue: list[tuple[Elf, str, list[str]]] = [(top, self.inside(path), [])]
        for elf, place, inherited in queue:
            own = _expand(elf.rpath, place)
            # A file with DT_RUNPATH ignores every DT_RPATH, its own and its loaders'.
            search = _expand(elf.runpath, place) if elf.runpath else own + inherited
            for name in elf.needed:
                if name in libraries or (interp is not None and name == os.path.basename(interp.name)):
                    continue
                library = self._find(name, search, top)
                if library is None:
                    raise Error(f"{elf.path}: needs {name}, which is not found under {self.root}")
                libraries[name] = library.path
                queue.append((library, self.inside(library.path), own + inherited))
        return Closure(interp, [Library(os.path.basename(name), path) for name, path in libraries.items()])

    def _find(self, name: str, search: list[str], top: Elf) -> Elf | None:
        candidates = [name] if "/" in name else [f"{folder}/{name}" for folder in [*search, *self.folders()]]
        for candidate in candidates:
            found = self.locate(candidate)
            if found is None:
                continue
            try:
                elf = read_elf(found)
            except Error:
                continue  # as ld.so does: a linker script or a foreign file of that name is passed over
            if elf.abi == top.abi:
                return elf
        return None


def _expand(folders: list[str], place: str) -> list[str]:
    origin = os.path.dirname(place)
    expanded = (folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for folder in folders)
    return [os.path.normpath(folder) for folder in expanded]
