# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the C core as ``guard._core`` (cffi API mode, abi3). The declarations for Python are the C headers
themselves: what stands in them between the include guards is what cffi parses, so the two cannot differ."""

from __future__ import annotations

import os
import re

from cffi import FFI

HERE = os.path.dirname(os.path.abspath(__file__))
LIBC, PLAN = "guard/csrc/libc.h", "capture/csrc/plan.h"  # nothing but declarations
HEADERS = [
    LIBC,
    "guard/csrc/pageset.h",
    "guard/csrc/gate.h",
    "guard/csrc/guardfile.h",
    "guard/csrc/corefile.h",
    "guard/csrc/tally.h",
    "guard/csrc/physmem.h",
    "guard/csrc/view.h",
    "guard/csrc/memmap.h",
    "guard/csrc/xen.h",
    "guard/csrc/btf.h",
    "capture/csrc/fuse.h",
    "capture/csrc/service.h",
    "capture/csrc/kexec.h",
    PLAN,
]
SOURCES = [name[:-1] + "c" for name in HEADERS if name not in (LIBC, PLAN)]
SOURCES += "guard/csrc/sum64.c", "guard/csrc/sigbus.c"  # which Python does not call


def declarations(header: str) -> str:
    """The header without its preprocessor lines."""
    with open(os.path.join(HERE, header), encoding="ascii") as file:
        return re.sub(r"^\s*#.*$", "", file.read(), flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef("\n".join(declarations(h) for h in HEADERS))
ffibuilder.set_source(
    "guard._core",
    "\n".join(f'#include "{os.path.basename(h)}"' for h in HEADERS),
    sources=SOURCES,
    include_dirs=[os.path.join(HERE, "guard/csrc"), os.path.join(HERE, "capture/csrc")],
    depends=[*HEADERS, "cffi_build.py"],
    extra_compile_args=[
        *("-O2", "-std=gnu11", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"),
    ],
    # code and constants in one segment: two gaps of up to a page less, in each capture initramfs
    extra_link_args=["-Wl,-z,noseparate-code"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
