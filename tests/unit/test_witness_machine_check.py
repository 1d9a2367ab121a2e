# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machine checks in the dead kernel's log: which addresses are refused, from lines as kernels print them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.ranges import RangeSet
from guard.registry import RAM
from guard.rules import machine_check as rules
from guard.witness.dead_kernel import DeadKernel
from guard.witness.machine_check import named_in
from guard.witness.memory import Problems
from guard.witness.printk_log import CONT, Record
from tests.unit.printk_ring import Ring
from tests.unit.witness_memory import DyingKernel

PAGE = 4096
NOTHING: RangeSet = RangeSet()
HW = "mce: [Hardware Error]: "
CPU0, CPU1 = 0x80000000, 0x80000001

INTEL = "PROCESSOR 0:206d7 TIME 1428957562 SOCKET 0 APIC 0 microcode 714"
AMD = "PROCESSOR 2:830f10 TIME 1581348273 SOCKET 0 APIC 8 microcode 8301025"
FATAL = f"""{HW}CPU 3: Machine Check Exception: 5 Bank 7: be00000001010091
{HW}RIP !INEXACT! 10:<ffffffff8a5c3f2a> {{native_safe_halt+0xa/0x10}}
{HW}TSC 6c8a3bd1e54 ADDR 1f3a5c7940 MISC 200004c0a8c1186 PPIN 5d9a1f2c3b4e
{HW}{INTEL}
{HW}Run the above through 'mcelog --ascii'
{HW}Machine check: Processor context corrupt
Kernel panic - not syncing: Fatal machine check on current CPU"""


def records(text: str, caller: int = CPU0, **fields: int) -> list[Record]:
    record = Record(0, 0, caller, b"", 0, 0, 0)._replace(**fields)  # type: ignore[arg-type]
    return [record._replace(text=line.encode()) for line in text.split("\n")]


def pages(*addresses: int) -> RangeSet:
    return RangeSet((a & -PAGE, (a & -PAGE) + PAGE) for a in addresses)


def named(text: str, sme_mask: int = 0) -> RangeSet:
    return named_in(records(text), Problems(), PAGE, sme_mask)


def test_page_of_a_fatal_machine_check_is_named() -> None:
    assert named(FATAL) == pages(0x1F3A5C7940)


def check(status: int, address: int, misc: int = 0, vendor: str = INTEL, more: str = "", global_status: int = 5) -> str:
    kind = " Exception" if global_status & 4 else ""
    misc_text = f"MISC {misc:x} " if misc else ""
    return (
        f"{HW}CPU 0: Machine Check{kind}: {global_status:x} Bank 4: {status:016x}\n"
        f"{HW}TSC 0 ADDR {address:x} {misc_text}{more}\n{HW}{vendor}"
    )


UC = 0xBE00000000800400
"""Valid, uncorrected, enabled, MISC and ADDR valid, context corrupt."""


@pytest.mark.parametrize(
    "text",
    [
        check(UC & ~(1 << 63), 0x12345000),
        check(UC & ~(1 << 61), 0x12345000),  # corrected
        check(UC & ~(1 << 58), 0x12345000),  # no address
        check(UC, 0x12345000, global_status=0),  # what the banks had kept of the boot before
        FATAL.replace("ADDR", "ADDRESS"),
        f"{HW}CPU 0: Machine Check Exception: 5 Bank 4: {UC:x}\n{HW}TSC 0 \n{HW}{INTEL}\nkernel: ADDR 1234000",
        check(UC, 0x12345000).replace(f"{HW}CPU", "thread: CPU"),
        f"{HW}TSC 0 ADDR 12345000 MISC 86\n{HW}{INTEL}",
    ],
)
def test_what_is_no_uncorrected_error_of_this_boot_with_an_address_names_nothing(text: str) -> None:
    assert named(text) == NOTHING


@pytest.mark.parametrize(
    ("misc", "size"),
    [(0x80 | 6, PAGE), (0x80 | 12, PAGE), (0x80 | 16, 1 << 16), (0x80 | 21, 1 << 21), (0x80 | 22, PAGE), (0xBF, PAGE)]
    + [(0x40 | 16, PAGE), (0x1C0 | 16, PAGE), (16, PAGE), (0, PAGE)],
)
def test_granularity_counts_if_the_address_is_physical_and_it_says_anything(misc: int, size: int) -> None:
    assert named(check(UC, 0x12345678, misc)) == RangeSet([(0x12345678 & -size, (0x12345678 & -size) + size)])


def test_granularity_does_not_count_without_its_valid_bit() -> None:
    assert named(check(UC & ~(1 << 59), 0x12345678, 0x80 | 16)) == pages(0x12345678)


def test_amds_misc_is_no_granularity() -> None:
    assert named(check(UC, 0x12345678, 0xD01A000100000090, AMD)) == pages(0x12345678)


def test_address_of_an_amd_memory_controller_is_not_taken_for_a_physical_one() -> None:
    umc = "SYND 6a0b1a1e0a800604 IPID 9600150f00 "
    problems = Problems()
    assert named_in(records(check(0xBC002800000C0859, 0x3F1C4A80, 0, AMD, umc)), problems) == NOTHING
    (line,) = problems
    assert "0x3f1c4a80 of its own memory" in line
    # since then some of them have a bit that says that it is (MCI_STATUS_PADDRV)
    assert named(check(0xBC002800000C0859 | 1 << 54, 0x3F1C4A80, 0, AMD, umc)) == pages(0x3F1C4A80)
    # another unit of the same processor: it read what was known to be broken
    assert named(check(0xBC002800000C0859, 0x3F1C4A80, 0, AMD, "IPID 1002000000000 ")) == pages(0x3F1C4A80)


def test_encryption_bit_is_no_part_of_the_address() -> None:
    assert named(check(UC, 1 << 47 | 0x12345678), 1 << 47) == pages(0x12345678)


def test_lines_of_two_processors_are_told_apart_by_their_callers() -> None:
    one, two = records(check(UC, 0x1111000), CPU0), records(check(UC, 0x2222000), CPU1)
    for order in ([0, 1, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0]):
        left = [list(one), list(two)]
        mixed = [left[which].pop(0) for which in order]
        assert named_in(mixed, Problems()) == pages(0x1111000, 0x2222000)


def test_address_of_a_corrected_error_is_not_taken_for_that_of_another_processors_fatal_one() -> None:
    fatal, corrected = records(check(UC, 0x1111000), CPU0), records(check(UC & ~(1 << 61), 0x2222000), CPU1)
    mixed = [fatal[0], *corrected, *fatal[1:]]
    assert named_in(mixed, Problems()) == pages(0x1111000)
    boot = records(check(UC, 0x2222000, global_status=0), CPU1)
    assert named_in([fatal[0], *boot, *fatal[1:]], Problems()) == pages(0x1111000)


def test_line_that_was_continued_in_records_of_its_own_is_put_together() -> None:
    parts = ["TSC 6c8a3bd1e54 ", "ADDR 1f3a5c7940 ", "MISC 86 "]
    lines = records(FATAL)
    broken = [*lines[:2], *(lines[2]._replace(text=p.encode(), flags=CONT) for p in parts), *lines[3:]]
    broken[2] = broken[2]._replace(text=HW.encode() + broken[2].text)
    other = records("usb 1-1: new device ADDR 77777000", 4711)
    assert named_in([*broken[:3], *other, *broken[3:]], Problems()) == pages(0x1F3A5C7940)


def test_lines_that_another_caller_printed_on_behalf_of_an_nmi_count() -> None:
    lines = records(FATAL)
    assert named_in([lines[0], *(line._replace(caller=99) for line in lines[1:])], Problems()) == pages(0x1F3A5C7940)


def test_line_of_an_unknown_caller_belongs_to_the_newest_machine_check() -> None:
    corrected, fatal = records(check(UC & ~(1 << 61), 0x1111000), CPU0), records(check(UC, 0x2222000), CPU1)
    late = [line._replace(caller=99) for line in fatal[1:]]
    assert named_in([corrected[0], fatal[0], *late], Problems()) == pages(0x2222000)


def test_log_that_ends_in_the_middle_names_what_it_has() -> None:
    lines = records(FATAL)
    assert named_in(lines[:3], Problems()) == pages(0x1F3A5C7940)
    assert named_in(lines[:2], Problems()) == NOTHING


def test_what_user_space_wrote_names_nothing() -> None:
    assert named_in(records(FATAL, facility=1), Problems()) == NOTHING
    unknown = [record._replace(facility=None) for record in records(FATAL)]
    assert named_in(unknown, Problems()) == pages(0x1F3A5C7940)


GHES = """{1}[Hardware Error]: Hardware error from APEI Generic Hardware Error Source: 4
{1}[Hardware Error]: event severity: fatal
{1}[Hardware Error]:  Error 0, type: fatal
{1}[Hardware Error]:  fru_text: B2
{1}[Hardware Error]:   section_type: memory error
{1}[Hardware Error]:    error_status: Storage error in DRAM memory (0x0000000000000400)
{1}[Hardware Error]:   physical_address: 0x000000276aeb0180
{1}[Hardware Error]:   physical_address_mask: 0xffffffffffffffc0
{1}[Hardware Error]:   node:1 card:4 module:0 rank:0 bank:6 device:0 row:24237 column:24
{1}[Hardware Error]:   error_type: 3, multi-bit ECC
{1}[Hardware Error]:  Error 1, type: corrected
{1}[Hardware Error]:   section_type: memory error
{1}[Hardware Error]:   physical_address: 0x0000001111111180
Kernel panic - not syncing: Fatal hardware error!"""


def test_memory_error_that_firmware_told_of_is_named() -> None:
    assert named(GHES) == pages(0x276AEB0180)
    assert named(GHES.replace("type: fatal", "type: recoverable")) == pages(0x276AEB0180)
    assert named(GHES.replace("Error 1, type: corrected", "Error 1, type: fatal")) == pages(0x276AEB0180, 0x1111111180)


@pytest.mark.parametrize(
    ("old", "new"),
    [("type: fatal", "type: corrected"), ("type: fatal", "type: info"), ("memory error", "PCIe error")]
    + [("{1}", ""), ("physical_address: 0x", "physical_address: "), ("Error 0", "Error zero")],
)
def test_what_is_no_uncorrected_memory_error_of_this_boot_is_not_named(old: str, new: str) -> None:
    """Without a number in braces it is BERT's word on how the boot before ended."""
    assert named(GHES.replace(old, new)) == NOTHING


@pytest.mark.parametrize(
    ("mask", "size"),
    [("0xffffffffffff0000", 1 << 16), ("0xffffffffffe00000", 1 << 21), ("0xffffffffffc00000", PAGE)]
    + [("0x0000000000000000", PAGE), ("0xffffffffffff00ff", PAGE), ("0xffffffffffffffff", PAGE)],
)
def test_firmwares_mask_is_the_granularity(mask: str, size: int) -> None:
    start = 0x276AEB0180 & -size
    assert named(GHES.replace("0xffffffffffffffc0", mask)) == RangeSet([(start, start + size)])


def test_reports_of_firmware_that_are_printed_at_the_same_time_are_told_apart() -> None:
    one, two = GHES.split("\n"), GHES.replace("{1}", "{2}").replace("276aeb0180", "2222222180").split("\n")
    both = "\n".join(line for pair in zip(one, two, strict=True) for line in pair)
    assert named(both) == pages(0x276AEB0180, 0x2222222180)


def test_of_very_many_addresses_the_last_count() -> None:
    problems = Problems()
    lines = records("\n".join(check(UC, n << 13) for n in range(1, 3001)))
    found = named_in(lines, problems)
    assert found == pages(*(n << 13 for n in range(3001 - 1024, 3001)))
    assert len(problems) == 1


lines = st.sampled_from([*FATAL.split("\n"), *GHES.split("\n"), *check(UC, 1, 1, AMD, "IPID 9600000000").split("\n")])
noise = st.text(alphabet="{}[]:0123456789abcdefx ADRMISCPOTUK,\n", max_size=60)


@given(st.lists(st.tuples(lines | noise, st.integers(0, 3), st.integers(0, 60)), max_size=40))
def test_no_text_raises_and_whatever_is_named_stood_there(written: list[tuple[str, int, int]]) -> None:
    found = named_in(
        [Record(0, 0, caller, text[cut:].encode(), None, None, None) for text, caller, cut in written], Problems()
    )
    assert all(start % PAGE == end % PAGE == 0 for start, end in found)
    assert found.size <= len(written) << 21


def dead_with(log: list[Record]) -> DeadKernel:
    ring = Ring(10, 17)
    for record in log:
        ring.write(record.text, record.caller)
    kernel = DyingKernel()
    ring.place(kernel)
    return DeadKernel(kernel.mem, kernel.info())


def test_dead_kernel_reads_its_log_for_them_once() -> None:
    dead = dead_with([*records("Linux version"), *records(FATAL)])
    assert dead.machine_checks() == pages(0x1F3A5C7940)
    assert dead.machine_checks() is dead.machine_checks()
    log = dead.log()
    assert log is not None
    assert len(list(log)) == 8
    assert list(dead.problems) == []


def test_log_without_such_lines_is_not_passed_over_record_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.witness.machine_check.named_in", None)
    assert dead_with(records("Linux version\nnothing happened")).machine_checks() == NOTHING


def test_machine_checks_that_were_given_are_believed_and_the_log_is_left_alone() -> None:
    kernel = DyingKernel()
    kernel.keys["SYMBOL(prb)"] = "dead000000000000"
    dead = DeadKernel(kernel.mem, kernel.info())
    dead.given_machine_checks(pages(0x5000))
    assert dead.machine_checks() == pages(0x5000)
    assert list(dead.problems) == []


def test_log_that_cannot_be_had_names_nothing_and_is_told_only_if_there_is_one() -> None:
    kernel = DyingKernel()
    dead = DeadKernel(kernel.mem, kernel.info())
    assert (dead.machine_checks(), dead.log(), list(dead.problems)) == (NOTHING, None, [])
    kernel.keys["SYMBOL(prb)"] = "dead000000000000"
    dead = DeadKernel(kernel.mem, kernel.info())
    assert (dead.machine_checks(), dead.log()) == (NOTHING, None)
    (line,) = dead.problems
    assert "log not known" in line


def test_rule_refuses_the_pages_and_is_none_without_any() -> None:
    assert rules.rule(NOTHING) is None
    rule = rules.rule(pages(0x12345678))
    assert rule is not None
    assert (rule.name, rule.deny, rule.trouble) == ("machine check", True, RAM)
    assert RangeSet(rule.pages.ranges(0, 1 << 46)) == pages(0x12345678)
