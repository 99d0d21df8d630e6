"""Where the lanes come into the machine: virtio-serial ports, or one serial line for all."""

from __future__ import annotations

import os
import socket
import sys
import termios
import tty

from .trunk import EXCHANGE_MARK, EXCHANGE_SIZE, Broken, Exchange, Trunk
from .wire import LANES, PORT_PREFIX

VIRTIO = "/sys/class/virtio-ports"
#: The serial line that the lanes share; the first one is the console.
LINE = "/dev/ttyS1"
BLOCK = "/sys/block"
SECTOR = 512


def open_lanes() -> tuple[list[int], int | None]:
    """Descriptors of the lanes, in the order of `LANES`, and of the process that carries them.

    The process is a pid descriptor; None where the kernel carries them.
    """
    if os.path.isdir(VIRTIO) and os.listdir(VIRTIO):
        return [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in find_ports()], None
    pairs = [socket.socketpair() for _ in LANES]
    ours, theirs = [pair[0].detach() for pair in pairs], [pair[1].detach() for pair in pairs]
    carrier = os.fork()
    if carrier == 0:
        for fd in ours:
            os.close(fd)
        carry(theirs)
    for fd in theirs:
        os.close(fd)
    return ours, os.pidfd_open(carrier)


def find_ports() -> list[str]:
    """Device paths of the virtio-serial ports, in the order of `LANES`."""
    names = {}
    for port in os.listdir(VIRTIO):
        with open(f"{VIRTIO}/{port}/name", encoding="ascii") as file:
            names[file.read().strip()] = f"/dev/{port}"
    return [names[PORT_PREFIX + lane] for lane in LANES]


def carry(lanes: list[int]) -> None:
    """Carry the lanes over the serial line, in this process, until the machine ends."""
    line = os.open(LINE, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    tty.setraw(line, termios.TCSANOW)
    settings = termios.tcgetattr(line)
    settings[4] = settings[5] = termios.B115200
    termios.tcsetattr(line, termios.TCSANOW, settings)
    exchange = Exchange(os.open(find_exchange(), os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC),
                        host=False)
    try:
        Trunk(line, exchange, lanes, host=False).serve()
    except Broken as error:
        sys.stderr.write(f"vmjob-init: the lanes broke: {error}\n")
    os._exit(1)


def find_exchange() -> str:
    """The disk that long pieces go over: the one that begins with its mark."""
    for name in sorted(os.listdir(BLOCK)):
        with open(f"{BLOCK}/{name}/size", encoding="ascii") as file:
            if int(file.read()) * SECTOR != EXCHANGE_SIZE:
                continue
        with open(f"/dev/{name}", "rb") as disk:
            if disk.read(len(EXCHANGE_MARK)) == EXCHANGE_MARK:
                return f"/dev/{name}"
    raise Broken("there is no disk to exchange pieces over")
