# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory map: whose word counts, what is read of it, and that the narrower answer wins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import memory_map
from capture.envelope import Envelope
from capture.memory_map import Device
from guard.ranges import Range, RangeSet
from guard.registry import Registry, deny_rule
from guard.witness.memory import Problems

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
NONE = RangeSet()


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


def test_reservations_count_only_where_the_capture_kernel_really_is() -> None:
    problems = Problems()
    own = RangeSet([(GIB, GIB + 128 * MIB)])
    reserved = [("crashk_res", GIB, GIB + 130 * MIB), ("crashk_low_res", 0, 512 * MIB)]
    assert memory_map.plausible_reservations(reserved, own, problems) == RangeSet([(GIB, GIB + 130 * MIB)])
    assert len(problems) == 1
    assert problems[0].startswith("crashk_low_res 0x0-0x1fffffff")


def test_reservation_that_the_capture_kernel_was_given_nothing_of_does_not_count() -> None:
    own = RangeSet([(0, MIB), (GIB, GIB + 128 * MIB)])
    for small in ((0, 4 * MIB), (8 * MIB, 12 * MIB)):
        problems = Problems()
        assert memory_map.plausible_reservations([("crashk_low_res", *small)], own, problems) == NONE
        assert len(problems) == 1


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
    memory_map.settle(registry, env._replace(confirmed=True), RangeSet([(MIB, GIB), (16 * GIB, 17 * GIB)]))
    assert registry.ram(env.all) == RangeSet([(MIB, GIB), (16 * GIB, 17 * GIB)])


def test_what_only_the_dead_kernel_could_have_settled_stays_closed_without_it() -> None:
    window, disputed = RangeSet([(16 * GIB, 32 * GIB)]), RangeSet([(2 * GIB, 3 * GIB)])
    env = env_of([(MIB, GIB)], window)._replace(disputed=disputed, heard=RangeSet([(4 * GIB, 5 * GIB)]))
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [])
    assert registry.ram(env.all) == env.boot | disputed | env.heard, "records are looked up there"
    after = env._replace(heard=NONE)
    memory_map.settle(registry, after, NONE)
    assert registry.ram(env.all) == env.boot
    assert [rule.name for rule in registry] == ["envelope", "capture kernel", "hotplug window", "disputed"]


def test_reservations_are_believed_where_nothing_tells_what_the_capture_kernel_owns() -> None:
    problems = Problems()
    reserved = [("crashk_res", GIB, 2 * GIB)]
    assert memory_map.plausible_reservations(reserved, None, problems) == RangeSet([(GIB, 2 * GIB)])
    assert problems == []


def test_two_devices_that_claim_one_region_are_both_asked() -> None:
    a, b = device(bitmap=b"\x0f"), device(bitmap=b"\x3c", name="0000:00:05.0")
    env = env_of([(0, GIB)])._replace(regions=RangeSet([a.region]))
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


def test_more_devices_than_any_machine_has_close_the_whole_window_and_all_that_they_span() -> None:
    window = RangeSet([(16 * GIB, 60 * GIB)])
    claimed = [Range(16 * GIB + n * MIB, 16 * GIB + n * MIB + PAGE) for n in range(30_000)]
    devices = memory_map.unlocated_devices(claimed, env_of([(MIB, GIB)], window), False)
    assert [d.region for d in devices] == list(window)
    devices = memory_map.unlocated_devices(claimed, env_of([(MIB, GIB)]), False)
    assert [d.region for d in devices] == [Range(claimed[0].start, claimed[-1].end)]
    some = memory_map.unlocated_devices(claimed[:20], env_of([(MIB, GIB)], window), False)
    assert [d.region for d in some] == claimed[:20]


def test_device_that_only_the_dead_kernel_tells_of_has_a_rule_in_no_window_too() -> None:
    """Firmware need not tell of a window (no SRAT); nothing of the region is read without the device's word."""
    claimed = [Range(16 * GIB, 17 * GIB), Range(0, 2 * MIB)]
    devices = memory_map.unlocated_devices(claimed, env_of([(0, GIB)]), False)
    assert [(d.region, d.bitmap) for d in devices] == [(claimed[0], None)]


page_ranges = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), max_size=6)


@given(page_ranges, page_ranges, page_ranges, page_ranges, st.integers(0, PAGE - 1))
def test_map_cuts_where_verdict_provenance_or_what_is_shown_changes_and_nowhere_else(
    boot: list[tuple[int, int]],
    refused: list[tuple[int, int]],
    claimed: list[tuple[int, int]],
    seen: list[tuple[int, int]],
    shift: int,
) -> None:
    def spans(pages: list[tuple[int, int]]) -> RangeSet:
        return RangeSet((a * PAGE, b * PAGE) for a, b in pages)

    env = Envelope(spans(boot), NONE, NONE, "test")
    claim = RangeSet((a + (shift if a else 0), b) for a, b in spans(claimed))
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [])
    registry.register(deny_rule("test", spans(refused), "test"))
    found = list(memory_map.entries(registry, env, [], {"source": claim}, spans(seen)))
    for a, b in pairwise(found):
        assert a.range.end <= b.range.start
        assert a.range.end < b.range.start or a[1:] != b[1:]
    shown = {p: e for e in found for p in range(e.range.start, e.range.end, PAGE)}
    assert set(shown) == {r for s in (env.all | claim).outer_pages(PAGE) for r in range(*s, PAGE)}
    for paddr, e in shown.items():
        rule = registry.refuser(paddr // PAGE)
        assert e.refused_by == (rule.name if rule else "")
        assert e.kind == ("ram" if paddr in env.boot else "other")
        assert e.shown == (rule is not None or paddr in spans(seen))


def test_map_of_a_device_in_tens_of_thousands_of_pieces_is_made_at_once() -> None:
    d = device(blocks=1 << 17, bitmap=b"\x55" * (1 << 14))
    env = env_of([(0, GIB)])._replace(regions=RangeSet([d.region]))
    registry = Registry()
    memory_map.install_rules(registry, env, NONE, [d])
    found = list(memory_map.entries(registry, env, [d], {d.name: d.plugged}, env.all))
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
