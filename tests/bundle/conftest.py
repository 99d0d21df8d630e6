"""The bundles, built once, and a computer that has neither Python nor QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundling.libraries import LOADER, closure
from tests.conftest import lend
from vmjob.home import Home
from vmjob.host.unpacking import unpacked
from vmjob.image.store import Image

ROOT = Path(__file__).parents[2]
#: Seconds to build both bundles, on a computer that has other things to do.
BUILDING = 280
#: What the bundle and vmjob run on the host, besides what any Linux has.
PROGRAMS = ("sh", "tar", "gzip", "tail", "mkdir", "rm", "ls", "readlink", "setpriv", "env",
            "sleep", "cat")
#: Enter a root directory of which only data/ can be written, with an empty /tmp that cannot.
ENTER = """
mount --bind "$0" "$0"
mount --bind "$0/data" "$0/data"
mount --rbind /proc "$0/proc"
mount --rbind /dev "$0/dev"
mount -t tmpfs -o ro none "$0/tmp"
mount -o remount,bind,ro "$0"
cd "$0/data/slots/0" && exec chroot "$0" env -i "$@"
"""


@dataclass(frozen=True)
class Bundles:
    """Files for volunteers."""

    vmjob: Path
    qemu: Path


def sources() -> list[Path]:
    """What the bundles are made of, as far as it is ours."""
    found = [ROOT / "requirements-dev.txt"]
    for directory in (ROOT / "src", ROOT / "packaging"):
        found += [path for path in directory.rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts]
    return found


def current(pattern: str) -> Path | None:
    """The newest file in dist/ if nothing changed after it."""
    found = sorted((ROOT / "dist").glob(pattern), key=lambda path: path.stat().st_mtime)
    newest = max(path.stat().st_mtime for path in sources())
    return found[-1] if found and found[-1].stat().st_mtime > newest else None


@pytest.fixture(scope="session")
def bundles() -> Bundles:
    patterns = {"wrapper": "vmjob-[0-9]*-linux-x86_64", "qemu": "vmjob-qemu-*.tar.gz"}
    stale = [what for what, pattern in patterns.items() if current(pattern) is None]
    if stale:
        subprocess.run([sys.executable, "-m", "bundling", *stale], check=True, timeout=BUILDING,
                       stdout=subprocess.DEVNULL,
                       env={**os.environ, "PYTHONPATH": str(ROOT / "packaging")})
    built = {what: current(pattern) for what, pattern in patterns.items()}
    assert built["wrapper"]
    assert built["qemu"]
    return Bundles(built["wrapper"], built["qemu"])


@dataclass(frozen=True)
class Computer:
    """A directory with a system of which only what a job needs is there."""

    root: Path

    @property
    def project(self) -> Path:
        """Where the BOINC client keeps a project's files."""
        return self.root / "data" / "projects" / "example.org_test"

    @property
    def programs(self) -> Path:
        """Where the bundle unpacks itself."""
        return self.project / "vmjob" / "programs"

    def argv(self, *arguments: str, **environment: str) -> list[str]:
        """A command that runs there, in a slot, as the BOINC client starts one; one process."""
        given = {"PATH": "/usr/bin:/bin", "HOME": "/home", "VMJOB_HOME": "/data/home",
                 "LD_LIBRARY_PATH": "../../projects/example.org_test:.:../..", **environment}
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        return ["unshare", *user, "--mount", "/bin/sh", "-e", "-c", ENTER, str(self.root),
                *(f"{name}={value}" for name, value in given.items()),
                "/bin/sh", "-c", 'cd /data/slots/0 && exec "$@"', "sh", *arguments]

    def run(self, *arguments: str, timeout: float = 60,
            **environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.argv(*arguments, **environment), capture_output=True,
                              timeout=timeout, check=False, stdin=subprocess.DEVNULL)


#: argv[0] as the BOINC client gives it.
VMJOB = "../../projects/example.org_test/vmjob_0.1.0_x86_64-pc-linux-gnu"


def put(program: Path, root: Path) -> None:
    """A program under its name in /usr/bin, with its libraries where the loader looks for them."""
    shutil.copy(program, root / "usr" / "bin" / program.name)
    for name, library in closure([program]).items():
        shutil.copy(library, root / "usr" / "lib" / name)


@pytest.fixture
def computer(bundles: Bundles, tmp_path: Path) -> Computer:
    """Debian's loader and libraries, a shell, tar and gzip: no Python, no QEMU."""
    root = tmp_path / "root"
    for name in ("usr/bin", "usr/lib", "etc", "proc", "dev", "tmp", "home", "data/slots/0"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "lib64").symlink_to("usr/lib")
    shutil.copy(LOADER, root / "usr" / "lib" / LOADER.name)
    for program in PROGRAMS:
        found = shutil.which(program)
        assert found
        put(Path(found).resolve().with_name(Path(found).resolve().name), root)
        if Path(found).resolve().name != program:  # sh is dash
            (root / "usr" / "bin" / program).symlink_to(Path(found).resolve().name)
    computer = Computer(root)
    computer.project.mkdir(parents=True)
    shutil.copy(bundles.vmjob, computer.project / Path(VMJOB).name)
    return computer


@pytest.fixture
def with_machines(computer: Computer, bundles: Bundles, default_image: Image) -> str:
    """The same with the QEMU bundle and an image; the value of ``VMJOB_QEMU`` there."""
    home = Home(computer.root / "data" / "home")
    lend(default_image, home)
    (home.root / "templates").unlink()  # it leads out of this computer
    qemu = unpacked(bundles.qemu, home.root / "programs")
    return f"/{qemu.relative_to(computer.root)}"
