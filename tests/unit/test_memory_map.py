# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory map: whose word counts, what is read of it, and that the narrower answer wins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import memory_map
from capture.machine import SOURCES
from capture.memory_map import Device, Envelope
from capture.sources import report
from capture.sources.report import Finding, SourceReport
from guard.ranges import Range, RangeSet
from guard.registry import Registry, deny_rule
from guard.witness.memory import Problems

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
NONE = RangeSet()


def reports(**findings: list[tuple[int, int, str]]) -> dict[str, SourceReport]:
    return {
        name: SourceReport(name, name, tuple(Finding(a, b, k, "") for a, b, k in findings.get(name, [])), (), True)
        for name in SOURCES
    }


def device(start: int = 16 * GIB, blocks: int = 64, bitmap: bytes | None = b"\x0f", **more: object) -> Device:
    size = 2 * MIB
    made = Device(
        "0000:00:04.0",
        Range(start, start + blocks * size),
        *(blocks * size, size, 4 * size, 4 * size, 0),
        bitmap,
        "" if bitmap is not None else "no answer",
    )
    return made._replace(**more)  # type: ignore[arg-type]


def envelope_of(
    made: dict[str, SourceReport], devices: list[Device] | None = None, images: RangeSet = NONE
) -> tuple[Envelope, list[str]]:
    problems = Problems()
    return memory_map.envelope(made, devices or [], images, problems), problems


RAM, RESERVED, WINDOW = report.RAM, report.RESERVED, report.HOTPLUG_WINDOW


def test_fw_cfg_is_believed_where_it_is() -> None:
    env, problems = envelope_of(
        reports(
            fw_cfg=[(0, 640 * KIB, RAM), (MIB, 2 * GIB, RAM), (2 * GIB, 3 * GIB, RESERVED)],
            srat=[(0, 4 * GIB, RAM)],
            smbios=[(0, 2 * GIB, RAM)],
        )
    )
    assert env.boot == RangeSet([(0, 640 * KIB), (MIB, 2 * GIB)])
    assert env.source == "fw_cfg"
    assert problems == []


def test_a_source_that_lacks_what_fw_cfg_calls_ram_is_told_and_fw_cfg_believed() -> None:
    env, problems = envelope_of(reports(fw_cfg=[(0, 2 * GIB, RAM)], smbios=[(0, GIB, RAM)]))
    assert env.boot == RangeSet([(0, 2 * GIB)])
    assert problems == ["smbios does not have 0x40000000-0x7fffffff, which fw_cfg calls RAM; fw_cfg is believed"]


@pytest.mark.parametrize(
    ("found", "boot", "source"),
    [
        ({"srat": [(0, 3 * GIB, RAM)], "smbios": [(0, 2 * GIB, RAM)]}, [(0, 2 * GIB)], "smbios and srat"),
        ({"srat": [(0, 3 * GIB, RAM)]}, [(0, 3 * GIB)], "srat"),
        ({"smbios": [(0, 2 * GIB, RAM)]}, [(0, 2 * GIB)], "smbios"),
        ({}, [], "nothing"),
    ],
)
def test_without_fw_cfg_only_what_all_others_agree_on_is_ram(
    found: dict[str, list[tuple[int, int, str]]], boot: list[tuple[int, int]], source: str
) -> None:
    env, problems = envelope_of(reports(**found))
    assert (env.boot, env.source, problems) == (RangeSet(boot), source, [])


def test_without_any_source_images_are_what_there_is() -> None:
    env, _ = envelope_of(reports(), images=RangeSet([(0, GIB)]))
    assert (env.boot, env.source) == (RangeSet([(0, GIB)]), "images")


def test_ram_without_an_image_is_left_out_and_told() -> None:
    env, problems = envelope_of(reports(fw_cfg=[(0, 2 * GIB, RAM)]), images=RangeSet([(0, GIB)]))
    assert env.boot == RangeSet([(0, GIB)])
    assert problems == ["no image holds 0x40000000-0x7fffffff, which fw_cfg calls RAM; it is left out"]


def test_what_the_firmware_map_still_calls_reserved_comes_off() -> None:
    env, _ = envelope_of(
        reports(fw_cfg=[(0, 2 * GIB, RAM)], firmware_memmap=[(GIB, GIB + MIB, RESERVED), (0, MIB, RAM)])
    )
    assert env.boot == RangeSet([(0, GIB), (GIB + MIB, 2 * GIB)])


def test_device_regions_are_neither_boot_ram_nor_hotplug_window() -> None:
    d = device()
    env, _ = envelope_of(reports(fw_cfg=[(0, 17 * GIB, RAM)], srat=[(16 * GIB, 32 * GIB, WINDOW)]), [d])
    region = RangeSet([d.region])
    assert env.regions == region
    assert not env.boot & region
    assert env.window == RangeSet([(16 * GIB, 32 * GIB)]) - region


@given(st.binary(max_size=12), st.integers(1, 80))
def test_plugged_is_what_the_bitmap_says_inside_the_region(bitmap: bytes, blocks: int) -> None:
    d = device(blocks=blocks, bitmap=bitmap)
    bits = int.from_bytes(bitmap, "little")
    start, size = d.region.start, d.block_size
    assert d.plugged == RangeSet((start + i * size, start + (i + 1) * size) for i in range(blocks) if bits >> i & 1)
    rule = d.rule(PAGE)
    assert rule is not None
    registry = Registry()
    registry.register(rule)
    assert registry.ram(RangeSet([d.region])) == d.plugged


def test_device_that_could_not_be_asked_has_no_readable_block() -> None:
    rule = device(bitmap=None).rule(PAGE)
    assert rule is not None
    assert rule.reason == "unknown plug state: no answer"
    registry = Registry()
    registry.register(rule)
    assert registry.ram(RangeSet([device().region])) == NONE
    assert device(bitmap=None).plugged == NONE


def test_device_that_the_kernel_gates_needs_no_rule_of_ours() -> None:
    assert device(bitmap=None, gated_by_kernel=True).rule(PAGE) is None


def env_of(boot: list[tuple[int, int]], window: RangeSet = NONE) -> Envelope:
    return Envelope(RangeSet(boot), window, NONE, "test")


def test_tree_narrows_boot_ram_and_opens_the_window() -> None:
    problems = Problems()
    env = env_of([(0, 4 * GIB)], RangeSet([(16 * GIB, 32 * GIB)]))
    tree = RangeSet([(0, 3 * GIB), (16 * GIB, 17 * GIB)])
    assert memory_map.witnessed_ram(env, tree, problems) == tree
    assert problems == []


def test_what_the_tree_has_outside_of_firmware_is_told_and_not_read() -> None:
    problems = Problems()
    tree = RangeSet([(0, 4 * GIB), (8 * GIB, 9 * GIB)])
    assert memory_map.witnessed_ram(env_of([(0, 4 * GIB)]), tree, problems) == RangeSet([(0, 4 * GIB)])
    assert len(problems) == 1
    assert "0x200000000-0x23fffffff" in problems[0]
    assert "not read" in problems[0]


@pytest.mark.parametrize(
    "tree",
    [
        [(0, GIB)],
        [(1 << 40, 1 << 41)],
        [(0, 1 << 63)],
        [(0, 4 * GIB), (1 << 60, (1 << 60) + 5 * GIB)],
    ],
)
def test_tree_that_is_not_plausible_costs_nothing(tree: list[tuple[int, int]]) -> None:
    problems = Problems()
    assert memory_map.witnessed_ram(env_of([(0, 4 * GIB)]), RangeSet(tree), problems) is None
    assert len(problems) == 1
    assert "not plausible" in problems[0]


def test_reservations_count_only_where_the_capture_kernel_really_is() -> None:
    problems = Problems()
    own = RangeSet([(GIB, GIB + 128 * MIB)])
    reserved = [("crashk_res", GIB, GIB + 130 * MIB), ("crashk_low_res", 0, 512 * MIB)]
    assert memory_map.plausible_reservations(reserved, own, problems) == RangeSet([(GIB, GIB + 130 * MIB)])
    assert len(problems) == 1
    assert problems[0].startswith("crashk_low_res 0x0-0x1fffffff")


def test_nothing_outside_the_envelope_is_ever_ram_up_to_the_end_of_the_address_space() -> None:
    registry = Registry()
    env = env_of([(MIB, GIB)])
    memory_map.install_rules(registry, env, NONE, [])
    assert registry.ram(RangeSet([(0, 1 << 64)])) == env.boot
    assert not registry.pfn_is_ram((1 << 52) - 1)


def test_hotplug_window_is_closed_until_a_witness_tells_what_was_there() -> None:
    window = RangeSet([(16 * GIB, 32 * GIB)])
    env = env_of([(MIB, GIB)], window)
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [])
    assert not registry.ram(window)
    memory_map.install_witness(registry, env, RangeSet([(MIB, GIB), (16 * GIB, 17 * GIB)]))
    assert registry.ram(env.all) == RangeSet([(MIB, GIB), (16 * GIB, 17 * GIB)])


def test_two_devices_that_claim_one_region_are_both_asked() -> None:
    a, b = device(bitmap=b"\x0f"), device(bitmap=b"\x3c", name="0000:00:05.0")
    env, _ = envelope_of(reports(fw_cfg=[(0, GIB, RAM)]), [a, b])
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [a, b])
    assert registry.ram(RangeSet([a.region])) == a.plugged & b.plugged


def test_two_devices_that_the_kernel_gates_in_one_region_are_no_trouble() -> None:
    a, b = device(bitmap=None, gated_by_kernel=True), device(bitmap=None, gated_by_kernel=True, name="0000:00:05.0")
    registry = Registry()
    ram = RangeSet([(a.region.start, a.region.start + 4 * MIB)])
    for one in (a, b):
        memory_map.install_kernel_gated(registry, one, ram, ram)
    assert registry.ram(RangeSet([a.region])) == ram


def test_more_devices_than_any_machine_has_close_the_whole_window() -> None:
    window = RangeSet([(16 * GIB, 32 * GIB)])
    claimed = [Range(16 * GIB + n * MIB, 16 * GIB + n * MIB + PAGE) for n in range(30_000)]
    devices = memory_map.unlocated_devices(claimed, env_of([(MIB, GIB)], window), False)
    assert [d.region for d in devices] == list(window)
    some = memory_map.unlocated_devices(claimed[:20], env_of([(MIB, GIB)], window), False)
    assert [d.region for d in some] == claimed[:20]


page_ranges = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), max_size=6)


@given(page_ranges, page_ranges, page_ranges, st.integers(0, PAGE - 1))
def test_map_cuts_where_verdict_or_provenance_changes_and_nowhere_else(
    boot: list[tuple[int, int]], refused: list[tuple[int, int]], claimed: list[tuple[int, int]], shift: int
) -> None:
    def spans(pages: list[tuple[int, int]]) -> RangeSet:
        return RangeSet((a * PAGE, b * PAGE) for a, b in pages)

    env = Envelope(spans(boot), NONE, NONE, "test")
    claim = RangeSet((a + (shift if a else 0), b) for a, b in spans(claimed))
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [])
    registry.register(deny_rule("test", spans(refused), "test"))
    found = list(memory_map.entries(registry, env, [], {"source": claim}))
    for a, b in pairwise(found):
        assert a.range.end <= b.range.start
        assert a.range.end < b.range.start or a[1:] != b[1:]
    shown = {p: e for e in found for p in range(e.range.start, e.range.end, PAGE)}
    assert set(shown) == {r for s in (env.all | claim).outer_pages(PAGE) for r in range(*s, PAGE)}
    for paddr, e in shown.items():
        rule = registry.refuser(paddr // PAGE)
        assert e.refused_by == (rule.name if rule else "")
        assert e.kind == ("ram" if paddr in env.boot else "other")


@pytest.mark.timeout(60)
def test_map_of_a_device_in_tens_of_thousands_of_pieces_is_made_at_once() -> None:
    d = device(blocks=1 << 17, bitmap=b"\x55" * (1 << 14))
    env, _ = envelope_of(reports(fw_cfg=[(0, GIB, RAM)]), [d])
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [d])
    found = list(memory_map.entries(registry, env, [d], {d.name: d.plugged}))
    assert len(found) == (1 << 17) + 1


sized = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=40)


@given(sized, st.integers(0, 12))
def test_largest_runs_are_kept_and_all_others_counted(sizes: list[tuple[int, int]], most: int) -> None:
    runs, at = [], 0
    for size, gap in sizes:
        runs.append(Range(at + gap, at + gap + size))
        at += gap + size
    kept, others, size_of_others = memory_map.largest(iter(runs), most)
    assert kept == [run for run in runs if run in kept]
    assert sorted(run.size for run in kept) == sorted(run.size for run in runs)[max(0, len(runs) - most) :]
    gone = [run for run in runs if run not in kept]
    assert (others, size_of_others) == (len(gone), sum(run.size for run in gone))


@pytest.mark.parametrize("most", [0, 10])
def test_largest_of_very_many_runs_takes_no_list_of_them_all(most: int) -> None:
    alive, most_alive = 0, 0

    class Counted(Range):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def runs() -> Iterator[Range]:
        nonlocal alive, most_alive
        for i in range(5000):
            alive += 1
            most_alive = max(alive, most_alive)
            yield Counted(i * 100, i * 100 + i * 7919 % 97 + 1)

    kept, others, _ = memory_map.largest(runs(), most)
    assert (len(kept), others) == (most, 5000 - most)
    assert all(run.size == 97 for run in kept)
    assert most_alive < 100
