# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rule plug-ins: what good ones get and give, and that no bad one costs more than what it had declared."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.guarded import open_machine
from guard import child, plugins
from guard.errors import Error
from guard.physmem import PREAD, ExactMemory, OldMemory, Segment
from guard.plugins import Context, Plugin
from guard.ranges import Range, RangeSet
from guard.registry import NOT_RAM, RAM, Registry, Rule, callback_rule, deny_rule
from guard.witness.memory import Problems
from initramfs.builder import Builder
from tests.image.machines import GIB, HIGH, VMCOREINFO_AT, RecordedKernel, Result, oldmem
from tests.pace import patience, wait_until
from tests.unit.guard_files import END as PAGES
from tests.unit.guard_files import rules as random_rules

PAGE = 4096
DOMAIN = (16 * PAGE, 32 * PAGE)
SHORT = 1.0
"""Seconds, for who never answers: all that comes before takes 0.03."""
EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"

HEAD = """
import itertools, os, signal, sys, time
from guard import *
from guard.plugins import Context
PAGE = 4096
def good():
    return deny_rule("good", RangeSet([(20 * PAGE, 21 * PAGE)]), "refused")
"""


class Machine:
    """64 pages, each filled with its number, of which a built-in rule refuses the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fd = os.memfd_create("image")
        os.write(self.fd, b"".join(bytes([p]) * PAGE for p in range(64)))
        self.registry = Registry()
        self.registry.register(deny_rule("built in", RangeSet([(0, PAGE)]), "belongs to us"))
        memory = OldMemory([Segment(0, 64 * PAGE, self.fd, 0, PREAD, "image")], self.registry)
        envelope = RangeSet([(0, 64 * PAGE)])
        self.context = Context(ExactMemory(memory), envelope, PAGE, str(folder), "x86_64", 0x1234)
        self.problems = Problems()

    def plugin(self, source: str, name: str = "plugin") -> Plugin:
        path = self.folder / f"{name}.py"
        path.write_text(HEAD + textwrap.dedent(source))
        return Plugin(name, f"{path}:rule")

    def ask(self, *asked: Plugin, timeout: float = 20.0) -> list[str]:
        return plugins.install(asked, self.context, self.registry, self.problems, patience(timeout))

    def refused(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for pfn in range(64):
            if rule := self.registry.refuser(pfn):
                found.setdefault(rule.name, []).append(pfn)
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    before = os.listdir("/proc/self/fd")
    made = Machine(tmp_path)
    yield made
    os.close(made.fd)
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ChildProcessError):  # nothing is left to be reaped
        os.waitpid(-1, os.WNOHANG)


def test_rules_of_a_plug_in_are_in_force_behind_the_others_and_called_by_its_name(machine: Machine) -> None:
    source = """
    @rule_plugin(trouble="not-ram", domain=(0, 64 * PAGE))
    def rule(context):
        yield deny_rule("two", RangeSet([(0, 3 * PAGE)]), "so it is")._replace(trouble="not-ram")
        yield bitmap_rule("bits", Range(8 * PAGE, 16 * PAGE), 2 * PAGE, b"\\x0b", "given back")
        yield deny_rule("nothing", RangeSet(), "not met")
    """
    machine.ask(machine.plugin(source))
    assert machine.problems == []
    assert [(r.name, r.reason, r.trouble) for r in machine.registry] == [
        ("built in", "belongs to us", NOT_RAM),
        ("plugin: two", "so it is", NOT_RAM),
        ("plugin: bits", "given back", NOT_RAM),
        ("plugin: nothing", "not met", NOT_RAM),
    ]
    assert machine.refused() == {"built in": [0], "plugin: two": [1, 2], "plugin: bits": [12, 13]}


@pytest.mark.parametrize("answer", ["None", "[]", "()", "iter(())"])
def test_a_plug_in_may_have_nothing_to_say(machine: Machine, answer: str) -> None:
    machine.ask(machine.plugin(f"def rule(context): return {answer}"))
    assert (machine.problems, machine.refused()) == ([], {"built in": [0]})


def test_a_plug_in_is_told_of_the_machine_and_reads_memory_through_the_rules_so_far(machine: Machine) -> None:
    source = """
    def rule(context):
        assert isinstance(context, Context)
        assert (context.page_size, context.arch, context.vmcoreinfo_paddr) == (PAGE, "x86_64", 0x1234)
        assert context.envelope == RangeSet([(0, 64 * PAGE)]) and os.path.isdir(context.root)
        try:
            context.memory.read(0, 8)
        except ReadError as e:
            assert "built in" in str(e)
        else:
            raise AssertionError("refused memory was read")
        (at,) = context.memory.read(40 * PAGE, 1)
        return deny_rule("found", RangeSet([(at * PAGE, at * PAGE + 1)]), "memory says so")
    """
    machine.ask(machine.plugin(source))
    assert (machine.problems, machine.refused()) == ([], {"built in": [0], "plugin: found": [40]})


def test_troubles_that_a_rule_had_itself_are_told_and_kept(machine: Machine) -> None:
    source = """
    def is_ram(paddr):
        return None if paddr == 18 * PAGE else paddr != 16 * PAGE
    def rule(context):
        for trouble in ("ram", "not-ram"):
            yield callback_rule(trouble, Range(16 * PAGE, 20 * PAGE), PAGE, is_ram, "asked", trouble)
    """
    machine.ask(machine.plugin(source))
    assert machine.refused() == {"built in": [0], "plugin: ram": [16], "plugin: not-ram": [18]}
    _, first, second = machine.registry
    assert (first.trouble, first.troubled) == (RAM, RangeSet([(18 * PAGE, 19 * PAGE)]))
    assert (second.trouble, second.troubled) == (NOT_RAM, first.troubled)
    assert machine.problems == [
        "rule plugin: ram: no answer about 0x12000-0x12fff; it is not refused for that",
        "rule plugin: not-ram: no answer about 0x12000-0x12fff; it is refused",
    ]


# What a plug-in does, and what is told of it
MISBEHAVIOUR = {
    "raise ValueError('no answer')": "raised ValueError: no answer",
    "raise ValueError('two\\nlines')": "raised ValueError: two\\nlines",
    "raise ValueError('x' * 10**6)": f"raised ValueError: {'x' * 225}...",
    "raise KeyboardInterrupt": "raised KeyboardInterrupt: ",
    "sys.exit(0)": "raised SystemExit: 0",
    "return rule(context)": "raised RecursionError: maximum recursion depth exceeded",
    "return (1 / 0 for _ in range(1))": "raised ZeroDivisionError: division by zero",
    "os._exit(0)": "ended without an answer",
    "os._exit(3)": "ended its process with status 3",
    "os.kill(os.getpid(), signal.SIGSEGV)": "was ended by signal 11 (Segmentation fault)",
    "os.closerange(0, 1000)": "ended its process with status 1",  # it has nowhere to write to any more
    "time.sleep(60)": "gave no answer within ",
    "max(itertools.repeat(0))": "gave no answer within ",  # in C, with the interpreter's lock held
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(60)": "gave no answer within ",
    "os.kill(os.getpid(), signal.SIGSTOP)": "gave no answer within ",
    "return 5": "returned 5, expected a Rule, several, or None",
    "return 'good'": "returned 'good', expected a Rule, several, or None",
    "return [good(), 5]": "returned 5 among its rules",
    "return [good(), good()]": "returned rules that cannot be: a rule named 'good' is registered already",
    "return itertools.repeat(good()._replace(name='same'))": "returned rules that cannot be: a rule named 'same' is",
    "return (good()._replace(name=str(i)) for i in itertools.count())": "returned more than 4096 rules",
    "return good()._replace(name=None)": "returned a rule whose name is None",
    "return good()._replace(reason=b'')": "returned a rule whose reason is b''",
    "return good()._replace(pages={20})": "returned a rule whose pages is {20}",
    "return good()._replace(deny=1)": "returned a rule whose deny is 1",
    "return good()._replace(troubled=[])": "returned a rule whose troubled is []",
    "return good()._replace(trouble='panic')": "returned rule 'good' whose trouble is 'panic'",
    "return good()._replace(domain=None)": "returned rule 'good' whose domain is None",
    "return good()._replace(domain=(0, 'x'))": "returned rule 'good' whose domain is (0, 'x')",
    "return good()._replace(domain=Range(20 * PAGE, 20 * PAGE + 5))": "returned rule 'good' for 0x14000 to 0x14005",
    "return good()._replace(domain=Range(20 * PAGE, 33 * PAGE))": "returned rule 'good' for 0x14000-0x20fff, but",
    "return good()._replace(domain=Range(-PAGE, 20 * PAGE))": "returned rule 'good' for -0x1000-0x13fff, but had dec",
    "return good()._replace(domain=Range(20 * PAGE, 1 << 65))": "returned rule 'good' for 0x14000-0x1ffffffff",
    "return good()._replace(domain=Range(21 * PAGE, 20 * PAGE))": "returned rules that cannot be: rule 'good'",
    "return deny_rule('large', RangeSet([(1 << 16, 1 << 17)]), 'x', 65536)": "returned rules that cannot be: rule 'l",
    "return deny_rule('x', RangeSet([(0, 1 << 65)]), 'x')": "raised ValueError: 0x0 to 0x20000000000000000 is not in",
    "r = good(); r.pages.data[0] = 90; return r": "returned rules that cannot be: these rules cannot be compil",
}


@pytest.mark.parametrize("trouble", [RAM, NOT_RAM])
@pytest.mark.parametrize("does", MISBEHAVIOUR)
def test_a_plug_in_that_misbehaves_costs_what_it_declared_and_one_line(
    does: str, trouble: str, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = machine.plugin(f"@rule_plugin({trouble!r}, {DOMAIN})\ndef rule(context):\n    {does}", "bad")
    good = [machine.plugin(f"def rule(context): return good()._replace(name='{i}')", f"good{i}") for i in (1, 2)]
    machine.ask(good[0])
    machine.ask(bad, timeout=SHORT if "no answer within" in MISBEHAVIOUR[does] else 20.0)
    machine.ask(good[1])
    (line,) = machine.problems
    assert line.removeprefix(f"rule plug-in {bad} ").startswith(MISBEHAVIOUR[does])
    assert line.isprintable()
    names = [rule.name for rule in machine.registry]
    if trouble == RAM:
        assert line.endswith("; nothing is refused for it")
        assert names == ["built in", "good1: 1", "good2: 2"]
        assert machine.refused() == {"built in": [0], "good1: 1": [20]}
    else:
        assert line.endswith("; all of 0x10000-0x1ffff is refused")
        assert names == ["built in", "good1: 1", "bad: no answer", "good2: 2"]
        assert machine.refused() == {
            "built in": [0],
            "good1: 1": [20],
            "bad: no answer": [p for p in range(16, 32) if p != 20],
        }
        rule = list(machine.registry)[2]
        assert (rule.trouble, rule.troubled) == (NOT_RAM, RangeSet([DOMAIN]))
        assert rule.reason.startswith("the plug-in ")
    assert capfd.readouterr().out == ""


TOO_LARGE = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); bytearray(1 << 29)"

# What comes to its end before it has declared anything
ABSENT = {
    "def rule(:": "raised SyntaxError: ",
    "raise OSError('while it is imported')": "raised OSError: while it is imported",
    "import no_such_module": "raised ModuleNotFoundError: No module named 'no_such_module'",
    "other = None": "is not there: module 'plugin' has no attribute 'rule'",
    "rule = 5": "is not there: rule is 5, expected a function",
    "while True: pass": "gave no answer within ",
    "os.kill(os.getpid(), signal.SIGKILL)": "was ended by signal 9 (Killed)",
    "os._exit(0)": "ended without an answer",
    f"{TOO_LARGE}": "raised MemoryError: ",
    f"{TOO_LARGE}, os._exit(1)": "raised MemoryError: ",
    "def rule(c): pass\nrule.oldmem_declares = 7": "raised TypeError: cannot unpack non-iterable int object",
    "def rule(c): raise OSError\nrule.oldmem_declares = 'not-ram', ('a', 'b')": "raised OSError: ",
    "rule_plugin('no')": "raised ValueError: trouble is 'no', expected 'ram' or 'not-ram'",
    "rule_plugin('not-ram')": "raised ValueError: trouble not-ram needs a domain",
    "rule_plugin(domain=(5, 5))": "raised ValueError: no domain goes from 0x5 to 0x5",
    "rule_plugin('not-ram', (0, 1 << 65))": "raised ValueError: no domain goes from 0x0 to 0x20000000000000000",
}


@pytest.mark.parametrize("source", ABSENT)
def test_where_nothing_was_declared_nothing_is_refused_and_that_nobody_knows_is_told(
    source: str, machine: Machine
) -> None:
    bad = machine.plugin(source)
    unknown = machine.ask(bad, timeout=SHORT if "while True" in source else 20.0)
    (line,) = machine.problems
    assert line.startswith(f"rule plug-in {bad} {ABSENT[source]}")
    assert line.endswith("; what it refuses is not known")
    assert unknown == [f"{line}, and was not refused"]
    assert machine.refused() == {"built in": [0]}


def test_function_that_takes_no_context_has_declared_that_it_may_be_done_without(machine: Machine) -> None:
    assert machine.ask(machine.plugin("def rule(): pass")) == []
    (line,) = machine.problems
    assert line.endswith(
        "raised TypeError: rule() takes 0 positional arguments but 1 was given; nothing is refused for it"
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module:rule", "No module named 'no_such_module'"),
        ("json.no_such_module:rule", "No module named 'json.no_such_module'"),
        ("no_such.module:rule", "No module named 'no_such'"),
        ("json:no_such_function", "module 'json' has no attribute 'no_such_function'"),
        ("json:JSONDecoder.no_such", "type object 'JSONDecoder' has no attribute 'no_such'"),
        ("string:digits", "digits is '0123456789', expected a function"),
        ("./no_such_file.py:rule", "./no_such_file.py: No such file or directory"),
        ("/:rule", "/: Is a directory"),
    ],
)
def test_what_was_asked_for_and_is_not_there_is_an_error(value: str, why: str, machine: Machine) -> None:
    with pytest.raises(Error) as told:
        machine.ask(plugins.named(value))
    assert str(told.value) == f"rule plug-in {value} is not there: {why}"
    assert machine.problems == []
    assert len(machine.ask(Plugin(value, value))) == 1  # an installed one


def test_module_that_was_asked_for_and_lacks_another_one_is_not_mistyped(machine: Machine) -> None:
    asked = machine.plugin("import no_such_module")._replace(must_be_there=True)
    (line,) = machine.ask(asked)
    assert "raised ModuleNotFoundError: No module named 'no_such_module'; what it refuses is not known" in line


@pytest.mark.parametrize("declares", ["('not-ram', None)", "('not-ram', (0, 1 << 70))", "('not-ram', ('a', 'b'))", "7"])
def test_a_forged_declaration_harms_nobody_else(declares: str, machine: Machine) -> None:
    machine.ask(machine.plugin(f"def rule(context): raise OSError\nrule.oldmem_declares = {declares}"))
    assert len(machine.problems) == 1
    assert machine.registry.refuser(0)


def test_what_a_plug_in_prints_is_not_on_standard_output(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine.ask(machine.plugin("def rule(context):\n    print('hello', flush=True)\n    os.system('echo hello')"))
    captured = capfd.readouterr()
    assert (captured.out, captured.err.splitlines()) == ("", ["hello", "hello"])


def test_what_a_plug_in_started_ends_with_it(machine: Machine) -> None:
    source = """
    def rule(context):
        for _ in range(2):
            pid = os.fork()
            if not pid:
                time.sleep(60)
            with open(os.path.join(context.root, "pids"), "a") as file:
                print(pid, file=file)
        time.sleep(60)
    """
    machine.ask(machine.plugin(source), timeout=2 * SHORT)
    started = (machine.folder / "pids").read_text().split()
    assert len(started) == 2
    wait_until("all gone", lambda: not any(running(int(pid)) for pid in started))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_plug_ins_of_one_name_keep_both_rules(machine: Machine) -> None:
    one = machine.plugin("def rule(context): return good()", "one")
    two = machine.plugin(f"@rule_plugin('not-ram', {DOMAIN})\ndef rule(context): raise OSError", "two")
    machine.ask(one, one, two._replace(name="one"), two._replace(name="built in"))
    names = [rule.name for rule in machine.registry]
    assert names == ["built in", "one: good", "one: good (2)", "one: no answer", "built in: no answer"]


@settings(deadline=None, max_examples=60)
@given(st.lists(random_rules(), max_size=4, unique_by=lambda r: r.name))
def test_rules_arrive_as_they_were_returned(tmp_path_factory: pytest.TempPathFactory, returned: list[Rule]) -> None:
    path = tmp_path_factory.getbasetemp() / "random_rules.py"
    path.write_text("def rule(context): return context.root")
    model, found, problems = Registry(), Registry(), Problems()
    context = Context(None, RangeSet(), PAGE, returned, "x86_64")  # type: ignore[arg-type]
    plugins.install([Plugin("p", f"{path}:rule")], context, found, problems)
    for rule in returned:
        model.register(rule)
    assert problems == []
    expected = [r and returned.index(r) for r in map(model.refuser, range(PAGES + 9))]
    arrived = list(found)
    assert [r and arrived.index(r) for r in map(found.refuser, range(PAGES + 9))] == expected
    assert [(r.domain.size, r.deny) for r in arrived] == [(r.domain.size, r.deny) for r in returned]


# A callback with a time-out


def test_blocks_without_an_answer_in_time_are_decided_by_the_policy_and_the_others_keep_theirs() -> None:
    def is_ram(paddr: int) -> bool:
        if paddr == 8 * PAGE:
            time.sleep(60)
        return paddr % (2 * PAGE) == 0

    for trouble in (RAM, NOT_RAM):
        rule = callback_rule("slow", Range(0, 12 * PAGE), PAGE, is_ram, "x", trouble, timeout=patience(SHORT))
        registry = Registry()
        registry.register(rule)
        assert [registry.pfn_is_ram(p) for p in range(12)] == [True, False] * 4 + [trouble == RAM] * 4
        assert (rule.trouble, rule.troubled) == (trouble, RangeSet([(8 * PAGE, 12 * PAGE)]))


def test_a_callback_that_dies_leaves_the_answers_that_it_gave() -> None:
    def is_ram(paddr: int) -> bool:
        if paddr == 4 * PAGE:
            raise OSError
        if paddr == 6 * PAGE:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    rule = callback_rule("dies", Range(0, 8 * PAGE), PAGE, is_ram, "x", timeout=20)
    assert rule.troubled == RangeSet([(4 * PAGE, 5 * PAGE), (6 * PAGE, 8 * PAGE)])
    assert RangeSet(rule.pages.ranges(0, 8 * PAGE)) == RangeSet([(0, 4 * PAGE), (5 * PAGE, 6 * PAGE)])


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_callback_rules_at_the_ends_of_what_can_be(timeout: float | None) -> None:
    def ask(domain: Range, block: int) -> Rule:
        return callback_rule("c", domain, block, lambda at: at % (2 * block) == 0, "x", timeout=timeout)

    top = (1 << 64) - 4 * PAGE
    pages = ask(Range(top, 1 << 64), PAGE).pages
    assert [pages.has((top >> 12) + i) for i in range(4)] == [True, False, True, False]
    for empty in (Range(0, 0), Range(0, PAGE)):
        assert list(ask(empty, 2 * PAGE).pages.ranges(0, 1 << 64)) == []
    for block in (0, -PAGE, PAGE // 2):
        with pytest.raises(ValueError, match="blocks of"):
            ask(Range(0, 8 * PAGE), block)
    with pytest.raises(ValueError, match="blocks of"):
        ask(Range(8 * PAGE, 4 * PAGE), PAGE)


# Processes


def test_a_child_that_cannot_be_started_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    assert child.run(lambda: None, 1) == "no process to run it in: Resource temporarily unavailable"


def test_a_child_under_ignored_sigchld_is_neither_lost_nor_waited_for() -> None:
    earlier = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        start = time.monotonic()
        assert child.run(lambda: None, 60) == ""
        assert child.run(lambda: time.sleep(60), 0.2) == "gave no answer within 0.2 s"
        assert time.monotonic() - start < 50
    finally:
        signal.signal(signal.SIGCHLD, earlier)


def test_a_child_whose_parent_is_killed_ends_by_itself(tmp_path: Path) -> None:
    work = (
        "import os, sys, time\nfrom guard import child\n"
        f"def hang():\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
        f"child.run(hang, {patience(SHORT)})"
    )
    with subprocess.Popen([sys.executable, "-c", work]) as parent:
        wait_until("child running", lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        parent.kill()
    pid = int((tmp_path / "pid").read_text())
    wait_until("child gone", lambda: not running(pid))


# How plug-ins are found


def install_distribution(folder: Path, name: str, entry_points: str, **modules: str) -> None:
    """As an installer leaves it in site-packages."""
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python searches, here and in what the test starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_installed_plug_ins_are_found_by_their_entry_points(site: Path) -> None:
    install_distribution(site, "one", "[oldmem.rules]\nzwei = m.sub:a.b\neins = m:f [extra]\n[other.group]\nx = y:z\n")
    install_distribution(site, "two", "[console_scripts]\nx = y:z\n[oldmem.rules]\neins = n:f\n")
    problems = Problems()
    found = plugins.installed(problems)
    assert found == ([Plugin("eins", "m:f"), Plugin("eins", "n:f"), Plugin("zwei", "m.sub:a.b")], [])
    assert problems == []
    assert str(found[0][0]) == "eins (m:f)"


def test_metadata_that_cannot_be_read_is_told_and_costs_the_installed_plug_ins_only(site: Path) -> None:
    install_distribution(site, "broken", "")
    (site / "broken-1.0.dist-info/entry_points.txt").write_bytes(b"[oldmem.rules]\n\xff\xfe = x:y\n")
    problems = Problems()
    found, unknown = plugins.installed(problems)
    assert (found, unknown) == ([], problems)
    assert len(problems) == 1
    assert problems[0].startswith("entry points oldmem.rules: raised UnicodeDecodeError: ")


def out_of_memory(_: object) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20),) * 2)
    bytearray(64 << 20)


DEATHS: dict[str, tuple[Callable[[object], object], str]] = {
    "killed": (lambda _: os.kill(os.getpid(), signal.SIGKILL), "was ended by signal 9 (Killed)"),
    "out of memory": (out_of_memory, "raised MemoryError: "),
    "out of time": (lambda _: time.sleep(60), "gave no answer within 0.4 s"),
    "without a word": (lambda _: os._exit(0), "ended without an answer"),
    "no frame": (lambda _: None, "ended without an answer"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_status_is_4_where_the_search_for_plug_ins_died(
    death: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from capture import cli

    die, why = DEATHS[death]
    monkeypatch.setattr(plugins, "_list", die)
    monkeypatch.setattr(plugins, "TIMEOUT", 0.4 if death == "out of time" else 20.0)
    assert cli.run(["header", "-q", "--machine", str(folder), "-o", "/dev/null"]) == cli.INCOMPLETE
    line = f"oldmem: warning: entry points oldmem.rules: {why}; no installed rule plug-in is asked"
    assert line in capfd.readouterr().err.splitlines()
    with pytest.raises(Error, match=r"entry points oldmem\.rules"):
        open_machine(str(folder))


def test_status_is_4_and_other_plug_ins_are_asked_where_an_installed_one_is_broken(folder: Path, site: Path) -> None:
    source = f"{HEAD}def rule(context): return deny_rule('x', RangeSet([(28 << 20, 29 << 20)]), 'x')"
    entry_points = "[oldmem.rules]\na = no_such_module:rule\nb = sound:rule\nc = broken:rule\n"
    install_distribution(site, "several", entry_points, sound=source, broken="os.kill(")
    result = oldmem("map", "--json", "--machine", folder)
    assert result.status == 4
    assert any((e["refused_by"] or "") == "b: x" for e in json.loads(result.out)["entries"])
    assert [line for line in result.warnings if line.endswith(", and was not refused")] == [
        "rule plug-in a (no_such_module:rule) is not there: No module named 'no_such_module'; what it refuses is not "
        "known, and was not refused",
        "rule plug-in c (broken:rule) raised SyntaxError: '(' was never closed (broken.py, line 1); what it refuses is "
        "not known, and was not refused",
    ]
    with pytest.raises(Error, match=r"rule plug-in a \(no_such_module:rule\) is not there"):
        open_machine(str(folder))


@pytest.mark.parametrize("by", ["option", "environment"])
@pytest.mark.parametrize("value", ["no_such_module:rule", "./no_such_file:rule", "json:no_such"])
def test_mistyped_rule_is_one_line_and_status_1(
    value: str, by: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        monkeypatch.setenv("OLDMEM_RULES", value)
    result = oldmem("map", "--machine", folder, *(["--rule", value] if by == "option" else []))
    assert (result.status, result.out) == (1, "")
    (line,) = result.lines
    assert line.startswith(f"oldmem: rule plug-in {value} is not there: ")


@pytest.mark.parametrize("value", ["", "module", "module:", ":function", "/path/to/file.py"])
def test_what_names_no_plug_in_is_an_error(value: str) -> None:
    with pytest.raises(Error, match="names no rule plug-in, expected MODULE:FUNCTION"):
        plugins.named(value)


def test_a_plug_in_in_a_package_or_class_is_found_by_its_dotted_name(machine: Machine, site: Path) -> None:
    (site / "pack").mkdir()
    (site / "pack/__init__.py").write_text("")
    (site / "pack/inner.py").write_text(HEAD + "class C:\n    @staticmethod\n    def rule(context): return good()\n")
    machine.ask(plugins.named("pack.inner:C.rule"))
    assert (machine.problems, machine.refused()) == ([], {"built in": [0], "pack.inner:C.rule: good": [20]})


# In the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded machine: RAM below 32 MiB, and a part of the old DIMMs of the example."""
    made = tmp_path_factory.mktemp("machine")
    (made / "root/proc").mkdir(parents=True)
    (made / "root/etc").mkdir()
    (made / "root/proc/iomem").write_text("00001000-0009fbff : System RAM\n01000000-017fffff : System RAM\n")
    with open(made / "ram.raw", "wb") as image:
        image.truncate(64 << 20)
    ram = [
        {"image": "ram.raw", "offset": at, "paddr": paddr, "size": 32 << 20}
        for at, paddr in ((0, 0), (32 << 20, 5 * GIB))
    ]
    (made / "machine.json").write_text(json.dumps({"format": 1, "arch": "x86_64", "ram": ram, "virtio_mem": []}))
    return made


def refused_by_plug_ins(result: Result) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for entry in json.loads(result.out)["entries"]:
        if (entry["refused_by"] or "").partition(":")[0] in ("bad-pages", "rule_plugin", "hwpoison", "envelope"):
            found.setdefault(entry["refused_by"], []).append((entry["start"], entry["end"]))
    return found


def test_the_example_works_as_an_installed_plug_in_and_by_its_name(
    folder: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "root/etc/bad-pages").write_text("140000000\n140003fff\n")
    expected = [(5 * GIB, 5 * GIB + PAGE), (5 * GIB + 3 * PAGE, 5 * GIB + 4 * PAGE)]
    shutil.copy(EXAMPLES / "rule_plugin.py", site)
    by_option = oldmem("map", "--json", "--machine", folder, "--rule", "rule_plugin:bad_pages")
    assert refused_by_plug_ins(by_option) == {"rule_plugin:bad_pages: broken": expected}
    install_distribution(site, "bad-pages", "[oldmem.rules]\nbad-pages = rule_plugin:bad_pages\n")
    installed = oldmem("map", "--json", "--machine", folder)
    assert refused_by_plug_ins(installed) == {"bad-pages: broken": expected}
    assert not any("plug-in" in line for line in installed.warnings + by_option.warnings)
    monkeypatch.setenv("OLDMEM_RULES", f"{EXAMPLES}/rule_plugin.py:bad_pages")
    result = oldmem("map", "--json", "--machine", folder)
    assert len([r for r in json.loads(result.out)["entries"] if "broken" in (r["refused_by"] or "")]) == 2
    (folder / "root/etc/bad-pages").unlink()
    monkeypatch.delenv("OLDMEM_RULES")
    failed = oldmem("map", "--json", "--machine", folder)
    assert refused_by_plug_ins(failed) == {"bad-pages: no answer": [(5 * GIB, 5 * GIB + (32 << 20))]}
    (line,) = [line for line in failed.warnings if "plug-in" in line]
    assert line == (
        "rule plug-in bad-pages (rule_plugin:bad_pages) raised FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{folder}/root/etc/bad-pages'; all of 0x100000000-0x1ffffffff is refused"
    )


def test_a_plug_in_cannot_take_a_built_in_rules_name_nor_open_what_that_refuses(folder: Path, site: Path) -> None:
    source = "\n".join(
        f"def {name}(context): return deny_rule('{name}', RangeSet([({at}, ({at}) + 1)]), 'x')"
        for name, at in (("hwpoison", "28 << 20"), ("envelope", "30 << 20"))
    )
    source += "\ndef open_all(context): return allow_rule('all', Range(0, 1 << 64), RangeSet([(0, 1 << 64)]), 'x')"
    entry_points = "[oldmem.rules]\nhwpoison = names:hwpoison\nenvelope = names:envelope\nz = names:open_all\n"
    before = json.loads(oldmem("map", "--json", "--machine", folder).out)["readable_bytes"]
    install_distribution(site, "names", entry_points, names=HEAD + source)
    result = oldmem("map", "--json", "--machine", folder)
    assert not any("plug-in" in line for line in result.warnings)
    found = refused_by_plug_ins(result)
    assert found["hwpoison: hwpoison"] == [(28 << 20, (28 << 20) + PAGE)]
    assert found["envelope: envelope"] == [(30 << 20, (30 << 20) + PAGE)]
    assert json.loads(result.out)["readable_bytes"] == before - 2 * PAGE


def test_what_a_plug_in_refuses_is_not_read_for_the_dead_kernels_records_either(tmp_path: Path, site: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    at = VMCOREINFO_AT
    (site / "note.py").write_text(f"{HEAD}def rule(context): return deny_rule('x', RangeSet([({at}, {at} + 1)]), 'x')")
    result = oldmem("map", "--machine", machine.write(tmp_path), "--rule", "note:rule")
    assert (
        f"VMCOREINFO note at {at:#x}, where it was said to be: old memory at {at:#x}: refused by note:rule: x"
        in (result.warnings[0])
    )


def test_a_plug_in_in_trouble_does_not_take_the_name_of_a_rule_that_comes_later(tmp_path: Path, site: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    later = ("hwpoison", "PageOffline", "crash reservation", "dead kernel")
    source = f"{HEAD}@rule_plugin('not-ram', {(HIGH[0], HIGH[0] + PAGE)})\ndef rule(context): raise OSError"
    listed = "".join(f"{name} = trouble:rule\n" for name in later)
    install_distribution(site, "trouble", f"[oldmem.rules]\n{listed}", trouble=source)
    result = oldmem("map", "--json", "--machine", machine.write(tmp_path))
    assert [line for line in result.warnings if "plug-in" in line] == [
        f"rule plug-in {name} (trouble:rule) raised OSError: ; all of {Range(HIGH[0], HIGH[0] + PAGE)} is refused"
        for name in sorted(later)
    ]


def test_status_is_4_where_a_plug_in_without_an_answer_costs_ram(tmp_path: Path, site: Path) -> None:
    machine = RecordedKernel()
    machine.shrink()
    machine.finish_kernel()
    lost = (HIGH[0], HIGH[0] + PAGE)
    (site / "dies.py").write_text(f"{HEAD}@rule_plugin('not-ram', {lost})\ndef rule(context): os._exit(1)")
    result = oldmem("header", "--machine", machine.write(tmp_path), "--rule", "dies:rule", "-o", tmp_path / "header")
    assert (result.status, result.warnings) == (
        4,
        [
            f"rule plug-in dies:rule ended its process with status 1; all of {Range(*lost)} is refused",
            f"{Range(*lost)} is lost: nothing tells its state",
        ],
    )


def test_a_wrong_rule_option_is_one_line_and_status_1(folder: Path) -> None:
    result = oldmem("map", "--machine", folder, "--rule", "nonsense")
    assert (result.status, result.out) == (1, "")
    assert result.lines == ["oldmem: 'nonsense' names no rule plug-in, expected MODULE:FUNCTION or FILE:FUNCTION"]


def test_a_plug_in_that_hangs_does_not_hang_the_dump(
    folder: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from capture import cli

    declared = "@rule_plugin('not-ram', (24 << 20, 25 << 20))\n"
    (site / "hangs.py").write_text(HEAD + declared + "def rule(context): max(itertools.repeat(0))\n")
    monkeypatch.setattr(plugins, "TIMEOUT", patience(SHORT))
    guarded = site / "guard"
    status = cli.run(["guard", "--machine", str(folder), "--rule", "hangs:rule", "-o", str(guarded)])
    assert status == cli.INCOMPLETE
    why = f"gave no answer within {plugins.TIMEOUT:g} s"
    assert f"hangs:rule {why}; all of 0x1800000-0x18fffff is refused" in capfd.readouterr().err
    assert guarded.exists()


# In a capture initramfs


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio tool")
def test_a_file_added_to_an_initramfs_is_a_plug_in_there(tmp_path: Path) -> None:
    builder = Builder()
    python = builder.add_python()
    builder.add("/etc/oldmem/rule_plugin.py", str(EXAMPLES / "rule_plugin.py"))
    builder.add_bytes("/etc/bad-pages", b"140000000\n")
    work = (
        "from guard import RangeSet, Registry, plugins\nfrom guard.witness.memory import Problems\n"
        "problems, registry = Problems(), Registry()\n"
        "context = plugins.Context(None, RangeSet(), 4096, '/', 'x86_64')\n"
        "found = [*plugins.installed(problems)[0], plugins.named('/etc/oldmem/rule_plugin.py:bad_pages')]\n"
        "plugins.install(found, context, registry, problems)\n"
        "print(problems, [(r.name, *r.domain) for r in registry])\n"
    )
    builder.add_bytes("/probe", work.encode())
    image = tmp_path / "image"
    image.mkdir()
    subprocess.run(["cpio", "-idm", "--quiet"], input=builder.archive(), cwd=image, check=True)
    # no /proc and no /dev in there: a plug-in needs neither
    done = subprocess.run(["chroot", str(image), python, "-IS", "/probe"], capture_output=True, text=True, check=False)
    name = "/etc/oldmem/rule_plugin.py:bad_pages: broken"
    assert (done.stdout, done.stderr) == (f"[] [('{name}', {5 * GIB}, {5 * GIB + PAGE})]\n", "")
