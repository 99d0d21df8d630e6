"""Under ``--cpu baseline`` a program whose last digits depend on the processor gives one answer."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vmjob
from tests.conftest import lend
from vmjob.home import Home, remove_tree
from vmjob.image.store import Image
from vmjob.machine.qemu import argv

pytestmark = pytest.mark.vm

#: A sum that shows every last digit of libm's sin and exp, which choose their code by AVX2 and FMA.
TRAP = ("import math; "
        "print(math.fsum(math.sin(i)*math.exp(-i*1e-6) for i in range(10**6)).hex())")
TRAP_PLAIN = "0x1.54145bf6068a3p-1\n"
TRAP_FMA = "0x1.54145bf6068bep-1\n"

#: What libm must not use for a native run to be comparable.
WITHOUT_FMA = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA"}
#: Flags of processors made after the baseline.
NEW_FLAGS = {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}

#: The pixels only: the header above them has the date.
POVRAY = ("povray +I/usr/share/doc/povray/examples/objects/quartic/torus.pov +W160 +H120 +A0.3 "
          "+WT1 +FP +O- -D -GA | tail -c 57600")

VINA = ("vina --receptor 1iep_receptor.pdbqt --ligand 1iep_ligand.pdbqt --center_x 15.190 "
        "--center_y 53.903 --center_z 16.917 --size_x 20 --size_y 20 --size_z 20 "
        "--exhaustiveness 1 --seed 42 --cpu 1 --num_modes 3 --out o.pdbqt >&2; cat o.pdbqt")
#: Seconds for it, under emulation on a loaded computer.
VINA_PATIENCE = 1500

#: The code that Cosmology@Home runs, with what it needs: binaries for the guest's Python.
CAMB_WHEELS = ("camb==2.0.5", "numpy==2.4.6", "scipy==1.17.1", "sympy==1.14.0", "mpmath==1.3.0",
               "packaging==26.3")
GUESTS_PYTHON = (3, 11)
CAMB = """\
import camb
pars = camb.set_params(H0=67.5, ombh2=.022, omch2=.122, mnu=.06, omk=0, tau=.06, As=2e-9, ns=.965,
                       lmax=1500)
spectra = camb.get_results(pars).get_cmb_power_spectra(pars, CMB_unit="muK")
temperature = spectra["total"][:, 0]
print(float(temperature[220]), float(temperature.sum()))
"""
CAMB_PLAIN = "5323.5376988461685 2900211.3202634957\n"
#: As for Vina.
CAMB_PATIENCE = 1500


def short(data: bytes) -> str:
    """The first 16 digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.anyio
async def test_baseline_gives_the_answers_of_a_processor_without_fma(
        home: Home, science_image: Image) -> None:
    lend(science_image, home)
    async with vmjob.AsyncMachine.create(image="science", accel="tcg", cpu="baseline",
                                         cold=True) as machine:
        trap = await machine.run(["python3", "-c", TRAP])
        assert trap.stdout_text == TRAP_PLAIN
        assert short(trap.stdout) == "14064dae1a56d490"
        picture = await machine.run(["sh", "-c", POVRAY], env={"LC_ALL": "C"})
        assert picture.exit_code == 0, picture.stderr_text
        assert short(picture.stdout) == "4f326d917e396414"
        libc = await machine.run(["getconf", "GNU_LIBC_VERSION"])
    if (platform.machine() == "x86_64" and sys.platform == "linux"
            and libc.stdout_text.strip() == os.confstr("CS_GNU_LIBC_VERSION")):
        native = subprocess.run([sys.executable, "-c", TRAP], capture_output=True, check=True,
                                env={**os.environ, **WITHOUT_FMA})
        assert trap.stdout == native.stdout


@pytest.mark.anyio
@pytest.mark.timeout(VINA_PATIENCE)
async def test_baseline_docks_a_ligand_as_a_processor_without_fma(
        home: Home, science_image: Image) -> None:
    given = os.environ.get("VMJOB_TEST_INPUTS")
    if given is None or not (found := sorted(Path(given).rglob("1iep_receptor.pdbqt"))):
        pytest.skip("VMJOB_TEST_INPUTS names no directory with 1iep_*.pdbqt")
    lend(science_image, home)
    async with vmjob.AsyncMachine.create(image="science", memory_mb=2048, accel="tcg",
                                         cpu="baseline", cold=True) as machine:
        for name in ("1iep_receptor.pdbqt", "1iep_ligand.pdbqt"):
            await machine.put(found[0].parent / name)
        result = await machine.run(["sh", "-c", VINA], env={"LC_ALL": "C"})
    assert result.exit_code == 0, result.stderr_text
    assert short(result.stdout) == "464138068b702627"


@pytest.fixture(scope="session")
def camb_wheels(image_home: Home) -> Path:
    """A directory with the wheels, downloaded once; it is kept where the session's images are."""
    kept = image_home.root / f"wheels-{short(repr(CAMB_WHEELS).encode())}"
    if not kept.exists():
        made = kept.with_suffix(".new")
        remove_tree(made)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", made,
             "--only-binary=:all:", "--implementation=cp",
             "--python-version=" + ".".join(map(str, GUESTS_PYTHON)),
             *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 27, 28)), *CAMB_WHEELS],
            capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            remove_tree(made)
            pytest.skip("CAMB WAS NOT RUN: its wheels cannot be downloaded: "
                        + done.stderr.strip()[-300:])
        made.rename(kept)
    return kept


@pytest.mark.anyio
@pytest.mark.timeout(CAMB_PATIENCE)
async def test_baseline_computes_a_universe_as_a_processor_without_fma(
        home: Home, science_image: Image, camb_wheels: Path, tmp_path: Path) -> None:
    lend(science_image, home)
    async with vmjob.AsyncMachine.create(image="science", memory_mb=2048, accel="tcg",
                                         cpu="baseline", cold=True) as machine:
        await machine.put(camb_wheels, "wheels")
        unpacked = await machine.run(
            ["sh", "-c", 'for each in wheels/*.whl; do python3 -m zipfile -e "$each" site; done'])
        assert unpacked.exit_code == 0, unpacked.stderr_text
        result = await machine.run(["python3", "-c", CAMB], env={"PYTHONPATH": "site"})
        assert (result.exit_code, result.stdout_text) == (0, CAMB_PLAIN), result.stderr_text
        libc = await machine.run(["getconf", "GNU_LIBC_VERSION"])
    if (platform.machine() == "x86_64" and sys.platform == "linux"
            and sys.version_info[:2] == GUESTS_PYTHON
            and libc.stdout_text.strip() == os.confstr("CS_GNU_LIBC_VERSION")):
        for wheel in camb_wheels.iterdir():
            shutil.unpack_archive(wheel, tmp_path / "site", "zip")
        native = subprocess.run([sys.executable, "-c", CAMB], capture_output=True, check=True,
                                env={**os.environ, **WITHOUT_FMA,
                                     "PYTHONPATH": str(tmp_path / "site")})
        assert result.stdout == native.stdout


@pytest.mark.usefixtures("vm_home")
@pytest.mark.parametrize(("cpu", "model", "present", "answer"), [
    ("baseline", argv.CPU_BASELINE, set(), TRAP_PLAIN),
    ("host", argv.CPU_MODELS["tcg"], NEW_FLAGS, TRAP_FMA)],
    ids=["baseline", "host"])
def test_the_record_names_the_model_and_the_flags_that_the_guest_saw(
        cpu: str, model: str, present: set[str], answer: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmjob", "run", "--json", "--quiet", "--cold", "--memory", "256",
         "--accel", "tcg", "--cpu", cpu, "--", "python3", "-c", TRAP],
        capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, answer)
    machine = json.loads(done.stdout)["machine"]
    assert machine["cpu_model"] == model
    flags = set(machine["guest_processor_flags"])
    assert flags & NEW_FLAGS == present
    assert {"sse4_2", "popcnt", "cx16"} <= flags
