# SPDX-License-Identifier: LGPL-2.1-or-later
"""What firmware and sysfs say about the machine's memory.

One module a source, each telling what it found and what it could not read."""
