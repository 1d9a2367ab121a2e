# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words that the command ``oldmem`` takes: subcommands, options, help."""

from __future__ import annotations

import argparse
import os

EPILOG = """exit status: 0 done, 1 failed, 2 usage, 3 not in a capture environment,
4 done, but memory was lost that should have been readable (see the report), or a rule plug-in
could not be asked, and what it refuses is not known"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        # a given width spares the import of shutil and all its compressors
        columns = os.environ.get("COLUMNS", "")
        super().__init__(prog, width=max(40, int(columns)) if columns.isdecimal() else 100)


def seconds(text: str) -> float:
    """A time that is not negative. Raises ValueError."""
    value = float(text)
    if not 0 <= value < 1e9:  # no NaN either
        raise ValueError
    return value


def name(text: str) -> str:
    """A file's. Raises ValueError for the empty one, which an unset variable of a script leads to."""
    if not text:
        raise ValueError
    return text


def parser(version: str) -> argparse.ArgumentParser:
    """The parser; ``command`` is the name of the subcommand."""
    top = argparse.ArgumentParser(
        prog="oldmem",
        description="Build the vmcore header of a dead machine after the crash, and guard every read of its memory.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=f"oldmem {version}")
    machine = argparse.ArgumentParser(add_help=False, formatter_class=_Help)
    group = machine.add_argument_group("machine (default: the one that this capture kernel came from)")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--machine", type=name, metavar="DIR", help="a recorded machine: folder with machine.json and images"
    )
    which.add_argument(
        "--image", type=name, metavar="FILE", help="an image of all RAM of an s390x machine, and nothing beside it"
    )
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
        type=name,
        metavar="FILE",
        help="the dead kernel's vmlinux: symbols and layouts where its VMCOREINFO note is missing or cut",
    )
    layout.add_argument(
        "--search-time",
        metavar="SECONDS",
        type=seconds,
        default=120.0,
        help="how long to search memory for the VMCOREINFO note where nothing tells it (default: 120; 0: not at all)",
    )
    layout.add_argument(
        "--no-compatibility",
        dest="compatibility",
        action="store_false",
        help="no lines for older collectors in the VMCOREINFO that is served",
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

    def command(name: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return sub.add_parser(name, parents=parents, help=about, description=about, formatter_class=_Help)

    p = command("map", "what memory there was, how that is known, and what is refused", *both)
    p.add_argument("--json", action="store_true")
    p.add_argument("--compare", action="store_true", help="what the preloaded header misses or has too much")
    p = command("plug", "virtio-mem devices and their plug bitmaps", machine)
    p.add_argument("--json", action="store_true")
    p = command("header", "the header alone, as the vmcore starts", *both)
    p.add_argument("-o", "--output", type=name, metavar="FILE", required=True, help='"-" for standard output')
    p = command("guard", "the rules as a compiled guard, which C programs ask", *both)
    p.add_argument("-o", "--output", type=name, metavar="FILE", required=True, help='"-" for standard output')
    p = command("mount", "serve the vmcore over a file, or as a folder", *both)
    p.add_argument("target", type=name, help="a file (/proc/vmcore too) or a folder")
    p.add_argument("--foreground", action="store_true", help="stay until unmounted or interrupted")
    p.add_argument("--direct", action="store_true", help="a file without page cache: for dd and other large reads")
    p = command("save", "guarded copy, sparse, with progress", *both)
    p.add_argument("-o", "--output", type=name, metavar="OUT", required=True, help='"-" streams to standard output')
    p.add_argument("--overwrite", action="store_true", help="replace OUT where there is such a file")
    p = command("run", "run a collector with the vmcore inside its own process", *both)
    p.add_argument(
        "--vmcore",
        type=name,
        metavar="FILE",
        default="/proc/vmcore",
        help="what the collector opens (default: /proc/vmcore)",
    )
    p.add_argument(
        "--report", type=name, metavar="FILE", help="where to write what was refused and what could not be read"
    )
    p.add_argument("argv", metavar="COMMAND", nargs="+", help="a program, and its arguments")
    p = command("check", "verify a vmcore")
    p.add_argument("file", type=name)
    p = command("record", "write this machine's state as a folder for --machine", *both)
    p.add_argument("folder", type=name)
    p.add_argument(
        "--minimal",
        action="store_true",
        help="with the pages of memory that map, header and guard need, and no other; of a recorded machine too",
    )
    p.add_argument("--with-log", action="store_true", help="with those pages too that hold the dead kernel's log")
    second = argparse.ArgumentParser(add_help=False, formatter_class=_Help)
    group = second.add_argument_group("stage 2")
    place = group.add_mutually_exclusive_group()
    about = "the header in place of the prepared one, or not at all"
    place.add_argument("--in-place", dest="place", action="store_const", const="in-place", help=about)
    about = "the header in locked pages of our own (default: where the other place has no room)"
    place.add_argument("--pinned", dest="place", action="store_const", const="pinned", help=about)
    group.add_argument("--kernel", type=name, metavar="FILE", help="image of the running kernel (default: found)")
    group.add_argument(
        "--initramfs", type=name, metavar="FILE", help="its initramfs (default: found, or the running one packed)"
    )
    p = command("stage2", "kexec once more, so that the kernel serves the vmcore itself", *both, second)
    p.add_argument("-n", "--dry-run", action="store_true", help="say what would be done, and do nothing")
    about = "the capture-kernel step: a guarded vmcore where collectors look for it"
    p = command("init", about, *both, second)
    p.add_argument(
        "--via",
        choices=("auto", "fuse", "run", "stage2"),
        default="fuse",
        help="over FUSE (default), inside of COMMAND, by the kernel itself, or what this machine allows",
    )
    p.add_argument("argv", metavar="COMMAND", nargs="*", help="a collector to run then, and its arguments")
    command("done", "after the collector: end what init left running, and say what reads have lost")
    return top
