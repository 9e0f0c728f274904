"""`--offline`: this process and those that it starts reach no other machine.

Hugging Face's libraries and W&B are told by their environment variables, which are read when they are imported. Whatever still connects is
stopped by an audit hook, which every Python library passes: an `OSError`, as with a cable that is not plugged in. Other processes of this
machine (torchrun, vLLM, an endpoint) can be reached.
"""

import errno
import os
import sys

VARIABLE = "ALIGN_OFFLINE"
TOLD = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
OUTGOING = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
HERE = ("localhost", "127.", "::1")

_hooked = False


def go_offline() -> None:
    """Reach no other machine from now on."""
    global _hooked
    os.environ.update(dict.fromkeys((VARIABLE, *TOLD), "1"))
    if not _hooked:
        sys.addaudithook(_refuse)
        _hooked = True


def is_offline() -> bool:
    """Whether this process or the one that started it went offline."""
    return os.environ.get(VARIABLE) == "1"


def _refuse(event: str, arguments: tuple) -> None:
    if event in OUTGOING:
        address = arguments[1]
    elif event in LOOKUPS:
        address = arguments
    else:
        return
    host = address[0] if isinstance(address, tuple) and address else None
    # A path or a name is that of a socket on this machine; no host is this machine.
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if isinstance(host, str) and host and not host.startswith(HERE) and is_offline():
        raise OSError(errno.ENETUNREACH, f"--offline keeps this process from reaching {host}")
