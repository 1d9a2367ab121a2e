# SPDX-License-Identifier: LGPL-2.1-or-later
"""oldmem.guard: may this page of old memory be read, and reading it. Knows nothing of ELF headers or of where memory maps come from."""
