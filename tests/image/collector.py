# SPDX-License-Identifier: LGPL-2.1-or-later
"""A collector to be run under ``oldmem run``: VMCORE SAVED SEED. Reads and maps VMCORE in every way there is, at random
places, and compares each answer with the same bytes of the file SAVED."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import sys
import threading

PAGE = mmap.PAGESIZE


def error_of(call: object, *arguments: object) -> int | None:
    try:
        call(*arguments)  # type: ignore[operator]
    except OSError as e:
        return e.errno
    return None


class Collector:
    def __init__(self, vmcore: str, saved: str, seed: int) -> None:
        self.path, self.random = vmcore, random.Random(seed)
        self.fd, self.saved = os.open(vmcore, os.O_RDONLY), os.open(saved, os.O_RDONLY)
        self.size = os.fstat(self.saved).st_size

    def place(self) -> tuple[int, int]:
        """Offset and size: anywhere, beyond the end too, of a few bytes to a few MiB; often at the start."""
        n = self.random.choice((0, 1, 8, PAGE - 1, PAGE, 3 * PAGE + 5, 1 << 20, 3 << 20))
        most = self.random.choice((3 * PAGE, self.size, self.size + 2 * PAGE))
        return self.random.randrange(most), n

    def pread(self) -> None:
        offset, n = self.place()
        assert os.pread(self.fd, n, offset) == os.pread(self.saved, n, offset), (offset, n)

    def preadv(self) -> None:
        offset, n = self.place()
        ours, theirs = [bytearray(n // 3 + i) for i in range(3)], [bytearray(n // 3 + i) for i in range(3)]
        assert os.preadv(self.fd, ours, offset) == os.preadv(self.saved, theirs, offset)
        assert ours == theirs, (offset, n)

    def read(self) -> None:
        offset, n = self.place()
        whence, by = self.random.choice(((os.SEEK_SET, offset), (os.SEEK_END, -offset % self.size), (os.SEEK_CUR, 7)))
        assert os.lseek(self.fd, by, whence) == os.lseek(self.saved, by, whence)
        again = os.dup(self.fd)
        for _ in range(3):
            assert os.read(again, n) == os.read(self.saved, n), (offset, n)
        ours, theirs = [bytearray(n), bytearray(5)], [bytearray(n), bytearray(5)]
        assert os.readv(again, ours) == os.readv(self.saved, theirs)
        assert ours == theirs
        os.close(again)
        assert os.lseek(self.fd, 0, os.SEEK_CUR) == os.lseek(self.saved, 0, os.SEEK_CUR)

    def map(self) -> None:
        offset, n = self.place()
        offset = offset // PAGE * PAGE
        n = min(max(n, 1), self.size - offset)
        if n <= 0:
            return
        flags = self.random.choice((mmap.MAP_PRIVATE, mmap.MAP_SHARED))
        with mmap.mmap(self.fd, n, flags, mmap.PROT_READ, offset=offset) as map:
            assert map[:] == os.pread(self.saved, n, offset), (offset, n)

    def refusals(self) -> None:
        """What cannot be, cannot be."""
        assert error_of(os.open, self.path, os.O_RDWR) == errno.EROFS
        assert error_of(os.open, self.path, os.O_WRONLY | os.O_TRUNC) == errno.EROFS
        assert error_of(os.write, self.fd, b"x") == errno.EBADF
        assert error_of(os.pread, self.fd, 1, -1) == errno.EINVAL
        for flags, prot in ((mmap.MAP_SHARED, mmap.PROT_WRITE), (mmap.MAP_PRIVATE, mmap.PROT_EXEC)):
            denied = error_of(lambda f, p: mmap.mmap(self.fd, PAGE, f, mmap.PROT_READ | p), flags, prot)
            assert denied in (errno.EACCES, errno.EPERM)

    def copied(self) -> None:
        """By the kernel, which knows nothing of the library."""
        offset, n = self.place()
        copied = os.memfd_create("copy")
        done = os.sendfile(copied, self.fd, offset, n)
        assert os.pread(copied, n, 0) == os.pread(self.saved, done, offset), (offset, n)
        os.close(copied)

    def reopened(self) -> None:
        again = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)
        offset, n = self.place()
        assert os.pread(again, n, offset) == os.pread(self.saved, n, offset), (offset, n)
        os.close(again)

    def metadata(self) -> None:
        told = {os.stat(self.path), os.lstat(self.path), os.fstat(self.fd)}
        assert len({(s.st_dev, s.st_ino) for s in told}) == 1
        for s in told:
            assert stat.S_ISREG(s.st_mode)
            assert s.st_size == self.size
            assert s.st_blocks * 512 >= self.size
        assert os.lseek(self.fd, 5, os.SEEK_DATA) == 5
        assert os.lseek(self.fd, 5, os.SEEK_HOLE) == self.size
        assert error_of(os.lseek, self.fd, self.size, os.SEEK_DATA) == errno.ENXIO
        os.lseek(self.fd, 0, os.SEEK_SET)
        assert not os.get_inheritable(self.fd)

    def some_of_everything(self, rounds: int) -> None:
        self.metadata()
        self.refusals()
        for _ in range(rounds):
            self.random.choice((self.pread, self.preadv, self.read, self.map, self.copied, self.reopened))()


def main() -> None:
    vmcore, saved, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    Collector(vmcore, saved, seed).some_of_everything(200)
    # threads, each with a descriptor of its own, on the same windows
    failed: list[BaseException] = []

    def read(number: int) -> None:
        try:
            Collector(vmcore, saved, seed + number).some_of_everything(30)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    with open(vmcore, "rb") as ours, open(saved, "rb") as theirs:  # another file is another file
        assert ours.read(64) == theirs.read(64)
    print("same")


if __name__ == "__main__":
    main()
