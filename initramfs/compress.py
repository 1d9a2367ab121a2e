# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression of the archive and decompression of kernel modules, in ways that give the same bytes every time.

zstd is the tool of that name (the standard library has it from Python 3.14 only); gzip and xz are the standard
library's."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess

from guard.errors import Error

METHODS = ("zstd", "gzip", "none")
DEFAULT_LEVEL = {"zstd": 19, "gzip": 9, "none": 0}


def default_method() -> str:
    """The best method at hand: zstd where its tool is installed, else gzip."""
    return "zstd" if shutil.which("zstd") else "gzip"


def _zstd(arguments: list[str], data: bytes, what: str) -> bytes:
    try:
        run = subprocess.run(["zstd", "-q", "-c", *arguments], input=data, capture_output=True, check=False)
    except OSError as error:
        raise Error(f"{what}: the zstd tool is needed and does not run: {error.strerror}") from None
    if run.returncode:
        message = run.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise Error(f"{what}: zstd: {message[-1]}")
    return run.stdout


def compress(data: bytes, method: str, level: int | None = None) -> bytes:
    """*data* compressed by *method* ("zstd", "gzip", "none") at *level* (default: the smallest usual output)."""
    if method not in METHODS:
        raise Error(f"compression {method!r}: not one of {', '.join(METHODS)}")
    level = DEFAULT_LEVEL[method] if level is None else level
    if method == "zstd":
        # One thread: with several, the block borders and so the bytes depend on the number of CPUs.
        return _zstd([f"-{level}", "-T1"], data, "compressing")
    if method == "gzip":
        return gzip.compress(data, level, mtime=0)
    return data


def decompress(data: bytes, name: str) -> bytes:
    """What is in *data*, whose compression the suffix of *name* tells (.xz, .gz, .zst, or none of them)."""
    try:
        if name.endswith(".xz"):
            return lzma.decompress(data)
        if name.endswith(".gz"):
            return gzip.decompress(data)
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise Error(f"{name}: damaged: {error}") from None
    if name.endswith(".zst"):
        return _zstd(["-d"], data, name)
    return data
