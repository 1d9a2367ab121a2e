# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a live guest: makes a page of HugeTLB and a transparent huge page, prints "hugetlb PFN" and "thp PFN" with
the first pfn of each (Documentation/admin-guide/mm/pagemap.rst), and leaves a process behind that keeps them."""

from __future__ import annotations

import mmap
import os
import sys
import time

HUGE = 2 << 20
MAP_HUGETLB = 0x40000
MADV_HUGEPAGE = 14
PRESENT = 1 << 63
PFN = (1 << 55) - 1


def address(flag: str) -> int:
    """Where the mapping begins that has *flag* among its VmFlags (fs/proc/task_mmu.c:show_smap_vma_flags())."""
    start = 0
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split()[0]
            if "-" in first:
                start = int(first.split("-")[0], 16)
            elif first == "VmFlags:" and flag in line.split():
                return start
    raise SystemExit(f"no mapping has the flag {flag}")


def pfn(vaddr: int) -> int:
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(vaddr // mmap.PAGESIZE * 8)
        entry = int.from_bytes(file.read(8), sys.byteorder)
    if not entry & PRESENT:
        raise SystemExit(f"nothing is mapped at {vaddr:#x}")
    return entry & PFN


def main() -> None:
    # shared: a page with a file behind it (even one without a name) is kept when it breaks, another one dissolved
    hugetlb = mmap.mmap(-1, HUGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    hugetlb[0] = 1
    print("hugetlb", pfn(address("ht")))
    thp = mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    thp.madvise(MADV_HUGEPAGE)
    start = address("hg")
    offset = -start % HUGE
    thp[offset : offset + HUGE] = b"t" * HUGE
    print("thp", pfn(start + offset), flush=True)
    if os.fork() == 0:
        os.close(1)
        time.sleep(1 << 30)


if __name__ == "__main__":
    main()
