# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a live guest: what its kernel says of each page in /proc/kpageflags (include/uapi/linux/kernel-page-flags.h),
as lines "FLAG first end" of pfns; of the flags in BY_DEFAULT, or of those named. With the argument ``free N``: N pfns
of free pages instead, from the highest on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

BITS = {"buddy": 10, "head": 15, "hugetlb": 17, "hwpoison": 19, "nopage": 20, "thp": 22, "offline": 23}
BY_DEFAULT = ("hwpoison", "nopage", "offline")
WORDS = 1 << 16


def planes(names: tuple[str, ...]) -> Iterator[tuple[int, list[bytes]]]:
    """First pfn, and for each flag a byte a page, 1 where it is set: in a guest without KVM a loop over all words would
    take long."""
    choose = [(BITS[name] // 8, bytes(value >> BITS[name] % 8 & 1 for value in range(256))) for name in names]
    pfn = 0
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        while data := file.read(8 * WORDS):
            yield pfn, [data[byte::8].translate(table) for byte, table in choose]
            pfn += len(data) // 8


def runs(plane: bytes) -> Iterator[tuple[int, int]]:
    end = 0
    while (start := plane.find(1, end)) >= 0:
        end = plane.find(0, start)
        end = len(plane) if end < 0 else end
        yield start, end


def main() -> None:
    if sys.argv[1:2] == ["free"]:
        count = int(sys.argv[2])
        spans = [(pfn + a, pfn + b) for pfn, (plane,) in planes(("buddy",)) for a, b in runs(plane)]
        free = [pfn for start, end in spans for pfn in range(start, end)]
        print(*free[:: -max(1, len(free) // count)][:count])
        return
    names = tuple(sys.argv[1:]) or BY_DEFAULT
    found: dict[str, list[list[int]]] = {name: [] for name in names}
    for pfn, flags in planes(names):
        for name, plane in zip(names, flags, strict=True):
            for start, end in runs(plane):
                if found[name] and found[name][-1][1] == pfn + start:
                    found[name][-1][1] = pfn + end
                else:
                    found[name].append([pfn + start, pfn + end])
    for name, spans_of_one in found.items():
        for first, last in spans_of_one:
            print(name, first, last)


if __name__ == "__main__":
    main()
