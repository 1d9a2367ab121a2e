# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of other programs. A plug-in is a function that takes a :class:`Context` and returns a Rule, several, or None.

It is found by the entry points of group ``oldmem.rules``, or named as MODULE:FUNCTION (FILE:FUNCTION where there is a
slash in it). All of it, its import included, runs in a child process (guard.child) with a time-out; its rules come back
as a compiled guard, checked like one from anywhere else. Where it raises, hangs, dies or answers nonsense, what it had
declared (:func:`rule_plugin`) counts instead."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from guard import child
from guard.compiled import MAX_RULES, compile_guard, parse_guard
from guard.errors import Error
from guard.pageset import PageSet
from guard.physmem import ExactMemory
from guard.ranges import Range, RangeSet
from guard.registry import NOT_RAM, RAM, Registry, Rule, deny_rule
from guard.witness.memory import Problems

GROUP = "oldmem.rules"
ENVIRONMENT = "OLDMEM_RULES"
TIMEOUT = 30.0  # seconds for each plug-in

_DECLARED, _RULES, _TROUBLED, _LISTED, _WRONG = b"D", b"R", b"T", b"L", b"W"
_FRAME = struct.Struct("=cQ")
_MAX_ANSWER = 64 << 20
_MAX_TEXT = 240
_END = 1 << 64
F = TypeVar("F", bound=Callable[..., Any])
Send = Callable[[bytes, bytes], None]


class Plugin(NamedTuple):
    """*name* is what messages and its rules are called by, *value* MODULE:FUNCTION."""

    name: str
    value: str

    def __str__(self) -> str:
        return self.name if self.name == self.value else f"{self.name} ({self.value})"


class Context(NamedTuple):
    """What a plug-in is told of the machine.

    *memory* reads old memory by physical address through the rules known so far, exactly or not at all (ReadError);
    *envelope* is what may be RAM by firmware and devices, in bytes; pages are of *page_size* bytes; *root* is where the
    capture environment's /sys and /proc are ("/", or the folder of a recorded machine), *arch* the dead machine's name
    as uname(2) has it, *vmcoreinfo_paddr* where firmware says that its VMCOREINFO note is, if it says so."""

    memory: ExactMemory
    envelope: RangeSet
    page_size: int
    root: str
    arch: str
    vmcoreinfo_paddr: int | None = None


def rule_plugin(trouble: str = RAM, domain: tuple[int, int] | None = None) -> Callable[[F], F]:
    """Declares, before a plug-in is asked, what counts where it gives no good answer: RAM (nothing is refused for it),
    or NOT_RAM (all of *domain* is: physical bytes). Whatever it answers, it may speak about *domain* only.

    Raises ValueError for a *trouble* that is neither, for a *domain* that is none, and for NOT_RAM without one."""
    if trouble not in (RAM, NOT_RAM):
        raise ValueError(f"trouble is {trouble!r}, expected {RAM!r} or {NOT_RAM!r}")
    if domain is None and trouble == NOT_RAM:
        raise ValueError("trouble not-ram needs a domain: what is refused where there is no answer")
    if domain is not None and not 0 <= domain[0] < domain[1] <= _END:
        raise ValueError(f"no domain goes from {domain[0]:#x} to {domain[1]:#x}")

    def declare(function: F) -> F:
        function.oldmem_declares = trouble, domain  # type: ignore[attr-defined]
        return function

    return declare


def named(value: str) -> Plugin:
    """The plug-in MODULE:FUNCTION. Raises Error where that is not its form."""
    module, colon, function = value.rpartition(":")
    if not (module and colon and function):
        raise Error(f"{value!r} names no rule plug-in, expected MODULE:FUNCTION or FILE:FUNCTION")
    return Plugin(_one_line(value), value)


def installed(problems: Problems) -> list[Plugin]:
    """The plug-ins that installed distributions declare. In a child too: importlib.metadata is large."""
    answer, why = _heard(_list, TIMEOUT)
    if why:
        problems.note(f"entry points {GROUP}: {why}; no installed rule plug-in is asked")
    lines = answer.get(_LISTED, b"").decode().split("\n")
    return [Plugin(_one_line(name), value) for name, tab, value in (line.partition("\t") for line in lines) if tab]


def _list(send: Send) -> None:
    try:
        from importlib.metadata import entry_points
    except ModuleNotFoundError:  # a capture initramfs has none
        return
    found = sorted({(e.name, e.value.partition("[")[0].strip()) for e in entry_points(group=GROUP)})
    send(_LISTED, "\n".join(map("\t".join, found)).encode())


def install(
    plugins: Iterable[Plugin],
    context: Context,
    registry: Registry,
    problems: Problems,
    timeout: float | None = None,
) -> None:
    """Asks each of *plugins* once, in turn, for up to *timeout* seconds (default: TIMEOUT), and puts what follows in
    force. Its rules are called by its name and theirs, so none takes a name that a built-in rule has or will have.
    Never raises for what a plug-in does: that is a line in *problems*."""
    for plugin in plugins:
        answer, why = _heard(partial(_ask, plugin, context), TIMEOUT if timeout is None else timeout)
        try:
            rules = [] if why else _received(answer)
        except (Error, KeyError):
            rules, why = [], "ended without an answer"
        for rule in rules:
            if rule.troubled:
                then = "it is refused" if rule.trouble == NOT_RAM else "it is not refused for that"
                problems.note(f"rule {plugin.name}: {rule.name}: no answer about {rule.troubled}; {then}")
        if why:
            rules = _instead(answer.get(_DECLARED, b""), why, registry.page_size)
            then = f"all of {rules[0].troubled} is refused" if rules else "nothing is refused for it"
            problems.note(f"rule plug-in {plugin} {why}; {then}")
        for rule in rules:
            registry.register(rule._replace(name=_free(f"{plugin.name}: {rule.name}", registry)))


def _free(name: str, registry: Registry) -> str:
    """*name*, or where two plug-ins are called the same, that with a number."""
    taken = {rule.name for rule in registry}
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _instead(declared: bytes, why: str, page_size: int) -> list[Rule]:
    """The rule that follows from what a plug-in in trouble had declared; none where that is RAM, or nothing yet."""
    words = declared.decode("ascii", "replace").split()
    if len(words) != 3 or words[0] != NOT_RAM or not (words[1].isdecimal() and words[2].isdecimal()):
        return []
    refused = RangeSet([(int(words[1]), int(words[2]))]) & RangeSet([(0, _END)])
    rule = deny_rule("no answer", refused, f"the plug-in {why}", page_size)
    return [rule._replace(trouble=NOT_RAM, troubled=refused)] if refused else []


def _received(answer: dict[bytes, bytes]) -> list[Rule]:
    troubled = {rule.name: rule for rule in parse_guard(answer[_TROUBLED])}
    rules = []
    for rule in parse_guard(answer[_RULES]):
        known = troubled[rule.name]
        ranges = RangeSet.of_ascending(known.pages.ranges(*known.domain))
        rules.append(rule._replace(trouble=known.reason, troubled=ranges))
    return rules


# What runs in the child


class _NonsenseError(Exception):
    """Something was returned that is no rule for this machine."""


def _ask(plugin: Plugin, context: Context, send: Send) -> None:
    function = _function(plugin.value)
    trouble, domain = getattr(function, "oldmem_declares", (RAM, None))
    start, end = domain or (0, _END)
    send(_DECLARED, f"{trouble} {start} {end}".encode())
    rules, troubled = Registry(context.page_size), Registry(context.page_size)
    for rule in _each(function(context)):
        _check(rule, Range(start, end), context.page_size)
        try:
            rules.register(rule)
        except ValueError as e:
            raise _NonsenseError(f"returned rules that cannot be: {e}") from None
        inside = RangeSet([rule.domain]) & rule.troubled
        troubled.register(deny_rule(rule.name, inside, rule.trouble, context.page_size))
    try:
        send(_TROUBLED, compile_guard(troubled))
        send(_RULES, compile_guard(rules))
    except Error as e:
        raise _NonsenseError(f"returned rules that cannot be: {e}") from None


def _function(value: str) -> Callable[[Context], object]:
    module, _, path = value.rpartition(":")
    if "/" in module:
        with open(module, "rb") as file:
            code = compile(file.read(), module, "exec")
        found: Any = type(sys)(os.path.basename(module).partition(".")[0])
        found.__file__ = module
        sys.modules[found.__name__] = found
        exec(code, found.__dict__)
    else:
        __import__(module)
        found = sys.modules[module]
    for name in path.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def _each(answer: object) -> Iterator[Rule]:
    if answer is None:
        return
    if isinstance(answer, Rule):
        answer = [answer]
    if isinstance(answer, str | bytes) or not isinstance(answer, Iterable):
        raise _NonsenseError(f"returned {_one_line(repr(answer))}, expected a Rule, several, or None")
    for number, rule in enumerate(answer):
        if not isinstance(rule, Rule):
            raise _NonsenseError(f"returned {_one_line(repr(rule))} among its rules")
        if number == MAX_RULES:
            raise _NonsenseError(f"returned more than {MAX_RULES} rules")
        yield rule


def _check(rule: Rule, declared: Range, page_size: int) -> None:
    """What register() and compile_guard() take for granted; raises _NonsenseError."""
    wanted = {"name": str, "reason": str, "pages": PageSet, "deny": bool, "troubled": RangeSet}
    for field, kind in wanted.items():
        if not isinstance(getattr(rule, field), kind):
            raise _NonsenseError(f"returned a rule whose {field} is {_one_line(repr(getattr(rule, field)))}")
    name = f"rule {_one_line(rule.name)!r}"
    if rule.trouble not in (RAM, NOT_RAM):
        raise _NonsenseError(f"returned {name} whose trouble is {_one_line(repr(rule.trouble))}")
    if not (isinstance(rule.domain, tuple) and len(rule.domain) == 2 and all(isinstance(a, int) for a in rule.domain)):
        raise _NonsenseError(f"returned {name} whose domain is {_one_line(repr(rule.domain))}")
    start, end = rule.domain
    if start % page_size or end % page_size:
        raise _NonsenseError(f"returned {name} for {start:#x} to {end:#x}, which are not whole pages")
    if start < end and not declared.start <= start < end <= declared.end:
        raise _NonsenseError(f"returned {name} for {Range(start, end)}, but had declared {declared}")


def _one_line(text: str) -> str:
    text = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


# Between the two


def _heard(work: Callable[[Send], None], timeout: float) -> tuple[dict[bytes, bytes], str]:
    """What *work* sent from its child process, by kind, and why that may not be all; "" if it is."""
    fd = os.memfd_create("oldmem-plugin", os.MFD_CLOEXEC)
    try:

        def send(kind: bytes, data: bytes) -> None:
            if len(data) > _MAX_ANSWER:
                raise _NonsenseError(f"returned rules of {len(data)} bytes, more than {_MAX_ANSWER}")
            os.writev(fd, (_FRAME.pack(kind, len(data)), data))

        def guarded() -> None:
            try:
                work(send)
            except _NonsenseError as e:
                send(_WRONG, str(e).encode("utf-8", "backslashreplace"))
            except BaseException as e:  # SystemExit too
                send(_WRONG, f"raised {_one_line(f'{type(e).__name__}: {e}')}".encode())

        why = child.run(guarded, timeout)
        answer = _frames(fd)
    finally:
        os.close(fd)
    return answer, answer.get(_WRONG, b"").decode() or why


def _frames(fd: int) -> dict[bytes, bytes]:
    """The whole frames in the file, one of each kind."""
    found: dict[bytes, bytes] = {}
    at = 0
    while len(head := os.pread(fd, _FRAME.size, at)) == _FRAME.size:
        kind, size = _FRAME.unpack(head)
        data = os.pread(fd, min(size, _MAX_ANSWER), at + _FRAME.size)
        if len(data) == size:
            found[kind] = data
        at += _FRAME.size + size
    return found
