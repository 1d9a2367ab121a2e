# SPDX-License-Identifier: LGPL-2.1-or-later
"""From this tree to a program on another machine: sdist, the wheel made from that sdist, and a virtual environment with
the wheel and the cffi backend in it, nothing else. Needs no network."""

from __future__ import annotations

import email
import email.message
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from capture.cli import VERSION
from tests.image.machines import RecordedKernel

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("guard", "capture", "initramfs")
# What a clone does not have: made by builds, tests and tools
MADE = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_core.c")

pytestmark = pytest.mark.slow


class Built(NamedTuple):
    tree: Path
    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*MADE))
    shutil.copytree(ROOT / ".ci", tree / ".ci")
    backend = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", backend, folder, cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-index", "--no-build-isolation", "--no-deps", "--no-cache-dir", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return Built(tree, sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel."""
    target = tmp_path_factory.mktemp("installed")
    venv.create(target, symlinks=True)
    python = target / "bin" / "python"
    install = ("--python", python, "install", "--no-index", "--no-deps", "--quiet", built.wheel)
    run(sys.executable, "-m", "pip", *install, cwd=target)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))", cwd=target).strip())
    backend = importlib.util.find_spec("_cffi_backend")
    assert backend is not None
    assert backend.origin is not None
    shutil.copy(backend.origin, packages)
    return python.parent


def files(tree: Path, folder: str) -> set[str]:
    """The files below *folder* as a clone has them: building leaves generated C and metadata in *tree*."""
    found = (path for path in (tree / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(tree)) for path in found if path.name != "_core.c"}


def wheel_names(built: Built) -> set[str]:
    with zipfile.ZipFile(built.wheel) as archive:
        return set(archive.namelist())


def metadata(built: Built) -> email.message.Message:
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_sdist_has_all_that_building_and_testing_need(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"cffi_build.py", "setup.py", "pyproject.toml", "Makefile", ".ci/run"}
    wanted |= {"LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    for folder in (*PACKAGES, "tests", "docs"):
        wanted |= files(built.tree, folder)
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_serves_every_interpreter_from_3_11_on(built: Built) -> None:
    distribution, version, python, abi, platform = built.wheel.stem.split("-")
    assert (distribution, version, python, abi) == ("oldmem", VERSION, "cp311", "abi3")
    assert platform.startswith("linux_")
    assert "guard/_core.abi3.so" in wheel_names(built)


def test_wheel_has_the_packages_with_their_types_and_nothing_else(built: Built) -> None:
    names = wheel_names(built)
    sources = {name for package in PACKAGES for name in files(built.tree, package) if name.endswith(".py")}
    data = {"guard/py.typed", "guard/_core.pyi", "guard/_core.abi3.so"}
    data |= {"capture/py.typed", "capture/_preload.abi3.so"}
    assert {name for name in names if ".dist-info/" not in name} == sources | data | files(built.tree, "initramfs")


def test_metadata_names_version_license_and_needs(built: Built) -> None:
    found = metadata(built)
    assert (found["Name"], found["Version"], found["Requires-Python"]) == ("oldmem", VERSION, ">=3.11")
    assert "LGPL-2.1-or-later" in (found["License"] or "", found["License-Expression"] or "")
    assert found.get_all("License-File") == ["LICENSE"]
    needs = [need for need in found.get_all("Requires-Dist") or [] if "extra" not in need]
    assert needs == ["cffi>=1.15"]


def test_installed_command_runs_outside_the_tree_without_cffi(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "oldmem", "--version", cwd=tmp_path) == f"oldmem {VERSION}\n"
    assert "exit status" in run(installed / "oldmem", "--help", cwd=tmp_path)
    assert run(installed / "python", "-m", "capture", "--version", cwd=tmp_path) == f"oldmem {VERSION}\n"
    assert "--list-files" in run(installed / "python", "-m", "initramfs", "--help", cwd=tmp_path)


def test_installed_command_puts_its_library_into_a_program(installed: Path, tmp_path: Path) -> None:
    kernel = RecordedKernel()
    kernel.shrink()
    kernel.finish_kernel()
    machine = kernel.write(tmp_path)
    magic = run(installed / "oldmem", "run", "--machine", machine, "--", "head", "-c4", "/proc/vmcore", cwd=tmp_path)
    assert magic == "\x7fELF"


def test_installed_packages_import_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    modules = "guard, guard.witness.dead_kernel, capture.service, capture.init, capture.record, capture.save"
    program = f"import sys, {modules}; print(guard.__file__, capture.__file__, 'cffi' in sys.modules)"
    files = run(installed / "python", "-c", program, cwd=tmp_path).split()
    assert all(file.startswith(str(installed.parent)) for file in files[:2])
    assert files[2] == "False"
