"""Fixtures in layers: a home, an image, a machine; and the check that nothing is left over."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import anyio
import psutil
import pytest
from hypothesis import HealthCheck, settings

from vmjob.errors import VmjobError
from vmjob.home import Home, remove_tree
from vmjob.machine.contract import BootParts, MachineSpec

if TYPE_CHECKING:
    from vmjob.guest.client import AgentClient
    from vmjob.image.store import Image
    from vmjob.machine.contract import Machine

# How long an example takes on a busy computer says nothing about what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

#: Inherited by everything that this session starts.
TOKEN = secrets.token_hex(8)
#: Seconds for a test in VirtualBox's interpreter, the boot of the first machine included.
INTERPRETED = 1200
#: Seconds that processes of a finished test may take to go.
GONE_DEADLINE = 10.0


#: What tests have that are not parametrized.
NO_PARAMETERS = SimpleNamespace(params={})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def session_processes(below: Path) -> list[psutil.Process]:
    """Living processes that descend from this session, even when their parents are gone.

    What a machine runs does not inherit our token; it is known by a path ``below`` the session's
    directory: in its command line, its environment or as its working directory.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            env = process.environ()
            said = [*process.cmdline(), *env.values(), process.cwd()]
            if env.get("VMJOB_TEST_TOKEN") == TOKEN or any(str(below) in each for each in said):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after the deadline."""
    return psutil.wait_procs(processes, timeout=GONE_DEADLINE)[1]


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the whole session: no process of it, and nothing of ours outside the homes."""
    os.environ["VMJOB_TEST_TOKEN"] = TOKEN
    before = ours_outside()
    yield
    left = wait_until_gone(session_processes(tmp_path_factory.getbasetemp()))
    assert not left, f"processes are left: {left}"
    assert ours_outside() <= before, "files are left outside VMJOB_HOME"


def ours_outside() -> set[str]:
    """Files with our names where temporary and user data go."""
    places = [Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/run"),
              Path("~/.local/share").expanduser(), Path.cwd()]
    patterns = ("vmjob*", ".vmjob*", "mmdebstrap*")
    return {str(path) for place in places for pattern in patterns for path in place.glob(pattern)}


@pytest.fixture(autouse=True)
def no_quiet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake machine has no kernel that puts work off."""
    if request.node.get_closest_marker("vm") is None:
        monkeypatch.setattr("vmjob.engine.freezing.QUIET", 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of the test's own."""
    monkeypatch.setenv("VMJOB_HOME", str(tmp_path / "home"))
    return Home()


@pytest.fixture
def fake_shape(home: Home) -> MachineSpec:
    return MachineSpec(id="", directory=home.root, boot=None)


@pytest.fixture(scope="session")
def image_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The home that holds this session's images; ``VMJOB_TEST_HOME`` keeps it between sessions."""
    given = os.environ.get("VMJOB_TEST_HOME")
    home = Home(given or tmp_path_factory.mktemp("images"))
    yield home
    if not given:
        remove_tree(home.root)


@pytest.fixture(scope="session")
def default_image(image_home: Home) -> Image:
    """The default image, built from this checkout."""
    from vmjob.image.recipe import Recipe
    from vmjob.image.store import ImageStore

    store = ImageStore(image_home)
    recipe = Recipe()
    return store.current(recipe) or store.build(recipe, lambda fraction, text: None)


#: The packages of the real programs whose answers are known.
SCIENCE = ("autodock-vina", "bc", "clustalo", "gromacs", "hmmer", "hmmer-examples", "ncbi-blast+",
           "openssh-client", "pari-gp", "povray", "povray-examples", "primecount-bin",
           "primesieve-bin")


@pytest.fixture(scope="session")
def science_image(image_home: Home) -> Image:
    """An image with real programs."""
    from vmjob.image.recipe import Recipe
    from vmjob.image.store import ImageStore

    store = ImageStore(image_home)
    recipe = Recipe("science", packages=SCIENCE)
    return store.current(recipe) or store.build(recipe, lambda fraction, text: None)


@pytest.fixture
def vm_home(home: Home, default_image: Image) -> Home:
    """A home of the test's own with the session's default image in it, by links to its parts."""
    lend(default_image, home)
    return home


def lend(image: Image, home: Home) -> None:
    """Make an image of the session usable in another home, with the templates made from it."""
    home.templates.rmdir()
    shared = Home(image.directory.parents[1])
    (home.root / "templates").symlink_to(shared.templates)
    target = home.images / image.name
    target.mkdir()
    for path in image.directory.iterdir():
        os.link(path, target / path.name)


@pytest.fixture
def vm_shape(vm_home: Home, default_image: Image) -> MachineSpec:
    return MachineSpec(id="", directory=vm_home.root, boot=BootParts.of(default_image),
                       memory_mb=256, accelerator="tcg")


@pytest.fixture(scope="session")
def virtualbox() -> Path:
    """The directory of a real VirtualBox's programs, which needs no kernel driver.

    Machines need ``--vm-execution-engine=interpreter``. `script/virtualbox` builds it.
    """
    given = os.environ.get("VMJOB_VIRTUALBOX")
    if not given:
        pytest.skip(os.environ.get("VMJOB_TEST_NO_VIRTUALBOX")
                    or "no real VirtualBox: VMJOB_VIRTUALBOX=$(script/virtualbox) builds one")
    return Path(given)


@pytest.fixture(scope="session")
def in_virtualbox(virtualbox: Path, default_image: Image, image_home: Home) -> MachineSpec:
    """The shape of machines on the real VirtualBox that are there at once.

    Copies of one that was booted, which takes minutes, and frozen; it has a network. `lend` gives
    it to other homes as well.
    """
    from vmjob.engine.freezing import lease
    from vmjob.machine.virtualbox.driver import VirtualBoxDriver

    shape = MachineSpec(id="", directory=image_home.root, boot=BootParts.of(default_image),
                        memory_mb=256, accelerator="interpreter", network="nat")

    async def template() -> Path:
        with contextlib.closing(await lease(image_home, VirtualBoxDriver(), shape,
                                            lambda phase: None)) as leased:
            return leased.template.directory

    return replace(shape, template=anyio.run(template))


async def awake(machine: Machine, client: AgentClient, deadline: float) -> None:
    """Wait for a machine's agent; that of a copy waits for us, too."""
    from vmjob.guest.client import Identity

    if machine.spec.template is not None:
        await client.introduce(Identity.fresh(machine.spec.id, network=False), deadline)
    else:
        await client.hello(deadline)


@pytest.fixture
def no_virtual_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests never start a virtual machine."""

    def refuse(*args: object) -> str:
        raise AssertionError("a unit test starts a virtual machine")

    monkeypatch.setattr("vmjob.machine.qemu.programs.find", refuse)
    monkeypatch.setattr("vmjob.machine.virtualbox.programs.find", refuse)
    real = subprocess.Popen.__init__

    def watched(self: object, args: object, *more: object, **options: object) -> None:
        words = [args] if isinstance(args, str | bytes | os.PathLike) else list(args)  # type: ignore[call-overload]
        if any(name in os.fsdecode(word) for word in words
               for name in ("qemu-system", "VBoxHeadless")):
            refuse()
        real(self, args, *more, **options)  # type: ignore[arg-type]

    # asyncio's subprocesses are made by it, too.
    monkeypatch.setattr(subprocess.Popen, "__init__", watched)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "virtualbox" in getattr(item, "fixturenames", ()) or (
                "virtualbox" in getattr(item, "callspec", NO_PARAMETERS).params.values()):
            item.add_marker("virtualbox")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(INTERPRETED))
        if "science_image" in getattr(item, "fixturenames", ()):
            item.add_marker("science")
        if "/tests/unit/" in str(item.path):
            item.add_marker(pytest.mark.usefixtures("no_virtual_machines"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None],
                              ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """An error's context (a log's end, a hypervisor's words) stands beside its traceback."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    while error is not None:
        if isinstance(error, VmjobError) and error.context and report.failed:
            report.sections.append((f"context of {type(error).__name__}", "\n".join(
                f"{name}: {value}" for name, value in error.context.items())))
        error = error.__cause__
    return report


def eventually(condition: object, seconds: float = 10.0) -> bool:
    """Wait for something that the operating system announces to nobody."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return psutil.Process().num_fds()
