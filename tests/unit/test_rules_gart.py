# SPDX-License-Identifier: LGPL-2.1-or-later
"""The GART aperture, by the configuration spaces of made-up northbridges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.x86_platform import NORTHBRIDGE
from guard.ranges import Range, RangeSet
from guard.registry import RAM, Registry
from guard.rules import gart
from guard.witness.memory import Problems
from tests.unit.platform_tables import ENABLED, FAMILY_10H, FAMILY_15H, FAMILY_16H, GIB, K8, MIB, northbridge


def nodes(*configs: bytes) -> dict[str, bytes]:
    return {f"0000:00:{0x18 + i:02x}.3": config for i, config in enumerate(configs)}


def told(*configs: bytes) -> tuple[RangeSet | None, list[str]]:
    """What is refused, and the problems."""
    problems = Problems()
    rule = gart.rule(nodes(*configs), problems)
    if rule is None:
        return None, problems
    assert (rule.name, rule.trouble) == ("GART aperture", RAM)
    registry = Registry()
    registry.register(rule)
    return RangeSet([(0, 1 << 40)]) - registry.ram(RangeSet([(0, 1 << 40)])), problems


@given(st.integers(0, 5), st.integers(1, 3), st.sampled_from([K8, FAMILY_10H, FAMILY_15H]), st.data())
def test_aperture_that_the_nodes_agree_on_is_refused(order: int, count: int, device: int, data: st.DataObject) -> None:
    size = 32 * MIB << order
    base = data.draw(st.integers(1, 4 * GIB // size - 1)) * size
    configs = [northbridge(base, order, device=device)] * count
    assert told(*configs) == (RangeSet([(base, base + size)]), [])


@pytest.mark.parametrize("flags", [0, ENABLED, 0x70, 0x71])
def test_enable_bit_does_not_count_because_the_capture_kernel_has_cleared_it(flags: int) -> None:
    assert told(northbridge(flags=flags)) == (RangeSet([Range(GIB, GIB + 64 * MIB)]), [])


@pytest.mark.parametrize(
    "configs",
    [
        [],
        [northbridge(base=0)],
        [northbridge(base=0, order=7), northbridge(base=0, order=3)],
        [northbridge(device=FAMILY_16H)],
        [northbridge(vendor=0x8086)],
        [b""],
        [b"\x22\x10"],
    ],
)
def test_machine_without_an_aperture_has_no_rule_and_no_problem(configs: list[bytes]) -> None:
    assert told(*configs) == (None, [])


@pytest.mark.parametrize(
    ("configs", "line"),
    [
        (
            [northbridge(), northbridge(base=2 * GIB)],
            "northbridge 0000:00:19.3: aperture 0x80000000-0x83ffffff, but 0000:00:18.3 has 0x40000000-0x43ffffff; "
            "no GART aperture is refused",
        ),
        (
            [northbridge(), northbridge(order=2)],
            "northbridge 0000:00:19.3: aperture 0x40000000-0x47ffffff, but 0000:00:18.3 has 0x40000000-0x43ffffff; "
            "no GART aperture is refused",
        ),
        (
            [northbridge(base=0), northbridge()],
            "northbridge 0000:00:19.3: aperture 0x40000000-0x43ffffff, but 0000:00:18.3 has none; "
            "no GART aperture is refused",
        ),
        (
            [northbridge(order=7)],
            "northbridge 0000:00:18.3: aperture 0x40000000-0x13fffffff, expected one below 4 GiB; "
            "no GART aperture is refused",
        ),
        (
            [northbridge()[:64]],
            "northbridge 0000:00:18.3: 64 bytes of configuration space, expected at least 152; "
            "no GART aperture is refused",
        ),
    ],
)
def test_registers_that_contradict_are_one_problem(configs: list[bytes], line: str) -> None:
    assert told(*configs) == (None, [line])


@given(st.lists(st.binary(max_size=300).map(lambda b: northbridge()[:4] + b), max_size=4))
def test_any_registers_give_one_range_below_4_gib_or_none(configs: list[bytes]) -> None:
    refused, problems = told(*configs)
    assert len(problems) <= 1
    assert refused is None or (len(refused) == 1 and next(iter(refused)).end <= 4 * GIB)


def test_northbridges_are_looked_for_where_the_kernel_does() -> None:
    assert gart.NODES[0] == NORTHBRIDGE
    assert [name for name in gart.NODES if name.startswith("0000:00:")] == [f"0000:00:{i:02x}.3" for i in range(24, 32)]
    assert len(gart.NODES) == 8 + 32 + 32
