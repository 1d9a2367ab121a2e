# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes all of a file to standard output, out of one mapping: PATH, or the number of a descriptor that it has got."""

from __future__ import annotations

import mmap
import os
import sys

fd = int(sys.argv[1]) if sys.argv[1].isdecimal() else os.open(sys.argv[1], os.O_RDONLY)
with mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ) as whole:
    sys.stdout.buffer.write(whole)
