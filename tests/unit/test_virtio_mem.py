# SPDX-License-Identifier: LGPL-2.1-or-later
"""The virtio-mem protocol: what the device answers is what the bitmap says, and any doubt is not RAM."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import DeviceError
from guard.ranges import RangeSet
from guard.virtio_mem import Config, PlugState, query
from tests.unit.virtio_device import MIB, NEVER, DirectTransport, make_config


def blocks_of(state: PlugState) -> set[int]:
    return {block for first, count in state.runs() for block in range(first, first + count)}


def ask(plugged: set[int], blocks: int = 512, slots: int = 32, **how: bool) -> tuple[PlugState, DirectTransport]:
    config = make_config(blocks, plugged_size=len(plugged) * 2 * MIB)
    transport = DirectTransport(config, plugged, slots)
    return query(transport, config, **how), transport


def fragmented(rng: random.Random, blocks: int, runs: int, align: int) -> set[int]:
    """*runs* runs of plugged blocks whose borders lie at random multiples of *align* blocks."""
    cuts = sorted(rng.sample(range(1, blocks // align), 2 * runs - 1))
    edges = [0, *(align * cut for cut in cuts)]
    return {b for i in range(0, len(edges), 2) for b in range(edges[i], edges[i + 1])}


@settings(deadline=None)
@given(
    edges=st.lists(st.integers(0, 700), max_size=40, unique=True),
    blocks=st.integers(1, 700),
    slots=st.sampled_from([1, 2, 3, 32, 64]),
)
def test_bitmap_is_exactly_the_plug_state_for_any_pattern(edges: list[int], blocks: int, slots: int) -> None:
    edges = sorted(e for e in edges if e < blocks)
    plugged = {b for i in range(0, len(edges), 2) for b in range(edges[i], (edges[i + 1 :] or [blocks])[0])}
    state, transport = ask(plugged, blocks, slots)
    assert blocks_of(state) == plugged
    assert state.problems == ()
    assert state.requests == len(transport.asked) <= 2 * blocks
    assert state.plugged == RangeSet((0x1_4000_0000 + b * 2 * MIB, 0x1_4000_0000 + (b + 1) * 2 * MIB) for b in plugged)


@given(plugged=st.sets(st.integers(0, 99)))
def test_block_by_block_says_the_same_with_one_request_per_kick(plugged: set[int]) -> None:
    state, transport = ask(plugged, 100, block_by_block=True)
    assert blocks_of(state) == plugged
    if plugged:
        assert state.requests == state.kicks == 100
        assert transport.asked == [(b, 1) for b in range(100)]


def test_plugged_bit_always_rests_on_a_plugged_answer() -> None:
    # Everything bigger than a block is called MIXED, every block UNPLUGGED: nothing may be inferred to be plugged.
    config = make_config(64, plugged_size=2 * MIB)
    transport = DirectTransport(config, set())
    transport.reply = lambda first, count: (0, 2) if count > 1 else (0, 1)
    assert blocks_of(query(transport, config)) == set()


# 16 runs at wholly random places carry 165 bits, so that no scheme of three-valued answers can do with less than 104
# requests: "four times fewer" is a matter of how memory comes to be fragmented, in steps of several blocks.
@pytest.mark.parametrize(("align", "times_fewer"), [(4, 4), (8, 5), (1, 2.4)])
@pytest.mark.parametrize("seed", range(20))
def test_fragmented_device_takes_many_times_fewer_requests_than_block_by_block(
    seed: int, align: int, times_fewer: float
) -> None:
    plugged = fragmented(random.Random(seed), 512, 16, align)
    state, _ = ask(plugged)
    one_by_one, _ = ask(plugged, block_by_block=True)
    assert state.bitmap == one_by_one.bitmap
    assert state.requests * times_fewer <= one_by_one.requests == 512
    assert state.kicks * 30 <= one_by_one.kicks == 512


@pytest.mark.parametrize("plugged", [set(range(512)), set(range(176))])
def test_simple_device_takes_few_requests_and_kicks(plugged: set[int]) -> None:
    state, _ = ask(plugged)
    assert state.requests <= 24
    assert state.kicks <= 6


def test_worst_pattern_stays_below_two_requests_per_block() -> None:
    state, _ = ask(set(range(0, 512, 2)))
    assert state.requests <= 1024


def test_large_region_is_asked_in_ranges_that_fit_16_bits() -> None:
    blocks = 0x30_0000
    config = make_config(blocks, plugged_size=2 * MIB * 5)
    transport = DirectTransport(config, {0, 1, 2, 70000, blocks - 1}, slots=4)
    state = query(transport, config)
    assert state.runs() == [(0, 3), (70000, 1), (blocks - 1, 1)]
    assert max(count for _, count in transport.asked) == 65535


def test_blocks_beyond_the_usable_region_are_never_asked_about() -> None:
    config = make_config(512, usable_region_size=100 * 2 * MIB, plugged_size=100 * 2 * MIB)
    transport = DirectTransport(config, set(range(100)))
    state = query(transport, config)
    assert state.runs() == [(0, 100)]
    assert max(first + count for first, count in transport.asked) == 100


def test_usable_region_larger_than_the_region_is_clamped_and_reported() -> None:
    config = make_config(8, usable_region_size=1000 * 2 * MIB, plugged_size=16 * MIB)
    state = query(DirectTransport(config, set(range(8))), config)
    assert state.runs() == [(0, 8)]
    assert len(state.problems) == 1
    assert "exceeds the region" in state.problems[0]


def test_device_without_plugged_memory_is_not_asked() -> None:
    state, transport = ask(set())
    assert state.requests == state.kicks == 0
    assert transport.asked == []
    assert not state.plugged


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ((1, 0), "NACK"),
        ((2, 0), "BUSY"),
        ((3, 0), "ERROR"),
        ((4, 0), "unknown type"),
        ((0xFFFF, 0), "unknown type"),
        ((0, 3), "unknown state"),
        ((0, 0xFFFF), "unknown state"),
        (b"\0\0\0\0\0\0\0\0\0", "cut short"),
        (b"", "nothing"),
        (b"\0", "nothing"),
        (NEVER, "no answer"),
    ],
)
def test_unusable_answer_costs_its_blocks_and_one_line(reply: tuple[int, int] | bytes | str, word: str) -> None:
    config = make_config(64, plugged_size=64 * 2 * MIB)
    transport = DirectTransport(config, set(range(64)))
    transport.reply = lambda first, count: reply if first <= 20 < first + count or first == 40 else None
    state = query(transport, config)
    missing = set(range(64)) - blocks_of(state)
    assert {20, 40} <= missing
    assert len(missing) <= 8
    assert sum(word in line for line in state.problems) == 1
    assert any("blocks of" in line and "are plugged, but" in line for line in state.problems)
    assert len(state.problems) == 2


def test_busy_is_asked_again_and_then_counts() -> None:
    config = make_config(64, plugged_size=64 * 2 * MIB)
    transport = DirectTransport(config, set(range(64)))
    left = [3]

    def busy_three_times(first: int, count: int) -> tuple[int, int] | None:
        if first == 0 and left[0]:
            left[0] -= 1
            return 2, 0
        return None

    transport.reply = busy_three_times
    state = query(transport, config)
    assert state.runs() == [(0, 64)]
    assert state.problems == ()


def test_block_that_is_mixed_for_ever_is_not_ram_and_reported() -> None:
    config = make_config(512, plugged_size=512 * 2 * MIB)
    transport = DirectTransport(config, set(range(512)))
    transport.reply = lambda first, count: (0, 2) if first <= 137 < first + count else None
    state = query(transport, config)
    assert blocks_of(state) == set(range(512)) - {137}


def test_device_that_calls_everything_mixed_ends_with_nothing_and_one_line() -> None:
    config = make_config(512, plugged_size=512 * 2 * MIB)
    transport = DirectTransport(config, set())
    transport.reply = lambda first, count: (0, 2)
    state = query(transport, config)
    assert not state.plugged
    assert sum("MIXED for a single block" in line for line in state.problems) == 1
    assert state.requests <= 1024


def test_device_that_stops_answering_is_given_up_and_the_rest_is_not_ram() -> None:
    config = make_config(0x10_0000, plugged_size=0x10_0000 * 2 * MIB)
    transport = DirectTransport(config, set(range(0x10_0000)), slots=4)
    transport.reply = lambda first, count: None if first < 4 * 65535 else NEVER
    state = query(transport, config)
    assert state.runs() == [(0, 4 * 65535)]
    assert state.kicks == 3
    assert any("stopped: 2 rounds in a row" in line for line in state.problems)


def test_time_limit_ends_the_query() -> None:
    config = make_config(512, plugged_size=512 * 2 * MIB)
    state = query(DirectTransport(config, set(range(512))), config, time_limit=0.0)
    assert state.requests == 0
    assert not state.plugged
    assert any("stopped after 0 s: 512 blocks" in line for line in state.problems)


def test_many_kinds_of_trouble_stay_a_bounded_number_of_lines() -> None:
    config = make_config(512, plugged_size=512 * 2 * MIB)
    transport = DirectTransport(config, set(range(512)), slots=1)
    exchange = transport.exchange
    calls = [0]

    def every_other_round_fails(requests: list[bytes], timeout: float) -> list[bytes | None]:
        calls[0] += 1
        if calls[0] % 2:
            raise DeviceError(f"trouble number {calls[0]}")
        return exchange(requests, timeout)

    transport.exchange = every_other_round_fails  # type: ignore[method-assign]
    state = query(transport, config, block_by_block=True)
    assert len(blocks_of(state)) > 256
    assert len(state.problems) <= 20
    assert state.problems[0].endswith("asked once more (first: trouble number 1)")


def test_plugged_size_that_disagrees_is_reported_and_the_bitmap_used() -> None:
    config = make_config(64, plugged_size=10 * 2 * MIB)
    state = query(DirectTransport(config, {3, 4}), config)
    assert state.runs() == [(3, 2)]
    assert "0x400000 bytes are plugged, but the device tells of 0x1400000" in state.problems[0]


@pytest.mark.parametrize(
    ("change", "kept"), [({"requested_size": 0}, True), ({"addr": 0x2_0000_0000}, False), ({"block_size": MIB}, False)]
)
def test_configuration_that_changes_meanwhile_is_reported(change: dict[str, int], kept: bool) -> None:
    config = make_config(64, plugged_size=2 * 2 * MIB)
    transport = DirectTransport(config, {3, 4})
    raw_config = config._replace(**change)
    transport.read_config = lambda length: DirectTransport(raw_config, set()).read_config(length)  # type: ignore[method-assign]
    state = query(transport, config)
    assert bool(state.plugged) is kept
    assert "changed during the queries" in state.problems[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 0}, "block size 0x0"),
        ({"block_size": 3 * MIB}, "block size 0x300000"),
        ({"block_size": 512}, "block size 0x200"),
        ({"addr": 0x1_4000_1000}, "not aligned"),
        ({"region_size": 3 * MIB}, "not a multiple"),
        ({"region_size": 0}, "not a multiple"),
        ({"addr": (1 << 64) - 2 * MIB}, "wraps around"),
        ({"plugged_size": 1 << 40}, "plugged size 0x10000000000 exceeds"),
        ({"block_size": 1 << 12, "region_size": 1 << 52, "usable_region_size": 1 << 52}, "more than"),
    ],
)
def test_impossible_configuration_is_refused_with_its_values(change: dict[str, int], words: str) -> None:
    raw = DirectTransport(make_config(64), set()).read_config(56)
    assert Config.parse(raw, 4096) == make_config(64)
    bad = make_config(64, **change)
    raw = DirectTransport(make_config(64), set()).read_config(56)
    transport = DirectTransport(make_config(64), set())
    transport.config = bad
    raw = transport.read_config(56)
    with pytest.raises(DeviceError, match="virtio-mem configuration: .*" + words):
        Config.parse(raw, 4096)


@given(raw=st.binary(min_size=56, max_size=56))
def test_any_56_bytes_are_a_checked_configuration_or_a_device_error(raw: bytes) -> None:
    try:
        config = Config.parse(raw, 4096)
    except DeviceError:
        return
    assert 0 <= config.blocks <= 1 << 24
    assert config.region.end <= 1 << 64


@settings(deadline=None)
@given(replies=st.lists(st.one_of(st.none(), st.binary(max_size=12)), max_size=60), data=st.randoms())
def test_any_replies_give_a_subset_of_what_was_called_plugged(replies: list[bytes | None], data: random.Random) -> None:
    config = make_config(64, plugged_size=2 * MIB)
    transport = DirectTransport(config, set(), slots=4)
    called_plugged: set[int] = set()

    def scripted(first: int, count: int) -> bytes | str | tuple[int, int]:
        reply = replies.pop() if replies else b"\0\0\0\0\0\0\0\0" + bytes([data.randrange(4), 0])
        if reply is None:
            return NEVER
        if len(reply) == 10 and reply[:2] == b"\0\0" and reply[8:] == b"\0\0":
            called_plugged.update(range(first, first + count))
        return reply

    transport.reply = scripted
    assert blocks_of(query(transport, config)) <= called_plugged
