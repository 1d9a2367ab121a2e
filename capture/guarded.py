# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of a whole machine for other Python programs: guard.GuardedMemory over what the command would dump. No
capture kernel needs it, so none has it in its initramfs."""

from __future__ import annotations

from capture.dump import Dump, build
from capture.machine import LiveMachine, Machine
from guard import plugins
from guard.errors import Error
from guard.guarded import GuardedMemory


class MachineMemory(GuardedMemory):
    """The memory of *dump*, whose problems, machine and dead kernel stand in :attr:`dump`. Closing it closes that."""

    def __init__(self, dump: Dump) -> None:
        super().__init__(dump.memory, dump.close)
        self.dump = dump

    def __enter__(self) -> MachineMemory:
        return self


def open_machine(folder: str | None = None) -> MachineMemory:
    """The machine recorded in *folder*, or the one that this capture kernel came from, under the rules that the command
    has: those of installed plug-ins too. Raises Error where there is nothing to be had, and where nobody knows what a
    plug-in would have refused."""
    machine: Machine
    if folder is None:
        machine = LiveMachine()
    else:
        from capture import recorded
        from capture.image_machine import ImageMachine

        machine = ImageMachine(recorded.load(folder))
    found, unknown = plugins.installed(machine.problems)
    dump = build(machine, plugins=found)
    if unknown := [*unknown, *dump.unknown]:
        dump.close()
        raise Error(unknown[0])
    return MachineMemory(dump)
