"""Files out of Debian packages, and package descriptions, without installing anything and without being root.

apt works on a private state folder here, so a machine whose own package lists are absent or old does not matter.
Standard library only; needs `apt-get` and `dpkg-deb`, so Debian or Ubuntu.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class NoApt(RuntimeError):
    """This machine cannot give Debian packages; the message says why and what to do."""


class Apt:
    """A private apt in `state`, which also fetches the package descriptions in `languages`."""

    def __init__(self, state: Path, languages: Sequence[str] = ("en",)) -> None:
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise NoApt("apt-get or dpkg-deb is missing; run this on Debian or Ubuntu")
        self.state = state.resolve()
        (self.state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self.state / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        self.options = [
            *("-o", f"Dir::State={self.state}"),
            *("-o", f"Dir::State::lists={self.state}/lists"),
            *("-o", f"Dir::Cache={self.state}"),
            *("-o", "Acquire::Languages=" + ",".join(languages)),
            *("-o", "Debug::NoLocking=1"),
            *("-o", "APT::Sandbox::User=root"),
        ]
        self._run("update")

    def _run(self, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(["apt-get", "-qq", *self.options, *words], cwd=cwd, text=True, capture_output=True)
        if done.returncode != 0:
            raise NoApt(f"apt-get {words[0]} failed; is there a network?\n{done.stderr.strip()}")
        return done.stdout

    def unpack(self, package: str, folder: Path) -> Path:
        """Download `package` and unpack its files under folder/PACKAGE, once; returns that folder."""
        target = folder / package
        if not target.exists():
            downloads = self.state / "downloads"
            downloads.mkdir(exist_ok=True)
            self._run("download", package, cwd=downloads)
            (archive,) = downloads.glob(f"{package}_*.deb")
            half = target.with_name(target.name + ".part")
            shutil.rmtree(half, ignore_errors=True)
            subprocess.run(["dpkg-deb", "-x", str(archive), str(half)], check=True)
            archive.unlink()
            half.rename(target)
        return target

    def _cache(self, *words: str) -> str:
        return subprocess.run(["apt-cache", *self.options, *words], text=True, capture_output=True, check=True).stdout

    def newest(self, pattern: str) -> str:
        """The package whose whole name matches the regular expression `pattern`; the last in order if several do."""
        names = [line.split(" ", 1)[0] for line in self._cache("search", "--names-only", f"^{pattern}$").splitlines()]
        if not names:
            raise NoApt(f"no package {pattern} in this distribution")
        return max(names)

    def version(self, package: str) -> str:
        """The version that `unpack` takes."""
        shown = self._cache("show", "--no-all-versions", package)
        return next(line.split(": ", 1)[1] for line in shown.splitlines() if line.startswith("Version: "))

    def lists(self, pattern: str) -> list[tuple[str, str]]:
        """(file name, text) of the downloaded lists whose names match the glob `pattern`, unpacked."""
        found = sorted((self.state / "lists").glob(pattern))
        helper = "/usr/lib/apt/apt-helper"
        return [
            (
                path.name,
                subprocess.run([helper, "cat-file", str(path)], capture_output=True, check=True).stdout.decode(),
            )
            for path in found
        ]
