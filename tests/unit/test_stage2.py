# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stage 2 decides before it does anything: where its header lies, which memory is in it, what is in the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import stage2
from capture.arch import Note, Shape
from capture.dump import KERNEL, PRELOADED, Dump, build
from capture.elfcore import Load
from capture.elfcorehdr import Prepared
from capture.header_place import InPlace, Pinned
from capture.image_machine import ImageMachine
from capture.recorded import load
from capture.stage2 import GivenUp, Options
from guard.errors import Error, SourceError
from guard.ranges import Range, RangeSet
from guard.registry import Registry, deny_rule
from tests.unit.kernel_header import vmcore_of
from tests.unit.stage_parts import LINE, MIB, PAGE, FakePlace, MakePlan, Places
from tests.unit.witness_memory import PRSTATUS

END = 64
"""Pages of the small machine."""
ALL, NOTHING = Range(0, END * PAGE), Range(0, 0)


def shape_of(text: Load | None = None) -> Shape:
    return Shape(62, "<", text, 0xFFFF888000000000, (Note(PRSTATUS, 0x5000),), 0, 4)


def small_dump(refused: RangeSet, shape: Shape, gated: Range = NOTHING) -> Dump:
    """END pages of memory from 0 on, without those of *refused*; in *gated* only the kernel's driver knows."""
    registry = Registry()
    registry.register(deny_rule("test", refused, "refused"))

    def readable() -> Iterator[Range]:
        yield from (run for run, rule in registry.verdicts(0, END * PAGE) if rule is None)

    devices = [SimpleNamespace(region=gated, gated_by_kernel=True), SimpleNamespace(region=ALL, gated_by_kernel=False)]
    machine = SimpleNamespace(page_size=PAGE, devices=devices)
    return cast(Dump, SimpleNamespace(machine=machine, registry=registry, readable_runs=readable, shape=shape))


PREPARED = Prepared(shape_of(), shape_of().notes)


def placed(dump: Dump, wanted: str | None = None) -> tuple[str, str, list[Load], GivenUp]:
    assert dump.shape is not None
    place, why, loads, given_up = stage2._placed(dump, dump.shape, PREPARED, wanted)
    return place.what, why, loads, given_up


IN_PLACE, PINNED = InPlace.what, Pinned.what


def of_runs(*sizes: int, text: Load | None = None) -> Dump:
    """Readable runs of so many pages, a refused page behind each."""
    refused, at = [], 0
    for size in sizes:
        at += size
        refused.append((at * PAGE, (at + 1) * PAGE))
        at += 1
    assert at <= END
    return small_dump(RangeSet([*refused, (at * PAGE, END * PAGE)]), shape_of(text))


def sizes(loads: list[Load]) -> list[int]:
    return [load.size // PAGE for load in loads]


def test_header_goes_in_place_if_all_runs_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(monkeypatch, PREPARED.size(3))
    assert placed(of_runs(5, 1, 9)) == (
        IN_PLACE,
        "",
        [shape_of().load(r) for r in of_runs(5, 1, 9).readable_runs()],
        (0, 0),
    )
    assert places.asked == []


def test_header_that_does_not_fit_in_place_goes_to_pinned_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(monkeypatch, PREPARED.size(3) - 1)
    what, why, loads, given_up = placed(of_runs(5, 1, 9))
    assert (what, sizes(loads), given_up) == (PINNED, [5, 1, 9], (0, 0))
    assert why == f"{PREPARED.size(3) - 1} bytes there hold 2 PT_LOADs of 3"
    assert places.asked == [PREPARED.size(3)]


def test_without_pinned_pages_the_smallest_runs_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Places(monkeypatch, PREPARED.size(3), pinned=False)
    what, why, loads, given_up = placed(of_runs(5, 1, 9, 2, 7))
    assert (what, sizes(loads), given_up) == (IN_PLACE, [5, 9, 7], (2, 3 * PAGE))
    assert why.endswith("hold 3 PT_LOADs of 5")


def test_in_place_is_obeyed_even_if_runs_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(monkeypatch, PREPARED.size(1))
    assert placed(of_runs(5, 9), "in-place")[2:] == ([shape_of().load(Range(6 * PAGE, 15 * PAGE))], (1, 5 * PAGE))
    assert places.asked == []


def test_in_place_where_there_is_no_such_place_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(monkeypatch, None)
    with pytest.raises(SourceError, match=r"^no such place$"):
        placed(of_runs(5, 9), "in-place")
    assert places.asked == []


def test_pinned_is_obeyed_though_all_would_fit_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(monkeypatch, 1 << 20)
    assert placed(of_runs(5, 9), "pinned")[:2] == (PINNED, "")
    assert places.looked == 0


def test_pinned_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(monkeypatch, 1 << 20, pinned=False)
    with pytest.raises(Error, match=r"^no place for a header: not asked for in place; no pinned pages$"):
        placed(of_runs(5, 9), "pinned")
    assert places.looked == 0


def test_no_place_at_all_is_one_line_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    Places(monkeypatch, None, pinned=False)
    with pytest.raises(Error, match=r"^no place for a header: no such place; no pinned pages$"):
        placed(of_runs(5, 9))


@pytest.mark.parametrize("wanted", [None, "in-place"])
@pytest.mark.parametrize("room", [PREPARED.size(1) - 1, PAGE // 64])
def test_place_without_room_for_a_single_run_is_an_error(
    room: int, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Places(monkeypatch, room, pinned=False)
    hold = rf"{room} bytes there hold 0 PT_LOADs of 2"
    with pytest.raises(Error, match=rf"^no room for a PT_LOAD in place of the prepared one: {hold}$"):
        placed(of_runs(5, 9), wanted)


def test_more_runs_than_any_header_is_to_have_are_given_up_in_pinned_pages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage2, "MAX_LOADS", 4)
    text = Load(0, 0xFFFFFFFF81000000, PAGE)
    for in_place in (1 << 20, None):
        places = Places(monkeypatch, in_place)
        what, _, loads, given_up = placed(of_runs(5, 1, 9, 2, 7, text=text))
        assert (what, sizes(loads)) == (PINNED if in_place is None else IN_PLACE, [1, 5, 9, 7])
        assert given_up == (2, 3 * PAGE)
        assert places.asked == ([PREPARED.size(4)] if in_place is None else [])


pages = st.sets(st.integers(0, END - 1), max_size=30)
texts = st.builds(
    lambda first, size, align: Load(first, 0xFFFFFFFF81000000 + first % PAGE, size, align),
    st.integers(0, 20 * PAGE),
    st.integers(1, 20 * PAGE),
    st.sampled_from([0, PAGE]),
)


regions = st.builds(lambda a, b: Range(a * PAGE, b * PAGE), st.integers(0, END), st.integers(0, END))


def of_pages(numbers: set[int]) -> RangeSet:
    return RangeSet((n * PAGE, (n + 1) * PAGE) for n in numbers)


@given(pages, texts)
def test_kernel_text_is_listed_without_its_refused_pages(refused: set[int], text: Load) -> None:
    found = list(stage2.text_loads(small_dump(of_pages(refused), shape_of(text)), shape_of(text)))
    assert RangeSet((t.paddr, t.paddr + t.size) for t in found) == (
        RangeSet([(text.paddr, text.paddr + text.size)]) - of_pages(refused)
    )
    assert all(t.vaddr - t.paddr == text.vaddr - text.paddr and t.align == text.align for t in found)
    assert len(found) == len(RangeSet((t.paddr, t.paddr + t.size) for t in found))


def test_kernel_whose_text_is_not_known_has_none() -> None:
    assert list(stage2.text_loads(small_dump(RangeSet(), shape_of()), shape_of())) == []


@settings(deadline=None)
@given(pages, st.none() | texts, st.integers(0, 20), st.sampled_from([None, "in-place"]), regions)
def test_only_the_smallest_runs_are_given_up_and_no_refused_page_is_listed(
    refused: set[int], text: Load | None, room: int, wanted: str | None, gated: Range
) -> None:
    dump = small_dump(of_pages(refused), shape_of(text), gated)
    readable = list(RangeSet([ALL]) - of_pages(refused) - RangeSet([gated]))
    pieces = [] if text is None else list(stage2.text_loads(dump, shape_of(text)))
    left = room - len(pieces)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Places(monkeypatch, PREPARED.size(room), pinned=False)
        if left <= 0:
            with pytest.raises(Error, match="no room for a PT_LOAD"):
                placed(dump, wanted)
            return
        _, _, loads, given_up = placed(dump, wanted)
    listed = RangeSet((ld.paddr, ld.paddr + ld.size) for ld in loads)
    assert not listed.outer_pages(PAGE) & of_pages(refused)
    assert loads[: len(pieces)] == pieces
    kept = [Range(ld.paddr, ld.paddr + ld.size) for ld in loads[len(pieces) :]]
    assert kept == sorted(set(kept) & set(readable))
    assert len(kept) == min(left, len(readable))
    gone = set(readable) - set(kept)
    assert given_up == (len(gone), sum(r.size for r in gone))
    assert not gone or max(r.size for r in gone) <= min(r.size for r in kept)


# ---- the plan of a whole machine


def test_recorded_machine_is_refused(recorded_folder: Path) -> None:
    made = build(ImageMachine(load(str(recorded_folder))))
    with pytest.raises(Error, match=r"^stage2 needs the machine itself: a recorded one has no kernel to go to$"):
        stage2.plan(made, Options())
    made.close()


def test_kernel_will_serve_of_the_planned_header_what_was_planned(plan_of: MakePlan, live_dump: Dump) -> None:
    made = plan_of()
    assert len(made.prepared.there) == 3  # two CPUs and VMCOREINFO
    assert made.prepared.copied == ()

    class Memory:
        def read(self, paddr: int, size: int) -> bytes:
            at = paddr - made.place.addr
            if 0 <= at < MIB:
                return made.header[at : at + size].ljust(size, b"\0")
            return live_dump.exact.read(paddr, size)

    assert vmcore_of(made.place.addr, Memory(), 4) == made.core.header
    assert RangeSet((ld.paddr, ld.paddr + ld.size) for ld in made.loads) == live_dump.readable()
    assert made.core.size == sum(e.size for e in made.core.extents) + len(made.core.header)


def test_region_that_only_this_kernels_driver_gates_is_left_out_and_told(plan_of: MakePlan, live_dump: Dump) -> None:
    (device,) = live_dump.machine.devices
    live_dump.machine.devices = [device._replace(gated_by_kernel=True)]
    made = plan_of()
    listed = RangeSet((ld.paddr, ld.paddr + ld.size) for ld in made.loads)
    assert listed == live_dump.readable() - RangeSet([device.region])
    assert stage2.left_out(live_dump) == live_dump.readable() & RangeSet([device.region]) == device.plugged


def test_device_that_was_not_asked_is_told_as_left_out(live_dump: Dump) -> None:
    assert stage2.left_out(live_dump) == RangeSet()
    (device,) = live_dump.machine.devices
    live_dump.machine.devices = [device._replace(bitmap=None)]
    assert stage2.left_out(live_dump) == RangeSet([device.region]) - device.plugged


def test_next_kernel_gets_our_header_and_all_else_of_the_command_line(plan_of: MakePlan) -> None:
    assert plan_of().cmdline == "root=/dev/vda nr_cpus=1 elfcorehdr=0x6bff0000 oldmem.stage=2"
    made = plan_of('elfcorehdr=1 a="b c" -- init elfcorehdr=2', place="pinned")
    assert made.cmdline == 'a="b c" memmap=64K$0x1 elfcorehdr=0x1000000 oldmem.stage=2 -- init elfcorehdr=2'


def test_command_line_may_be_as_long_as_the_kernel_takes(plan_of: MakePlan) -> None:
    size = len(plan_of(f"name=\udcff {LINE}").cmdline)
    plan_of(f"name=\udcff {LINE}", most_cmdline=size + 1)  # kexec counts the NUL too
    with pytest.raises(Error, match=rf"^a command line of {size} bytes, of which /boot/vmlinuz takes {size - 1}$"):
        plan_of(f"name=\udcff {LINE}", most_cmdline=size)


def test_header_without_any_note_is_refused_for_no_kernel_takes_it(plan_of: MakePlan, live_dump: Dump) -> None:
    assert live_dump.shape is not None
    live_dump.shape = live_dump.shape._replace(notes=())
    with pytest.raises(Error, match=r"^nothing is known of the dead kernel's notes"):
        plan_of()


@pytest.mark.parametrize("line", [f'{LINE} name="open', f'"{LINE}'])
def test_command_line_in_which_the_next_kernel_would_not_find_its_header_is_refused(
    line: str, plan_of: MakePlan
) -> None:
    with pytest.raises(Error, match=r"^the next kernel would not find its header by the command line '"):
        plan_of(line)


@pytest.mark.parametrize("parameters", [[], [f"elfcorehdr={MIB:#x}"], ["elfcorehdr=0x1000000", "elfcorehdr=0"]])
def test_place_that_the_command_line_does_not_lead_to_is_refused(
    parameters: list[str], plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePlace, "parameters", lambda place: parameters)
    with pytest.raises(Error, match=r"^the next kernel would not find its header by the command line '"):
        plan_of(place="pinned")


@pytest.mark.parametrize(
    ("stage", "why"),
    [("2", "this is stage 2 already"), ("back", "this kernel was come back to from stage 2: that is tried once")],
)
def test_stage_2_is_gone_to_once(stage: str, why: str, plan_of: MakePlan) -> None:
    with pytest.raises(Error, match=f"^{why}$"):
        plan_of(f"{LINE} oldmem.stage={stage}")


def test_dump_that_no_header_of_ours_can_be_of_is_refused(
    plan_of: MakePlan, live_dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("layout", KERNEL), ("mode", PRELOADED), ("shape", None)):
        with monkeypatch.context() as m:
            m.setattr(live_dump, name, value)
            with pytest.raises(Error, match=r"^stage2 builds its own header in layout cut: "):
                plan_of()
    monkeypatch.setattr(live_dump.machine, "header_is_the_kernels", True)
    with pytest.raises(Error, match=r"^this kernel built its header after the crash: "):
        plan_of()
