# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m capture`` is the command ``oldmem``."""

from capture.cli import main

main()
