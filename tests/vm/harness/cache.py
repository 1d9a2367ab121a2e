# SPDX-License-Identifier: LGPL-2.1-or-later
"""A folder of pieces that are slow to get (packages unpacked, kernels built), each made once.

A piece is made beside its place and renamed into it, so that a folder with its final name is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .apt import Suite

ROOT = Path(__file__).resolve().parents[3]


class Cache:
    """The cache in *folder*, which may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def suite(self, name: str, arch: str = "amd64", base: str | None = None) -> Suite:
        """A Debian suite whose lists and packages last until the piece that they are for is there."""
        return Suite(name, self.folder / "apt" / f"{name}-{arch}", arch, base)

    def piece(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of piece *name*, filled by *make* if it is not there."""
        final = self.folder / name
        if final.is_dir():
            return final
        with self._lock():
            if not final.is_dir():
                partial = self.folder / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(final)
                shutil.rmtree(self.folder / "apt", ignore_errors=True)
        return final

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def chosen_folder() -> Path | None:
    """Where the user wants caches (``OLDMEM_CACHE``)."""
    folder = os.environ.get("OLDMEM_CACHE")
    return Path(folder).resolve() if folder else None
