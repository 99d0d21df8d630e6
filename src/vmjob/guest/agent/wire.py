"""The protocol's words and numbers, shared by the agent and the host's client.

HTTP/1.1 (RFC 9112) restricted to what is needed: no persistent state between
requests but the connection itself, no pipelining, bodies either counted
(``content-length``) or chunked. Pure functions; nothing here does input or output.
"""

from __future__ import annotations

#: One number for the whole protocol; agreed at the first request (``GET /v1/hello``).
PROTOCOL_VERSION = 1
#: The oldest protocol that this side still speaks.
OLDEST_PROTOCOL = 1

#: Lanes: independent connections, so that a long answer never blocks a short question.
#: ``control`` short questions · ``output`` long polls · ``input`` stdin · ``data`` files
LANES = ("control", "output", "input", "data")
#: Name of a lane's virtio-serial port.
PORT_PREFIX = "org.vmjob."

#: Longest request or status line and header block, bytes. A peer that sends more is refused.
MAX_HEAD = 16 * 1024
#: Largest piece the host sends at once (a chunk, or a counted body), bytes. It bounds what a
#: guest can be left waiting for when a connection is cut, and so the length of `RESYNC_FILLER`.
MAX_REQUEST_PIECE = 64 * 1024
#: Largest chunk the guest sends, bytes. Larger pieces cost fewer turns of a slow guest CPU.
MAX_RESPONSE_PIECE = 256 * 1024
#: Largest counted response body (JSON, output), bytes.
MAX_RESPONSE_BODY = 1024 * 1024
#: Largest share of one stream in one answer, bytes.
MAX_STREAM_PIECE = 256 * 1024
#: Output the agent holds for the host, per stream, bytes. When it is full the job waits.
STREAM_WINDOW = 1024 * 1024
#: Longest line a job may send to the host, bytes (PIPE_BUF: such writes are atomic).
MAX_MESSAGE = 4096
#: Messages kept for a host that does not ask; the oldest go first.
MAX_MESSAGES = 1000
#: Bytes of messages that one job may read from the host.
MAX_INBOX = 1024 * 1024
#: Entries of one directory listing.
MAX_LISTING = 10_000
#: Deepest directory tree that is transferred.
MAX_DEPTH = 256

#: A (re)connect sends this, then ``SYNC nonce``. It is longer than anything the guest can still
#: be waiting for, so it ends whatever was cut off, and cannot itself be taken for data.
RESYNC_FILLER = b"\n" * (MAX_REQUEST_PIECE + MAX_HEAD)
SYNC = b"SYNC "
SYNC_ACK = b"SYNC-ACK "
#: Length of a nonce: 16 random bytes in hexadecimal.
NONCE_LENGTH = 32

REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 409: "Conflict",
           413: "Content Too Large", 500: "Internal Server Error", 507: "Insufficient Storage"}


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow."""


def parse_fields(lines: list[bytes]) -> dict[str, str]:
    """Header lines as a dictionary with lower-case names; raises `ProtocolError`."""
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise ProtocolError("a header line without a name")
        try:
            fields[name.decode("ascii").lower()] = value.strip().decode("ascii")
        except UnicodeDecodeError:
            raise ProtocolError("a header line that is not ASCII") from None
    return fields


def parse_request_line(line: bytes) -> tuple[str, str]:
    """Method and target of ``METHOD /target HTTP/1.1``; raises `ProtocolError`."""
    parts = line.split(b" ")
    if len(parts) != 3 or parts[2] != b"HTTP/1.1" or not parts[1].startswith(b"/"):
        raise ProtocolError("not a request line")
    try:
        return parts[0].decode("ascii"), parts[1].decode("ascii")
    except UnicodeDecodeError:
        raise ProtocolError("a request line that is not ASCII") from None


def parse_status_line(line: bytes) -> int:
    """Status of ``HTTP/1.1 200 OK``; raises `ProtocolError`."""
    parts = line.split(b" ", 2)
    if len(parts) < 2 or parts[0] != b"HTTP/1.1" or len(parts[1]) != 3 or not parts[1].isdigit():
        raise ProtocolError("not a status line")
    return int(parts[1])


def parse_length(fields: dict[str, str], most: int) -> int | None:
    """The counted length of a body, or None for a chunked one; raises `ProtocolError`."""
    if fields.get("transfer-encoding") == "chunked":
        return None
    text = fields.get("content-length", "0")
    # isdecimal also takes other scripts' digits, which int() reads; ASCII was checked before.
    if not text.isdecimal() or len(text) > 12:
        raise ProtocolError("a length that is not a number")
    length = int(text)
    if length > most:
        raise ProtocolError(f"a body of {length} bytes where at most {most} are allowed")
    return length


def parse_chunk_size(line: bytes, most: int) -> int:
    """Size of the chunk that follows; 0 ends the body; raises `ProtocolError`."""
    if not line or len(line) > 8 or line.strip(b"0123456789abcdefABCDEF"):
        raise ProtocolError("not a chunk size")
    size = int(line, 16)
    if size > most:
        raise ProtocolError(f"a chunk of {size} bytes where at most {most} are allowed")
    return size


def request_head(method: str, target: str, fields: dict[str, str]) -> bytes:
    """The head of a request, with its empty line."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
    return "\r\n".join(lines).encode("ascii")


def response_head(status: int, fields: dict[str, str]) -> bytes:
    """The head of a response, with its empty line."""
    first = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"
    return "\r\n".join([first, *(f"{k}: {v}" for k, v in fields.items()), "", ""]).encode("ascii")


def plain_head(length: int) -> bytes:
    """`response_head` of what is 200 and says its length only: before every news of a command."""
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length
