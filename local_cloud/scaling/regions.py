"""Several regions behind one address: failover, and bursting to a rented cloud.

Each region is a balancer and its replicas; in front of all stands one more balancer
that knows the regions by their addresses alone. The distance between them is emulated:
a relay on loopback holds every byte back for half a round trip.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from local_cloud.scaling.balancer import checked, wait_up
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.replicas import Command, ReplicaSet

AMPLE = 10_000  # requests: as many as a region can be given
PIECE_BYTES = 65_536


@dataclass(frozen=True)
class Region:
    """A place that serves on its own."""

    name: str
    port: int  # where it is reached from afar: behind its distance
    balancer: HAProxy
    replicas: ReplicaSet

    def fail(self) -> None:
        """Nobody reaches the region any more: its balancer is killed."""
        os.kill(self.balancer.pid, signal.SIGKILL)


@contextmanager
def region(
    name: str,
    command: Command,
    *,
    replicas: int = 2,
    round_trip_s: float = 0.0,
    slots: int | None = None,
) -> Iterator[Region]:
    """A running region, its distance included."""
    with ExitStack() as stack:
        balancer = stack.enter_context(
            HAProxy("queue" if slots else "leastconn", slots=slots)
        )
        members = ReplicaSet(command, balancer=balancer, least=replicas, most=replicas)
        stack.enter_context(members)
        port = stack.enter_context(distance(balancer.port, round_trip_s))
        members.wait(replicas)
        yield Region(name, port, balancer, members)


@contextmanager
def front(regions: Sequence[Region], *, spill_at: int = AMPLE) -> Iterator[HAProxy]:
    """One address for all: the first region serves, the next if it cannot.

    A region cannot if it is gone, or if `spill_at` requests are in it already: with
    your own machines first and a rented cloud second, that is hybrid burst.
    """
    with HAProxy("first", slots=spill_at, slow_start_s=0) as balancer:
        for index, one in enumerate(regions):
            last = index == len(regions) - 1
            slots = AMPLE if last else spill_at
            balancer.add(one.name, "127.0.0.1", one.port, slots=slots)
        wait_up(balancer, [one.name for one in regions])
        yield balancer


@contextmanager
def distance(port: int, round_trip_s: float) -> Iterator[int]:
    """A relay to a port of this machine, as far away as the round trip; its port.

    An emulation: it delays, and neither loses nor reorders, nor limits the bandwidth.
    Nagle's algorithm is off, so a stream arrives in the pieces it was sent in.
    """
    checked("round_trip_s", round_trip_s, 0, 60)
    loop, started = asyncio.new_event_loop(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    end = asyncio.Event()

    async def run() -> None:
        async def relay(reader: Any, writer: Any) -> None:
            with suppress(asyncio.CancelledError):  # the end of the block
                await _relay(reader, writer, port, round_trip_s / 2)

        async with await asyncio.start_server(relay, sock=listener):
            started.set()
            await end.wait()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        started.wait(10)
        yield listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


async def _relay(
    near_in: asyncio.StreamReader,
    near_out: asyncio.StreamWriter,
    port: int,
    delay_s: float,
) -> None:
    """One connection, both ways."""
    try:
        far_in, far_out = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        near_out.transport.abort()
        return
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_carry(near_in, far_out, delay_s))
            both.create_task(_carry(far_in, near_out, delay_s))
    except* OSError:
        pass  # one end is gone, so the other is hung up on, below
    finally:
        for writer in (near_out, far_out):
            writer.transport.abort()


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    """Pass on every piece `delay_s` after it came; one that waits holds up no other."""
    loop = asyncio.get_running_loop()
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def arrive() -> None:
        while True:
            due, piece = await on_the_way.get()
            await asyncio.sleep(due - loop.time())
            if not piece:
                break
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async with asyncio.TaskGroup() as group:
        group.create_task(arrive())
        while piece := await reader.read(PIECE_BYTES):
            on_the_way.put_nowait((loop.time() + delay_s, piece))
        on_the_way.put_nowait((loop.time() + delay_s, b""))
