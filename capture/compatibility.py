# SPDX-License-Identifier: LGPL-2.1-or-later
"""Old collectors on new kernels: lines that the served VMCOREINFO has beside the kernel's own, and what a makedumpfile
does wrong that no line can help.

Only what was renamed is added: the same value under the name that it had before, where the old name is absent. Of all
keys that kernels since 6.1 have lost, that is page.compound_head alone (7.1, commit d50569612c29; bit 0 of the word
still marks a tail page, and makedumpfile looks at nothing else of it: makedumpfile commit f50c015 reads the new key
into the same variable). page.compound_dtor and page.compound_order (6.3) count from another structure now, PG_slab and
PG_hugetlb (6.10, 6.9) have become page types, vmap_area_list and kallsyms_relative_base (6.9, 7.0) are gone for good.
Older renames (page._count, init_level4_pgt) concern nobody who can read a kernel of today. crash takes the layout from
the vmlinux, drgn and libkdumpfile do not read these keys."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from guard.witness.vmcoreinfo import NOTE_NAME, Vmcoreinfo, note_of

_MAX_SCRIPT = 1 << 16
MOST_PROGRAM = 64 << 20
"""Bytes of a program beyond which it is not searched; makedumpfile has half a megabyte."""


class Rename(NamedTuple):
    """*key* is what kernels write *since* that release, *old* what they wrote before, for *whom* it is needed, and what
    it costs them not to have it."""

    key: str
    since: str
    old: str
    whom: str
    otherwise: str


RENAMES = (
    Rename(
        "OFFSET(page.compound_info)",
        "7.1",
        "OFFSET(page.compound_head)",
        "makedumpfile up to 1.7.9",
        "leaves out tail pages that are wanted",
    ),
)


class Added(NamedTuple):
    """A line that was added, and for whom."""

    line: str
    whom: str


def missing(info: Vmcoreinfo) -> list[Added]:
    """The lines that older collectors look for, and *info* has under a new name."""
    return [
        Added(f"{r.old}={info.texts[r.key]}", r.whom)
        for r in RENAMES
        if r.key in info.texts and r.old not in info.texts
    ]


def with_lines(info: Vmcoreinfo, added: Sequence[Added]) -> Vmcoreinfo:
    """*info* with the lines *added* behind its last whole one; all else as it is."""
    end = info.desc.rfind(b"\n") + 1
    lines = "".join(f"{one.line}\n" for one in added).encode()
    desc = info.desc[:end] + lines + info.desc[end:]
    return Vmcoreinfo(desc, note_of(desc))


class Need(NamedTuple):
    """A note for which *applies* is read rightly only by a makedumpfile that has *text* in it; else it does *wrong*, if
    it has *knowing* in it."""

    applies: Callable[[Vmcoreinfo], bool]
    text: bytes
    wrong: str
    knowing: bytes = b""


def _has(key: str) -> Callable[[Vmcoreinfo], bool]:
    return lambda info: key in info.texts


def _types_are_values(info: Vmcoreinfo) -> bool:
    """Page types are numbers in the top byte of _mapcount, no longer bits of it (6.12, commit 4ffca5a96678)."""
    slab = info.number("PAGE_SLAB_MAPCOUNT_VALUE")
    return slab is not None and not slab & 0xFFFFFF


SLAB, HUGETLB = "NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)", "NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)"

# NUMBER(PAGE_UNACCEPTED_MAPCOUNT_VALUE) (6.16, makedumpfile 1.7.8) is none of them: in layout cut no unaccepted memory
# is listed, and in another one it costs no more than zeros
NEEDS = (
    Need(_has(SLAB), SLAB.encode(), "may take slab pages for user data and leave them out (-d 8 and more)"),
    Need(_has(HUGETLB), HUGETLB.encode(), "keeps pages of huge pages (HugeTLB and THP)"),
    # makedumpfile 72c3414 (1.7.7) changed no string; the commit behind it, a9cf4da, corrected this one
    Need(
        _types_are_values,
        b"'-E' option is disabled, ",
        "takes free and offline pages for slab and keeps them: a large file",
        SLAB.encode(),
    ),
)


def wrong(info: Vmcoreinfo, program: str) -> list[str]:
    """What the makedumpfile *program* makes of *info* as it is served, a line each. Of what cannot be read, nothing:
    that is the collector's own trouble."""
    wanted = [need for need in NEEDS if need.applies(info)]
    for r in RENAMES:
        if r.key in info.texts and r.old not in info.texts:
            wanted.append(Need(_has(r.key), r.key.encode(), r.otherwise))
    if not wanted:
        return []
    try:
        with open(program, "rb") as file:
            if file.read(2) == b"#!":
                program = _started_by(file.read(_MAX_SCRIPT), program)
        with open(program, "rb") as file:
            if not 0 < os.fstat(file.fileno()).st_size <= MOST_PROGRAM:
                return []
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                if text.find(NOTE_NAME.rstrip(b"\0")) < 0:
                    return []  # no makedumpfile at all
                lacking = [n for n in wanted if text.find(n.text) < 0 <= text.find(n.knowing)]
    except (OSError, ValueError):
        return []
    return [f"{program} is too old for this kernel: it {need.wrong}" for need in lacking]


def _started_by(script: bytes, path: str) -> str:
    """The program of the same name that the *script* at *path* starts, as those of initramfs/builder.py do."""
    name = os.path.basename(path)
    words = (os.fsdecode(word) for word in script.split())
    return next((word for word in words if os.path.isabs(word) and os.path.basename(word) == name), path)
