"""A stand-in for the Python interpreter whose programs run in a process forked from the test's, which has imported everything.

In: the arguments of an interpreter, `-m MODULE ...` or `FILE ...`, its environment, folder and files 0 to 2. Out: what
the program writes, and its exit code. A new interpreter would import torch and transformers first, for 12 seconds.
"""

import array
import json
import os
import runpy
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.forked import exit_code, fork

# The program that is started: it hands everything to the test's process, passes signals on, and ends as the child does.
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = array.array("i", [0, 1, 2])
server.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
stream = server.makefile("rw")
print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]), file=stream, flush=True)
child = int(stream.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(child, number))
code = int(stream.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def forking_python(folder: Path) -> Iterator[Path]:
    """The path of the program, which lies in `folder` and works inside the block."""
    address, program = folder / "forks", folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        threading.Thread(target=_serve, args=[server], daemon=True).start()
        yield program
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # the block has ended
            return
        threading.Thread(target=_run, args=[client], daemon=True).start()


def _run(client: socket.socket) -> None:
    files = array.array("i")
    _, ((_, _, passed),), _, _ = client.recvmsg(1, socket.CMSG_SPACE(3 * files.itemsize))
    files.frombytes(passed)
    with client, client.makefile("rw") as stream:
        arguments, folder, environment = json.loads(stream.readline())
        child = fork(lambda: _program(list(files), arguments, folder, environment))
        for file in files:
            os.close(file)
        print(child, file=stream, flush=True)
        print(exit_code(child), file=stream, flush=True)


def _program(files: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
