# SPDX-License-Identifier: LGPL-2.1-or-later
"""oldmem.capture: what the machine had, shown as a vmcore."""
