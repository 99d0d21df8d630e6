"""What vmjob packs: names that the wrapper finds in its slot, and no job that cannot run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.unit.small_image import small_image
from vmjob.cli.main import cli
from vmjob.errors import JobFileInvalid, PackageInvalid
from vmjob.home import Home
from vmjob.image import manifest
from vmjob.image.store import Image
from vmjob.project import signing
from vmjob.project.package import Package, package

JOB = 'run = ["cat", "in"]\ninputs = ["in"]\nmemory_mb = 256\n'
VBOX = "<vbox_job><memory_size_mb>512</memory_size_mb><enable_network/></vbox_job>"


@pytest.fixture
def image(home: Home) -> Image:
    """An image of four small files."""
    return small_image(home)


def packed(tmp_path: Path, image: Image | None = None, text: str = JOB, name: str = "job.toml",
           **options: Any) -> Package:
    job = tmp_path / name
    job.write_text(text)
    return package(tmp_path / "apps", app="lab", number="1.00", job=job, image=image,
                   **{"inputs": ["in"], **options})


def logical(made: Package) -> dict[str, str]:
    return {each.logical_name: each.physical_name for each in made.version.files}


def test_the_wrapper_finds_its_files_by_the_names_it_was_promised(tmp_path: Path,
                                                                  image: Image) -> None:
    (tmp_path / "qemu").write_text("q")
    (tmp_path / "app").write_text("a")
    made = packed(tmp_path, image, qemu=tmp_path / "qemu", copied=["shared/boinc_app"],
                  files={"shared/boinc_app": tmp_path / "app"})
    found = logical(made)
    assert found.keys() == {"", "vmjob.toml", "vmjob_qemu.tar.gz", "shared/boinc_app",
                            "vmjob_image/manifest.json",
                            *(f"vmjob_image/{name}.bin" for name in manifest.PART_NAMES)}
    assert found["vmjob_image/kernel.bin"] == f"lab_{image.digest[:12]}_kernel.bin"
    assert [each.logical_name for each in made.version.files if each.copy_file] == [
        "shared/boinc_app"]
    for each in made.version.files:
        if each.logical_name.startswith("vmjob_image/") and not each.logical_name.endswith("json"):
            assert each.path.samefile(image.directory / each.logical_name.partition("/")[2])


def test_versions_share_the_files_of_an_image(tmp_path: Path, image: Image) -> None:
    first, second = (logical(packed(tmp_path, image, plan_class=each)) for each in ("a", "b"))
    assert first == second


@pytest.mark.parametrize(("text", "name", "expected"), [
    (JOB, "x.toml", "vmjob.toml"), (VBOX, "my.xml", "vbox_job.xml"),
    ("<job_desc><task><application>in</application></task></job_desc>", "my.xml", "job.xml")])
def test_a_job_file_gets_the_name_of_its_language(tmp_path: Path, text: str, name: str,
                                                  expected: str) -> None:
    made = packed(tmp_path, text=text, name=name, inputs=["in", "shared/boinc_app"])
    assert expected in logical(made)


def test_a_job_with_errors_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(JobFileInvalid, match=r"job\.toml: .*'in'"):
        packed(tmp_path, inputs=[])
    with pytest.raises(JobFileInvalid):
        packed(tmp_path, text="run = 1")
    assert not (tmp_path / "apps").exists()


def test_a_job_with_a_network_needs_the_clients(tmp_path: Path) -> None:
    assert packed(tmp_path, text=VBOX, name="j.xml").version.needs_network
    assert not packed(tmp_path, plan_class="other").version.needs_network


def test_workunits_files_may_be_in_a_directory_of_the_slot(tmp_path: Path) -> None:
    text = JOB.replace('["in"]', '["shared/in:in"]')
    with pytest.raises(JobFileInvalid, match="shared/in"):
        packed(tmp_path, text=text, inputs=["in"])
    made = packed(tmp_path, text=text, inputs=["in"], file_prefix="shared")
    assert made.version.file_prefix == "shared"
    assert "<file_prefix>shared</file_prefix>" in (
        made.version.main_program.path.with_name("version.xml").read_text())


def test_without_a_wrapper_the_script_starts_this_python_and_a_warning_says_so(
        tmp_path: Path) -> None:
    made = packed(tmp_path)
    assert made.version.main_program.path.read_text().endswith('-P -m vmjob wrapper "$@"\n')
    assert any("development server" in each for each in made.warnings)
    assert any("signed" in each for each in made.warnings)
    (tmp_path / "wrapper.py").write_text("#!/usr/bin/python3\n")
    other = packed(tmp_path, plan_class="b", wrapper=tmp_path / "wrapper.py",
                   key=signing.generate())
    assert other.version.main_program.path.read_text() == "#!/usr/bin/python3\n"
    assert not any("development" in each or "signed" in each for each in other.warnings)


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(PackageInvalid, match="none of the files"):
        packed(tmp_path, copied=["x"])
    with pytest.raises(PackageInvalid, match="as well"):
        packed(tmp_path, files={"in": tmp_path / "f"})


def vmjob(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["project", *arguments])


def test_the_command_makes_a_signed_package(tmp_path: Path, image: Image) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    keys = json.loads(vmjob("keys", str(tmp_path / "keys"), "--json").stdout)
    run = vmjob("package", "--app", "lab", "--version", "1.00", "--job", str(tmp_path / "job.toml"),
                "--image", "none", "--input", "in", "--key", keys["private"],
                "--output", str(tmp_path / "apps"), "--json")
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert all(each["signed"] for each in said["files"])
    assert Path(said["directory"], "version.xml").is_file()
    assert said["bounds"]["disk"] > 20 << 30


def test_the_command_writes_templates(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    run = vmjob("templates", "--app", "lab", "--job", str(tmp_path / "job.toml"), "--image", "none",
                "--input", "in", "--output", "out", "--copy", "out",
                "--directory", str(tmp_path / "templates"))
    assert run.exit_code == 0, run.output
    assert "<open_name>in</open_name>" in (tmp_path / "templates" / "lab_in").read_text()
    out = (tmp_path / "templates" / "lab_out").read_text()
    assert "<open_name>out</open_name>" in out
    assert "<copy_file/>" in out
    again = vmjob("templates", "--app", "lab", "--job", str(tmp_path / "job.toml"), "--image",
                  "none", "--input", "in", "--directory", str(tmp_path / "templates"))
    assert getattr(again.exception, "code", None) == "usage"


@pytest.mark.parametrize(("arguments", "code"), [
    (["keys", "/proc/nothing"], "key-file-invalid"),
    (["serve-dev", "/nowhere/a/1.00/x"], "package-invalid"),
    (["package", "--app", "../x", "--version", "1.00", "--job", "/nothing"], "usage"),
    (["package", "--app", "x", "--version", "1.00", "--job", "/nothing"], "image-missing"),
    (["package", "--app", "x", "--version", "1.00", "--job", "/nothing", "--image", "none"],
     "input-missing"),
    (["package", "--app", "x", "--version", "1.00", "--job", "/nothing", "--file", "x"], "usage"),
    (["package", "--app", "x", "--version", "1.00", "--job", "/dev/null", "--key", "/dev/null"],
     "key-file-invalid")])
@pytest.mark.usefixtures("home")
def test_what_cannot_be_done_has_a_code(arguments: list[str], code: str) -> None:
    before = set(Path(tempfile.gettempdir()).glob("vmjob-*"))
    run = vmjob(*arguments, "--json")
    assert json.loads(run.stdout)["error"]["code"] == code
    assert run.exit_code == 125
    assert set(Path(tempfile.gettempdir()).glob("vmjob-*")) <= before


def test_a_missing_client_is_named_with_its_package(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = vmjob("serve-dev", str(tmp_path), "--with-client", "--json")
    error = json.loads(run.stdout)["error"]
    assert error["code"] == "program-missing"
    assert "boinc-client" in error["advice"]
