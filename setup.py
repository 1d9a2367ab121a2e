# SPDX-License-Identifier: LGPL-2.1-or-later
# cffi_modules is a setup() keyword that pyproject.toml cannot say, and ext_modules is one only since setuptools 74. The
# license stands here because no form of it in pyproject.toml suits both setuptools 66 (Debian 12), which knows only the
# table, and current ones, which drop it.
from setuptools import Extension, setup

LIBRARY = ("preload", "preload_name", "preload_read", "composer", "compose", "window", "faults", "vma")
HEADERS = ("compose", "composer", "faults", "plan", "preload", "sys", "vma", "window")
GUARD = ("gate", "pageset", "guardfile", "sum64", "sigbus", "tally")

# No module to import: the library that "oldmem run" puts into collectors. Built as one, it goes where the package goes.
preload = Extension(
    "capture._preload",
    sources=[f"capture/csrc/{name}.c" for name in LIBRARY] + [f"guard/csrc/{name}.c" for name in GUARD],
    include_dirs=["capture/csrc", "guard/csrc"],
    depends=[f"capture/csrc/{name}.h" for name in HEADERS],
    extra_compile_args=["-O2", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"],
    # where dlsym() is before glibc 2.34; the file without a version has nothing in it since then
    extra_link_args=["-Wl,-z,defs", "-Wl,--no-as-needed", "-l:libdl.so.2"],
    py_limited_api=True,
)

setup(
    cffi_modules=["cffi_build.py:ffibuilder"],
    ext_modules=[preload],
    license="LGPL-2.1-or-later",
)
