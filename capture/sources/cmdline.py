# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/cmdline: where the prepared vmcore header is (elfcorehdr=), and whether /dev/mem is relaxed (iomem=relaxed).

Parsed as the kernel does: words and quotes as lib/cmdline.c:next_arg, numbers as memparse, elfcorehdr= as
kernel/elfcorehdr.c:setup_elfcorehdr, iomem= as kernel/resource.c:strict_iomem; the last one wins, and nothing counts
behind a lone "--". s390x ignores elfcorehdr=, and a device tree may set the header's address without it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

from . import files, report
from .report import Finding, Problems, SourceReport

_PATH = "proc/cmdline"
_MAX_SIZE = 65536
_U64 = (1 << 64) - 1
_SUFFIXES = "kmgtpe"
NO_HEADER = _U64
"""ELFCORE_ADDR_MAX of the kernel: with this address it does not take itself for a kdump kernel."""
STAGE = "oldmem.stage"
"""Our own parameter; the kernel leaves what has a dot in its name to modules, and init does not see it."""


class Elfcorehdr(NamedTuple):
    """Physical address of the prepared header, and its size in bytes or None if the parameter does not tell."""

    addr: int
    size: int | None


class CommandLine(NamedTuple):
    """The parameters that matter to a reader of old memory; *stage* is ours (capture/stage2.py)."""

    elfcorehdr: Elfcorehdr | None
    iomem_relaxed: bool
    stage: str | None = None


def read(root: str) -> SourceReport:
    """Findings: one ELFCOREHDR range, empty if the parameter gives no size, if there is a header."""
    problems = Problems()
    path = files.under(root, _PATH)
    line = read_command_line(root, problems)
    findings: list[Finding] = []
    header = line.elfcorehdr if line is not None else None
    if header is not None and header.addr != NO_HEADER:
        end = min(header.addr + (header.size or 0), _U64)
        findings.append(Finding(header.addr, end, report.ELFCOREHDR, "elfcorehdr= parameter"))
    return SourceReport("cmdline", path, tuple(findings), problems.lines(), line is not None)


def read_command_line(root: str, problems: Problems) -> CommandLine | None:
    """The running (or recorded) kernel's command line, None (and a problem) if it cannot be read."""
    data = files.read_file(root, _PATH, _MAX_SIZE, problems)
    return None if data is None else parse(data, files.under(root, _PATH), problems)


def parse(data: bytes, path: str, problems: Problems) -> CommandLine:
    """The command line in *data*; *path* names it in problems."""
    elfcorehdr: Elfcorehdr | None = None
    relaxed = False
    stage: str | None = None
    for token in map(_unquoted, _words(data.decode("ascii", "backslashreplace"))):
        if token == "--":
            break
        name, _, value = token.partition("=")
        if name == "elfcorehdr" and "=" in token:
            elfcorehdr = _elfcorehdr(value, f"{path}: {report.shown(token)}", problems)
        elif name == "iomem":
            if "relaxed" in value:
                relaxed = True
            if "strict" in value:
                relaxed = False
        elif name == STAGE:
            stage = value
    return CommandLine(elfcorehdr, relaxed, stage)


def stage_of(line: str) -> str | None:
    """The value of STAGE on the command line *line*."""
    return parse(line.encode("utf-8", "surrogateescape"), "", Problems()).stage


def rewritten(line: str, dropped: Container[str], parameters: Sequence[str]) -> str:
    """The command line *line* without the parameters of the names *dropped*, with *parameters* before a lone "--"; all
    else as it is written."""
    kept, behind = [], []
    words = _words(line)
    for i, word in enumerate(words):
        if _unquoted(word) == "--":
            behind = words[i:]
            break
        if _unquoted(word).partition("=")[0] not in dropped:
            kept.append(word)
    return " ".join([*kept, *parameters, *behind])


def _words(text: str) -> list[str]:
    """The words of *text* as they are written; blanks between double quotes do not separate."""
    words: list[str] = []
    word: list[str] = []
    quoted = False
    for char in text:
        if char == '"':
            quoted = not quoted
        if char in " \t\n\v\f\r" and not quoted:
            if word:
                words.append("".join(word))
                word.clear()
        else:
            word.append(char)
    if word:
        words.append("".join(word))
    return words


def _unquoted(word: str) -> str:
    return word.replace('"', "")


def _elfcorehdr(value: str, where: str, problems: Problems) -> Elfcorehdr:
    addr, rest = _memparse(value)
    size: int | None = None
    if rest.startswith("@"):
        size = addr
        addr, rest = _memparse(rest[1:])
    if rest or not value:
        problems.add(f"{where}: expected [size[KMG]@]offset[KMG]; taken as address {addr:#x}, as the kernel does")
    return Elfcorehdr(addr, size)


def _memparse(text: str) -> tuple[int, str]:
    """The number at the head of *text* (decimal, 0 octal, 0x hexadecimal; one binary suffix; 64 bits, wrapping) and
    the rest. No number at all is 0."""
    base, digits, at = 10, "0123456789", 0
    if text[:2].lower() == "0x" and text[2:3] and text[2] in "0123456789abcdefABCDEF":
        base, digits, at = 16, "0123456789abcdefABCDEF", 2
    elif text[:1] == "0":
        base, digits = 8, "01234567"
    value = 0
    while at < len(text) and text[at] in digits:
        value = (value * base + int(text[at], 16)) & _U64
        at += 1
    suffix = text[at : at + 1].lower()
    if suffix and suffix in _SUFFIXES:
        value = (value << 10 * (_SUFFIXES.index(suffix) + 1)) & _U64
        at += 1
    return value, text[at:]
