from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Host, Network, NoHosts, hosts, require_rights
from tests.support.deadlines import HANG_S

PORT = 7_000
DELAY_S = 0.03


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        require_rights()
    except NoHosts as error:
        pytest.skip(str(error))
    with hosts(3) as network:
        yield network


def names() -> set[str]:
    """Names of the existing namespaces."""
    folder = Path("/run/netns")
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def listen(host: Host) -> socket.socket:
    """An echo on a host, until it is closed."""
    with host.inside():
        listener = socket.create_server((host.address, PORT))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(peer,), daemon=True).start()

    def echo(peer: socket.socket) -> None:
        with peer:
            while data := peer.recv(1 << 16):
                peer.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return listener


@pytest.fixture
def connection(network: Network) -> Iterator[socket.socket]:
    """From the first host to the second."""
    first, second, _ = network.hosts
    listener = listen(second)
    with first.inside():
        opened = socket.create_connection((second.address, PORT), timeout=HANG_S)
    with opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield opened
    network.delay(0)
    network.heal(second)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def round_trip_s(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
    return time.monotonic() - began


def test_a_host_has_its_own_address_and_no_way_out(network: Network) -> None:
    first = network.hosts[0]
    with first.inside():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("8.8.8.8", 1))
            assert probe.getsockname()[0] == first.address
        shown = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} == {"lo", "link0"}


def test_a_round_trip_takes_twice_the_delay(network: Network, connection: socket.socket) -> None:
    assert min(round_trip_s(connection) for _ in range(20)) < DELAY_S / 2
    network.delay(DELAY_S)
    slow = min(round_trip_s(connection) for _ in range(5))
    assert 2 * DELAY_S <= slow < 3 * DELAY_S


def test_a_cut_host_receives_everything_only_once_healed(network: Network, connection: socket.socket) -> None:
    second, before = network.hosts[1], network.dropped()
    network.cut(second)
    connection.sendall(b"later")
    connection.settimeout(0.5)
    with pytest.raises(TimeoutError):
        connection.recv(5)
    assert network.dropped() > before
    network.heal(second)
    connection.settimeout(HANG_S)
    assert connection.recv(5) == b"later"


def test_the_link_carries_thousands_of_packets_a_second(network: Network, connection: socket.socket) -> None:
    began, sent = time.monotonic(), 4_000
    for _ in range(sent):  # each packet is answered before the next, so both ends and the link wait for each other
        round_trip_s(connection)
    assert 2 * sent / (time.monotonic() - began) > 2_500


def test_closing_hosts_removes_their_namespaces(network: Network) -> None:
    before = names()
    with hosts(2) as other:
        made = names() - before
        assert made == {host.name for host in other.hosts}
    assert names() == before
