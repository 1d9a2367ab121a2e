# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts an image together: what goes in is added part by part, what comes out is one cpio archive for the kernel.

The image has a merged /usr (/bin, /sbin, /lib, /lib64 are links); whatever path is given, files land in /usr. All
shared libraries of the host lie in one folder, the one its C library is in, which the loader searches without a
configuration."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from typing import NamedTuple

from capture import newc
from capture.boot_image import kernel_at
from guard.errors import Error
from initramfs.compress import compress, default_method
from initramfs.elfdeps import Searcher, read_elf
from initramfs.kmod import ModuleTree
from initramfs.pyclosure import PythonClosure

_HERE = os.path.dirname(os.path.abspath(__file__))
_MERGED = ("bin", "sbin", "lib", "lib64")
_FOLDERS = (
    "dev",
    "etc",
    "mnt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "usr/sbin",
)
MODULE_LIST = "modules.load"
"""In /lib/modules/RELEASE of the image: the modules to load, one path a line relative to that folder, in order."""

_COMMAND = """\
#!{python} -IS
import sys

from capture.cli import main

sys.exit(main())
"""


class _Item(NamedTuple):
    entry: newc.Entry
    source: str | None  # the host file it is a true copy of
    part: str


class PartSize(NamedTuple):
    """One line of the size table: *unpacked* and *packed* are bytes; *packed* is of this part alone."""

    part: str
    files: int
    unpacked: int
    packed: int


def _shown(message: str) -> str:
    return message.strip().splitlines()[-1] if message.strip() else "no message"


def image_path(path: str) -> str:
    """*path* as it stands in the archive: no leading slash, /bin, /sbin, /lib and /lib64 moved to /usr."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise Error(f"{path!r}: not a path for the image")
    if parts[0] in _MERGED and len(parts) > 1:
        parts.insert(0, "usr")
    return "/".join(parts)


class Builder:
    """One image. *cache* is a folder kept between builds for what is slow to make (compiled modules, stripped files).

    Every method that adds something raises Error, one line, when it cannot be added."""

    def __init__(self, cache: str | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="oldmem-initramfs.") if cache is None else None
        self._cache = self._scratch.name if self._scratch else os.path.abspath(str(cache))
        try:
            os.makedirs(self._cache, exist_ok=True)
        except OSError as error:
            raise Error(f"{cache}: {error.strerror}") from None
        self._items: dict[str, _Item] = {}
        self._applets: list[str] = []
        self._host = Searcher()
        self._sysroots: dict[str, Searcher] = {}
        self._loads: dict[str, list[str]] = {}
        self._libdir = "/usr/lib"
        self._loaders: set[str] = set()
        for folder in _FOLDERS:
            self.add_dir(folder, 0o1777 if folder == "tmp" else 0o755)
        for folder in _MERGED:
            self._put(newc.Entry(folder, stat.S_IFLNK | 0o777, f"usr/{folder}".encode()), None, "base")
        # The kernel opens /dev/console for init before anything can mount a devtmpfs.
        self.add_node("/dev/console", stat.S_IFCHR | 0o600, 5, 1)
        self.add_node("/dev/null", stat.S_IFCHR | 0o666, 1, 3)

    # What goes in, one by one. Paths of the image may have a leading slash or not.

    def add_bytes(self, path: str, data: bytes, mode: int = 0o644, part: str = "other") -> None:
        """A file with contents given."""
        self._put(newc.Entry(image_path(path), stat.S_IFREG | mode, data), None, part)

    def add_file(self, path: str, source: str, mode: int | None = None, part: str = "other") -> None:
        """A copy of the host file *source*; *mode* defaults to 755 for what is executable and 644 for the rest."""
        try:
            with open(source, "rb") as file:
                data = file.read()
                found = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise Error(f"{source}: {error.strerror}") from None
        mode = (0o755 if found & 0o111 else 0o644) if mode is None else mode
        self._put(newc.Entry(image_path(path), stat.S_IFREG | mode, data), os.path.realpath(source), part)

    def add(self, path: str, source: str) -> None:
        """The host file or folder *source* at *path*."""
        if os.path.isdir(source):
            self.add_tree(path, source)
        else:
            self.add_file(path, source)

    def add_tree(self, path: str, source: str, part: str = "other") -> None:
        """What is in the host folder *source*, under *path*: folders, files and symbolic links, in that form."""
        if not os.path.isdir(source):
            raise Error(f"{source}: not a folder")
        self.add_dir(path, part=part)
        for folder, subfolders, files in os.walk(source):
            for name in sorted(subfolders + files):
                inner = os.path.join(folder, name)
                place = os.path.normpath(f"{path}/{os.path.relpath(inner, source)}")
                if os.path.islink(inner):
                    self.add_symlink(place, os.readlink(inner), part)
                elif os.path.isdir(inner):
                    self.add_dir(place, part=part)
                elif os.path.isfile(inner):
                    self.add_file(place, inner, part=part)
                else:
                    raise Error(f"{inner}: neither file, folder nor symbolic link")

    def add_dir(self, path: str, mode: int = 0o755, part: str = "base") -> None:
        """A folder; those above it come by themselves."""
        self._put(newc.Entry(image_path(path), stat.S_IFDIR | mode), None, part)

    def add_symlink(self, path: str, target: str, part: str = "other") -> None:
        """A symbolic link at *path* with *target* as its text."""
        self._put(newc.Entry(image_path(path), stat.S_IFLNK | 0o777, os.fsencode(target)), None, part)

    def add_node(self, path: str, mode: int, major: int, minor: int) -> None:
        """A device node; *mode* has the type, S_IFCHR or S_IFBLK."""
        self._put(newc.Entry(image_path(path), mode, b"", (major, minor)), None, "base")

    # What goes in, by parts.

    def add_busybox(self, busybox: str = "busybox") -> None:
        """busybox with a link for each of its applets; a file added under an applet's name takes its place."""
        path = self._program(busybox)
        self.add_binary(path, name="busybox", part="busybox")
        try:
            run = subprocess.run([path, "--list"], capture_output=True, text=True, check=False)
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        applets = run.stdout.split()
        if run.returncode or "sh" not in applets or "insmod" not in applets:
            raise Error(f"{path}: not a busybox with the applets sh and insmod: {_shown(run.stderr)}")
        self._applets = [name for name in applets if name != "busybox"]

    def add_python(self, interpreter: str | None = None, path: list[str] | None = None) -> str:
        """The program with the interpreter it runs under (default: the one this runs under), the C core, and the
        command /usr/bin/oldmem. *path*: folders searched first for the program. Returns the interpreter's path in the
        image."""
        closure = PythonClosure(interpreter or sys.executable, path, self._cache)
        packed = closure.collect()
        # By these two the interpreter knows its prefix (Modules/getpath.py); where os is frozen in, the name is enough.
        self.add_dir(f"{closure.library}/lib-dynload", part="python")
        if f"{closure.library}/os.pyc" not in {file.path for file in packed.files}:
            self.add_bytes(f"{closure.library}/os.pyc", b"", part="python")
        self._add_elf(packed.path, packed.executable, "python")
        for file in packed.files:
            if file.is_elf:
                self._add_elf(file.path, file.source, "python")
            else:
                self.add_file(file.path, file.source, 0o644, "python")
        self.add_bytes("/usr/bin/oldmem", _COMMAND.format(python=packed.path).encode(), 0o755, "python")
        return packed.path

    def add_binary(
        self, source: str, *, sysroot: str | None = None, name: str | None = None, part: str = "collectors"
    ) -> str:
        """A program with its loader and libraries, as /usr/bin/NAME (default: its file name). Returns that path.

        With *sysroot*, a folder tree of another system (packages unpacked, say), *source* is a path inside it, such as
        /usr/sbin/kexec, or a host path into it. Program, loader and libraries then go under /opt/SYSROOT-NAME, and
        /usr/bin/NAME is a script that starts the one through the others, so that it runs beside the host's C
        library."""
        target = f"/usr/bin/{name or os.path.basename(source)}"
        if sysroot is None:
            path = self._program(source)
            self._add_elf(target, path, part)
            return target
        searcher = self._sysroots.setdefault(os.path.realpath(sysroot), Searcher(sysroot))
        inner = os.path.abspath(source)
        if inner.startswith((os.path.abspath(sysroot) + "/", searcher.root + "/")):
            inner = searcher.inside(inner)
        found = searcher.locate(inner)
        if found is None:
            raise Error(f"{source}: no such file in the sysroot {sysroot}")
        closure = searcher.closure(found)
        prefix = f"/opt/{os.path.basename(searcher.root)}"
        program = f"{prefix}/bin/{os.path.basename(inner)}"
        if closure.interp is None:
            self.add_file(target, found, 0o755, part)
            return target
        self.add_file(program, found, 0o755, part)
        loader = f"{prefix}/lib/{os.path.basename(closure.interp.name)}"
        self.add_file(loader, closure.interp.path, 0o755, part)
        for library in closure.libraries:
            self.add_file(f"{prefix}/lib/{library.name}", library.path, 0o755, part)
        script = f'#!/bin/sh\nexec {loader} --library-path {prefix}/lib {program} "$@"\n'
        self.add_bytes(target, script.encode(), 0o755, part)
        return target

    def add_modules(self, tree: str, names: list[str]) -> list[str]:
        """Kernel modules *names* with what they depend on, uncompressed, and their load list for /init. *tree* is a
        folder as /lib/modules/RELEASE, or a root with one in it. Returns the names in load order; built-in ones are not
        among them."""
        modules = ModuleTree(tree)
        order = modules.load_order(names)
        folder = f"/lib/modules/{modules.release}"
        loads = self._loads.setdefault(folder, [])
        for module in order:
            self.add_bytes(f"{folder}/{module.path}", module.data, 0o644, "modules")
            if module.path not in loads:
                loads.append(module.path)
        return [module.name for module in order]

    def add_init(self, script: str | None = None, run: str | None = None) -> None:
        """/init: the host file *script*, or the one that comes with the builder (init.sh), which ends by running the
        shell command *run* if there is one, and then a shell."""
        self.add_file("/init", script or os.path.join(_HERE, "init.sh"), 0o755, "base")
        if run is not None:
            self.add_bytes("/etc/oldmem-run", f"{run}\n".encode(), 0o644, "base")

    def add_stage2(self, kernel: str) -> None:
        """What ``oldmem init --via auto`` needs for stage 2, and the word that /init is to do that: the image *kernel*
        of the capture kernel, where it is looked for. The initramfs itself is packed again by whom it runs."""
        release = kernel_at(kernel).release
        self.add_file(f"/boot/vmlinuz-{release}", kernel, 0o644, "stage 2")
        self.add_bytes("/etc/oldmem-via", b"auto\n", 0o644, "stage 2")

    # What comes out.

    def archive(self) -> bytes:
        """The cpio archive, not compressed."""
        return newc.archive(item.entry for item in self._complete().values())

    def write(self, output: str, compression: str | None = None, level: int | None = None) -> int:
        """Writes the image to the file *output* and returns its size in bytes. *compression*: "zstd", "gzip" or "none"
        (default: zstd where the tool is at hand, else gzip); *level* defaults to the smallest output."""
        data = compress(self.archive(), compression or default_method(), level)
        try:
            with open(output, "wb") as file:
                file.write(data)
        except OSError as error:
            raise Error(f"{output}: {error.strerror}") from None
        return len(data)

    def stage(self, folder: str) -> list[tuple[str, str]]:
        """For other builders (dracut, initramfs-tools): (path in the image, host file) of every regular file. Those
        that exist nowhere on the host as they are get written under *folder*, an existing one."""
        listed: list[tuple[str, str]] = []
        for path, item in sorted(self._complete().items()):
            if not stat.S_ISREG(item.entry.mode):
                continue
            source = item.source
            if source is None or source.startswith(os.path.realpath(self._cache) + "/"):
                source = os.path.join(os.path.abspath(folder), path)
                try:
                    os.makedirs(os.path.dirname(source), exist_ok=True)
                    with open(source, "wb") as file:
                        file.write(item.entry.data)
                    os.chmod(source, stat.S_IMODE(item.entry.mode))
                except OSError as error:
                    raise Error(f"{source}: {error.strerror}") from None
            listed.append((f"/{path}", source))
        return listed

    def sizes(self, compression: str | None = None) -> list[PartSize]:
        """Size of each part by itself, the last line "total"; compressed as write() would."""
        method = compression or default_method()
        items = self._complete().values()
        names = [*dict.fromkeys(item.part for item in items), "total"]
        table: list[PartSize] = []
        for name in names:
            entries = [item.entry for item in items if name in (item.part, "total")]
            files = [entry for entry in entries if stat.S_ISREG(entry.mode)]
            unpacked = sum(len(entry.data) for entry in files)
            table.append(PartSize(name, len(files), unpacked, len(compress(newc.archive(entries), method))))
        return table

    def _complete(self) -> dict[str, _Item]:
        """All items, with applet links, load lists and missing parent folders."""
        items = dict(self._items)
        for applet in self._applets:
            path = f"usr/bin/{applet}"
            items.setdefault(path, _Item(newc.Entry(path, stat.S_IFLNK | 0o777, b"busybox"), None, "busybox"))
        for folder, loads in self._loads.items():
            path = image_path(f"{folder}/{MODULE_LIST}")
            text = "".join(f"{load}\n" for load in loads)
            items[path] = _Item(newc.Entry(path, stat.S_IFREG | 0o644, text.encode()), None, "modules")
        for path in list(items):
            parent = os.path.dirname(path)
            while parent and parent not in items:
                items[parent] = _Item(newc.Entry(parent, stat.S_IFDIR | 0o755), None, "base")
                parent = os.path.dirname(parent)
        for path in items:
            parent = os.path.dirname(path)
            if parent and not stat.S_ISDIR(items[parent].entry.mode):
                raise Error(f"/{path}: /{parent} is not a folder in the image")
        return items

    def _put(self, entry: newc.Entry, source: str | None, part: str) -> None:
        there = self._items.get(entry.path)
        if there is None:
            self._items[entry.path] = _Item(entry, source, part)
        elif there.entry != entry:
            raise Error(
                f"/{entry.path}: added twice with different contents{f' (again from {source})' if source else ''}"
            )

    def _program(self, name: str) -> str:
        found = name if "/" in name else shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if found is None or not os.path.exists(found):
            raise Error(f"{name}: no such program")
        return os.path.realpath(found)

    def _add_elf(self, path: str, source: str, part: str) -> None:
        """An ELF file of the host with its loader and libraries."""
        closure = self._host.closure(source)
        self.add_file(path, self._stripped(source), 0o755, part)
        if closure.interp is not None:
            self._loaders.add(os.path.basename(closure.interp.name))
            self.add_file(closure.interp.name, self._stripped(closure.interp.path), 0o755, part)
        for library in closure.libraries:
            if library.name.startswith("libc."):
                self._libdir = os.path.dirname(library.path)
        for library in closure.libraries:
            if library.name not in self._loaders:  # some name the loader as a library, which it then already is
                self.add_file(f"{self._libdir}/{library.name}", self._stripped(library.path), 0o755, part)

    def _stripped(self, source: str) -> str:
        """*source*, or a copy of it without its symbol table: privately built interpreters often have tens of MB of
        it."""
        tool = shutil.which("strip")
        if tool is None or ".symtab" not in read_elf(source).sections():
            return source
        with open(source, "rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
        output = os.path.join(self._cache, f"{key}.stripped")
        if not os.path.exists(output):
            made = f"{output}.{os.getpid()}"
            if subprocess.run([tool, "-o", made, source], capture_output=True, check=False).returncode:
                return source
            os.replace(made, output)
        return output
