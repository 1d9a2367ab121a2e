# SPDX-License-Identifier: LGPL-2.1-or-later
"""The capture-kernel step: from nothing to a guarded vmcore where collectors look for it.

One FUSE folder at /run/oldmem with vmcore, vmcore.direct and reports, and its vmcore bind-mounted over /proc/vmcore,
so that every collector works unmodified. Where the kernel made no /proc/vmcore none can be created: collectors are
then given /run/oldmem/vmcore. All is undone on any failure, and the distribution goes on with the kernel's own file."""

from __future__ import annotations

import os
from collections.abc import Callable

from capture.dump import Dump
from capture.fuse import FuseServer
from capture.losses import missing
from capture.mounts import MS_BIND, make_room, mount, mounts_on
from capture.report import MOST_SERVED, as_json, guard_json, map_json
from capture.service import Service
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


def bring_up(
    dump: Dump, folder: str = FOLDER, over: str = procvmcore.PATH, tell: Callable[[str], None] = lambda _line: None
) -> str:
    """Serve *dump* at *folder* and over the file *over* if there is one; returns where the vmcore is. What a dead
    server has left there is taken away, with a line to *tell*.

    Raises Error with everything undone; so it is, too, if this process is killed before it returns."""
    for target in (over, folder):
        make_room(target, tell)
        if mounts_on(target):
            raise Error(f"something is mounted on {target} already; umount it first")
    os.makedirs(folder, 0o755, exist_ok=True)  # where all started by init, the umask may be 0
    server = FuseServer(dump.vmcore, folder, texts(dump))
    with Service(server, [folder, over]) as service:
        server.mount()
        service.mounted()
        service.wait_until_served()
        where = server.probe
        if os.path.exists(over):
            mount(server.probe, over, None, MS_BIND, None)
            where = over
        service.commit()
    return where
