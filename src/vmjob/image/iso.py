"""A CD that starts an image's kernel, for hypervisors that cannot do so themselves.

Made from the parts when it is needed: it holds the kernel a second time, and its command line is
that of one machine.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from vmjob.errors import HostDiskFull, ImageCorrupt

__all__ = ["loader_configuration", "write_iso"]

#: Of the loader's own files (ISOLINUX 6, of Debian's packages isolinux and syslinux-common).
LOADER, MODULE = "isolinux.bin", "ldlinux.c32"
#: The largest loader that is taken, bytes; honest ones have 160 KB.
MAX_LOADER = 4 << 20
#: Sectors of 512 bytes that the BIOS loads of it; it loads the rest itself.
LOADED_SECTORS = 4


def loader_configuration(arguments: str) -> bytes:
    """What the loader is to do: start the kernel at once, with these arguments."""
    return (f"DEFAULT vmjob\nPROMPT 0\nTIMEOUT 0\nLABEL vmjob\n KERNEL kernel\n INITRD initrd\n"
            f" APPEND {arguments}\n").encode("ascii")


def write_iso(target: Path, loader: Path, kernel: Path, initrd: Path, arguments: str) -> None:
    """Make the CD; ``loader`` is an image's part. Raises `ImageCorrupt`, `HostDiskFull`."""
    import pycdlib  # slow to import, and seldom needed
    from pycdlib.pycdlibexception import PyCdlibException

    try:
        with zipfile.ZipFile(loader) as parts:
            if sum(each.file_size for each in parts.infolist()) > MAX_LOADER:
                raise ImageCorrupt(f"the boot loader in {loader} is too large")
            boot, module = parts.read(LOADER), parts.read(MODULE)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ImageCorrupt(f"the boot loader in {loader} cannot be read: {error}") from error
    iso = pycdlib.PyCdlib()
    try:
        iso.new(interchange_level=3)

        def add(name: str, data: bytes) -> None:
            iso.add_fp(io.BytesIO(data), len(data), f"/{name};1")

        add("ISOLINUX.BIN", boot)
        add("LDLINUX.C32", module)
        add("ISOLINUX.CFG", loader_configuration(arguments))
        iso.add_file(str(kernel), "/KERNEL.;1")
        iso.add_file(str(initrd), "/INITRD.;1")
        iso.add_eltorito("/ISOLINUX.BIN;1", "/BOOT.CAT;1", boot_load_size=LOADED_SECTORS,
                         boot_info_table=True)
        with target.open("wb") as file:
            iso.write_fp(file)
    except OSError as error:
        raise HostDiskFull(f"cannot make {target.name}: {error.strerror}") from error
    except PyCdlibException as error:
        raise ImageCorrupt(f"no CD can be made of the image: {error}") from error
    finally:
        iso.close()
