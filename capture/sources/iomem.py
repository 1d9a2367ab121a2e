# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/iomem: which physical addresses the running kernel uses for what.

Layout: Linux kernel/resource.c:r_show. Two spaces of indentation per depth, "start-end : name" in hexadecimal, ends
inclusive; all addresses read as zero for a reader without CAP_SYS_ADMIN. In a capture kernel, System RAM is that
kernel's own memory, and "RAM buffer" (from the end of a System RAM range to the next 64 MiB border,
arch/x86/kernel/e820.c) covers old memory that /dev/mem refuses unless iomem=relaxed is on the command line. It knows
nothing of the dead machine's RAM, but its devices and buses are still where they were."""

from __future__ import annotations

from typing import NamedTuple

from . import e820, files, report
from .report import Finding, Problems, SourceReport

_PATH = "proc/iomem"
_MAX_SIZE = 4 << 20
_VIRTIO_MEM_RAM = "System RAM (virtio_mem)"
_PART = "part"  # of memory that other resources tell of: no finding
_UNTOLD = "untold"  # the name does not say whether it is memory or a device: a driver, a system-board resource

# By whole names
_KINDS = {
    **e820.BY_NAME,
    "System RAM": report.OWN_RAM,
    "RAM buffer": report.RAM_BUFFER,
    "Crash kernel": report.CRASH_KERNEL,
    # below System RAM: arch/x86/kernel/setup.c
    "Kernel code": _PART,
    "Kernel rodata": _PART,
    "Kernel data": _PART,
    "Kernel bss": _PART,
    # in the first MiB, which is never old memory: arch/x86/kernel/probe_roms.c
    "Video ROM": _PART,
    "System ROM": _PART,
    "Extension ROM": _PART,
    "Adapter ROM": _PART,
    "Local APIC": report.DEVICE,  # arch/x86/kernel/apic/apic.c
    "PCI ECAM": report.DEVICE,  # drivers/pci/ecam.c
    "amd_iommu": report.DEVICE,  # its registers: drivers/iommu/amd/init.c
    # by nature RAM, but the graphics device's alone: arch/x86/kernel/early-quirks.c
    "Graphics Stolen Memory": report.DEVICE,
}
# By a name's beginning; a PCI address is tested for before these
_BEGINNINGS = (
    ("PCI Bus ", report.BUS_WINDOW),  # drivers/pci/probe.c, drivers/acpi/pci_root.c
    ("PCI CardBus ", report.BUS_WINDOW),
    ("System RAM", report.OWN_RAM),  # with (virtio_mem) or (kmem) it is the running kernel's memory like any other
    ("PCI ECAM ", report.DEVICE),  # arch/x86/pci/mmconfig-shared.c; earlier kernels:
    ("PCI MMCONFIG ", report.DEVICE),
)
# By a beginning that only numbers follow
_NUMBERED = (
    ("IOAPIC ", report.DEVICE),  # arch/x86/kernel/apic/io_apic.c
    ("HPET ", report.DEVICE),  # arch/x86/kernel/acpi/boot.c
    ("dmar", report.DEVICE),  # registers of an IOMMU: drivers/iommu/intel/dmar.c
    ("CXL Window ", report.CXL_WINDOW),  # drivers/cxl/acpi.c
    # parts of CXL, soft-reserved or persistent memory; seen at depth 0 too
    ("dax", _PART),  # drivers/dax
    ("hmem.", _PART),  # drivers/dax/hmem/device.c
    ("region", _PART),  # drivers/cxl/core/region.c
    ("namespace", _PART),  # drivers/nvdimm
)
# Claims on addresses; what lies inside of one is covered by it, unless it is a stronger one.
_STRENGTH = {report.BUS_WINDOW: 1, report.DEVICE: 2}
_MEMORY = (report.OWN_RAM, report.CRASH_KERNEL, report.CXL_WINDOW, report.SOFT_RESERVED, report.PERSISTENT, _PART)


class Resource(NamedTuple):
    """One line: physical bytes [start, end), *parent* is the index of the enclosing resource, -1 at depth 0."""

    depth: int
    start: int
    end: int
    name: str
    parent: int


def read(root: str) -> SourceReport:
    """Findings: the resources that tell about memory. The caller must not read OWN_RAM as old memory, and must not
    take an unavailable report for a kernel that owns nothing. What lies inside of a DEVICE or BUS_WINDOW is not told as
    one again. A BUS_WINDOW can overlap a CXL_WINDOW or OWN_RAM: firmware is not always right about its buses."""
    problems = Problems()
    path = files.under(root, _PATH)
    tree = read_tree(root, problems)
    if tree is None:
        return SourceReport("iomem", path, (), problems.lines(), available=False)
    return SourceReport("iomem", path, tuple(findings(tree)), problems.lines(), available=True)


def read_tree(root: str, problems: Problems) -> tuple[Resource, ...] | None:
    """The whole tree in the file's order, parents first; None (and a problem) if it is absent, empty or hides its
    addresses."""
    data = files.read_file(root, _PATH, _MAX_SIZE, problems)
    if data is None:
        return None
    path = files.under(root, _PATH)
    tree = parse(data, path, problems)
    if not tree:
        problems.add(f"{path}: tells of no resource at all, expected the kernel's own memory; ignored")
        return None
    if all(r.start == 0 and r.end == 1 for r in tree):
        problems.add(f"{path}: all addresses read as zero, expected real ones (reader needs CAP_SYS_ADMIN); ignored")
        return None
    return tree


def parse(data: bytes, path: str, problems: Problems) -> tuple[Resource, ...]:
    """The resources in *data*; *path* names it in problems. A line whose indentation makes no sense is kept, since to
    lose one may mean to take the reader's own memory for old memory."""
    tree: list[Resource] = []
    enclosing: list[int] = []
    for number, line in enumerate(data.decode("ascii", "backslashreplace").split("\n"), 1):
        if not line:
            continue
        text = line.lstrip(" ")
        span, _, name = text.partition(" : ")
        first, _, last = span.partition("-")
        start, end = files.hexadecimal(first), files.hexadecimal(last)
        where = f"{path}: line {number}"
        if start is None or end is None or start > end or not name:
            problems.add(f"{where}: expected 'start-end : name', found {report.shown(line)}; ignored")
            continue
        depth, odd = divmod(len(line) - len(text), 2)
        if odd or depth > len(enclosing):
            problems.add(
                f"{where}: indented by {len(line) - len(text)}, expected an even number up to {2 * len(enclosing)}; "
                f"taken as depth {min(depth, len(enclosing))}"
            )
            depth = min(depth, len(enclosing))
        del enclosing[depth:]
        parent = enclosing[-1] if enclosing else -1
        enclosing.append(len(tree))
        tree.append(Resource(depth, start, end + 1, name, parent))
    return tuple(tree)


def virtio_mem_claims(tree: tuple[Resource, ...]) -> tuple[Resource, ...]:
    """The device regions that virtio_mem claimed, which it does in normal mode only: in kdump mode it claims nothing
    (Linux drivers/virtio/virtio_mem.c:virtio_mem_create_resource). Any claim in a capture environment means that the
    driver took the machine for a running one and has unplugged, hence destroyed, the old memory of that device.

    The resource has the device's name. virtiofs names its DAX window alike, but that lies in a PCI BAR, never at
    depth 0."""
    with_memory = {r.parent for r in tree if r.name == _VIRTIO_MEM_RAM}
    return tuple(
        r
        for i, r in enumerate(tree)
        if r.name.startswith("virtio")
        and files.decimal(r.name.removeprefix("virtio")) is not None
        and (r.depth == 0 or i in with_memory)
    )


def findings(tree: tuple[Resource, ...]) -> list[Finding]:
    """What the resources of *tree* tell about memory; see :func:`read`."""
    claims = virtio_mem_claims(tree)
    claimed = set(claims)
    found = []
    kinds: list[str] = []  # of each resource, or of the claim around it if that covers it
    for r in tree:
        around = kinds[r.parent] if r.parent >= 0 else ""
        kind = _PART if r in claimed else _kind(r.name)
        if kind == _UNTOLD:
            kind = _PART if around in _MEMORY else report.BUS_WINDOW
        strength, outer = _STRENGTH.get(kind, 0), _STRENGTH.get(around, 0)
        if kind != _PART and not 0 < strength <= outer:
            found.append(Finding(r.start, r.end, kind, r.name))
        kinds.append(around if outer >= max(strength, 1) else kind)
    return found + [Finding(r.start, r.end, report.DRIVER_CLAIM, r.name) for r in claims]


def _kind(name: str) -> str:
    if (kind := _KINDS.get(name)) is not None:
        return kind
    if _is_pci_address(name):  # of a device's BAR
        return report.DEVICE
    for beginning, kind in _BEGINNINGS:
        if name.startswith(beginning):
            return kind
    for beginning, kind in _NUMBERED:
        if name.startswith(beginning) and name[len(beginning) :].replace(".", "").isdecimal():
            return kind
    return _UNTOLD


def _is_pci_address(name: str) -> bool:
    """Is it a name as drivers/pci/probe.c:pci_setup_device() gives them: dddd:bb:dd.f, the domain of five digits behind
    a VMD controller?"""
    domain, _, rest = name.partition(":")
    return (
        len(rest) == 7
        and rest[2] == ":"
        and rest[5] == "."
        and 4 <= len(domain) <= 8
        and not (domain + rest[:2] + rest[3:5]).strip("0123456789abcdef")
        and rest[6] in "01234567"
    )
