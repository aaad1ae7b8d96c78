"""The program of a snapshot's process: init once, then one fork for each sandbox.

It is the runtime client of AWS with one method of its own. Told that it runs under
SnapStart (AWS_LAMBDA_INITIALIZATION_TYPE=snap-start), the client imports the handler,
runs the before-snapshot hooks and calls `restore/next`, which on AWS answers in another
virtual machine, copied from the memory of this one. Here the call forks: it answers in
each clone, which then runs the after-restore hooks and asks for work. The parent stays
inside the call for ever: it is the snapshot.

    python -P template.py module.handler <fd>     started by snapshot.py alone

`-P`, because this folder's names (queue, platform) are those of the standard library.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys

import runtime_client  # the client's own transport, in C
from awslambdaric import bootstrap, lambda_runtime_client
from awslambdaric.lambda_config import LambdaConfigProvider

READY = b"ready"
MOST_BYTES = 65_536  # of an order


class ForkingClient(lambda_runtime_client.LambdaRuntimeClient):
    """The client, whose `restore_next` returns once in every clone."""

    def __init__(self, address: str, use_thread: bool, control: socket.socket) -> None:
        super().__init__(address, use_thread)
        self._control = control
        self._agent = lambda_runtime_client._user_agent()

    def restore_next(self) -> None:
        gc.collect()
        gc.freeze()  # a collection in a clone would write into every object's page
        self._control.send(READY)
        clones = _Clones()
        while True:
            clones.wait_for(self._control)
            order, log, *_ = socket.recv_fds(self._control, MOST_BYTES, 1)
            if not order:  # the platform is gone; nothing here is worth a goodbye
                os._exit(0)
            asked = json.loads(order)
            if "code_of" in asked:
                self._tell(code=clones.codes.pop(asked["code_of"], None))
            elif pid := os.fork():
                os.setpgid(pid, pid)  # as the clone does: whoever comes first
                os.close(log[0])
                clones.add(pid)
                self._tell(pid=pid)
            else:
                clones.forget()
                self._become(asked, log[0])
                return

    def call_rapid(
        self, http_method, endpoint, expected_http_code, payload=None, headers=None
    ):
        """For errors; these too must say which clone they come from."""
        headers = {**(headers or {}), "User-Agent": self._agent}
        super().call_rapid(http_method, endpoint, expected_http_code, payload, headers)

    def _tell(self, **facts: int | None) -> None:
        self._control.send(json.dumps(facts).encode())

    def _become(self, asked: dict, log: int) -> None:
        """What makes a clone a sandbox of its own."""
        os.setpgid(0, 0)
        for door in asked["doors"]:  # before anything is written into memory
            enter(door)
        self._control.close()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.update(asked["environment"])
        if "tempfile" in sys.modules:
            import tempfile

            tempfile.tempdir = None  # it remembers the template's
        self._agent += f" sandbox/{asked['id']}"
        # The transport took its address and name when it was loaded: the address is
        # shared, and the name tells the clones apart.
        runtime_client.initialize_client(self._agent)


def enter(door: str) -> None:
    """Come under a control group's limits (`open` would take three times as long)."""
    handle = os.open(door, os.O_WRONLY)
    os.write(handle, b"0")
    os.close(handle)


class _Clones:
    """The template's children: reaped as they end, with the codes they ended by."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self._pids: dict[int, int] = {}  # by the handle that tells of the end

    def add(self, pid: int) -> None:
        self._pids[os.pidfd_open(pid)] = pid

    def wait_for(self, control: socket.socket) -> None:
        """Reap until there is an order to read."""
        while True:
            readable, _, _ = select.select([control, *self._pids], [], [])
            for handle in readable:
                if isinstance(handle, int):
                    pid = self._pids.pop(handle)
                    self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    os.close(handle)
            if control in readable:
                return

    def forget(self) -> None:
        """In a clone: the others are not its children."""
        for handle in self._pids:
            os.close(handle)
        self._pids.clear()


def main(arguments: list[str]) -> None:
    *config, fd = arguments
    control = socket.socket(fileno=int(fd))
    chosen = LambdaConfigProvider(config)
    client = ForkingClient(chosen.api_address, chosen.use_thread_polling, control)
    bootstrap.run(chosen.handler, client)


if __name__ == "__main__":
    main(sys.argv)
