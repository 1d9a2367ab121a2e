# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which files the capture path needs, by the program's own report: an initramfs holds these and nothing else.

check is not in it: it needs pyelftools, and a dump is checked on a healthy system."""

from __future__ import annotations

import importlib
import os
import sys

_X86_LATE = ("guard.rules.gart", "guard.rules.unaccepted", "guard.rules.xen_hvm", "guard.witness.scan")
MODULES = (
    "capture.cli",
    "capture.service",
    "capture.init",
    "capture.done",
    "capture.record",
    "capture.record_pages",
    "capture.run",
    "capture.save",
    "capture.arrival",
    "capture.via",
    "guard.compiled",
    "guard.plugins",
    "guard.rules.static",
    f"capture.{os.uname().machine}",  # no machine needs another one's
    *(_X86_LATE if os.uname().machine == "x86_64" else ()),
    # the interpreter imports these late, for the terminal's encoding, file names and errors
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_8",
    "encodings.unicode_escape",
)


def closure() -> list[str]:
    """Import all of the capture path and return the file of every module that is loaded then."""
    for name in MODULES:
        importlib.import_module(name)
    from capture.arguments import parser

    parser("").format_help()  # argparse imports what it formats with at the last moment
    from capture.run import LIBRARY

    # optional helpers in C, of modules that do the same without them
    files = {getattr(m, "__file__", None) for name, m in list(sys.modules.items()) if name != "_json"}
    if os.path.exists(LIBRARY):  # a core that is built for another machine comes without
        files.add(LIBRARY)
    return sorted(filter(None, files))
