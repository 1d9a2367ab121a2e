# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tests.vm.harness.fetch``: downloads what the guests are made of. Exit status: 0 done, 1 failed."""

from __future__ import annotations

import sys
import time

from . import debian
from .apt import FetchError


def main() -> int:
    start = time.monotonic()
    try:
        debian.prefetch()
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    releases = ", ".join(debian.kernel(generation).release for generation in debian.SUITES)
    print(f"{debian.cache()}: {releases}, sysroot ({time.monotonic() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
