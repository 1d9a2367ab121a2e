# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in the guest: takes compound pages of every kind, says what the kernel tells of each page, and stays. For the
user, which collectors may leave out: transparent huge pages (one with a hole), HugeTLB pages, plain ones. In the
page cache: a file of huge pages. For the kernel: arrays of pipes, which are too big for slab (``pipe_buffer``, 10 KiB);
slab pages there are anyway.

/tmp/pages then has lines "FLAG first end" of pfns, from /proc/kpageflags (include/uapi/linux/kernel-page-flags.h)."""

import mmap
import os
import time
from array import array
from fcntl import fcntl

MiB = 1 << 20
MAP_HUGETLB = 0x40000
F_SETPIPE_SZ = 1031
PIPES = 64
FLAGS = {"user": 1 << 12 | 1 << 17, "tail": 1 << 16}  # KPF_ANON, KPF_HUGE, KPF_COMPOUND_TAIL


def taken(size: int, flags: int = 0, huge: bool = False) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 1
    return memory


def wrote(name: str, text: str) -> None:
    with open(name, "w") as file:
        file.write(text)


os.makedirs("/tmp/huge")
if os.system("mount -t tmpfs -o huge=always tmpfs /tmp/huge"):
    raise SystemExit("no tmpfs")
with open("/tmp/huge/file", "wb") as file:
    file.write(b"page cache " * (8 * MiB // 11))
wrote("/sys/kernel/mm/transparent_hugepage/enabled", "madvise\n")
wrote("/proc/sys/vm/nr_hugepages", "4\n")
kept = [taken(4 * MiB, MAP_HUGETLB), taken(16 * MiB, huge=True), taken(8 * MiB)]
kept[1].madvise(mmap.MADV_DONTNEED, 5 * MiB, 64 * 1024)
pipes = [os.pipe() for _ in range(PIPES)]
for _, end in pipes:
    fcntl(end, F_SETPIPE_SZ, MiB)

runs: dict[str, list[list[int]]] = {name: [] for name in FLAGS}
pfn = 0
with open("/proc/kpageflags", "rb", buffering=0) as flags_file:
    while data := flags_file.read(1 << 19):
        for word in array("Q", data):
            for name, bits in FLAGS.items():
                if word & bits:
                    if runs[name] and runs[name][-1][1] == pfn:
                        runs[name][-1][1] += 1
                    else:
                        runs[name].append([pfn, pfn + 1])
            pfn += 1
wrote("/tmp/pages.new", "".join(f"{name} {first} {end}\n" for name, found in runs.items() for first, end in found))
os.rename("/tmp/pages.new", "/tmp/pages")
time.sleep(1 << 30)
