"""vmjob as volunteers get it: with a Python and its libraries, in one file that unpacks itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import py_compile
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vmjob
from bundling import debian
from bundling.content import File, Tree, archive, read
from bundling.libraries import LOADER, libraries_of, stripped
from vmjob.errors import EXIT_VMJOB_FAILED

__all__ = ["contents", "one_file", "requirements"]

FILES = Path(__file__).with_name("files")
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
#: Of the standard library: what only developers and desktops use.
NOT_STANDARD = frozenset({
    "test", "tests", "idle_test", "idlelib", "tkinter", "turtle.py", "turtledemo", "lib2to3",
    "ensurepip", "venv", "pydoc_data", "distutils", "curses", "unittest", "msilib",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__"})
#: Of its compiled modules, besides tests: they need libraries of terminals and desktops.
NOT_COMPILED = ("_tkinter", "_curses", "readline", "nis", "_dbm", "_gdbm", "ossaudiodev", "_test",
                "_xxtestfuzz", "xxlimited", "_ctypes_test", "_crypt")
#: Required by rich, for what vmjob does not use: 4 MB of lexers, and a reader of Markdown.
NOT_REQUIRED = frozenset({"pygments", "markdown-it-py", "mdurl"})
#: All files' time in the archive: nothing depends on it.
MTIME = 1_700_000_000
#: Bytes before the archive. A whole number of blocks; the script is padded.
SKIP = 8192
#: Exit code of settle.py for a damaged file.
DAMAGED = 3


def requirements(name: str) -> set[str]:
    """Distributions that one needs on this system, with those that they need; without extras."""
    found: set[str] = set()
    for text in importlib.metadata.requires(name) or []:
        needed = Requirement(text)
        other = canonicalize_name(needed.name)
        if other not in NOT_REQUIRED and (
                needed.marker is None or needed.marker.evaluate({"extra": ""})):
            found |= {other} | requirements(other)
    return found


def compiled(path: Path, shown: str) -> bytes:
    """A module's code, to be used without a look at its source or its time."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "code"
        py_compile.compile(str(path), str(target), shown, doraise=True,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        return target.read_bytes()


def _walk(root: Path, leave_out: frozenset[str]) -> Iterator[tuple[Path, str]]:
    """All files below a directory, with their relative names."""
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names
                          if name not in leave_out and not name.startswith("config-"))
        for name in sorted(files):
            if name not in leave_out:
                path = Path(directory, name)
                yield path, str(path.relative_to(root))


def _standard_library() -> tuple[dict[str, bytes], list[Path]]:
    """Its modules, compiled, by name; and its modules that are shared libraries."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {f"{name}c": compiled(path, name) for path, name in _walk(root, NOT_STANDARD)
               if name.endswith(".py") and not name.startswith("_sysconfigdata")}
    extensions = [path for path in sorted((root / "lib-dynload").glob("*.so"))
                  if not path.name.startswith(NOT_COMPILED)]
    return modules, extensions


def _distribution(name: str) -> tuple[dict[str, bytes], Tree, list[Path], Tree]:
    """Its modules for the zip, or its files if it has shared libraries; those; its licences."""
    pure: dict[str, bytes] = {}
    beside: Tree = {}
    extensions: list[Path] = []
    licences: Tree = {}
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if ".dist-info" in file.parts[0]:
            if "licen" in str(file).lower() or "copying" in str(file).lower():
                licences[f"licences/{name}/{path.name}"] = read(path)
        elif file.parts[0] == ".." or "tests" in file.parts or "__pycache__" in file.parts:
            continue
        elif path.suffix == ".so":
            extensions.append(path)
            beside[str(file)] = File(stripped(path))
        elif path.suffix == ".py":
            pure[f"{file}c"] = compiled(path, str(file))
    if not licences:
        licences[f"licences/{name}/METADATA"] = File(
            (distribution.read_text("METADATA") or "").encode())
    if extensions:  # nothing can be loaded out of a zip file but Python
        beside |= {module: File(code) for module, code in pure.items()}
        pure = {}
    return pure, beside, extensions, licences


def contents() -> Tree:
    """All files of the directory that the one file unpacks."""
    modules, extensions = _standard_library()
    landmark = modules["os.pyc"]
    library = f"lib/{VERSION}"
    # Not in site-packages, which Debian's Python calls otherwise; all look into this one.
    packages = library
    tree: Tree = {f"{library}/lib-dynload/{path.name}": File(stripped(path))
                  for path in extensions}
    for name in sorted(requirements("vmjob")):
        pure, beside, more, licences = _distribution(name)
        modules |= pure
        tree |= {f"{packages}/{file}": content for file, content in beside.items()} | licences
        extensions += more
    modules["sitecustomize.pyc"] = compiled(FILES / "sitecustomize.py", "sitecustomize.py")
    # With sources: some are sent into machines, and a report of an error can show the others.
    ours = Path(vmjob.__file__).parent
    for path, name in _walk(ours, frozenset({"__pycache__"})):
        tree[f"{packages}/vmjob/{name}"] = read(path)
        if path.suffix == ".py":
            cached = importlib.util.cache_from_source(f"{packages}/vmjob/{name}")
            tree[cached] = File(compiled(path, f"vmjob/{name}"))

    program = Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]  # noqa: SLF001
    shared, used = libraries_of([program, *extensions])
    tree |= shared
    tree["lib/python"] = File(stripped(program))
    # Python looks for itself by these names.
    tree[f"{library}/os.pyc"] = File(landmark)
    tree[f"lib/{VERSION.replace('.', '')}.zip"] = File(_zip(modules))
    tree["bin/python3"] = File(_filled("python3.sh").encode(), executable=True)
    tree["bin/vmjob"] = read(FILES / "vmjob.py")
    tree["settle.py"] = read(FILES / "settle.py")
    tree |= _licences(used)
    return tree


def _licences(used: set[Path]) -> Tree:
    """Of vmjob, of Python, and of the libraries, which are Debian's or Python's."""
    prefix = Path(sys.base_prefix).resolve()
    python = Path(sysconfig.get_path("stdlib"), "LICENSE.txt")
    if not python.exists():  # Debian's
        python = Path("/usr/share/doc", VERSION, "copyright")
    system = {path for path in used if not path.is_relative_to(prefix) or str(prefix) == "/usr"}
    return debian.licences(debian.owners(system)) | {
        "licences/vmjob": read(Path(__file__).parents[2] / "LICENSE"),
        "licences/python": read(python)}


def _zip(modules: dict[str, bytes]) -> bytes:
    """Not compressed: what holds it is, and reading it is quicker."""
    content = io.BytesIO()
    # A package without __init__.py is known by the entry of its directory.
    directories = {f"{parent}/" for name in modules for parent in PurePosixPath(name).parents
                   if parent.name}
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        for name in sorted(directories):
            file.writestr(zipfile.ZipInfo(name), b"")
        for name, code in sorted(modules.items()):
            file.writestr(zipfile.ZipInfo(name), code)
    return content.getvalue()


def _filled(name: str, **values: object) -> str:
    text = (FILES / name).read_text(encoding="ascii")
    for key, value in {"LOADER": LOADER.name, **values}.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def one_file(tree: Tree) -> bytes:
    """A script that unpacks what is behind it."""
    packed = archive(tree, MTIME)
    checksum = hashlib.sha256(packed).hexdigest()
    header = _filled("header.sh", VERSION=vmjob.__version__, HASH=checksum[:16], SHA256=checksum,
                     SKIP=SKIP, NEXT=SKIP + 1, FAILED=EXIT_VMJOB_FAILED, DAMAGED=DAMAGED).encode()
    # The last line is a command that ends: no shell reads on into the archive.
    if len(header) > SKIP:
        raise ValueError(f"the script has {len(header)} bytes; it may have {SKIP}")
    return header + b"\n" * (SKIP - len(header)) + packed
