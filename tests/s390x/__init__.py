# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real s390x crashes under QEMU (TCG), against which oldmem proves itself: ``python -m tests.s390x [NAME...]``.

Each scenario crashes a guest, keeps what the capture kernel's own /proc/vmcore has beside the guest's memory as the
host sees it, and compares that vmcore with the one that oldmem builds from the memory.

Modules: ``scenarios`` (which crashes), ``run`` (one of them), ``compare``, ``live`` (oldmem inside the capture
kernel), ``units`` (unit tests on a big-endian machine), ``fixture`` (small images from a run); ``guest`` (the machine),
``images`` (its initramfs), ``kernel`` and ``core`` (built by a cross compiler), ``pieces`` (what comes from Debian)."""
