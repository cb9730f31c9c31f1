"""Several hosts on one machine: network namespaces with own addresses, joined by a link that can be slow or cut.

    with hosts(3, delay_s=0.001) as network:
        with network.hosts[1].inside():        # this thread now lives on the second host
            socket.create_server((network.hosts[1].address, 80))
        network.cut(network.hosts[1])          # no packet reaches it or leaves it; no socket is closed
        network.heal(network.hosts[1])

The link is a process that reads each host's packets from a TUN device, holds them for the delay and hands them to the
host they are for. It needs root and /dev/net/tun, and no module of the kernel for traffic control. Everything is made
in namespaces of its own and goes with the context; the machine's own interfaces are neither read nor changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import multiprocessing
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SUBNET = ipaddress.ip_network("10.213.0.0/24")
MTU = 8_900  # as in a cloud's own network
QUEUE = 10_000  # packets that wait for the link to read them
DEVICE = "link0"
TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_DESTINATION = slice(16, 20)  # of an IPv4 packet
_CLONE_NEWNET = 0x40000000
_HOLD = 50_000  # packets on their way at most
_STOP_S = 5.0


class NoHosts(RuntimeError):
    """This machine does not allow network namespaces with a link between them; the message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace and its only address besides the loopback."""

    name: str
    address: str

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Put this thread, and the sockets and processes that it starts, on this host within the context."""
        with Path("/proc/thread-self/ns/net").open("rb") as before:
            self.enter()
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def enter(self) -> None:
        """Move this thread here for good."""
        with (Path("/run/netns") / self.name).open("rb") as namespace:
            _set_namespace(namespace.fileno())


class Network:
    """Hosts and the link between them. Made by `hosts`."""

    def __init__(self, hosts: Sequence[Host], pipe: Connection) -> None:
        self.hosts = tuple(hosts)
        self._pipe = pipe

    def delay(self, seconds: float) -> None:
        """Hold each packet for so long from now on: one way, so a round trip takes twice that."""
        self._tell("delay", seconds)

    def cut(self, host: Host) -> None:
        """Drop all packets from and to a host, those on their way included."""
        self._tell("cut", host.address)

    def heal(self, host: Host) -> None:
        """Let a host's packets through again."""
        self._tell("heal", host.address)

    def dropped(self) -> int:
        """Packets dropped so far because a host was cut off."""
        return int(self._tell("dropped", None))

    def _tell(self, what: str, value: Any) -> Any:
        self._pipe.send((what, value))
        return self._pipe.recv()


@contextlib.contextmanager
def hosts(count: int, delay_s: float = 0.0) -> Iterator[Network]:
    """A number of hosts, each of which reaches the others over the link. Raises NoHosts where that is not allowed."""
    require_rights()
    _sweep()
    made = [Host(f"hosts-{os.getpid()}-{_free(i)}", str(SUBNET[i + 1])) for i in range(count)]
    with contextlib.ExitStack() as stack:
        for host in made:
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "delete", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        link = multiprocessing.get_context("spawn").Process(target=_run_link, args=(theirs, made), daemon=True)
        link.start()
        theirs.close()
        stack.callback(_end, link, ours)
        _expect_start(ours)
        for host in made:
            _ip("-n", host.name, "address", "add", f"{host.address}/{SUBNET.prefixlen}", "dev", DEVICE)
            _ip("-n", host.name, "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", str(QUEUE), "up")
            _ip("-n", host.name, "route", "add", "default", "dev", DEVICE)  # a host asks its routes for its own address
        network = Network(made, ours)
        network.delay(delay_s)
        yield network


def require_rights() -> None:
    """Raise NoHosts, naming what is missing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise NoHosts("network namespaces need root")
    if shutil.which("ip") is None:
        raise NoHosts("network namespaces need the `ip` program (iproute2)")
    if not TUN.exists():
        raise NoHosts(f"the link between network namespaces needs {TUN}")
    name = f"hosts-{os.getpid()}-probe"
    _ip("netns", "add", name)
    _ip("netns", "delete", name)


def _sweep() -> None:
    """Remove the namespaces of processes that were killed before they could."""
    for entry in Path("/run/netns").glob("hosts-*-*"):
        owner = entry.name.split("-")[1]
        if owner.isdigit() and not (Path("/proc") / owner).exists():
            _ip("netns", "delete", entry.name)


def _free(number: int) -> str:
    """A number that no namespace of this process has."""
    while (Path("/run/netns") / f"hosts-{os.getpid()}-{number}").exists():
        number += 100
    return str(number)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if done.returncode:
        raise NoHosts(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _set_namespace(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _expect_start(pipe: Connection) -> None:
    try:
        error = pipe.recv()
    except EOFError:
        error = "its process ended"
    if error is not None:
        raise NoHosts(f"the link between the hosts did not start: {error}")


def _end(link: Any, pipe: Connection) -> None:
    pipe.close()
    link.join(_STOP_S)
    if link.is_alive():
        link.kill()
        link.join()


# -- the link's own process


def _run_link(pipe: Connection, made: Sequence[Host]) -> None:
    try:
        link = _Link({host.address: _open_device(host) for host in made}, pipe)
    except OSError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        link.run()


def _open_device(host: Host) -> int:
    """The descriptor of a TUN device of a host: it can be read from any namespace."""
    with host.inside():
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


class _Link:
    """Packets from device to device, each after the delay, in the order in which they came."""

    def __init__(self, devices: dict[str, int], pipe: Connection) -> None:
        self._devices = {socket.inet_aton(address): device for address, device in devices.items()}
        self._sources = {device: address for address, device in self._devices.items()}
        self._pipe = pipe
        self._delay_s = 0.0
        self._cut: set[bytes] = set()
        self._held: deque[tuple[float, bytes, bytes, bytes]] = deque()  # due, source, destination, packet
        self._dropped = 0

    def run(self) -> None:
        """Forward packets until the pipe is closed."""
        sources = [self._pipe.fileno(), *self._sources]
        while True:
            wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            ready, _, _ = select.select(sources, [], [], wait)
            for source in ready:
                if source == self._pipe.fileno():
                    self._obey(*self._pipe.recv())
                else:
                    self._read(source)
            self._deliver(time.monotonic())

    def _obey(self, what: str, value: Any) -> None:
        match what:
            case "delay":
                self._delay_s = value
            case "cut":
                self._cut.add(socket.inet_aton(value))
            case "heal":
                self._cut.discard(socket.inet_aton(value))
        self._pipe.send(self._dropped)

    def _read(self, device: int) -> None:
        """Take what waits at a device, up to a batch, so that none is starved."""
        source = self._sources[device]
        for _ in range(64):
            try:
                packet = os.read(device, MTU + 64)
            except BlockingIOError:
                return
            if packet[0] >> 4 == 4 and packet[_DESTINATION] in self._devices and len(self._held) < _HOLD:
                self._held.append((time.monotonic() + self._delay_s, source, packet[_DESTINATION], packet))

    def _deliver(self, now: float) -> None:
        while self._held and self._held[0][0] <= now:
            _, source, destination, packet = self._held.popleft()
            if source in self._cut or destination in self._cut:
                self._dropped += 1
                continue
            with contextlib.suppress(OSError):  # a device whose queue is full drops, like any other
                os.write(self._devices[destination], packet)
