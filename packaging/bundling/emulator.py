"""QEMU as volunteers get it: what the driver uses of Debian's packages, and nothing else."""

from __future__ import annotations

from pathlib import Path

from bundling import debian
from bundling.content import File, Tree, read
from bundling.libraries import LOADER, libraries_of, stripped

__all__ = ["FIRMWARE", "MODULES", "PROGRAMS", "contents", "launcher", "version_in_name"]

EMULATOR = Path("/usr/bin/qemu-system-x86_64")
#: QEMU's programs that the driver runs.
PROGRAMS = (EMULATOR, Path("/usr/bin/qemu-img"))
#: QEMU's modules: emulation is one. The others are for sound, screens and USB.
MODULES = (Path("/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"),)
#: What QEMU puts into a machine's memory: the BIOS, what it calls to start a kernel that is given,
#: its help under KVM, and the BIOS of a screen. Then the keyboard, which a screen has to have. Seen
#: by listing what QEMU opens (`docs/decisions/013-bundle.md`).
FIRMWARE = (Path("/usr/share/seabios/bios-256k.bin"), Path("/usr/share/qemu/linuxboot_dma.bin"),
            Path("/usr/share/qemu/kvmvapic.bin"), Path("/usr/share/seabios/vgabios-stdvga.bin"))
KEYMAP = Path("/usr/share/qemu/keymaps/en-us")

#: The loader is told where the libraries are instead of the environment, which all that QEMU starts
#: would inherit. Modules and firmware of an installed QEMU, of another version, are not looked at.
LAUNCHER = """\
#!/bin/sh
unset LD_PRELOAD LD_LIBRARY_PATH
case $0 in /*) d=${{0%/*/*}} ;; *) d=$(cd "${{0%/*}}/.." && pwd) || exit 127 ;; esac
QEMU_MODULE_DIR=$d/lib/qemu
export QEMU_MODULE_DIR
exec "$d/lib/{loader}" --library-path "$d/lib" --argv0 "$0" "$d/lib/{program}"{firmware} "$@"
"""


def launcher(program: str, *, firmware: bool) -> str:
    """The script in ``bin/`` that becomes a program of ``lib/``."""
    return LAUNCHER.format(loader=LOADER.name, program=program,
                           firmware=' -L "$d/share/qemu"' if firmware else "")


def contents() -> tuple[Tree, debian.Package, int]:
    """The bundle's files, the package QEMU came from, and the time that all files get."""
    tree, used = libraries_of([*PROGRAMS, *MODULES])
    for program in PROGRAMS:
        tree[f"lib/{program.name}"] = File(stripped(program))
        tree[f"bin/{program.name}"] = File(
            launcher(program.name, firmware=program == EMULATOR).encode(), executable=True)
    for module in MODULES:
        tree[f"lib/qemu/{module.name}"] = File(stripped(module))
    for firmware in FIRMWARE:
        tree[f"share/qemu/{firmware.name}"] = read(firmware)
    tree[f"share/qemu/keymaps/{KEYMAP.name}"] = read(KEYMAP)
    tree |= debian.licences(debian.owners({*used, *PROGRAMS, *MODULES, *FIRMWARE, KEYMAP}))
    newest = max(path.stat().st_mtime for path in {*used, *PROGRAMS, *MODULES})
    return tree, debian.package_of(EMULATOR), int(newest)


def version_in_name(version: str) -> str:
    """A Debian version as part of a file's name; epochs and signs trouble URLs and servers."""
    return version.rpartition(":")[2].replace("+", ".").replace("~", ".")
