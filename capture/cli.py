# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command ``oldmem``. Each subcommand imports what it needs, when it needs it: this runs in a capture kernel."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from capture import arguments
from capture.console import fill_standard_descriptors, give_up, say, tell, warn, write_out
from guard.errors import Error

if TYPE_CHECKING:
    from capture import stage2
    from capture.dump import Dump
    from capture.machine import Machine

VERSION = "0.1.0"
DONE, FAILED, NOT_CAPTURE, INCOMPLETE = 0, 1, 3, 4  # 2, usage, is argparse's
MAX_LINES = 64  # of one kind on the console


def open_machine(args: argparse.Namespace) -> Machine:
    if args.machine is None and args.image is None:
        from capture.machine import LiveMachine

        return LiveMachine(args.source, args.force)
    from capture import recorded
    from capture.image_machine import ImageMachine

    record = recorded.of_image(args.image) if args.machine is None else recorded.load(args.machine)
    return ImageMachine(record, args.loop)


def open_dump(args: argparse.Namespace) -> Dump:
    from capture.dump import build
    from guard import plugins

    named = [plugins.named(value) for value in [*os.environ.get(plugins.ENVIRONMENT, "").split(), *args.rule]]
    rules = []
    if args.deny or args.allow:
        from guard.rules import static

        rules = [static.deny(static.parse(args.deny))] if args.deny else []
        rules += [static.allow(static.parse(args.allow))] if args.allow else []
    machine = open_machine(args)
    machine.arch.search_time, machine.arch.compatibility = args.search_time, args.compatibility
    if getattr(args, "minimal", False):
        from guard.physmem import Touched

        machine.touched = Touched(machine.page_size)
    if args.vmlinux:
        try:
            machine.arch.use_vmlinux(args.vmlinux)
        except Error:
            machine.close()
            raise
    found, unknown = plugins.installed(machine.problems)
    dump = build(machine, args.layout, args.mode, rules, [*found, *named])
    dump.unknown += unknown
    if not args.quiet:
        for line in dump.problems:
            warn(line)
        if args.verbose:
            for report in dump.machine.reports.values():
                for line in report.problems:
                    if line not in dump.problems:
                        warn(line)
            for line in dump.machine.remarks:
                tell(f"note: {line}")
            tell(f"memory read from {dump.machine.source}")
    return dump


def finished(dump: Dump) -> int:
    """The exit status that says whether everything readable could be read; tells what could not."""
    from capture.losses import losses, unlisted

    faults = [f for f in dump.memory.faults() if f.errno != errno.ENXIO]  # what no source shows is told once
    lines = [*dump.unknown, *unlisted(dump.memory.unlisted_faults)]
    lines += [f"{f.range} could not be read and is zeros: {os.strerror(f.errno)}" for f in faults]
    lines += [f"{r} is lost: {why}" for r, why in losses(dump)]
    dump.close()
    return incomplete(lines)


def incomplete(lines: list[str]) -> int:
    """Tell what was lost, a line each, if anything; the exit status that says whether it was."""
    for line in lines[:MAX_LINES]:
        warn(line)
    if len(lines) > MAX_LINES:
        warn(f"{len(lines) - MAX_LINES} more ranges of RAM are lost for such reasons")
    return INCOMPLETE if lines else DONE


def cmd_map(args: argparse.Namespace) -> int:
    from capture import report

    dump = open_dump(args)
    if args.compare:
        print(report.compare_text(dump.compare()), end="")
    elif args.json:
        write_out(report.as_json(report.map_json(dump)), "-")
    else:
        print(report.map_text(dump), end="")
    return finished(dump)


def cmd_plug(args: argparse.Namespace) -> int:
    from capture import report

    machine = open_machine(args)
    if args.json:
        write_out(report.as_json({"devices": [report.device_json(d) for d in machine.devices]}), "-")
    else:
        print(report.plug_text(machine.devices), end="")
    if not args.quiet:
        for line in [*machine.problems, *(f"{d.name}: {p}" for d in machine.devices for p in d.problems)]:
            warn(line)
    unknown = any(d.bitmap is None for d in machine.devices)
    machine.close()
    return INCOMPLETE if unknown else DONE


def cmd_header(args: argparse.Namespace) -> int:
    dump = open_dump(args)
    write_out(dump.core.header, args.output)
    return finished(dump)


def cmd_guard(args: argparse.Namespace) -> int:
    from guard.compiled import compile_guard

    dump = open_dump(args)
    write_out(compile_guard(dump.registry), args.output)
    return finished(dump)


def cmd_save(args: argparse.Namespace) -> int:
    from capture.save import refuse_existing, save

    if not args.overwrite:
        refuse_existing(args.output)  # now, rather than after a long search
    dump = open_dump(args)
    save(dump.vmcore, args.output, sys.stderr, args.overwrite, tell)
    tell("saving vmcore complete")
    return finished(dump)


def cmd_mount(args: argparse.Namespace) -> int:
    from capture.fuse import FuseServer
    from capture.init import texts
    from capture.mounts import make_room
    from capture.service import Service

    make_room(args.target, warn)
    try:
        os.stat(args.target)
    except OSError as e:
        raise Error(f"cannot mount on {args.target}: {e.strerror}") from None
    dump = open_dump(args)
    server = FuseServer(dump.vmcore, args.target, texts(dump), args.direct)
    with Service(server, [server.target]) as service:
        server.mount()
        service.mounted()
        service.wait_until_served()
        if args.foreground:
            service.wait_until_ended()
        else:
            service.commit()
    return finished(dump)


def cmd_init(args: argparse.Namespace) -> int:
    from capture.arrival import settle

    lacking = settle(say, warn)
    if lacking is None:
        return _hand_over(args)
    return _and_command(args.argv, incomplete(lacking))


def _hand_over(args: argparse.Namespace) -> int:
    """Put the vmcore in place by the way that was asked for, then run the command if there is one."""
    from capture import via
    from capture.init import FOLDER, bring_up, check_complete
    from guard import procvmcore

    if args.via == via.RUN and not args.argv:
        raise Error("--via run needs a COMMAND to be inside of")
    dump = open_dump(args)
    check_complete(dump)
    way, plan = args.via, None
    if way == via.AUTO:
        way, why, plan = via.choose(dump, args.argv, _stage2_options(args))
        say(f"{way}: {why}")
    if way == via.RUN:
        return _inside(dump, args.argv, procvmcore.PATH)
    if way == via.STAGE2:
        try:
            _go(dump, plan, args)
        except Error as e:
            if args.via != via.AUTO:
                raise
            warn(f"no stage 2: {e}; over FUSE instead")
    where = bring_up(dump, tell=warn)
    say(f"guarded vmcore at {where} ({dump.vmcore.size} bytes), report in {FOLDER}/guard.json")
    return _and_command(args.argv, finished(dump))


def cmd_done(args: argparse.Namespace) -> int:
    from capture.done import end

    return incomplete(end())


def _and_command(argv: list[str], status: int) -> int:
    """Run the collector, if there is one; its exit status, or *status* where that is 0."""
    from capture.programs import spawn

    return (spawn(argv) or status) if argv else status


def _stage2_options(args: argparse.Namespace) -> stage2.Options:
    from capture.stage2 import Options

    return Options(args.place, args.kernel, args.initramfs)


def _go(dump: Dump, plan: stage2.Plan | None, args: argparse.Namespace) -> None:
    from capture import stage2

    if dump.unknown:  # what has been refused is in no PT_LOAD there, and nobody could tell any more
        raise Error(dump.unknown[0])
    plan = plan or stage2.plan(dump, _stage2_options(args))
    say(f"to stage 2, header of {len(plan.loads)} PT_LOADs {plan.place.what}")
    stage2.go(plan, dump)


def cmd_stage2(args: argparse.Namespace) -> int:
    from capture import stage2

    dump = open_dump(args)
    plan = stage2.plan(dump, _stage2_options(args))
    if args.dry_run:
        print("\n".join(stage2.described(plan, dump)))
        return INCOMPLETE if plan.given_up.runs or stage2.left_out(dump) or dump.unknown else DONE
    _go(dump, plan, args)
    return FAILED


def cmd_record(args: argparse.Namespace) -> int:
    from capture.record import record, record_minimal
    from capture.sources import files

    if args.with_log and not args.minimal:
        raise Error("--with-log is for --minimal: without it no memory is written")
    if args.vmlinux and args.minimal:
        raise Error("--vmlinux: a record does not hold it; record without, and name it where the record is looked at")
    seen = files.seen = {}
    try:
        dump = open_dump(args)
    finally:
        files.seen = None
    if args.minimal:
        lines = record_minimal(dump, args.folder, seen, warn, args.with_log, args.force)
    else:
        lines = record(dump, args.folder, seen)
    for line in lines:
        print(f"oldmem: {line}")
    return DONE


def cmd_run(args: argparse.Namespace) -> int:
    return _inside(open_dump(args), args.argv, args.vmcore, args.report)


def _inside(dump: Dump, argv: list[str], vmcore: str, to: str | None = None) -> int:
    """A collector with the vmcore inside of its process, and the report written to the file *to*."""
    from capture.run import CommandError, run

    try:
        status = run(dump, argv, vmcore)
    except CommandError as e:
        tell(str(e))
        return e.status
    if to:
        from capture import report

        write_out(report.as_json(report.guard_json(dump, report.MOST_SERVED)), to)
    ended = finished(dump)
    return status or ended


def cmd_check(args: argparse.Namespace) -> int:
    from capture.check import check

    wrong, has, kinds = check(args.file)
    if kinds:
        tell(f"{args.file}: {'; in it '.join(kinds)}")
    for line in has:
        print(f"{args.file}: {line}")
    for line in wrong:
        print(f"{args.file}: WRONG: {line}")
    return FAILED if wrong else DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "map": cmd_map,
    "plug": cmd_plug,
    "header": cmd_header,
    "guard": cmd_guard,
    "mount": cmd_mount,
    "save": cmd_save,
    "run": cmd_run,
    "check": cmd_check,
    "record": cmd_record,
    "stage2": cmd_stage2,
    "init": cmd_init,
    "done": cmd_done,
}


def run(argv: list[str] | None = None) -> int:
    """The command with the arguments *argv* (default: the process's own); returns its exit status."""
    try:
        args = arguments.parser(VERSION).parse_args(argv)
        return COMMANDS[args.command](args)
    except SystemExit as e:  # argparse has said what there is to say
        return int(e.code or 0)
    except Error as e:
        from capture.machine import NotCaptureError

        tell(str(e))
        return NOT_CAPTURE if isinstance(e, NotCaptureError) else FAILED
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith(("capture.", "guard.")):
            raise
        tell(f"{args.command} is not part of this initramfs (no module {e.name})")
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except MemoryError:
        tell("out of memory")
        return FAILED


def main() -> NoReturn:
    fill_standard_descriptors()
    try:
        code = run()
        sys.stdout.flush()
    except OSError as e:
        if isinstance(e, BrokenPipeError):
            code = 128 + signal.SIGPIPE
        else:
            unnamed = "working directory" if e.errno == errno.ENOENT else "standard output"
            tell(f"{e.filename or unnamed}: {e.strerror}")
            code = FAILED
        give_up(1)
    try:
        sys.stderr.flush()
    except OSError:
        give_up(2)
    sys.exit(code)


if __name__ == "__main__":
    main()
