# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the small initramfs in which oldmem runs after a crash: interpreter, program, busybox, collectors, kernel
modules.

It runs on the healthy system, so time and memory matter little here; what it writes is read in a capture kernel with
little memory, so its size does. The same inputs give the same bytes."""
