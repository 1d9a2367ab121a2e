# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Python part of the image: one interpreter, whatever its prefix, and the modules that the program itself reports.

In the image the interpreter is /usr/bin/pythonX.Y and all modules are in its /usr/lib/pythonX.Y: it finds its prefix
from there (Modules/getpath.py: the landmark os.pyc above the executable), whatever prefix was built into it, and no
search path has to be set. Modules are sourceless bytecode; those frozen into the interpreter are not needed as
files."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import guard
from guard.errors import Error

_HERE = os.path.dirname(os.path.abspath(__file__))

# Without column numbers, which only serve to mark a spot in a source line that the image does not have.
_COMPILE = ("-I", "-S", "-X", "no_debug_ranges", os.path.join(_HERE, "_bytecode.py"))

_FACTS = """
import os, sys
folder = os.path.dirname(os.__file__)
print(repr({
    "version": sys.version_info[:2], "build": sys.version, "executable": os.path.realpath(sys.executable),
    "stdlib": folder, "platlibdir": sys.platlibdir, "path": sys.path[1:],
}))
"""


class PackedFile(NamedTuple):
    """A file of the image: where it goes (*path*, absolute), the host file it is (*source*), whether it is ELF."""

    path: str
    source: str
    is_elf: bool


class PackedPython(NamedTuple):
    """The interpreter's *executable* (host path), where it goes (*path*), and the *files* of the modules."""

    executable: str
    path: str
    files: list[PackedFile]


def program_root() -> str:
    """The folder that the packages guard and capture are in."""
    return os.path.dirname(os.path.dirname(os.path.abspath(guard.__file__)))


def _run(interpreter: str, arguments: list[str], stdin: str = "") -> str:
    # A fixed hash seed, and none of the caller's PYTHON* settings: they must not change what gets packed.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONHASHSEED"] = "0"
    try:
        run = subprocess.run(
            [interpreter, "-B", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            cwd="/",
            check=False,
        )
    except OSError as error:
        raise Error(f"{interpreter}: {error.strerror}") from None
    if run.returncode:
        message = run.stderr.strip().splitlines() or [f"ended with status {run.returncode}"]
        raise Error(f"{interpreter}: {message[-1]}")
    return run.stdout


def _literal(interpreter: str, text: str) -> dict[str, object]:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise Error(f"{interpreter}: not a Python interpreter: it answered {text.strip()[:60]!r}")
    return value


class PythonClosure:
    """Asks *interpreter* what it consists of and collects it. *path*: folders searched before the interpreter's own for
    the program (default: where the builder's own guard package is). *cache*: an existing folder, for compiled
    modules."""

    def __init__(self, interpreter: str, path: list[str] | None, cache: str) -> None:
        self._interpreter = shutil.which(interpreter) or interpreter
        self._cache = cache
        self._facts = _literal(self._interpreter, _run(self._interpreter, ["-c", _FACTS]))
        version = self._facts["version"]
        if not isinstance(version, tuple) or version < (3, 11):
            raise Error(f"{interpreter}: Python {version}: oldmem needs 3.11 or later")
        self._version = ".".join(map(str, version))
        self._path = [os.path.abspath(folder) for folder in (path or [program_root()])]
        stdlib = str(self._facts["stdlib"])
        self.library = f"/usr/{self._facts['platlibdir']}/{os.path.basename(stdlib)}"
        """The folder of the modules in the image."""

    def collect(self) -> PackedPython:
        """The files to pack. Raises Error when the program cannot be imported or reports what is no file."""
        searched = self._facts["path"]
        assert isinstance(searched, list)
        path = [os.path.join(_HERE, "lean"), *self._path, *map(str, searched)]
        report = ["-S", "-E", "-s", os.path.join(_HERE, "_report.py"), *path]
        answer = _literal(self._interpreter, _run(self._interpreter, report))
        modules, data = answer["modules"], answer["data"]
        assert isinstance(modules, list)
        assert isinstance(data, list)
        files: list[PackedFile] = []
        sources: list[tuple[str, str]] = []
        packages: dict[str, str] = {}
        for name, file, is_frozen, is_package in modules:
            place = f"{self.library}/{name.replace('.', '/')}"
            if is_package:
                packages[os.path.dirname(file)] = place
                place += "/__init__"
            if is_frozen:
                continue
            if not os.path.isfile(file):
                raise Error(f"{self._interpreter}: module {name} is not a file of its own: {file}")
            if file.endswith(".py"):
                sources.append((file, f"{place}.pyc"))
            elif file.endswith(".pyc"):
                files.append(PackedFile(f"{place}.pyc", file, False))
            else:
                dynload = os.path.basename(os.path.dirname(file)) == "lib-dynload"
                folder = f"{self.library}/lib-dynload" if dynload else os.path.dirname(place)
                files.append(PackedFile(f"{folder}/{os.path.basename(file)}", file, True))
        files += [self._data_file(file, packages) for file in data]
        files += self._compiled(sources)
        executable = str(self._facts["executable"])
        return PackedPython(executable, f"/usr/bin/python{self._version}", sorted(files))

    def _data_file(self, file: str, packages: dict[str, str]) -> PackedFile:
        folder = os.path.dirname(file)
        while folder not in packages:
            if folder == os.path.dirname(folder):
                raise Error(f"capture.closure reports {file}, which is in none of the packages imported")
            folder = os.path.dirname(folder)
        try:
            with open(file, "rb") as stream:
                is_elf = stream.read(4) == b"\x7fELF"
        except OSError as error:
            raise Error(f"capture.closure reports {file}: {error.strerror}") from None
        return PackedFile(f"{packages[folder]}/{os.path.relpath(file, folder)}", file, is_elf)

    def _compiled(self, sources: list[tuple[str, str]]) -> list[PackedFile]:
        files: list[PackedFile] = []
        with open(_COMPILE[-1], "rb") as stream:
            how = repr((self._facts["build"], _COMPILE[:-1], stream.read())).encode()
        missing: dict[str, tuple[str, str]] = {}
        for source, place in sources:
            try:
                with open(source, "rb") as stream:
                    text = stream.read()
            except OSError as error:
                raise Error(f"{source}: {error.strerror}") from None
            key = hashlib.sha256(b"\0".join((how, place.encode(), text))).hexdigest()
            output = os.path.join(self._cache, f"{key}.pyc")
            files.append(PackedFile(place, output, False))
            if not os.path.exists(output):
                missing[output] = (source, place)
        if missing:
            # Compiled beside, then renamed: an interrupted or a second builder leaves no half file in a shared cache.
            with tempfile.TemporaryDirectory(dir=self._cache) as work:
                made = {output: os.path.join(work, os.path.basename(output)) for output in missing}
                lines = "".join(f"{source}\t{place[:-1]}\t{made[out]}\n" for out, (source, place) in missing.items())
                _run(self._interpreter, [*_COMPILE], lines)
                for output, file in made.items():
                    os.replace(file, output)
        return files
