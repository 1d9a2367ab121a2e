# SPDX-License-Identifier: LGPL-2.1-or-later
"""The GART aperture of AMD's K8 and its successors: accesses to it are remapped, and where the dead kernel had laid it
over RAM, reading there may hang the machine.

Base and size stand in function 3 of each node's northbridge (arch/x86/kernel/aperture_64.c, include/asm/gart.h). As in
gart_iommu_hole_init() the enable bit does not count: that function clears it before this can run."""

from __future__ import annotations

from collections.abc import Mapping

from guard.ranges import Range, RangeSet
from guard.registry import RAM, Rule, deny_rule
from guard.witness.memory import Problems

NAME = "GART aperture"
NODES = tuple(
    f"0000:{bus:02x}:{slot:02x}.3"
    for bus, slots in ((0x00, range(0x18, 0x20)), (0xFF, range(0x20)), (0xFE, range(0x20)))
    for slot in slots
)
"""PCI addresses where northbridges are: arch/x86/kernel/amd_nb.c:amd_nb_bus_dev_ranges."""

_WITH_GART = (0x1103, 0x1203, 0x1603)
"""Device IDs of the families that have one (asm/amd/nb.h:amd_gart_present): 0fh, 10h, 15h up to model 0fh."""
_AMD = 0x1022
_CONTROL, _BASE, _END = 0x90, 0x94, 0x98
_SMALLEST = 32 << 20
_LIMIT = 1 << 32


def rule(configs: Mapping[str, bytes], problems: Problems, page_size: int = 4096) -> Rule | None:
    """Refuses the aperture. None where there is no such northbridge in *configs* (PCI configuration spaces by address),
    or no aperture was set; None and a line in *problems* where the nodes do not agree on a possible one."""
    found: dict[str, Range] = {}
    for address, config in configs.items():
        if _word(config, 0) & 0xFFFF != _AMD or _word(config, 0) >> 16 not in _WITH_GART:
            continue
        if len(config) < _END:
            _unsound(problems, address, f"{len(config)} bytes of configuration space, expected at least {_END}")
            return None
        base = (_word(config, _BASE) & 0x7FFF) << 25
        found[address] = Range(base, base + (_SMALLEST << (_word(config, _CONTROL) >> 1 & 7)) if base else 0)
    if not any(aperture.size for aperture in found.values()):
        return None
    first, aperture = next(iter(found.items()))
    for address, other in found.items():
        if other != aperture:
            _unsound(problems, address, f"aperture {_shown(other)}, but {first} has {_shown(aperture)}")
            return None
    if aperture.end > _LIMIT:
        _unsound(problems, first, f"aperture {aperture}, expected one below 4 GiB")
        return None
    return deny_rule(NAME, RangeSet([aperture]), "remapped by the GART", page_size)._replace(trouble=RAM)


def _word(config: bytes, at: int) -> int:
    return int.from_bytes(config[at : at + 4], "little")


def _shown(aperture: Range) -> str:
    return str(aperture) if aperture.size else "none"


def _unsound(problems: Problems, address: str, what: str) -> None:
    problems.note(f"northbridge {address}: {what}; no GART aperture is refused")
