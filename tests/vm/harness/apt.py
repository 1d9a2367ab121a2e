# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages of any Debian suite, fetched and unpacked with the machine's own apt, without touching its state.

The mirror is the one the machine's apt is configured with (so are its proxies and credentials); lists, caches and the
dpkg status (an empty one) are private to each suite's folder."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RELEASES = {"bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"}
ATTEMPTS = 5


class FetchError(Exception):
    """A package, a suite or the tools to fetch them are not to be had; ``str()`` is one line with apt's own reason."""


def mirror() -> str:
    """URI of the Debian archive that this machine's apt uses, from sources.list or deb822 alike."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    for line in _run(command).splitlines():
        uri, release, component = line.split()[:3]
        if release in RELEASES and component == "main":
            return uri
    raise FetchError("apt: no Debian archive (a release's main component) in this machine's sources")


class Suite:
    """One suite (``trixie``, ``trixie-backports``) of :func:`mirror` for *arch*, with its private apt state in
    *folder*. *base*: the suite that has what *name* itself, a backports suite, leaves out."""

    def __init__(self, name: str, folder: Path, arch: str = "amd64", base: str | None = None) -> None:
        self.name = name
        self._archives = folder / "cache" / "archives"
        for path in (folder / "state" / "lists" / "partial", self._archives / "partial"):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "status").write_bytes(b"")
        sources = folder / "sources.list"
        line = f"deb [arch={arch} target=Packages signed-by={KEYRING}] {mirror()}"
        sources.write_text("".join(f"{line} {suite} main\n" for suite in (name, base) if suite))
        settings = {
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Sandbox::User": "root",
            "APT::Architecture": arch,
            "APT::Architectures": arch,
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        if base:
            settings["APT::Default-Release"] = name
        self._options = ["-q"]
        for key, value in settings.items():
            self._options += ["-o", f"{key}={value}"]
        self._apt("apt-get", "--error-on=any", "update")

    def _apt(self, tool: str, *arguments: str) -> str:
        attempts = ATTEMPTS if tool == "apt-get" else 1
        return _run([tool, *self._options, *arguments], attempts=attempts, cwd=self._archives)

    def depends(self, package: str) -> list[str]:
        """Names that *package* (its newest version in the suite) depends on; of alternatives, the first."""
        match = re.search(r"^Depends: (.*)$", self._apt("apt-cache", "show", "--no-all-versions", package), re.M)
        return [item.split()[0] for item in match.group(1).split(",")] if match else []

    def download(self, packages: Iterable[str]) -> list[Path]:
        """Exactly *packages*, as .deb files."""
        self._clean()
        self._apt("apt-get", "download", *packages)
        return sorted(self._archives.glob("*.deb"))

    def download_closure(self, packages: Iterable[str]) -> list[Path]:
        """*packages* and all that they depend on (no recommendations), as .deb files."""
        self._clean()
        self._apt("apt-get", "--no-install-recommends", "--download-only", "--yes", "install", *packages)
        return sorted(self._archives.glob("*.deb"))

    def _clean(self) -> None:
        for path in self._archives.glob("*.deb"):
            path.unlink()


def unpack(debs: Iterable[Path], into: Path) -> None:
    """Unpacks *debs* as one merged-/usr tree."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (into / "usr" / name).mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to(f"usr/{name}")
    for deb in debs:
        # `dpkg-deb --extract` would replace the links by folders where an older package ships /lib
        with tempfile.TemporaryFile() as archive:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], stdout=archive, check=True)
            archive.seek(0)
            extract = ["tar", "--extract", "--keep-directory-symlink", "--no-same-owner", "--directory", str(into)]
            subprocess.run(extract, stdin=archive, check=True)


def _run(command: list[str], *, attempts: int = 1, cwd: Path | None = None) -> str:
    for attempt in range(attempts):
        if attempt:
            time.sleep(2**attempt)
        try:
            done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=600)
        except FileNotFoundError:
            raise FetchError(f"{command[0]}: not installed") from None
        except subprocess.TimeoutExpired:
            reason = "no end after 600 s"
            continue
        if done.returncode == 0:
            return done.stdout
        reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), done.stderr.strip()[-300:])
    raise FetchError(f"{' '.join([command[0], *command[-2:]])}: {reason}")
