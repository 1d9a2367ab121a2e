# SPDX-License-Identifier: LGPL-2.1-or-later
# cffi_modules is a setup() keyword that pyproject.toml cannot say
from setuptools import setup

setup(cffi_modules=["cffi_build.py:ffibuilder"])
