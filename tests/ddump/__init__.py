# SPDX-License-Identifier: LGPL-2.1-or-later
"""Device dumps that a driver adds to /proc/vmcore while oldmem serves, by ``make ddump``: on kernels that are built
here, for Debian's have CONFIG_PROC_VMCORE_DEVICE_DUMP off."""
