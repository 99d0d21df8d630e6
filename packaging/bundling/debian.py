"""What Debian says of its files: package, source, licence. Raises `LookupError`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from bundling.content import File, Tree, read

__all__ = ["Package", "licences", "owners", "package_of"]

DEADLINE = 60.0
#: Between the fields that dpkg-query prints.
FORMAT = "${binary:Package}\t${Version}\t${source:Package}\t${source:Version}\n"

SOURCES = """\
The programs and libraries below come unchanged from Debian, but for symbols that only debuggers
need. Many are under the GNU GPL or LGPL: whoever passes them on must give their source, too, to
everybody who asks. The source of each is in Debian's archive of source packages, and stays in
Debian's snapshot archive when a newer version replaces it; on a Debian system with `deb-src` lines

    apt-get source SOURCE=VERSION

fetches it. Who runs a project should keep copies of these sources beside the files for download.
Their copyright notices and licences are in the directory licences/.

"""


@dataclass(frozen=True, order=True)
class Package:
    """A binary package and the source that it was built from."""

    name: str
    version: str
    source: str
    source_version: str


def _query(*arguments: str) -> str:
    done = subprocess.run(["dpkg-query", *arguments], capture_output=True, text=True,
                          timeout=DEADLINE, check=False)
    if done.returncode:
        raise LookupError(done.stderr.strip())
    return done.stdout


def package_of(path: Path) -> Package:
    """The package that a file belongs to, under the name with or without /usr."""
    bare = Path("/", *path.parts[2:]) if path.parts[1] == "usr" else Path("/usr", *path.parts[1:])
    for name in dict.fromkeys((path, bare, path.resolve())):
        try:
            owner = _query("-S", str(name)).partition(": ")[0]
        except LookupError:
            continue
        return Package(*_query("-W", "-f", FORMAT, owner).strip().split("\t"))
    raise LookupError(f"no Debian package has {path}")


def owners(paths: Iterable[Path]) -> list[Package]:
    return sorted({package_of(path) for path in paths})


def licences(packages: Iterable[Package]) -> Tree:
    """``licences/`` of a bundle, and the text that says where the source is."""
    tree: Tree = {}
    rows = ["package\tversion\tsource\tversion of the source"]
    for package in packages:
        name = package.name.partition(":")[0]
        tree[f"licences/{name}"] = read(Path("/usr/share/doc", name, "copyright"))
        rows.append("\t".join(astuple(package)))
    for path in Path("/usr/share/common-licenses").iterdir():  # to which the notices refer
        tree[f"licences/common/{path.name}"] = read(path)
    tree["SOURCES.txt"] = File((SOURCES + "\n".join(rows) + "\n").encode())
    return tree
