# SPDX-License-Identifier: LGPL-2.1-or-later
"""What firmware and northbridges have in memory and configuration space, made up: EFI's tables as the UEFI
specification and include/linux/efi.h lay them out, GART registers as arch/x86/include/asm/gart.h does."""

from __future__ import annotations

import struct
import uuid

MIB, GIB = 1 << 20, 1 << 30

SYSTAB, TABLES, TABLE = 0x7FFE1018, 0x7FFE2F98, 0x7FFF0018
"""Physical addresses: the EFI system table, the array of configuration tables, the unaccepted memory table."""
GUID = uuid.UUID("d5d1de3c-105c-44f9-9ea9-bcef98120031")
ACPI = uuid.UUID("8868e871-e4f1-11d3-bc22-0080c73c8881")
UNIT = 2 * MIB

K8, FAMILY_10H, FAMILY_15H, FAMILY_16H = 0x1103, 0x1203, 0x1603, 0x1533
ENABLED = 1


def system_table(count: int, signature: bytes = b"IBI SYST") -> bytes:
    return signature.ljust(104, b"\x5a") + struct.pack("<IIQ", count, 0, TABLES)


def table(bitmap: bytes, version: int = 1, unit: int = UNIT, base: int = 4 * GIB, size: int | None = None) -> bytes:
    """A table of unaccepted memory."""
    return struct.pack("<IIQQ", version, unit, base, len(bitmap) if size is None else size) + bitmap


def northbridge(base: int = GIB, order: int = 1, flags: int = 0, device: int = K8, vendor: int = 0x1022) -> bytes:
    """Configuration space of a function 3 with an aperture of 32 MiB << *order*."""
    config = bytearray(256)
    struct.pack_into("<HH", config, 0, vendor, device)
    struct.pack_into("<II", config, 0x90, order << 1 | flags, base >> 25)
    return bytes(config)
