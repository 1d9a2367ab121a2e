# SPDX-License-Identifier: LGPL-2.1-or-later
"""The registry of rules that gate every read of old memory: the user-space twin of the kernel's vmcore_cb list.

Semantics of fs/proc/vmcore.c: a page is RAM unless a rule says otherwise; rules are asked in order of registration
and the first refusal ends it; a rule speaks about its own domain only; a refused page reads as zeros. Unlike the
kernel's callbacks, rules are materialised (ranges or bitmaps) when they are registered, so that no read waits for a
device or for the interpreter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from guard._core import ffi, lib
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet

if TYPE_CHECKING:
    from guard._core import CData

NOT_RAM = "not-ram"
RAM = "ram"


class GuardWarning(UserWarning):
    """The registry was changed at a time when a reader may already have seen old memory without that change."""


class Rule(NamedTuple):
    """One reason for which pages must not be read.

    *domain* is what the rule speaks about (physical bytes, whole pages). Inside it, *pages* are the only pages that
    are RAM, or with *deny* those that are not. *trouble* says what the rule answered where it could not find out:
    NOT_RAM (virtio-mem, as the kernel's driver does) or RAM (Xen HVM); *troubled* where that was."""

    name: str
    domain: Range
    pages: PageSet
    deny: bool
    reason: str
    trouble: str = NOT_RAM
    troubled: RangeSet = RangeSet()


def allow_rule(name: str, domain: Range, ram: RangeSet, reason: str, page_size: int = 4096) -> Rule:
    """Inside *domain* only the whole pages of *ram* may be read."""
    return Rule(name, domain, PageSet.of_ranges(ram, page_size), False, reason)


def deny_rule(name: str, refused: RangeSet, reason: str, page_size: int = 4096) -> Rule:
    """No page that *refused* touches may be read."""
    pages = refused.outer_pages(page_size)
    ends = [r.end for r in pages]
    domain = Range(min((r.start for r in pages), default=0), max(ends, default=0))
    return Rule(name, domain, PageSet.of_ranges(pages, page_size), True, reason)


def bitmap_rule(name: str, domain: Range, block_size: int, bitmap: bytes, reason: str, page_size: int = 4096) -> Rule:
    """Inside *domain* only the blocks whose bit is set may be read; blocks beyond the bitmap may not."""
    blocks = min(len(bitmap) * 8, domain.size // block_size)
    return Rule(name, domain, PageSet.of_bitmap(domain.start, block_size, blocks, bitmap, page_size), False, reason)


def callback_rule(
    name: str,
    domain: Range,
    block_size: int,
    is_ram: Callable[[int], bool],
    reason: str,
    trouble: str = NOT_RAM,
    page_size: int = 4096,
) -> Rule:
    """Ask *is_ram* once for each block (its physical address in bytes) and keep the answers.

    An answer that is no bool, or an exception, is trouble: the rule's declared policy decides for that block."""
    bits = bytearray((domain.size // block_size + 7) // 8)
    troubled = []
    for i in range(domain.size // block_size):
        at = domain.start + i * block_size
        try:
            answer = is_ram(at)
        except Exception:  # whatever a plug-in raises, its policy answers
            answer = None
        if answer is not True and answer is not False:
            troubled.append((at, at + block_size))
            answer = trouble == RAM
        bits[i // 8] |= answer << i % 8
    rule = bitmap_rule(name, domain, block_size, bytes(bits), reason, page_size)
    return rule._replace(trouble=trouble, troubled=RangeSet(troubled))


class Registry:
    """Rules in force, in order. One registry serves one thread at a time."""

    def __init__(self, page_size: int = 4096) -> None:
        self.page_size = page_size
        self.opened = False
        self._shift = page_size.bit_length() - 1
        self._rules: list[Rule] = []
        self._c_rules: CData = ffi.NULL
        self.c: CData = ffi.new("struct gate *")

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules)

    def register(self, rule: Rule) -> None:
        """Put *rule* in force, behind those already there. Raises ValueError if the name is taken.

        Warns (GuardWarning) once old memory has been opened: readers may have seen pages that the rule refuses."""
        if any(r.name == rule.name for r in self._rules):
            raise ValueError(f"a rule named {rule.name!r} is registered already")
        if self.opened:
            warnings.warn(f"rule {rule.name!r} registered after old memory was opened", GuardWarning, stacklevel=2)
        self._install([*self._rules, rule])

    def unregister(self, name: str) -> None:
        """Take a rule out of force. Raises KeyError if there is none of that name.

        Once old memory has been opened the rule stays in force as it is, with a warning: a hole must not open under
        a reader (before Linux 5.16 the kernel did open it; in 5.16 it turned every later read into zeros)."""
        if not any(r.name == name for r in self._rules):
            raise KeyError(name)
        if self.opened:
            message = f"rule {name!r} unregistered after old memory was opened; it stays in force"
            warnings.warn(message, GuardWarning, stacklevel=2)
            return
        self._install([r for r in self._rules if r.name != name])

    def _install(self, rules: list[Rule]) -> None:
        counted = self.counters()
        array = ffi.new("struct gate_rule[]", len(rules))
        for c, rule in zip(array, rules, strict=True):
            c.first, c.end = rule.domain.start >> self._shift, rule.domain.end >> self._shift
            c.set, c.deny, c.refused = rule.pages.c[0], rule.deny, counted.get(rule.name, 0)
        self._rules, self._c_rules = rules, array
        self.c.n, self.c.rules = len(rules), array

    def pfn_is_ram(self, pfn: int) -> bool:
        """May the page be read as RAM of the dead machine?"""
        return int(lib.gate_refuser(self.c, pfn)) < 0

    def refuser(self, pfn: int) -> Rule | None:
        """The rule that refuses the page, None where it is RAM."""
        i = lib.gate_refuser(self.c, pfn)
        return None if i < 0 else self._rules[i]

    def next_ram(self, pfn: int, end: int) -> int:
        """The first pfn in [pfn, end) that is RAM; *end* if there is none."""
        return int(lib.gate_next(self.c, pfn, end, True))

    def next_refused(self, pfn: int, end: int) -> int:
        """The first pfn in [pfn, end) that is refused; *end* if there is none."""
        return int(lib.gate_next(self.c, pfn, end, False))

    def verdicts(self, start: int, end: int) -> Iterator[tuple[Range, Rule | None]]:
        """[start, end) (bytes, whole pages) as maximal runs with the rule that refuses each, None for RAM."""
        refuser = ffi.new("int *")
        pfn, stop = start >> self._shift, end >> self._shift
        while pfn < stop:
            run_end = lib.gate_run(self.c, pfn, stop, refuser)
            rule = self._rules[refuser[0]] if refuser[0] >= 0 else None
            yield Range(pfn << self._shift, run_end << self._shift), rule
            pfn = run_end

    def ram(self, ranges: RangeSet) -> RangeSet:
        """The part of *ranges* that may be read."""
        pages = ranges.inner_pages(self.page_size)
        return RangeSet(run for r in pages for run, rule in self.verdicts(*r) if rule is None)

    def counters(self) -> dict[str, int]:
        """Pages that reads asked for and each rule turned into zeros; a page read twice counts twice."""
        return {rule.name: int(self._c_rules[i].refused) for i, rule in enumerate(self._rules)}
