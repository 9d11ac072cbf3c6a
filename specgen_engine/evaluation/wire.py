"""Small JSON messages between the processes of an evaluation.

JSON and never pickle: one end of a channel may be a process that runs a candidate's code.
"""

from __future__ import annotations

import array
import json
import socket

MESSAGE_BYTES = 64 << 10
TEXT_CHARS = 6000


class WireError(Exception):
    """The other end sent something that is not a message of this protocol."""


class Channel:
    """One end of a SOCK_SEQPACKET pair: message boundaries are the kernel's, file descriptors may ride along."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Raises WireError when the message is too long, OSError when the other end is gone or doesn't read."""
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MESSAGE_BYTES:
            raise WireError(f"message of {len(data)} bytes; at most {MESSAGE_BYTES}")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)

    def recv(self) -> dict[str, object] | None:
        """The next message, None at the end. Raises WireError on anything that is not a JSON object."""
        return self.recv_fds(0)[0]

    def recv_fds(self, most: int) -> tuple[dict[str, object] | None, list[int]]:
        """The next message and the descriptors that came with it (at most `most`)."""
        try:
            space = socket.CMSG_SPACE(most * array.array("i").itemsize) if most else 0
            data, ancillary, flags, _ = self.sock.recvmsg(MESSAGE_BYTES + 1, space)
        except ConnectionResetError:
            return None, []
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            return None, list(fds)
        if flags & socket.MSG_TRUNC:
            raise WireError("message longer than the protocol allows")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise WireError("message is not JSON") from error
        if not isinstance(message, dict):
            raise WireError("message is not an object")
        return message, list(fds)

    def close(self) -> None:
        self.sock.close()


def clip(text: str, limit: int = TEXT_CHARS) -> str:
    """Head and tail of a long text, so that it fits a message."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
