"""What the client puts into a slot is found under its logical names, and nothing is copied."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vmjob.cli.wrapper import for_the_job
from vmjob.cli.wrapper import wrapper as command
from vmjob.engine.folderside import may_lead_to
from vmjob.errors import (
    HomeUnusable,
    HostDiskFull,
    HostMemoryLow,
    ImageMissing,
    JobFileInvalid,
    PolicyForbids,
    VmjobError,
)
from vmjob.grid.boinc import InitData
from vmjob.home import Home
from vmjob.host.facts import Memory
from vmjob.image.manifest import PART_NAMES
from vmjob.job.model import Job, Network
from vmjob.job.reading import Surroundings
from vmjob.wrapper import contents, ground
from vmjob.wrapper.options import Options
from vmjob.wrapper.policy import Policy

TOML = """
inputs = ["in", "data/table"]
outputs = ["out", "result"]
[[task]]
run = ["./program", "in"]
"""
VBOX = "<vbox_job><memory_size_mb>512</memory_size_mb><enable_shared_directory/></vbox_job>"


class Slot:
    """A client's data directory with one project and one slot."""

    def __init__(self, root: Path) -> None:
        self.project = root / "projects" / "127.0.0.1_8000"
        self.directory = root / "slots" / "0"
        self.project.mkdir(parents=True)
        self.directory.mkdir(parents=True)
        self.init = InitData(project_dir=self.project, boinc_dir=root, app_name="app",
                             result_name="wu_1_0", ncpus=1.0)

    def link(self, logical: str, physical: str, content: str | None = None) -> Path:
        """A link file as the client makes it: relative to the slot, wherever it is."""
        target = self.project / physical
        if content is not None:
            target.write_text(content)
        path = self.directory / logical
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<soft_link>../../projects/{self.project.name}/{physical}</soft_link>\n")
        return target

    def where(self, *arguments: str) -> Surroundings:
        return contents.surroundings(self.directory, self.init, arguments, None, None, None)


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    return Slot(tmp_path)


def test_files_of_a_job_are_where_the_links_lead(slot: Slot) -> None:
    slot.link("vmjob.toml", "app_1.00_vmjob.toml", TOML)
    given = slot.link("in", "wu_1_in", "input")
    table = slot.link("data/table", "app_1.00_table", "1 2")
    out = slot.link("out", "wu_1_0_0")
    job, findings = contents.read_job(slot.where())
    assert findings == []
    assert [each.source for each in job.inputs] == [given, table]
    assert [each.destination for each in job.outputs] == [out, slot.directory / "result"]


def test_a_data_directory_behind_a_symbolic_link_is_the_same(slot: Slot, tmp_path: Path) -> None:
    """Debian's client is told of /var/lib/boinc, and is in /var/lib/boinc-client."""
    slot.link("vmjob.toml", "app_1.00_vmjob.toml", TOML)
    given = slot.link("in", "wu_1_in", "input")
    slot.link("data/table", "table", "")
    alias = tmp_path.parent / f"{tmp_path.name}-alias"
    alias.symlink_to(tmp_path)
    slot.init = replace(slot.init, project_dir=alias / "projects" / slot.project.name)
    job, _ = contents.read_job(slot.where())
    assert job.inputs[0].source == given
    alias.unlink()


def test_a_link_that_leads_out_of_the_project_is_no_input(slot: Slot, tmp_path: Path) -> None:
    slot.link("vmjob.toml", "app_1.00_vmjob.toml", TOML)
    (tmp_path / "secret").write_text("secret")
    (slot.directory / "in").write_text("<soft_link>../../secret</soft_link>")
    with pytest.raises(JobFileInvalid, match="in"):
        contents.read_job(slot.where())


def test_the_slot_itself_is_no_input(slot: Slot) -> None:
    """It holds the account's key."""
    (slot.directory / "d").mkdir()
    (slot.directory / "loop").symlink_to("loop")
    (slot.directory / "away").symlink_to("..")
    for words in ('["."]', f'["{slot.directory.parent}"]', '["..:x"]', '["d/..:x"]',
                  f'["{slot.directory}/../0:x"]', '["../../slots:x"]', '["away:x"]',
                  '["../../projects/127.0.0.1_8000:x"]'):
        slot.link("vmjob.toml", "toml", TOML.replace('["in", "data/table"]', words))
        with pytest.raises(JobFileInvalid):
            contents.read_job(slot.where())


@pytest.mark.parametrize("line", [
    'inputs = ["/etc/hostname"]', 'inputs = ["../1/in"]', 'inputs = ["../../client_state.xml"]',
    'inputs = ["../../projects/127.0.0.1_8000/vmjob/images"]', 'inputs = ["../../projects/b/f"]',
    'outputs = ["o:/tmp/o"]', 'outputs = ["o:../1/out"]', 'packages = ["/srv/p.tar"]',
    '[[folder]]\nname = "shared"\nsource = ".."', '[[folder]]\nname = "f"\nsource = "/home"',
    '[hardware]\ndisk = "/dev/sda"', '[hardware]\niso = "../../cd.iso"'])
def test_a_job_has_the_files_of_its_slot_and_of_its_project_and_no_others(slot: Slot,
                                                                          line: str) -> None:
    top, tables = ("", line) if line.startswith("[") else (line, "")
    slot.link("vmjob.toml", "toml", f'{top}\n[[task]]\nrun = ["true"]\n{tables}\n')
    with pytest.raises(JobFileInvalid, match="neither in the slot nor in its project"):
        contents.read_job(slot.where())


def test_the_first_job_file_counts_and_none_is_an_error(slot: Slot) -> None:
    with pytest.raises(JobFileInvalid, match=r"vbox_job\.xml"):
        contents.read_job(slot.where())
    slot.link("vmjob.toml", "toml", TOML)
    slot.link("vbox_job.xml", "xml", VBOX)
    job, _ = contents.read_job(slot.where())
    assert job.tasks[0].title == "boinc_app"


def test_every_error_of_a_job_file_is_told_with_its_line(slot: Slot) -> None:
    slot.link("vmjob.toml", "toml", 'run = 1\nmemory_mb = "x"\n')
    with pytest.raises(JobFileInvalid) as caught:
        contents.read_job(slot.where())
    assert "vmjob.toml:1:" in caught.value.message
    assert "vmjob.toml:2:" in caught.value.message


def test_links_in_a_shared_folder_are_relative_to_the_slot(slot: Slot) -> None:
    slot.link("vbox_job.xml", "xml", VBOX)
    job, _ = contents.read_job(slot.where())
    shared = next(each for each in job.folders if each.name == "shared")
    assert (shared.links, shared.base) == (True, slot.directory)


def test_links_in_a_shared_folder_lead_into_its_slot_and_project_only(slot: Slot) -> None:
    slot.link("vbox_job.xml", "xml", VBOX)
    job, _ = contents.read_job(slot.where())
    shared = next(each for each in job.folders if each.name == "shared")
    led = {path: may_lead_to(shared, path) for path in (
        slot.directory / "shared" / "x", slot.project / "in_1", slot.project / "vmjob" / "x",
        slot.directory / "vmjob" / "job.json", slot.project.parent / "other" / "x",
        slot.directory.parent / "1" / "x", Path("/etc/passwd"))}
    assert list(led.values()) == [True, True, False, False, False, False, False]


def test_a_shared_slot_keeps_the_clients_files_and_ours_from_the_job(slot: Slot) -> None:
    slot.link("vbox_job.xml", "xml",
              "<vbox_job><memory_size_mb>512</memory_size_mb><share_slot_dir/></vbox_job>")
    job, _ = contents.read_job(slot.where())
    without = job.folders[0].without
    assert {"vmjob", "vmjob_*", "boinc_lockfile", "boinc_mmap_file", "stderr.txt"} <= {*without}


def test_a_shared_project_keeps_our_own_files_from_the_job(slot: Slot) -> None:
    slot.link("vbox_job.xml", "xml", VBOX.replace("</vbox_job>",
                                                  "<share_project_dir/></vbox_job>"))
    job, _ = contents.read_job(slot.where())
    project = next(each for each in job.folders if each.name == "project")
    assert "vmjob" in project.without


@pytest.mark.parametrize(("free_memory", "free_disk", "error"), [
    (511, 10_000, HostMemoryLow), (10_000, 700, HostDiskFull), (512, 768, None)])
def test_a_job_waits_for_memory_and_disk_that_are_not_there(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_memory: int, free_disk: int,
        error: type[VmjobError] | None) -> None:
    monkeypatch.setattr(ground, "memory", lambda: Memory(1 << 40, free_memory << 20))
    monkeypatch.setattr(ground, "disk_free", lambda path: free_disk << 20)
    with pytest.raises(error) if error else contextlib.nullcontext():
        ground.check_room(Job(tasks=(), memory_mb=512), tmp_path)


@pytest.mark.parametrize(("ncpus", "option", "policy", "expected"), [
    (1.0, None, None, 1), (0.5, None, None, 1), (1.0, 2, None, 2), (1.0, 2, 1, 1)])
def test_processors_are_as_many_as_were_set_aside_and_are_allowed(
        slot: Slot, monkeypatch: pytest.MonkeyPatch, ncpus: float, option: int | None,
        policy: int | None, expected: int) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    slot.link("vmjob.toml", "toml", TOML)
    job, _ = contents.read_job(slot.where())
    init = replace(slot.init, ncpus=ncpus)
    assert contents.limited(job, Policy(cpus=policy), init, cpus=option).cpus == expected


def test_no_machine_has_more_processors_than_the_computer(
        slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert contents.limited(Job(tasks=()), Policy(), slot.init, cpus=16).cpus == 2


def test_a_job_with_a_network_is_refused_where_there_must_be_none(slot: Slot) -> None:
    with pytest.raises(PolicyForbids):
        contents.limited(Job(tasks=(), network=Network.NAT), Policy(network=False), slot.init,
                         cpus=None)


@pytest.mark.parametrize(("preferences", "said"), [
    ("", False), ("<vmjob_emulation>1</vmjob_emulation>", True),
    ("<project_specific>\n<vmjob_emulation> 1 </vmjob_emulation>", True),
    ("<vmjob_emulation>0</vmjob_emulation>", False), ("<vmjob_emulation/>", True)])
def test_the_volunteers_word_on_emulation_is_heard(slot: Slot, preferences: str,
                                                   said: bool) -> None:
    assert contents.allows_emulation(replace(slot.init, project_preferences=preferences)) is said
    assert not contents.allows_emulation(None)


def test_outputs_that_are_not_there_are_named(slot: Slot) -> None:
    slot.link("out", "wu_1_0_0")
    slot.link("made", "wu_1_0_1", "x")
    (slot.directory / "plain").write_text("no link")
    assert list(contents.missing_outputs(slot.where())) == ["out"]


# -- the image -------------------------------------------------------------------------------


def with_image(slot: Slot) -> None:
    parts = {}
    for name in ("kernel", "initrd", "root", "scratch"):
        slot.link(f"vmjob_image/{name}", f"img_0123_{name}", name)
        parts[name] = {"file": name, "size": len(name), "sha256": "0" * 64}
    slot.link("vmjob_image/manifest.json", "img_0123_manifest.json", json.dumps({
        "format": 1, "name": "img", "suite": "bookworm", "requested": [], "recipe_digest": "0",
        "created": "2026-01-01T00:00:00Z", "agent_protocol": 1, "kernel_version": "6.1",
        "parts": parts, "packages": [], "total_size": 20}))


def test_the_applications_image_stays_where_it_is(slot: Slot, tmp_path: Path) -> None:
    with_image(slot)
    home = Home(tmp_path / "home")
    image = contents.find_image(home, slot.where())
    assert image is not None
    assert image.root.is_symlink()
    assert image.root.resolve() == slot.project / "img_0123_root"
    assert contents.find_image(home, slot.where()) == image
    assert [path.name for path in home.images.iterdir()] == [image.name]


def test_an_image_whose_files_were_removed_is_forgotten(slot: Slot, tmp_path: Path) -> None:
    with_image(slot)
    home = Home(tmp_path / "home")
    old = contents.find_image(home, slot.where())
    assert old is not None
    (slot.project / "img_0123_root").unlink()
    with pytest.raises(ImageMissing, match="root"):
        contents.find_image(home, slot.where())
    slot.link("vmjob_image/root", "img_4567_root", "another")
    text = (slot.project / "img_0123_manifest.json").read_text().replace("0" * 64, "1" * 64)
    slot.link("vmjob_image/manifest.json", "img_4567_manifest.json", text)
    new = contents.find_image(home, slot.where())
    assert new is not None
    assert [path.name for path in home.images.iterdir()] == [new.name] != [old.name]


def test_a_slot_without_an_image_or_a_hypervisor_has_none(slot: Slot, tmp_path: Path) -> None:
    assert contents.find_image(Home(tmp_path / "home"), slot.where()) is None
    assert contents.find_qemu(slot.where()) is None
    archive = slot.link("vmjob_qemu.tar.gz", "qemu_1.tar.gz", "x")
    assert contents.find_qemu(slot.where()) == archive


# -- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kept"), [
    ((), ()), (("20", "-x", "in"), ("20", "-x", "in")),
    (("--device", "0", "a"), ("a",)), (("--use_tstp", "a"), ("a",)),
    (("a", "--passthrough_child", "--device", "b"), ("a", "--device", "b")),
    (("--", "a", "--", "b"), ("a", "--", "b"))])
def test_the_job_gets_all_words_that_are_not_the_clients(given: tuple[str, ...],
                                                         kept: tuple[str, ...]) -> None:
    assert for_the_job(given) == kept


@pytest.mark.parametrize("target", ["a" * 300, "/no/such/file", "../../../no/such/file"])
def test_an_output_that_looks_like_a_link_is_no_missing_output(tmp_path: Path,
                                                               target: str) -> None:
    slot = Slot(tmp_path)
    (slot.directory / "out").write_text(f"<soft_link>{target}</soft_link>")
    slot.link("result", "result_0")
    found = list(contents.missing_outputs(slot.where()))
    assert found == ["result"]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, HostDiskFull),
                                              (errno.EROFS, HomeUnusable)])
def test_an_image_that_cannot_be_kept_is_this_computers_fault(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int,
        kind: type[VmjobError]) -> None:
    slot = Slot(tmp_path)
    part = {"size": 1, "sha256": "0" * 64}
    slot.link("vmjob_image/manifest.json", "app_manifest.json", json.dumps({
        "format": 1, "name": "x", "suite": "x", "requested": [], "recipe_digest": "x",
        "created": "x", "agent_protocol": 1, "kernel_version": "x", "packages": [],
        "total_size": 4, "parts": {each: {"file": each, **part} for each in PART_NAMES}}))
    for each in PART_NAMES:
        slot.link(f"vmjob_image/{each}", f"app_{each}", "x")

    def refused(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "symlink_to", refused)
    with pytest.raises(kind):
        contents.find_image(Home(tmp_path / "home"), slot.where())


@pytest.mark.parametrize(("given", "kept"), [
    (["--help", "x"], ("--help", "x")), (["a", "--help"], ("a", "--help")),
    (["--nthreads", "2", "--passthrough_child", "--nthreads", "3"], ("--nthreads", "3"))])
def test_words_that_are_the_jobs_are_no_options_of_ours(
        monkeypatch: pytest.MonkeyPatch, given: list[str], kept: tuple[str, ...]) -> None:
    options: list[Options] = []
    monkeypatch.setattr("vmjob.wrapper.start.wrap", lambda found: options.append(found) or 0)
    monkeypatch.setattr("vmjob.cli.wrapper.leave", lambda code: None)
    command.main(given, standalone_mode=False)
    assert [each.arguments for each in options] == [kept]


def test_help_alone_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--help"], standalone_mode=False)
    assert "Carry the job of a BOINC slot" in capsys.readouterr().out
