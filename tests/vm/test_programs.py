"""Real programs on real input give the answers that they give everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import vmjob
from tests.conftest import lend
from vmjob.home import Home
from vmjob.image.store import Image

pytestmark = pytest.mark.vm

TUTORIAL = "/usr/share/doc/hmmer/examples/tutorial"

#: Command -> first 16 digits of the SHA-256 of its stdout, computed natively on two processors,
#: with and without AVX2 and FMA: these programs give the same bytes everywhere.
ANSWERS = {
    "primesieve 1e11 -t1 -q -c1": "aa347538990397b9",
    "primesieve 999999900000 1e12 -p": "c300d1ffed7cdf87",
    "primecount 1e15 -t1": "62534e919619252e",
    'echo "scale=3000; 4*a(1)" | bc -lq': "b1d6536884c74f1f",
    'echo "p=19937;s=Mod(4,2^p-1);for(i=1,p-2,s=s^2-2);print(lift(s)==0)" | gp -q -s 256M':
        "4355a46b19d348dc",
    f"hmmbuild --seed 42 g.hmm {TUTORIAL}/globins4.sto >/dev/null; hmmsearch --seed 42 --cpu 0 "
    f"--noali --tblout o.tbl g.hmm {TUTORIAL}/globins45.fa >/dev/null; grep -v '^#' o.tbl":
        "ed89dce33a3e823c",
    f"clustalo -i {TUTORIAL}/globins45.fa --threads=1 --outfmt=fa": "57efdbcef1d87786",
}

#: Seconds for all of them together, under emulation on a loaded computer.
PATIENCE = 1500


@pytest.mark.anyio
@pytest.mark.timeout(PATIENCE)
async def test_the_portable_programs_give_the_known_answers(home: Home,
                                                            science_image: Image) -> None:
    lend(science_image, home)
    found = {}
    async with vmjob.AsyncMachine.create(image="science", memory_mb=512, accel="tcg") as machine:
        for command in ANSWERS:
            result = await machine.run(["sh", "-c", command], env={"LC_ALL": "C"})
            assert result.exit_code == 0, result.stderr_text
            found[command] = hashlib.sha256(result.stdout).hexdigest()[:16]
    assert found == ANSWERS


def test_the_seeds_worker_runs_from_the_synchronous_api(vm_home: Home, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads stdin and the file ``in``, writes stdout and ``out``, tells its fraction done."""
    example = Path(__file__).parents[2] / "examples" / "worker"
    monkeypatch.chdir(example)
    with vmjob.Machine.create(memory_mb=256, accel="tcg", home=vm_home.root) as machine:
        machine.put("in")
        machine.put("worker.py")
        result = machine.run(["python3", "worker.py", "1"], stdin="a line on stdin\n")
        assert (result.exit_code, result.stderr) == (0, b"")
        assert result.stdout_text.splitlines()[-1] == "worker: used 1 CPU seconds"
        assert machine.get("out", tmp_path / "out").read_text() == \
            "A LINE IN THE FILE\nA LINE ON STDIN\n"
        fractions = [float(line.split()[1]) for line in machine.messages()]
        assert fractions[0] < 0.5
        assert fractions[-1] == 1.0
        assert result.end.cpu_seconds is not None
        assert 1.0 <= result.end.cpu_seconds < 60  # with what others took of the computer
        assert [entry.name for entry in machine.ls()] == ["in", "out", "worker.py"]
        with pytest.raises(vmjob.JobError) as caught:
            machine.get("nothing", tmp_path / "nothing")
        assert caught.value.code == "output-missing"
        machine.mkdir("a/b")
        machine.delete("a")
        machine.suspend()
        assert machine.status() == "suspended"
        machine.resume()
        assert machine.ping()["memory_available_bytes"] > 0
        assert machine.facts()["hypervisor"] == "qemu"
        with pytest.raises(vmjob.JobError):
            machine.run(["sleep", "1000"], timeout=0.2)
    with pytest.raises(vmjob.UsageError):
        machine.ls()
