# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which crashes: one line each."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tests.vm.harness import Device, MiB

Load = Literal["s", "c"]


class Scenario(NamedTuple):
    """One crash. *crashed* and *capturing* are kernel versions; memory in bytes. *offline*: CPUs that are taken offline
    before the crash; *crash_on*: the CPU that dies first. *devices* lie on *bus*; *shrink*: what the first of them is
    asked to shrink to once it is in use all over. *identity*: whether the identity mapping must turn out randomized
    (None: it may be)."""

    name: str
    smp: int = 2
    crashed: str = "7.2"
    capturing: str = "7.2"
    memory: int = 256 * MiB  # with less, a kernel at a random place may leave no room for the crash region
    crashkernel: str = "64M"
    cpu: str = "max"
    append: str = ""
    load: Load = "s"
    offline: tuple[int, ...] = ()
    crash_on: int = 0
    bus: str = "ccw"
    devices: tuple[Device, ...] = ()
    shrink: int | None = None
    identity: bool | None = None


# A device's usable region is at least 256 MiB more than what is requested at start (VIRTIO_MEM_USABLE_EXTENT in QEMU's
# hw/virtio/virtio-mem.c), and QMP does not tell it. Those here request so much that it is the whole region.
VM0 = Device("vm0", 512 * MiB, 304 * MiB)
VM1 = Device("vm1", 256 * MiB, 44 * MiB)

SCENARIOS = (
    Scenario("smp1", smp=1),
    Scenario("smp2"),
    Scenario("smp3", smp=3),
    Scenario("offline", smp=3, offline=(1,)),
    Scenario("crash-on-cpu1", append="nokaslr", crash_on=1),
    Scenario("vx-off", cpu="max,vx=off"),
    Scenario("nokaslr", append="nokaslr", identity=False),
    Scenario("kaslr-identity", identity=True),
    Scenario("vmem-ccw", devices=(VM0,)),
    Scenario("vmem-pci", bus="pci", devices=(VM0,)),
    Scenario("vmem-shrunk", devices=(VM0,), shrink=100 * MiB),
    Scenario("vmem-two", devices=(VM0, VM1)),
    Scenario("load-c", load="c"),
    Scenario("6.1-crashed-7.2-capturing", crashed="6.1"),
    Scenario("7.2-crashed-6.1-capturing", capturing="6.1"),
    Scenario("6.1-both", crashed="6.1", capturing="6.1", load="c"),
)
