# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be RAM: each source's right to add and to take away, whatever the others say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import envelope
from capture.envelope import Envelope
from capture.machine import SOURCES
from capture.sources import report
from capture.sources.report import Finding, SourceReport
from guard.ranges import RangeSet
from guard.witness.memory import Problems
from guard.witness.sections import Sections

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NONE = RangeSet()
RAM, RESERVED, HOT = report.RAM, report.RESERVED, report.HOTPLUG_WINDOW
Found = list[tuple[int, int, str]]


def reports(**findings: Found) -> dict[str, SourceReport]:
    return {
        name: SourceReport(
            name,
            name,
            tuple(Finding(a, b, k, "") for a, b, k in findings.get(name, [])),
            (),
            True,
        )
        for name in SOURCES
    }


def with_bad_srat(**findings: Found) -> dict[str, SourceReport]:
    found = reports(**findings)
    return found | {"srat": found["srat"]._replace(narrows_only=True)}


def made(
    found: dict[str, SourceReport],
    regions: RangeSet = NONE,
    images: RangeSet = NONE,
    header: RangeSet = NONE,
) -> tuple[Envelope, list[str]]:
    problems = Problems()
    return envelope.envelope(found, regions, images, header, problems), problems


def spans(*ranges: tuple[float, float]) -> RangeSet:
    """In GiB."""
    return RangeSet((int(a * GIB), int(b * GIB)) for a, b in ranges)


def test_fw_cfg_is_believed_where_it_is() -> None:
    env, problems = made(
        reports(
            fw_cfg=[(0, 640 * KIB, RAM), (MIB, 2 * GIB, RAM), (2 * GIB, 3 * GIB, RESERVED)],
            srat=[(0, 4 * GIB, RAM)],
            smbios=[(0, 2 * GIB, RAM)],
        )
    )
    assert env.boot == RangeSet([(0, 640 * KIB), (MIB, 2 * GIB)])
    assert (env.source, env.disputed, problems) == ("fw_cfg", NONE, [])


def test_a_source_that_lacks_what_fw_cfg_calls_ram_is_told_and_fw_cfg_believed() -> None:
    env, problems = made(reports(fw_cfg=[(0, 2 * GIB, RAM)], smbios=[(0, GIB, RAM)]))
    assert env.boot == spans((0, 2))
    assert problems == ["smbios does not have 0x40000000-0x7fffffff, which fw_cfg calls RAM; fw_cfg is believed"]


@pytest.mark.parametrize(
    ("found", "boot", "disputed", "source"),
    [
        ({"srat": [(0, 3 * GIB, RAM)], "smbios": [(0, 2 * GIB, RAM)]}, [(0, 2)], [(2, 3)], "smbios and srat"),
        ({"srat": [(0, 3 * GIB, RAM)]}, [(0, 3)], [], "srat"),
        ({"smbios": [(0, 2 * GIB, RAM)]}, [(0, 2)], [], "smbios"),
        ({}, [], [], "nothing"),
    ],
)
def test_without_fw_cfg_what_all_others_agree_on_is_ram_and_the_rest_disputed(
    found: dict[str, Found], boot: list[tuple[int, int]], disputed: list[tuple[int, int]], source: str
) -> None:
    env, problems = made(reports(**found))
    assert (env.boot, env.disputed, env.source, problems) == (spans(*boot), spans(*disputed), source, [])


def test_hot_pluggable_entries_confirm_boot_ram_that_another_source_tells() -> None:
    """Hyper-V flags every entry, and lets windows go on to 2^52."""
    srat = [(0, GIB, HOT), (4 * GIB, 5 * GIB, HOT), *((1 << n, 2 << n, HOT) for n in range(36, 52))]
    env, problems = made(reports(srat=srat, smbios=[(0, GIB, RAM), (4 * GIB, 5 * GIB, RAM)]))
    assert (env.boot, env.source, problems) == (spans((0, 1), (4, 5)), "smbios and srat", [])
    assert env.window == RangeSet([(1 << 36, 1 << 52)])


def test_hot_pluggable_entries_are_a_window_beside_fw_cfgs_ram() -> None:
    env, problems = made(reports(fw_cfg=[(0, GIB, RAM)], srat=[(0, GIB, HOT), (4 * GIB, 8 * GIB, HOT)]))
    assert (env.boot, env.window, problems) == (spans((0, 1)), spans((4, 8)), [])


def test_where_only_hot_pluggable_entries_are_told_the_kernels_header_stands_in_for_boot_ram() -> None:
    env, problems = made(reports(srat=[(0, 8 * GIB, HOT)]), header=spans((0, 1), (2, 3)))
    assert (env.boot, env.source, env.by_firmware) == (spans((0, 1), (2, 3)), "preloaded header", False)
    assert env.window == spans((0, 8)) - env.boot
    assert len(problems) == 1


def test_srat_that_knows_no_boot_ram_at_all_says_nothing_about_it() -> None:
    env, _ = made(reports(smbios=[(0, GIB, RAM)], srat=[(4 * GIB, 8 * GIB, HOT)]))
    assert (env.boot, env.window) == (spans((0, 1)), spans((4, 8)))


def test_srat_with_a_bad_checksum_narrows_but_adds_nothing() -> None:
    srat = [(0, 2 * GIB, RAM), (4 * GIB, 8 * GIB, RAM), (8 * GIB, 9 * GIB, HOT)]
    env, _ = made(with_bad_srat(smbios=[(0, 3 * GIB, RAM)], srat=srat))
    assert (env.boot, env.disputed, env.window) == (spans((0, 2)), spans((2, 3)), NONE)
    env, _ = made(with_bad_srat(srat=srat))
    assert env.all == NONE


def test_without_any_source_images_are_what_there_is() -> None:
    env, _ = made(reports(), images=spans((0, 1)))
    assert (env.boot, env.source) == (spans((0, 1)), "images")


def test_bus_window_in_images_that_alone_tell_of_ram_is_disputed_and_not_lost_from_sight() -> None:
    env, _ = made(reports(iomem=[(GIB, 2 * GIB, report.BUS_WINDOW)]), images=spans((0, 3)))
    assert (env.boot, env.disputed, env.decoded) == (spans((0, 1), (2, 3)), spans((1, 2)), NONE)
    env, _ = made(reports(iomem=[(GIB, 2 * GIB, report.BUS_WINDOW)]), header=spans((0, 3)))
    assert (env.boot, env.disputed, env.decoded) == (spans((0, 1), (2, 3)), spans((1, 2)), NONE)


def test_bus_window_that_fw_cfg_does_not_call_ram_stays_a_bus_whoever_else_does() -> None:
    bus = [(GIB, 2 * GIB, report.BUS_WINDOW)]
    env, _ = made(reports(fw_cfg=[(0, GIB, RAM)], smbios=[(0, 2 * GIB, RAM)], iomem=bus))
    assert (env.boot, env.disputed) == (spans((0, 1)), NONE)


def test_images_beyond_firmwares_tables_are_places_to_look_at_and_no_ram() -> None:
    """So are those in the hotplug window: firmware that flags boot RAM hot-pluggable does not hide the kernel there."""
    env, _ = made(reports(smbios=[(0, GIB, RAM)], srat=[(0, GIB, RAM), (4 * GIB, 8 * GIB, HOT)]), images=spans((0, 5)))
    assert (env.boot, env.window, env.heard) == (spans((0, 1)), spans((4, 8)), spans((1, 5)))
    assert envelope.unwitnessed(env, NONE).all == spans((0, 1), (4, 8))
    assert envelope.witnessed(env, spans((0, 1)), online(spans((0, 8))), Problems()).all == spans((0, 1), (4, 8))


def test_ram_without_an_image_is_left_out_and_known_to_be_absent() -> None:
    env, _ = made(reports(fw_cfg=[(0, 2 * GIB, RAM)]), images=spans((0, 1)))
    assert (env.boot, env.absent) == (spans((0, 1)), spans((1, 2)))


@pytest.mark.parametrize("kind", report.NO_RAM)
@pytest.mark.parametrize("source", ["fw_cfg", "firmware_memmap"])
def test_what_any_map_calls_something_else_comes_off_whoever_calls_it_ram(source: str, kind: str) -> None:
    found: dict[str, Found] = {"smbios": [(0, 2 * GIB, RAM)], "srat": [(0, 2 * GIB, RAM)]}
    found[source] = [*([(0, 2 * GIB, RAM)] if source == "fw_cfg" else []), (GIB, GIB + MIB, kind)]
    env, _ = made(reports(**found))
    assert env.all == RangeSet([(0, GIB), (GIB + MIB, 2 * GIB)])
    assert env.no_ram == RangeSet([(GIB, GIB + MIB)])


def test_device_resources_come_off_always() -> None:
    env, _ = made(
        reports(
            fw_cfg=[(0, 2 * GIB, RAM)],
            smbios=[(0, 2 * GIB, RAM)],
            srat=[(4 * GIB, 8 * GIB, HOT)],
            iomem=[(GIB, GIB + MIB, report.DEVICE), (5 * GIB, 6 * GIB, report.DEVICE)],
        ),
        header=spans((0, 2), (5, 6)),
    )
    assert env.all == RangeSet([(0, GIB), (GIB + MIB, 2 * GIB), (4 * GIB, 5 * GIB), (6 * GIB, 8 * GIB)])


def test_bus_windows_come_off_where_one_source_alone_calls_them_ram() -> None:
    bus = [(GIB, 2 * GIB, report.BUS_WINDOW)]
    env, _ = made(reports(smbios=[(0, 3 * GIB, RAM)], iomem=bus))
    assert (env.boot, env.disputed) == (spans((0, 1), (2, 3)), spans((1, 2)))
    env, _ = made(reports(smbios=[(0, 3 * GIB, RAM)], srat=[(0, 3 * GIB, RAM)], iomem=bus))
    assert (env.boot, env.disputed) == (spans((0, 3)), NONE)


def test_the_kernels_header_adds_places_to_look_at_but_no_ram() -> None:
    env, problems = made(reports(fw_cfg=[(0, GIB, RAM)]), header=spans((0, 1), (4, 5)))
    assert (env.boot, env.heard, problems) == (spans((0, 1)), spans((4, 5)), [])
    assert envelope.unwitnessed(env, NONE).all == spans((0, 1))
    assert envelope.witnessed(env, spans((0, 1)), online(spans((0, 8))), Problems()).all == spans((0, 1))


def test_device_regions_are_neither_boot_ram_nor_hotplug_window() -> None:
    region = spans((16, 17))
    env, _ = made(reports(fw_cfg=[(0, 17 * GIB, RAM)], srat=[(16 * GIB, 32 * GIB, HOT)]), region)
    assert (env.regions, env.boot & region, env.window) == (region, NONE, spans((17, 32)))


def env_of(**parts: Any) -> Envelope:
    return Envelope(NONE, NONE, NONE, "test")._replace(**parts)


def online(ranges: RangeSet, size: int = 128 * MIB) -> Sections:
    return Sections(size, ranges, ranges)


def test_system_ram_that_no_source_knows_is_admitted_where_sections_agree() -> None:
    problems = Problems()
    env = envelope.witnessed(env_of(boot=spans((0, 2))), spans((0, 2), (4, 6)), online(spans((0, 5))), problems)
    assert (env.admitted, env.confirmed) == (spans((4, 5)), True)
    assert problems == [
        "0x100000000-0x13fffffff was System RAM that no firmware table here calls RAM: read, on the dead kernel's word"
    ]


def test_system_ram_is_not_admitted_without_sections() -> None:
    assert envelope.witnessed(env_of(boot=spans((0, 2))), spans((0, 6)), None, Problems()).admitted == NONE


def test_system_ram_that_is_no_whole_section_is_not_admitted() -> None:
    tree = spans((0, 2)) | RangeSet([(4 * GIB, 4 * GIB + 129 * MIB), (6 * GIB, 6 * GIB + MIB)])
    env = envelope.witnessed(env_of(boot=spans((0, 2))), tree, online(spans((0, 8))), Problems())
    assert env.admitted == RangeSet([(4 * GIB, 4 * GIB + 128 * MIB)])


@pytest.mark.parametrize("what", ["no_ram", "decoded", "absent"])
def test_system_ram_is_not_admitted_where_something_else_is_known_to_be(what: str) -> None:
    env = env_of(boot=spans((0, 2)), **{what: spans((4, 5))})
    assert envelope.witnessed(env, spans((0, 6)), online(spans((0, 8))), Problems()).admitted == spans((2, 4), (5, 6))


def test_soft_reserved_and_persistent_memory_is_ram_only_if_the_dead_kernel_made_it_so() -> None:
    kinds = [(GIB, 2 * GIB, report.SOFT_RESERVED), (2 * GIB, 3 * GIB, report.PERSISTENT)]
    env, _ = made(reports(smbios=[(0, 4 * GIB, RAM)], firmware_memmap=kinds))
    assert env.all == spans((0, 1), (3, 4))
    after = envelope.witnessed(env, spans((0, 1), (2, 3)), online(spans((0, 4))), Problems())
    assert after.admitted == spans((2, 3))


def test_without_a_sound_tree_the_dead_kernels_e820_tells_boot_ram_from_window() -> None:
    env = envelope.unwitnessed(env_of(boot=spans((0, 1)), window=spans((4, 8))), spans((0, 1), (4, 5), (9, 10)))
    assert (env.boot, env.window, env.confirmed) == (spans((0, 1), (4, 5)), spans((5, 8)), False)
    assert env.unsettled == spans((5, 8))


pieces = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4).map(
    lambda found: RangeSet((a * MIB, b * MIB) for a, b in found)
)


@given(*[pieces] * 9)
def test_nothing_known_to_be_a_device_is_in_any_envelope_and_parts_do_not_overlap(
    fw_cfg: RangeSet,
    smbios: RangeSet,
    srat: RangeSet,
    hot: RangeSet,
    device: RangeSet,
    bus: RangeSet,
    regions: RangeSet,
    header: RangeSet,
    tree: RangeSet,
) -> None:
    def found(kind: str, ranges: RangeSet) -> Found:
        return [(r.start, r.end, kind) for r in ranges]

    env, _ = made(
        reports(
            fw_cfg=found(RAM, fw_cfg),
            smbios=found(RAM, smbios),
            srat=found(RAM, srat) + found(HOT, hot),
            iomem=found(report.DEVICE, device) + found(report.BUS_WINDOW, bus),
        ),
        regions,
        header=header,
    )
    for after in (env, envelope.witnessed(env, tree, online(tree, MIB), Problems()), envelope.unwitnessed(env, tree)):
        assert not (after.all - regions) & device
        parts = (after.boot, after.window, after.regions, after.disputed, after.admitted)
        assert sum(part.size for part in parts) == RangeSet(r for part in parts for r in part).size
        by_two = fw_cfg & smbios | fw_cfg & srat | smbios & srat
        if env.by_firmware:
            assert not after.boot & (bus - by_two - tree)
    assert not envelope.witnessed(env, tree, online(tree, MIB), Problems()).admitted - tree
