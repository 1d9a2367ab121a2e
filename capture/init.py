# SPDX-License-Identifier: LGPL-2.1-or-later
"""The capture-kernel step: from nothing to a guarded vmcore where collectors look for it.

One FUSE folder at /run/oldmem with vmcore, vmcore.direct and reports, and its vmcore bind-mounted over /proc/vmcore,
so that every collector works unmodified. Where the kernel made no /proc/vmcore none can be created: collectors are
then given /run/oldmem/vmcore. All is undone on any failure, and the distribution goes on with the kernel's own file."""

from __future__ import annotations

import os
from collections.abc import Callable

from capture.background import serve_in_background
from capture.dump import Dump
from capture.fuse import MS_BIND, FuseServer, mount, mounted_device, unmount
from capture.losses import missing
from capture.report import MOST_SERVED, as_json, guard_json, map_json
from guard import procvmcore
from guard.errors import Error

FOLDER = "/run/oldmem"
MAP, GUARD = "map.json", "guard.json"
"""Names of the reports there."""


def texts(dump: Dump) -> dict[str, Callable[[], bytes]]:
    """The reports that are served beside the vmcore, each made when it is looked at."""
    return {
        MAP: lambda: as_json(map_json(dump, MOST_SERVED)),
        GUARD: lambda: as_json(guard_json(dump, MOST_SERVED)),
    }


def check_complete(dump: Dump) -> None:
    """Raises Error where the kernel's own vmcore has memory that ours would lack though nothing is known against it:
    then that one has to stay."""
    if lacking := missing(dump):
        raise Error(
            f"the kernel's own {procvmcore.PATH} has {lacking}, which {dump.envelope.source} does not call RAM and no "
            "sound record of the dead kernel settles: it is left as it is"
        )


def bring_up(dump: Dump, folder: str = FOLDER, over: str = procvmcore.PATH) -> str:
    """Serve *dump* at *folder* and over the file *over* if there is one; returns where the vmcore is.

    Raises Error with everything undone."""
    for target in (folder, over):
        if mounted_device(target):
            raise Error(f"something is mounted on {target} already; umount it first")
    os.makedirs(folder, exist_ok=True)
    server = FuseServer(dump.vmcore, folder, texts(dump))
    serve_in_background(server, [folder, over])
    if not os.path.exists(over):
        return server.probe
    try:
        mount(server.probe, over, None, MS_BIND, None)
    except Error:
        unmount(folder)
        raise
    return over
