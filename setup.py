# SPDX-License-Identifier: LGPL-2.1-or-later
# cffi_modules is a setup() keyword that pyproject.toml cannot say. The license stands here because no form of it in
# pyproject.toml suits both setuptools 66 (Debian 12), which knows only the table, and current ones, which drop it.
from setuptools import setup

setup(cffi_modules=["cffi_build.py:ffibuilder"], license="LGPL-2.1-or-later")
