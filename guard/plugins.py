# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of other programs. A plug-in is a function that takes a :class:`Context` and returns a Rule, several, or None.

It is found by the entry points of group ``oldmem.rules``, or named as MODULE:FUNCTION (FILE:FUNCTION where there is a
slash in it). All of it, its import included, runs in a child process (guard.child) with a time-out; its rules come back
as a compiled guard, checked like one from anywhere else. Where it raises, hangs, dies or answers nonsense, what it had
declared (:func:`rule_plugin`) counts instead. Where it comes to its end before it has declared anything, or the search
for entry points does, nobody knows what would have been refused: that it was not must show in how the command ends."""

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

_DECLARED, _RULES, _TROUBLED, _LISTED, _WRONG, _ABSENT = b"D", b"R", b"T", b"L", b"W", b"A"
_FRAME = struct.Struct("=cQ")
_MAX_ANSWER = 64 << 20
_MAX_TEXT = 240
_END = 1 << 64
F = TypeVar("F", bound=Callable[..., Any])
Send = Callable[[bytes, bytes], None]


class Plugin(NamedTuple):
    """*name* is what messages and its rules are called by, *value* MODULE:FUNCTION. *must_be_there*: somebody asked for
    it by that, and may have mistyped it."""

    name: str
    value: str
    must_be_there: bool = False

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
    return Plugin(_one_line(value), value, must_be_there=True)


def installed(problems: Problems) -> tuple[list[Plugin], list[str]]:
    """The plug-ins that installed distributions declare. In a child too: importlib.metadata is large. Where they cannot
    be found that is told in *problems*, and as the second of what is returned, for the end of the command."""
    answer, why = _heard(_list, TIMEOUT)
    if _LISTED not in answer:
        line = f"entry points {GROUP}: {why or 'ended without an answer'}; no installed rule plug-in is asked"
        problems.note(line)
        return [], [line]
    lines = answer[_LISTED].decode().split("\n")
    found = [Plugin(_one_line(name), value) for name, tab, value in (line.partition("\t") for line in lines) if tab]
    return found, []


def _list(send: Send) -> None:
    try:
        from importlib.metadata import entry_points
    except ModuleNotFoundError as e:
        if e.name != "importlib.metadata":
            raise
        send(_LISTED, b"")  # a capture initramfs has none
        return
    found = sorted({(e.name, e.value.partition("[")[0].strip()) for e in entry_points(group=GROUP)})
    send(_LISTED, "\n".join(map("\t".join, found)).encode())


def install(
    plugins: Iterable[Plugin],
    context: Context,
    registry: Registry,
    problems: Problems,
    timeout: float | None = None,
) -> list[str]:
    """Asks each of *plugins* once, in turn, for up to *timeout* seconds (default: TIMEOUT), and puts what follows in
    force. Its rules are called by its name and theirs, so none takes a name that a built-in rule has or will have.

    What a plug-in does is a line in *problems*; those lines are returned by which nobody knows what would have been
    refused. Raises Error where one that must be there is not."""
    unknown: list[str] = []
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
        if why and plugin.must_be_there and _ABSENT in answer:
            raise Error(f"rule plug-in {plugin} {why}")
        if why:
            declared = _policy(answer.get(_DECLARED, b""))
            rules = _instead(declared, why, registry.page_size) if declared else []
            then = f"all of {rules[0].troubled} is refused" if rules else "nothing is refused for it"
            if declared is None:
                then = "what it refuses is not known"
                unknown.append(f"rule plug-in {plugin} {why}; {then}, and was not refused")
            problems.note(f"rule plug-in {plugin} {why}; {then}")
        for rule in rules:
            registry.register(rule._replace(name=_free(f"{plugin.name}: {rule.name}", registry)))
    return unknown


def _free(name: str, registry: Registry) -> str:
    """*name*, or where two plug-ins are called the same, that with a number."""
    taken = {rule.name for rule in registry}
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _policy(declared: bytes) -> tuple[str, Range] | None:
    """What counts where there is no answer, and for which physical bytes; None where nothing was declared."""
    words = declared.decode("ascii", "replace").split()
    if len(words) != 3 or words[0] not in (RAM, NOT_RAM) or not (words[1].isdecimal() and words[2].isdecimal()):
        return None
    start, end = int(words[1]), int(words[2])
    return (words[0], Range(start, end)) if start < end <= _END else None


def _instead(policy: tuple[str, Range], why: str, page_size: int) -> list[Rule]:
    """The rule that follows from the *policy* of a plug-in in trouble; none where that is RAM."""
    trouble, domain = policy
    if trouble == RAM:
        return []
    refused = RangeSet([domain])
    rule = deny_rule("no answer", refused, f"the plug-in {why}", page_size)
    return [rule._replace(trouble=NOT_RAM, troubled=refused)]


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


class _AbsentError(Exception):
    """There is no such plug-in."""


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
    """Raises _AbsentError, and whatever else happens while it is imported."""
    module, _, path = value.rpartition(":")
    found: Any = _of_file(module) if "/" in module else _of_module(module)
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as e:
            raise _AbsentError(f"is not there: {e}") from None
    if not callable(found):
        raise _AbsentError(f"is not there: {path} is {_one_line(repr(found))}, expected a function")
    return found  # type: ignore[no-any-return]


def _of_file(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as e:
        raise _AbsentError(f"is not there: {path}: {e.strerror}") from None
    code = compile(source, path, "exec")
    found: Any = type(sys)(os.path.basename(path).partition(".")[0])
    found.__file__ = path
    sys.modules[found.__name__] = found
    exec(code, found.__dict__)
    return found


def _of_module(name: str) -> Any:
    try:
        __import__(name)
    except ModuleNotFoundError as e:
        if e.name and f"{name}.".startswith(f"{e.name}."):  # not what the module itself imports
            raise _AbsentError(f"is not there: {e}") from None
        raise
    return sys.modules[name]


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
            except _AbsentError as e:
                send(_ABSENT, b"")
                send(_WRONG, _one_line(str(e)).encode("utf-8", "backslashreplace"))
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
