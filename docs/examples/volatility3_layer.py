# SPDX-License-Identifier: LGPL-2.1-or-later OR LicenseRef-VSL-1.0
"""Guarded memory as a layer of volatility3, for plug-ins and translation layers to stand on: no dump is written, and no
page is read that the guard refuses.

``python volatility3_layer.py DIR`` opens a recorded machine, finds the VMCOREINFO text with volatility's scanner, and
reads the kernel's release by its virtual address, through volatility's own walk of the dead kernel's page tables."""

from __future__ import annotations

import sys
from typing import Any

from volatility3.framework import contexts, exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import intel, scanners

from capture.guarded import open_machine
from guard import ReadError


class GuardedLayer(interfaces.layers.DataLayerInterface):
    """Physical memory of the recorded machine named by the configuration's ``machine``. Without *pad* a refused page is
    an invalid address; with it, zeros, which ``memory.counters()`` tells of."""

    def __init__(self, context: Any, config_path: str, name: str, metadata: Any = None) -> None:
        super().__init__(context, config_path, name, metadata)
        self.memory = open_machine(self.config["machine"])

    @classmethod
    def get_requirements(cls) -> list[Any]:
        return [requirements.StringRequirement(name="machine", description="folder of a recorded machine")]

    @property
    def minimum_address(self) -> int:
        return 0

    @property
    def maximum_address(self) -> int:
        return self.memory.end - 1

    def is_valid(self, offset: int, length: int = 1) -> bool:
        return offset >= 0 and length > 0 and self.memory.covers(offset, length)

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        if pad:
            return self.memory.read(offset, length)
        try:
            return self.memory.read_exact(offset, length)
        except ReadError as e:
            raise exceptions.InvalidAddressException(self.name, e.paddr, str(e)) from None

    def write(self, offset: int, data: bytes) -> None:
        raise NotImplementedError("old memory is evidence: nothing is written to it")

    def destroy(self) -> None:
        self.memory.close()


def add_layers(context: Any, machine: str) -> GuardedLayer:
    """Adds "memory" to *context*, and "kernel", the x86_64 address space of the dead kernel, on top of it."""
    context.config["memory.machine"] = machine
    layer = GuardedLayer(context, "memory", "memory")
    context.add_layer(layer)
    if dead := layer.memory.dump.arch.dead:
        context.config["kernel.memory_layer"] = "memory"
        context.config["kernel.page_map_offset"] = dead.walk.root_paddr
        context.add_layer(intel.Intel32e(context, "kernel", "kernel"))
    return layer


def main() -> None:
    context = contexts.Context()
    layer = add_layers(context, sys.argv[1])
    # whole ranges of RAM: volatility leaves out all 16 MiB around a page that cannot be read
    ranges = [(r.start, r.size) for r in layer.memory]
    for found in layer.scan(context, scanners.BytesScanner(b"VMCOREINFO\0"), sections=ranges):
        print(f"VMCOREINFO at {found:#x}")
    info = layer.memory.dump.arch.info
    if info and (at := info.symbol("init_uts_ns")) and "kernel" in context.layers:
        name = context.layers["kernel"].read(at + (info.offset("uts_namespace.name") or 0), 3 * 65)
        print(name[130:].split(b"\0")[0].decode())
    layer.destroy()


if __name__ == "__main__":
    main()
