# SPDX-License-Identifier: LGPL-2.1-or-later
"""The registry of rules that gate every read of old memory: the user-space twin of the kernel's vmcore_cb list.

Semantics of fs/proc/vmcore.c: a page is RAM unless a rule says otherwise; rules are asked in order of registration
and the first refusal ends it; a rule speaks about its own domain only; a refused page reads as zeros. Unlike the
kernel's callbacks, rules are materialised (ranges or bitmaps) when they are registered, so that no read waits for a
device or for the interpreter."""

from __future__ import annotations

import warnings
from _thread import allocate_lock
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from guard import shared
from guard._core import ffi, lib
from guard.pageset import PageSet
from guard.ranges import Range, RangeSet

if TYPE_CHECKING:
    from mmap import mmap

    from guard._core import CData

NOT_RAM = "not-ram"
RAM = "ram"
_NO, _YES = 1, 2  # of a callback; 0 is no answer
_COUNTERS = 512  # at a time: a page of them


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
    mask = page_size - 1
    pages = PageSet.of_ascending(((r.start & ~mask, r.end + mask & ~mask) for r in refused), page_size)
    domain = Range(pages.data[0] * page_size, pages.data[-1] * page_size) if pages.data else Range(0, 0)
    return Rule(name, domain, pages, True, reason)


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
    timeout: float | None = None,
) -> Rule:
    """Ask *is_ram* once for each block (its physical address in bytes) and keep the answers.

    An answer that is no bool, or an exception, is trouble: the rule's declared policy decides for that block. With
    *timeout*, in seconds and for all blocks together, *is_ram* runs in a child process: what has no answer by then, or
    when that process dies, is trouble too. Without it, it runs here, and has to come to an end. Raises ValueError where
    blocks do not consist of whole pages."""
    if block_size <= 0:
        raise ValueError(f"blocks of {block_size} bytes")
    blocks = max(domain.size, 0) // block_size

    def ask(answers: bytearray | mmap) -> None:
        for i in range(blocks):
            try:
                answer = is_ram(domain.start + i * block_size)
            except Exception:  # whatever it raises, the policy answers
                continue
            if answer is True or answer is False:
                answers[i] = _YES if answer else _NO

    answers: bytearray | mmap = bytearray(blocks)
    if timeout is not None and blocks:
        from mmap import mmap

        from guard import child

        answers = mmap(-1, blocks)  # shared: what was answered before the time was up counts
        child.run(lambda: ask(answers), timeout)
    else:
        ask(answers)
    bits = bytearray((blocks + 7) // 8)
    troubled = []
    for i in range(blocks):
        if not answers[i]:
            at = domain.start + i * block_size
            troubled.append((at, at + block_size))
        bits[i // 8] |= (answers[i] == _YES or (trouble == RAM and not answers[i])) << i % 8
    rule = bitmap_rule(name, domain, block_size, bytes(bits), reason, page_size)
    return rule._replace(trouble=trouble, troubled=RangeSet.of_ascending(troubled))


class _InForce(NamedTuple):
    """The rules at one moment, as Python and as C know them. What is in force is replaced, never changed."""

    rules: tuple[Rule, ...]
    array: CData  # struct gate_rule[], with room for more
    gate: CData


class Registry:
    """Rules in force, in order.

    Any thread may register, unregister and ask at any time, also while others read old memory (each through an
    OldMemory of its own): a read that begins after ``register`` has returned obeys the rule, one that runs already
    does so from its next run of pages on, at the latest. Reads take no lock. The price is that what they may still be
    looking at, which is every rule that ever was in force, lives as long as the registry."""

    def __init__(self, page_size: int = 4096) -> None:
        self.page_size = page_size
        self.opened = False
        self._shift = page_size.bit_length() - 1
        self._pfns = 1 << 64 - self._shift
        self._changing = allocate_lock()
        self._kept: list[object] = []
        self._counters: list[CData] = []
        self._counted = 0
        self.slot: CData = ffi.new("struct gate **")
        self._install((), self._new_array(4))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._now.rules)

    @property
    def c(self) -> CData:
        """The gate in force (struct gate); the registry keeps it alive."""
        return self._now.gate

    def in_force(self) -> tuple[tuple[Rule, ...], CData]:
        """The rules, and the gate (struct gate) that has them at the same places."""
        return self._now.rules, self._now.gate

    def register(self, rule: Rule) -> None:
        """Put *rule* in force, behind those already there. A page that its domain has a part of is in its domain.

        Raises ValueError if the name is taken, the rule was made for pages of another size, or its domain is none.
        Warns (GuardWarning) once old memory has been opened: readers may have seen pages that the rule refuses."""
        self._check(rule)
        with self._changing:
            rules, array, _ = self._now
            if any(r.name == rule.name for r in rules):
                raise ValueError(f"a rule named {rule.name!r} is registered already")
            if len(rules) == len(array):
                array = self._copied(range(len(rules)), 2 * len(rules))
            self._put(rule, array[len(rules)])  # which no gate counts yet
            self._install((*rules, rule), array)
        if self.opened:
            warnings.warn(f"rule {rule.name!r} registered after old memory was opened", GuardWarning, stacklevel=2)

    def replace(self, rule: Rule) -> None:
        """Put *rule* in the place of the one of its name, with a counter of its own.

        Raises KeyError if there is none of that name, ValueError as :meth:`register`, and also once old memory has been
        opened: what a reader may see by then does not change."""
        self._check(rule)
        with self._changing:
            rules = self._now.rules
            at = next((i for i, r in enumerate(rules) if r.name == rule.name), None)
            if at is None:
                raise KeyError(rule.name)
            if self.opened:
                raise ValueError(f"rule {rule.name!r} cannot be replaced: old memory has been opened")
            array = self._copied(range(len(rules)), len(rules))
            self._put(rule, array[at])
            self._install((*rules[:at], rule, *rules[at + 1 :]), array)

    def _check(self, rule: Rule) -> None:
        if rule.pages.page_shift != self._shift:
            theirs = 1 << rule.pages.page_shift
            raise ValueError(f"rule {rule.name!r} is made for pages of {theirs} bytes, here they have {self.page_size}")
        if not 0 <= rule.domain.start <= rule.domain.end <= 1 << 64:
            start, end = rule.domain
            raise ValueError(f"rule {rule.name!r}: no domain goes from {start:#x} to {end:#x}")

    def _put(self, rule: Rule, c: CData) -> None:
        """Fill in a struct gate_rule that no gate in force has."""
        counter = self._new_counter()
        c.first, c.end = rule.domain.start >> self._shift, -(-rule.domain.end >> self._shift)
        c.set, c.deny, c.refused = rule.pages.c[0], rule.deny, counter
        self._kept.append(rule)

    def _new_counter(self) -> CData:
        """All processes that are forked from this one count into the same."""
        at = self._counted % _COUNTERS
        if not at:
            self._counters.append(shared.new("uint64_t", _COUNTERS))
        self._counted += 1
        return self._counters[-1] + at

    def unregister(self, name: str) -> None:
        """Take a rule out of force. Raises KeyError if there is none of that name.

        Once old memory has been opened the rule stays in force as it is, with a warning: a hole must not open under
        a reader (before Linux 5.16 the kernel did open it; in 5.16 it turned every later read into zeros)."""
        with self._changing:
            rules = self._now.rules
            staying = [i for i, rule in enumerate(rules) if rule.name != name]
            if len(staying) == len(rules):
                raise KeyError(name)
            if not self.opened:
                self._install(tuple(rules[i] for i in staying), self._copied(staying, len(rules)))
                return
        message = f"rule {name!r} unregistered after old memory was opened; it stays in force"
        warnings.warn(message, GuardWarning, stacklevel=2)

    def _copied(self, places: Sequence[int], room: int) -> CData:
        """A new array with these of the rules in force."""
        array = self._new_array(room)
        for to, i in enumerate(places):
            array[to] = self._now.array[i]
        return array

    def _new_array(self, room: int) -> CData:
        array = ffi.new("struct gate_rule[]", room)
        self._kept.append(array)
        return array

    def _install(self, rules: tuple[Rule, ...], array: CData) -> None:
        gate = ffi.new("struct gate *", {"n": len(rules), "rules": array})
        self._kept.append(gate)
        self._now = _InForce(rules, array, gate)
        lib.gate_install(self.slot, gate)

    def pfn_is_ram(self, pfn: int) -> bool:
        """May the page be read as RAM of the dead machine? Raises ValueError where no 64-bit address is in it."""
        return int(lib.gate_refuser(self.c, self._page(pfn))) < 0

    def refuser(self, pfn: int) -> Rule | None:
        """The rule that refuses the page, None where it is RAM. Raises ValueError as :meth:`pfn_is_ram`."""
        rules, gate = self.in_force()
        i = lib.gate_refuser(gate, self._page(pfn))
        return None if i < 0 else rules[i]

    def next_ram(self, pfn: int, end: int) -> int:
        """The first pfn in [pfn, end) that is RAM; *end* if there is none. Raises ValueError as :meth:`pfn_is_ram`."""
        return int(lib.gate_next(self.c, self._border(pfn), self._border(end), True))

    def next_refused(self, pfn: int, end: int) -> int:
        """The first pfn in [pfn, end) that is refused; *end* if there is none. Raises as :meth:`next_ram`."""
        return int(lib.gate_next(self.c, self._border(pfn), self._border(end), False))

    def _page(self, pfn: int) -> int:
        """Beyond the last page no rule says anything, and that must not be taken for RAM."""
        if not 0 <= pfn < self._pfns:
            raise ValueError(f"pfn {pfn:#x} is not between 0 and {self._pfns - 1:#x}")
        return pfn

    def _border(self, pfn: int) -> int:
        if not 0 <= pfn <= self._pfns:
            raise ValueError(f"pfn {pfn:#x} is not between 0 and {self._pfns:#x}")
        return pfn

    def verdicts(self, start: int, end: int) -> Iterator[tuple[Range, Rule | None]]:
        """[start, end) (bytes, whole pages) as maximal runs with the rule that refuses each, None for RAM; by the
        rules that are in force when it begins. Raises ValueError as :meth:`next_ram`."""
        refuser = ffi.new("int *")
        rules, gate = self.in_force()
        pfn, stop = self._border(start >> self._shift), self._border(end >> self._shift)
        while pfn < stop:
            run_end = lib.gate_run(gate, pfn, stop, refuser)
            rule = rules[refuser[0]] if refuser[0] >= 0 else None
            yield Range(pfn << self._shift, run_end << self._shift), rule
            pfn = run_end

    def ram(self, ranges: RangeSet) -> RangeSet:
        """The part of *ranges* that may be read."""
        pages = ranges.inner_pages(self.page_size)
        return RangeSet.of_ascending(run for r in pages for run, rule in self.verdicts(*r) if rule is None)

    def counters(self) -> dict[str, int]:
        """Pages that reads asked for and each rule turned into zeros; a page read twice counts twice."""
        rules, gate = self.in_force()
        return {rule.name: int(gate.rules[i].refused[0]) for i, rule in enumerate(rules)}
