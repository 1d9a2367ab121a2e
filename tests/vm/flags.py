# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a live guest: what its kernel says of each page in /proc/kpageflags (include/uapi/linux/kernel-page-flags.h),
as lines "FLAG first end" of pfns. With the argument ``free N``: N pfns of free pages instead, from the highest on."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

BITS = {"buddy": 10, "hwpoison": 19, "nopage": 20, "offline": 23}


def words() -> Iterator[tuple[int, int]]:
    pfn = 0
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        while data := file.read(1 << 19):
            for word in array("Q", data):
                yield pfn, word
                pfn += 1


def main() -> None:
    if sys.argv[1:2] == ["free"]:
        count = int(sys.argv[2])
        free = [pfn for pfn, word in words() if word >> BITS["buddy"] & 1]
        print(*free[:: -max(1, len(free) // count)][:count])
        return
    runs: dict[str, list[list[int]]] = {name: [] for name in ("hwpoison", "nopage", "offline")}
    for pfn, word in words():
        for name, found in runs.items():
            if word >> BITS[name] & 1:
                if found and found[-1][1] == pfn:
                    found[-1][1] = pfn + 1
                else:
                    found.append([pfn, pfn + 1])
    for name, found in runs.items():
        for first, end in found:
            print(name, first, end)


if __name__ == "__main__":
    main()
