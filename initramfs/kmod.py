# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel modules by name with what they depend on, from a tree as /lib/modules/RELEASE, in the order to load them.

Dependencies are read from each module's own .modinfo section (include/linux/module.h: MODULE_INFO; modpost writes
"depends", MODULE_SOFTDEP "softdep"), so a tree unpacked from a package, where depmod never ran, will do."""

from __future__ import annotations

import glob
import os
import re
from typing import NamedTuple

from guard.errors import Error
from initramfs.compress import decompress
from initramfs.elfdeps import Elf

_FILE = re.compile(r"(?P<name>.+)\.ko(\.(xz|gz|zst))?")


class Module(NamedTuple):
    """A module: its *name* with underscores, *path* in the tree without a compression suffix, contents uncompressed."""

    name: str
    path: str
    data: bytes


def _normal(name: str) -> str:
    return name.removesuffix(".ko").replace("-", "_")


class ModuleTree:
    """The modules of one kernel: *path* is a folder as /lib/modules/RELEASE, or a root with exactly one of these in
    it."""

    def __init__(self, path: str) -> None:
        self.path = _tree(path)
        self.release = os.path.basename(self.path)
        self._files: dict[str, str] = {}
        for folder, subfolders, files in os.walk(self.path):
            subfolders.sort()
            for file in sorted(files):
                match = _FILE.fullmatch(file)
                if match:
                    name = _normal(match["name"])
                    # depmod's order where no depmod.d says otherwise: updates/ before all else.
                    if name not in self._files or os.path.relpath(folder, self.path).split("/")[0] == "updates":
                        self._files[name] = os.path.join(folder, file)
        if not self._files:
            raise Error(f"{path}: no kernel modules (*.ko, *.ko.xz, *.ko.gz, *.ko.zst) in it")
        self._builtin = self._read_builtin()

    def _read_builtin(self) -> set[str]:
        try:
            with open(os.path.join(self.path, "modules.builtin"), encoding="utf-8") as file:
                return {_normal(os.path.basename(line.strip())) for line in file}
        except OSError:
            return set()

    def load_order(self, names: list[str]) -> list[Module]:
        """*names* and all they depend on, each after its dependencies; what is built into the kernel is left out.

        Raises Error naming the module that is neither in the tree nor built in."""
        order: list[Module] = []
        seen: set[str] = set()
        for name in names:
            self._visit(_normal(name), None, order, seen)
        return order

    def _visit(self, name: str, wanted_by: str | None, order: list[Module], seen: set[str]) -> None:
        if name in seen or name in self._builtin:
            return
        seen.add(name)
        file = self._files.get(name)
        if file is None:
            reason = f", which {wanted_by} depends on," if wanted_by else ""
            raise Error(f"module {name}{reason} is neither in {self.path} nor built into that kernel")
        try:
            with open(file, "rb") as stream:
                data = decompress(stream.read(), file)
        except OSError as error:
            raise Error(f"{file}: {error.strerror}") from None
        hard, soft = _dependencies(data, file)
        for other in hard:
            self._visit(other, name, order, seen)
        for other in soft:
            # A soft dependency may name an alias, or something this kernel was built without: it is a wish.
            if other in self._files:
                self._visit(other, name, order, seen)
        match = _FILE.fullmatch(file)
        assert match is not None
        order.append(Module(name, os.path.relpath(match["name"] + ".ko", self.path), data))


def _tree(path: str) -> str:
    real = os.path.realpath(path)
    if not os.path.isdir(real):
        raise Error(f"{path}: not a folder")
    if os.path.isdir(os.path.join(real, "kernel")) or os.path.exists(os.path.join(real, "modules.order")):
        return real
    root = glob.escape(real)
    inner = {os.path.realpath(tree) for part in ("lib", "usr/lib") for tree in glob.glob(f"{root}/{part}/modules/*/")}
    if len(inner) > 1:
        raise Error(
            f"{path}: modules of several kernels in it ({', '.join(sorted(map(os.path.basename, inner)))}): name one"
        )
    return inner.pop() if inner else real


def _dependencies(data: bytes, file: str) -> tuple[list[str], list[str]]:
    modinfo = Elf(data, file).sections().get(".modinfo")
    if modinfo is None:
        raise Error(f"{file}: not a kernel module: no .modinfo section")
    hard: list[str] = []
    soft: list[str] = []
    for item in modinfo.decode("utf-8", "replace").split("\0"):
        key, _, value = item.partition("=")
        if key == "depends":
            hard += [_normal(name) for name in value.split(",") if name]
        elif key == "softdep":
            words = value.split()
            if "pre:" in words:
                after = words[words.index("pre:") + 1 :]
                soft += [_normal(word) for word in (after[: after.index("post:")] if "post:" in after else after)]
    return hard, soft
