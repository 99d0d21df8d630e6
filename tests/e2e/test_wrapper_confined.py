"""As Debian's service runs the client: as user `boinc`, who may write in the data directory only.

Not with systemd, which is not everywhere, but with what it uses: a mount namespace in which all
else is read-only, /tmp too, homes are not there, and /dev/kvm is root's.
"""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import vmjob
from tests.conftest import eventually
from tests.e2e.life import BEGIN, Task, World, hypervisors, make_template
from vmjob.home import Home, remove_tree
from vmjob.image.store import Image
from vmjob.project.devclient import programs

pytestmark = [pytest.mark.e2e, pytest.mark.vm, pytest.mark.timeout(600),
              pytest.mark.skipif(os.geteuid() != 0, reason="only root makes such a place")]

USER = "boinc"
#: Where the service has its data.
DATA = Path("/var/lib/boinc-client")

#: Instead of the client: makes the place, and becomes the client in it. The trees of this very
#: Python and vmjob may be in a home; they, and nothing else of it, are there.
CONFINED = """#!/bin/sh
# --dir DATA --gui_rpc_port PORT
[ "$1" = --confined ] || exec unshare --mount --propagation private -- "$0" --confined "$@"
set -e
mount --bind "$3" {data}
for tree in {trees}; do
  top=/$(echo "$tree" | cut -d/ -f2)
  [ "$(stat -c %a "$top" | tail -c 2)" -ge 5 ] && continue
  mkdir -p "{scratch}/tree"
  mount --bind "$tree" "{scratch}/tree"
  mount -t tmpfs -o mode=755 none "$top"
  mkdir -p "$tree"
  mount --move "{scratch}/tree" "$tree"
done
if [ -e /dev/kvm ]; then  # and root's alone, whatever it is out there
  install -m 600 /dev/null "{scratch}/kvm"
  mount --bind "{scratch}/kvm" /dev/kvm
fi
mount -o remount,bind,ro /
cd {data}
exec setpriv --reuid {user} --regid {user} --clear-groups env -u HOME -u USER -u TMPDIR \\
  {boinc} --dir {data} "$4" "$5"
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, image_home: Home,
         default_image: Image) -> Iterator[World]:
    root = tmp_path_factory.mktemp("confined")
    make_template(image_home, root / "template")
    boinc = root / "bin" / "boinc"
    boinc.parent.mkdir()
    trees = {Path(sys.prefix), Path(sys.base_prefix), Path(vmjob.__file__).parents[1]}
    boinc.write_text(CONFINED.format(
        data=DATA, user=USER, scratch=root, boinc=programs()[0],
        trees=" ".join(shlex.quote(str(each)) for each in sorted(trees))))
    boinc.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(boinc.parent), prepend=os.pathsep)
        made = World(root / "world", default_image, image_home,
                     {"allowed": 100, "not allowed": 100}, consent=["allowed"],
                     checkpoint_period=2)
    own = made.client.project_directory / "vmjob"
    remove_tree(own)  # links lead out of the place
    own.mkdir()
    subprocess.run(["cp", "-a", "--sparse=always", image_home.templates, own / "templates"],
                   check=True)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", made.client.folder], check=True)
    with made:
        yield made


def everything(job: Task) -> list[psutil.Process]:
    wrapper = job.wrapper()
    return [wrapper, *hypervisors(wrapper)]


def test_a_job_runs_where_only_the_data_directory_is_writable(here: World) -> None:
    job = here.released("allowed")
    shared = set(Path("/dev/shm").iterdir())
    job.goes_on()
    job.kept()
    uid = pwd.getpwnam(USER).pw_uid
    wrapper, machine = everything(job)
    for each in (wrapper, machine):
        assert set(each.uids()) == {uid}
        assert "HOME" not in each.environ()
        options = [line.split()[3] for line in Path(f"/proc/{each.pid}/mounts").read_text(
            ).splitlines() if line.split()[1] == "/"]
        assert options[-1].startswith("ro")
    opened = {each.path for each in (*wrapper.open_files(), *machine.open_files())
              if "w" in each.mode or "+" in each.mode or "a" in each.mode}
    assert all(Path(each).is_relative_to(DATA) for each in opened), opened
    assert set(Path("/dev/shm").iterdir()) <= shared
    result = job.ends_well()
    assert "warning" not in result.stderr_out
    assert "Traceback" not in result.stderr_out


def test_without_consent_it_is_postponed_and_says_what_to_do(here: World) -> None:
    name = here.released("not allowed").name
    assert eventually(lambda: f"Task {name} postponed for" in here.client.log, BEGIN), \
        here.client.log
    advice = (f"Add the user that runs this ({USER}) to the group kvm"
              if Path("/dev/kvm").exists() else "Switch on virtualization")
    assert eventually(lambda: any(advice in each for each in here.client.notices()), 30), \
        here.client.notices()
    assert "in BOINC's directory." in here.client.log  # so all of it has fitted
    here.client.abort(name)
    assert here.job("not allowed").result().exit_status == 203
