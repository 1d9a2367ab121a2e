# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our numbers and layouts are those of the kernel's UAPI headers, as a C compiler sees them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from guard import loop, virtio_mem, virtio_queue, virtio_regs, virtio_search
from guard.loop import LoopConfig, LoopInfo64

HEADERS = ("virtio_pci", "virtio_mem", "virtio_ring", "virtio_config", "virtio_ids", "pci_regs", "loop")


def expected() -> dict[str, int]:
    r, q, m = virtio_regs, virtio_queue, virtio_mem
    numbers = {
        "VIRTIO_PCI_CAP_COMMON_CFG": r.CAP_COMMON_CFG,
        "VIRTIO_PCI_CAP_NOTIFY_CFG": r.CAP_NOTIFY_CFG,
        "VIRTIO_PCI_CAP_DEVICE_CFG": r.CAP_DEVICE_CFG,
        "VIRTIO_PCI_CAP_PCI_CFG": r.CAP_PCI_CFG,
        "VIRTIO_PCI_CAP_BAR": r.CAP_BAR,
        "VIRTIO_PCI_CAP_OFFSET": r.CAP_OFFSET,
        "VIRTIO_PCI_CAP_LENGTH": r.CAP_LENGTH,
        "VIRTIO_PCI_NOTIFY_CAP_MULT": r.NOTIFY_CAP_MULT,
        "offsetof(struct virtio_pci_cfg_cap, pci_cfg_data)": r.PCI_CFG_DATA,
        "VIRTIO_MSI_NO_VECTOR": r.MSI_NO_VECTOR,
        "sizeof(struct virtio_pci_cap)": 16,
        "VIRTIO_PCI_COMMON_Q_USEDHI + 4": r.COMMON_SIZE,
        "VIRTIO_CONFIG_S_ACKNOWLEDGE": r.STATUS_ACKNOWLEDGE,
        "VIRTIO_CONFIG_S_DRIVER": r.STATUS_DRIVER,
        "VIRTIO_CONFIG_S_DRIVER_OK": r.STATUS_DRIVER_OK,
        "VIRTIO_CONFIG_S_FEATURES_OK": r.STATUS_FEATURES_OK,
        "VIRTIO_CONFIG_S_NEEDS_RESET": r.STATUS_NEEDS_RESET,
        "VIRTIO_F_VERSION_1": r.F_VERSION_1,
        "VIRTIO_F_ACCESS_PLATFORM": r.F_ACCESS_PLATFORM,
        "0x1040 + VIRTIO_ID_MEM": m.PCI_DEVICE_ID,
        "VIRTIO_MEM_F_ACPI_PXM": m.FEATURES[0],
        "VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE": m.FEATURES[1],
        "VIRTIO_MEM_REQ_STATE": m.REQ_STATE,
        "VIRTIO_MEM_RESP_ACK": m.RESP_ACK,
        "VIRTIO_MEM_RESP_NACK": m.RESP_NACK,
        "VIRTIO_MEM_RESP_BUSY": m.RESP_BUSY,
        "VIRTIO_MEM_RESP_ERROR": m.RESP_ERROR,
        "VIRTIO_MEM_STATE_PLUGGED": virtio_search.STATE_PLUGGED,
        "VIRTIO_MEM_STATE_UNPLUGGED": virtio_search.STATE_UNPLUGGED,
        "VIRTIO_MEM_STATE_MIXED": virtio_search.STATE_MIXED,
        "sizeof(struct virtio_mem_req)": m.REQUEST_SIZE,
        "offsetof(struct virtio_mem_req, u.state.addr)": 8,
        "offsetof(struct virtio_mem_req, u.state.nb_blocks)": 16,
        "sizeof(struct virtio_mem_resp)": m.RESPONSE_SIZE,
        "offsetof(struct virtio_mem_resp, u.state.state)": 8,
        "sizeof(struct virtio_mem_config)": m.CONFIG_SIZE,
        "sizeof(struct vring_desc)": q.DESC_SIZE,
        "offsetof(struct vring_desc, len)": 8,
        "offsetof(struct vring_desc, flags)": 12,
        "offsetof(struct vring_desc, next)": 14,
        "VRING_DESC_F_NEXT": q.DESC_F_NEXT,
        "VRING_DESC_F_WRITE": q.DESC_F_WRITE,
        "VRING_AVAIL_F_NO_INTERRUPT": q.AVAIL_F_NO_INTERRUPT,
        "sizeof(struct vring_used_elem)": q.USED_ELEM_SIZE,
        "offsetof(struct vring_avail, ring)": 4,
        "offsetof(struct vring_used, ring)": 4,
        "sizeof(struct loop_info64)": ctypes.sizeof(LoopInfo64),
        "sizeof(struct loop_config)": ctypes.sizeof(LoopConfig),
        "offsetof(struct loop_config, info)": LoopConfig.info.offset,
        "0x1000 + offsetof(struct loop_config, __reserved)": 0x1000 + LoopConfig.reserved.offset,
    }
    for name in dir(r):
        if name.startswith("COMMON_") and name != "COMMON_SIZE":
            numbers[f"VIRTIO_PCI_{name}"] = getattr(r, name)
        elif name.startswith("PCI_") and name != "PCI_CFG_DATA":
            numbers[name] = getattr(r, name)
    for name in dir(loop):
        if name.startswith("LOOP_"):
            numbers[name] = getattr(loop, name)
    for name in ("LO_FLAGS_READ_ONLY", "LO_FLAGS_AUTOCLEAR", "LO_NAME_SIZE", "LO_KEY_SIZE"):
        numbers[name] = getattr(loop, name)
    offsets = (0, 8, 16, 24, 32, 40, 48)
    for name, offset in zip(virtio_mem.Config._fields, offsets, strict=True):
        numbers[f"offsetof(struct virtio_mem_config, {name})"] = offset
    for name, *_ in LoopInfo64._fields_:
        numbers[f"offsetof(struct loop_info64, {name})"] = getattr(LoopInfo64, name).offset
    return numbers


def test_numbers_and_layouts_are_those_of_the_uapi_headers(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    missing = [name for name in HEADERS if not Path(f"/usr/include/linux/{name}.h").exists()]
    if missing:
        pytest.skip(f"no kernel headers: {missing}")
    numbers = expected()
    lines = [f'printf("%llu\\n", (unsigned long long)({name}));' for name in numbers]
    includes = [f"#include <linux/{name}.h>" for name in HEADERS]
    program = ["#include <stdio.h>", "#include <stddef.h>", *includes, "int main(void) {", *lines, "return 0; }"]
    (tmp_path / "probe.c").write_text("\n".join(program))
    subprocess.run([compiler, "-o", str(tmp_path / "probe"), str(tmp_path / "probe.c")], check=True)
    output = subprocess.run([str(tmp_path / "probe")], check=True, capture_output=True, text=True).stdout
    assert dict(zip(numbers, map(int, output.split()), strict=True)) == numbers


def test_config_fields_are_parsed_from_their_offsets() -> None:
    raw = bytearray(56)
    values = {0: 0x20_0000, 16: 0x1_0000_0000, 24: 0x4000_0000, 32: 0x2000_0000, 40: 0x60_0000, 48: 0x80_0000}
    for offset, value in values.items():
        raw[offset : offset + 8] = value.to_bytes(8, "little")
    raw[8:16] = b"\x02\x01\xff\xff\xff\xff\xff\xff"
    config = virtio_mem.Config.parse(bytes(raw), 4096)
    assert tuple(config) == (0x20_0000, 0x102, 0x1_0000_0000, 0x4000_0000, 0x2000_0000, 0x60_0000, 0x80_0000)
