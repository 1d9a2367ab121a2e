# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command ``oldmem``. Each subcommand imports what it needs, when it needs it: this runs in a capture kernel."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from guard.errors import Error

if TYPE_CHECKING:
    from capture.dump import Dump
    from capture.machine import Machine

VERSION = "0.1.0"
DONE, FAILED, NOT_CAPTURE, INCOMPLETE = 0, 1, 3, 4  # 2, usage, is argparse's
MAX_LINES = 64  # of one kind on the console

EPILOG = """exit status: 0 done, 1 failed, 2 usage, 3 not in a capture environment,
4 done, but memory was lost that should have been readable (see the report)"""


def tell(line: str) -> None:
    """A line on standard error; a console that takes none must not cost the dump."""
    with contextlib.suppress(OSError):
        print(f"oldmem: {line}", file=sys.stderr)


def warn(line: str) -> None:
    tell(f"warning: {line}")


def write_out(data: bytes, path: str) -> None:
    """Write to the file *path*, or to standard output where it is "-"."""
    if path == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as e:
        raise Error(f"{path}: {e.strerror}") from None


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
    if args.vmlinux:
        try:
            machine.arch.use_vmlinux(args.vmlinux)
        except Error:
            machine.close()
            raise
    dump = build(machine, args.layout, args.mode, rules, [*plugins.installed(machine.problems), *named])
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
    lost = dump.lost()
    faults = [f for f in dump.memory.faults() if f.errno != errno.ENXIO]  # what no source shows is told once
    lines = [f"{f.range} could not be read and is zeros: {os.strerror(f.errno)}" for f in faults]
    lines += [f"{r} was RAM and is zeros: no source shows it, or nothing tells its state" for r in lost]
    for line in lines[:MAX_LINES]:
        warn(line)
    if len(lines) > MAX_LINES:
        warn(f"{len(lines) - MAX_LINES} more ranges of RAM are zeros for such reasons")
    dump.close()
    return INCOMPLETE if faults or lost else DONE


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
    from guard.compiled import compile_guard, write_guard

    dump = open_dump(args)
    if args.output == "-":
        write_out(compile_guard(dump.registry), "-")
    else:
        write_guard(dump.registry, args.output)
    return finished(dump)


def cmd_save(args: argparse.Namespace) -> int:
    from capture.save import save

    dump = open_dump(args)
    save(dump.vmcore, args.output, sys.stderr)
    tell("saving vmcore complete")
    return finished(dump)


def cmd_mount(args: argparse.Namespace) -> int:
    from capture.background import serve_in_background, serve_until_stopped
    from capture.fuse import FuseServer
    from capture.init import texts

    try:
        os.stat(args.target)
    except OSError as e:
        raise Error(f"cannot mount on {args.target}: {e.strerror}") from None
    dump = open_dump(args)
    server = FuseServer(dump.vmcore, args.target, texts(dump), args.direct)
    if args.foreground:
        serve_until_stopped(server, [server.target])
        return finished(dump)
    serve_in_background(server, [server.target])
    return finished(dump)


def cmd_init(args: argparse.Namespace) -> int:
    from capture.init import bring_up

    dump = open_dump(args)
    where = bring_up(dump)
    print(f"oldmem: guarded vmcore at {where} ({dump.vmcore.size} bytes), report in /run/oldmem/guard.json")
    return finished(dump)


def cmd_record(args: argparse.Namespace) -> int:
    from capture.record import record

    dump = open_dump(args)
    for line in record(dump, args.folder):
        print(f"oldmem: {line}")
    return DONE


def cmd_run(args: argparse.Namespace) -> int:
    from capture.run import CommandError, run

    dump = open_dump(args)
    try:
        status = run(dump, args.argv, args.vmcore)
    except CommandError as e:
        tell(str(e))
        return e.status
    if args.report:
        from capture import report

        write_out(report.as_json(report.guard_json(dump, report.MOST_SERVED)), args.report)
    ended = finished(dump)
    return status or ended


def cmd_check(args: argparse.Namespace) -> int:
    from capture.check import check

    wrong, has = check(args.file)
    for line in has:
        print(f"{args.file}: {line}")
    for line in wrong:
        print(f"{args.file}: WRONG: {line}")
    return FAILED if wrong else DONE


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        # a given width spares the import of shutil and all its compressors
        columns = os.environ.get("COLUMNS", "")
        super().__init__(prog, width=max(40, int(columns)) if columns.isdecimal() else 100)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="oldmem",
        description="Build the vmcore header of a dead machine after the crash, and guard every read of its memory.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=f"oldmem {VERSION}")
    machine = argparse.ArgumentParser(add_help=False, formatter_class=_Help)
    group = machine.add_argument_group("machine (default: the one that this capture kernel came from)")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--machine", metavar="DIR", help="a recorded machine: folder with machine.json and images")
    which.add_argument("--image", metavar="FILE", help="an image of all RAM of an s390x machine, and nothing beside it")
    group.add_argument("--loop", action="store_true", help="attach images as read-only loop devices")
    group.add_argument("--source", choices=("auto", "devmem", "vmcore"), default="auto", help="where to read memory")
    group.add_argument("--force", action="store_true", help="go on where this does not look like a capture kernel")
    machine.add_argument("-v", "--verbose", action="store_true", help="tell what each source could not read")
    machine.add_argument("-q", "--quiet", action="store_true", help="no warnings before the work is done")
    layout = argparse.ArgumentParser(add_help=False, formatter_class=_Help)
    layout.add_argument(
        "--layout",
        choices=("cut", "kernel"),
        default="cut",
        help="PT_LOADs cut by the plug bitmap, or as the kernel lays them out",
    )
    layout.add_argument(
        "--mode",
        choices=("dynamic", "preloaded"),
        default="dynamic",
        help="build the header, or take the kernel's own as it is",
    )
    for option, about in (("--deny", "do not read these"), ("--allow", "read nothing but these")):
        layout.add_argument(
            option,
            metavar="RANGES",
            action="append",
            default=[],
            help=f"{about} physical ranges: 40000000-4fffffff, or a file with such lines (repeatable)",
        )
    layout.add_argument(
        "--vmlinux",
        metavar="FILE",
        help="the dead kernel's vmlinux: symbols and layouts where its VMCOREINFO note is missing or cut",
    )
    layout.add_argument(
        "--rule",
        metavar="MODULE:FUNCTION",
        action="append",
        default=[],
        help="ask this rule plug-in too, besides the installed ones; a FILE has a slash in it (repeatable)",
    )
    sub = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    both = [machine, layout]

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        p = sub.add_parser(name, parents=parents, help=about, description=about, formatter_class=_Help)
        p.set_defaults(run=run)
        return p

    p = command("map", cmd_map, "what memory there was, how that is known, and what is refused", *both)
    p.add_argument("--json", action="store_true")
    p.add_argument("--compare", action="store_true", help="what the preloaded header misses or has too much")
    p = command("plug", cmd_plug, "virtio-mem devices and their plug bitmaps", machine)
    p.add_argument("--json", action="store_true")
    p = command("header", cmd_header, "the header alone, as the vmcore starts", *both)
    p.add_argument("-o", "--output", metavar="FILE", required=True, help='"-" for standard output')
    p = command("guard", cmd_guard, "the rules as a compiled guard, which C programs ask", *both)
    p.add_argument("-o", "--output", metavar="FILE", required=True, help='"-" for standard output')
    p = command("mount", cmd_mount, "serve the vmcore over a file, or as a folder", *both)
    p.add_argument("target", help="a file (/proc/vmcore too) or a folder")
    p.add_argument("--foreground", action="store_true", help="stay until unmounted or interrupted")
    p.add_argument("--direct", action="store_true", help="a file without page cache: for dd and other large reads")
    p = command("save", cmd_save, "guarded copy, sparse, with progress", *both)
    p.add_argument("-o", "--output", metavar="OUT", required=True, help='"-" streams to standard output')
    p = command("run", cmd_run, "run a collector with the vmcore inside its own process", *both)
    p.add_argument(
        "--vmcore", metavar="FILE", default="/proc/vmcore", help="what the collector opens (default: /proc/vmcore)"
    )
    p.add_argument("--report", metavar="FILE", help="where to write what was refused and what could not be read")
    p.add_argument("argv", metavar="COMMAND", nargs="+", help="a dynamically linked program, and its arguments")
    p = command("check", cmd_check, "verify a vmcore")
    p.add_argument("file")
    p = command("record", cmd_record, "write this machine's state as a folder for --machine", *both)
    p.add_argument("folder")
    command("init", cmd_init, "the capture-kernel step: a guarded vmcore over /proc/vmcore", *both)
    return top


def run(argv: list[str] | None = None) -> int:
    """The command with the arguments *argv* (default: the process's own); returns its exit status."""
    try:
        args = parser().parse_args(argv)
        return int(args.run(args))
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


def fill_standard_descriptors() -> None:
    """A caller may have closed some: the next file opened would take their place and be written to. Now writing to
    them fails as it does with a closed one."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main() -> NoReturn:
    fill_standard_descriptors()
    try:
        code = run()
        sys.stdout.flush()
    except OSError as e:
        if isinstance(e, BrokenPipeError):
            code = 128 + signal.SIGPIPE
        else:
            tell(f"{e.filename or 'standard output'}: {e.strerror}")
            code = FAILED
        _give_up(1)
    try:
        sys.stderr.flush()
    except OSError:
        _give_up(2)
    sys.exit(code)


def _give_up(fd: int) -> None:
    """What could not be written would be tried again, with a traceback, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


if __name__ == "__main__":
    main()
