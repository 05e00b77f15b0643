from __future__ import annotations

import datetime as dt
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pyarrow import flight

from shmplasma import (
    ObjectID,
    PlasmaClient,
    PlasmaObjectExists,
    PlasmaObjectNotFound,
    PlasmaStoreFull,
    Store,
)
from shmplasma.flight import PIECE_BYTES, Head, connect, fetch, send
from shmplasma.flight_server import StoreFlightServer
from shmplasma.layout import LAYOUT_VERSION
from shmplasma.payloads import Codec
from tests.clients import MISSING, new_id
from tests.command import running as running_store
from tests.command import segment_in
from tests.processes import Child, until

PROGRAM = [sys.executable, "-m", "shmplasma.flight_cli"]

LARGE = np.arange(PIECE_BYTES // 4, dtype=np.int64)
"""Two pieces."""

VALUES: dict[str, Any] = {
    "bytes": b"abc",
    "pickle": {"key": [1, "two"]},
    "parts": {"array": LARGE, "more": "text"},
    "array": LARGE.reshape(2, -1).T,
    "table": pa.table({"x": pa.array(LARGE), "text": ["a", None, "cc", ""] * (len(LARGE) // 4)}),
    "batch": pa.record_batch({"x": [1, 2, 3]}),
    "column": pa.array([1.5, None]),
    "chunks": pa.chunked_array(
        [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c"]).dictionary_encode()]
    ),
    "empty table": pa.table({"x": pa.array([], pa.int32())}),
    "tensor": pa.Tensor.from_numpy(np.eye(3)),
}


@pytest.fixture(scope="module", autouse=True)
def _flight_is_there() -> None:
    """Let Flight make what it keeps for the rest of the process, before a test looks for what is left."""
    with Store("1MB") as store, store.connect() as client, serving(client) as (_, flights):
        assert not list(flights.list_flights())


@pytest.fixture(autouse=True)
def _flight_lets_go() -> Iterator[None]:
    """Wait until the threads of Flight have closed what they wait with."""
    before = waited_with()
    yield
    gc.collect()  # the tracebacks of expected errors keep servers
    until(lambda: waited_with() <= before, "Flight has closed what it waits with")


def waited_with() -> set[str]:
    """Return the descriptors of this process that only serve to wait for others."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target in ("anon_inode:[eventpoll]", "anon_inode:[eventfd]"):
                found.add(f"{fd} {target}")
    return found


@contextmanager
def serving(
    client: PlasmaClient, kind: type[StoreFlightServer] = StoreFlightServer, **options: Any
) -> Iterator[tuple[Any, flight.FlightClient]]:
    """Serve a store in this process; give the server and a plain Flight client."""
    with (
        kind(client, **options) as server,
        flight.connect(f"grpc://127.0.0.1:{server.port}") as flights,
    ):
        yield server, flights


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*PROGRAM, *arguments], check=False, capture_output=True, text=True)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; give the process and the location where it serves."""
    with subprocess.Popen([*PROGRAM, *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while (match := re.search(r"ready: location (\S+),", said)) is None:
                line = process.stderr.readline()
                assert line, f"it ended: {said}"
                said += line
            yield process, match[1]
        finally:
            process.terminate()


@pytest.fixture
def far() -> Iterator[PlasmaClient]:
    """Give a client of another host's store, so to speak."""
    with Store("100MB") as store, store.connect() as client:
        yield client


def ticket(object_id: ObjectID, prefix: bytes = b"") -> flight.Ticket:
    """Return the ticket of an object."""
    return flight.Ticket(prefix + object_id.binary())


def command(object_id: ObjectID) -> flight.FlightDescriptor:
    """Return a descriptor of an object."""
    return flight.FlightDescriptor.for_command(object_id.binary())


# --- between two stores ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VALUES)
def test_every_kind_of_object_is_fetched_and_sent(
    client: PlasmaClient, far: PlasmaClient, kind: str
) -> None:
    """What arrives is the same object, byte by byte, in both directions."""
    there, here = far.put(VALUES[kind]), client.put(VALUES[kind])
    with serving(far) as (_, flights):
        data = fetch(client, flights, there)
        send(client, flights, here)
    for object_id in (there, here):
        near_by, far_away = client.get_encoded(object_id, 0), far.get_encoded(object_id, 0)
        assert near_by is not None
        assert far_away is not None
        assert near_by.data.equals(far_away.data)
        assert near_by.codec == far_away.codec
    assert data.equals(far.get_buffers(there))


def test_a_copy_of_what_references_own(client: PlasmaClient, far: PlasmaClient) -> None:
    """It is an object as any other, that no reference owns, and is offered as Arrow data."""
    table: Any = pa.table({"x": [1, 2, 3]})
    with client.put_ref(table) as ref, serving(far) as (_, flights):
        send(client, flights, ref.object_id)
        assert flights.get_flight_info(command(ref.object_id)).schema.equals(table.schema)
        encoded = far.get_encoded(ref.object_id)
        assert encoded is not None
        assert encoded.codec == Codec.TABLE
        del encoded
        assert far.evict(1) > 0, "nobody keeps it there"
    with pytest.raises(ValueError, match="no object has the codec"):
        client.create_encoded(new_id(), 10, b"", 1 << 31)


def test_raw_objects_bring_their_metadata(client: PlasmaClient, far: PlasmaClient) -> None:
    """Bytes that a user wrote arrive with their metadata, also when there are none."""
    with serving(far) as (_, flights):
        ids = [
            far.put_raw_buffer(data, metadata=b"m\0\xff") for data in (b"", b"1", bytes(9 << 20))
        ]
        fetch(client, flights, ids)
    for object_id in ids:
        (metadata, data) = client.get_buffers(object_id, 0, with_meta=True)
        assert metadata == b"m\0\xff"
        assert data.equals(far.get_buffers(object_id))


def test_fetch_takes_a_location_and_many_ids(client: PlasmaClient, far: PlasmaClient) -> None:
    """Buffers come in the order of the ids, of which one may come twice, and one be there already."""
    ids = [far.put_raw_buffer(b"%d" % number) for number in range(3)]
    client.put_raw_buffer(b"here", ids[1])
    with serving(far) as (server, _):
        location = f"grpc://127.0.0.1:{server.port}"
        got = fetch(client, location, [*ids, ids[0]], timeout_ms=30_000)
        assert [buffer.to_pybytes() for buffer in got] == [b"0", b"here", b"2", b"0"]
        assert fetch(client, location, []) == []


class Counting(StoreFlightServer):
    """Counts the transfers."""

    transfers = 0

    def do_get(self, context: Any, ticket: Any) -> flight.RecordBatchStream:
        """Count, and send."""
        self.transfers += 1
        return super().do_get(context, ticket)


def test_who_fetch_the_same_transfer_it_once(store: Store, far: PlasmaClient) -> None:
    """Of many clients that fetch the same objects at once each object comes once, and all get it."""
    ids = [far.put(LARGE + number) for number in range(3)]
    got: list[bool] = []

    def fetch_all() -> None:
        with store.connect() as client:
            fetch(client, f"grpc://127.0.0.1:{server.port}", ids)
            got.append(all((client.get(ids[n], 0) == LARGE + n).all() for n in range(3)))

    with serving(far, Counting) as (server, _):
        threads = [threading.Thread(target=fetch_all) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [True] * 6
        assert server.transfers == 3


def test_who_waits_takes_over_from_who_gives_up(
    client: PlasmaClient, client2: PlasmaClient, far: PlasmaClient
) -> None:
    """When who was writing an object gives up, who waits for it fetches it."""
    object_id = far.put("value")
    client2.create(object_id, 100)
    with serving(far) as (_, flights):
        thread = threading.Thread(target=fetch, args=(client, flights, object_id))
        thread.start()
        client2.abort(object_id)
        thread.join()
    assert client.get(object_id, 0) == "value"


def test_what_is_not_there_is_not_fetched(client: PlasmaClient, far: PlasmaClient) -> None:
    """An object that is missing, or not sealed, on the other host is not found."""
    unsealed = new_id()
    far.create(unsealed, 1)
    with serving(far) as (_, flights):
        for object_id in (MISSING, unsealed):
            with pytest.raises(PlasmaObjectNotFound, match=object_id.binary().hex()):
                fetch(client, flights, object_id)
        with pytest.raises(PlasmaObjectNotFound, match="there is no sealed"):
            send(client, flights, MISSING)
    far.abort(unsealed)
    assert not client.list()


def test_a_store_that_is_full_says_so(client: PlasmaClient, far: PlasmaClient) -> None:
    """Both directions raise what a local store would raise, and nothing stays."""
    large = far.put_raw_buffer(bytes(60_000_000))
    held = client.get_buffers(client.put_raw_buffer(bytes(60_000_000)))
    with serving(far) as (_, flights):
        with pytest.raises(PlasmaStoreFull):
            fetch(client, flights, large)
        blocked = far.get_buffers(large)
        with pytest.raises(PlasmaStoreFull, match="the other host says"):
            send(client, flights, client.list())
        with pytest.raises(PlasmaObjectExists):
            send(far, flights, large)
    assert len(client.list()) == len(far.list()) == 1
    del held, blocked


# --- a plain Flight client --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["table", "batch", "column", "chunks", "empty table"])
def test_arrow_data_comes_as_itself(client: PlasmaClient, kind: str) -> None:
    """A client that knows nothing of shmplasma gets the rows, in pieces, of what is Arrow."""
    value = VALUES[kind]
    object_id = client.put(value)
    with serving(client) as (_, flights):
        reader = flights.do_get(flight.Ticket(object_id.binary().hex()))
        batches = [chunk.data for chunk in reader if chunk.data is not None]
        got = pa.Table.from_batches(batches, reader.schema)
        info = flights.get_flight_info(flight.FlightDescriptor.for_path(object_id.binary().hex()))
        result: Any = flights.get_schema(command(object_id))
        assert info.schema == got.schema == result.schema
        assert info.total_records == got.num_rows
        assert flights.do_get(info.endpoints[0].ticket).read_all() == got
    if isinstance(value, pa.Table):
        assert got == value
        assert len(batches) == (4 if kind == "table" else 0)
    elif isinstance(value, pa.RecordBatch):
        assert got == pa.Table.from_batches([value])
    else:
        assert got.column(0).to_pylist() == value.to_pylist()


def test_anything_comes_encoded(client: PlasmaClient) -> None:
    """What is no Arrow, and after a prefix what is, comes as bytes, with what is needed to read them."""
    raw = client.put_raw_buffer(bytes(range(256)) * (PIECE_BYTES // 200), metadata=b"meta")
    table = client.put(pa.table({"x": [1]}))
    with serving(client) as (_, flights):
        reader = flights.do_get(ticket(raw))
        assert reader.schema.metadata == {
            b"shmplasma.codec": b"0",
            b"shmplasma.metadata": b"meta",
            b"shmplasma.data_size": b"%d" % (256 * (PIECE_BYTES // 200)),
        }
        data: list[Any] = reader.read_all().column("data").to_pylist()
        assert len(data) == 2
        assert b"".join(data) == client.get_buffers(raw).to_pybytes()
        data = flights.do_get(ticket(table, b"encoded:")).read_all().column("data").to_pylist()
        assert pa.ipc.open_stream(data[0]).read_all() == client.get(table)


def test_a_table_is_put(client: PlasmaClient) -> None:
    """What a plain client puts can be got as a table."""
    object_id = new_id()
    table = pa.table({"x": pa.array(LARGE), "y": pa.array(LARGE / 3)})
    with serving(client) as (_, flights):
        writer, _ = flights.do_put(
            flight.FlightDescriptor.for_path(object_id.binary().hex()), table.schema
        )
        with writer:
            writer.write_table(table, max_chunksize=100_000)
    assert client.get(object_id, 0) == table


def put_encoded(
    flights: flight.FlightClient, object_id: ObjectID, head: Head, pieces: list[bytes | None]
) -> None:
    """Put pieces of bytes as a plain client would, whatever the head says."""
    schema = head.schema().set(0, pa.field("data", pa.large_binary()))
    writer, _ = flights.do_put(command(object_id), schema)
    with writer:
        for piece in pieces:
            writer.write_metadata(pa.py_buffer(b"the sender's own"))
            writer.write_batch(
                pa.record_batch([pa.array([piece], pa.large_binary())], schema=schema)
            )


@pytest.mark.parametrize("size", [5, None])
def test_bytes_are_put(client: PlasmaClient, size: int | None) -> None:
    """Bytes are put with their size or without."""
    object_id = new_id()
    with serving(client) as (_, flights):
        put_encoded(flights, object_id, Head(Codec.RAW, b"meta", size), [b"abc", b"", b"de"])
    metadata, data = client.get_buffers(object_id, 0, with_meta=True)
    assert (metadata, data.to_pybytes()) == (b"meta", b"abcde")


@pytest.mark.parametrize(
    ("head", "pieces", "said"),
    [
        (Head(0, b"", 4), [b"abc"], "3 bytes came, and 4 were announced"),
        (Head(0, b"", 2), [b"abc"], "more bytes came than the 2"),
        (Head(0, b"", None), [b"abc", None], "null"),
        (Head(0, b"", 3), [None], "null"),
        (Head(0, b"", -3), [], "size -3"),
        (Head(1 << 32, b"", 3), [], "codec 4294967296"),
        (Head(1 << 31, b"", 3), [], "codec 2147483648"),
    ],
)
def test_half_an_object_is_none(
    client: PlasmaClient, head: Head, pieces: list[bytes | None], said: str
) -> None:
    """A stream that is not what it has announced is refused, and leaves nothing."""
    with serving(client) as (_, flights):
        with pytest.raises(flight.FlightServerError, match=said) as caught:
            put_encoded(flights, new_id(), head, pieces)
        assert caught.value.extra_info == b"invalid"
    assert not client.list()


def test_offsets_that_lead_elsewhere_are_refused(client: PlasmaClient) -> None:
    """What a caller sends may be no array at all; nothing beyond its bytes is read."""
    ends = pa.py_buffer(np.array([0, 1 << 30, 3], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.binary(), 2, [None, ends, pa.py_buffer(b"abc")])
    with serving(client) as (_, flights):
        for schema in (Head(0, b"", 1 << 20).schema(), pa.schema([("data", pa.binary())])):
            writer, _ = flights.do_put(command(new_id()), schema)
            with pytest.raises(flight.FlightServerError, match="Offset") as caught, writer:
                writer.write_batch(pa.record_batch([column], schema=schema))
            assert caught.value.extra_info == b"invalid"
    assert not client.list()


def test_an_encoded_object_has_one_column(client: PlasmaClient) -> None:
    """A stream that says it is encoded and is a table of something else is refused."""
    schema = Head(0, b"", 8).schema().set(0, pa.field("data", pa.int64()))
    with serving(client) as (_, flights):
        writer, _ = flights.do_put(command(new_id()), schema)
        with pytest.raises(flight.FlightServerError, match="one column of binaries"):
            writer.close()


def test_objects_are_listed(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A list has the sealed objects whose ids begin so, and their sizes."""
    first, second = ObjectID(b"\xab" * 20), ObjectID(b"\xcd" * 20)
    client.put_raw_buffer(b"12", first)
    client.put_raw_buffer(b"345", second)
    client2.create(MISSING, 1)
    with serving(client) as (_, flights):
        found = {
            info.endpoints[0].ticket.ticket: info.total_bytes for info in flights.list_flights()
        }
        assert found == {first.binary(): 2, second.binary(): 3}
        (info,) = flights.list_flights(b"AB")  # type: ignore[arg-type]  # the stubs are wrong
        assert info.descriptor.path == [first.binary().hex().encode()]
    client2.abort(MISSING)


def test_actions(client: PlasmaClient) -> None:
    """An object can be looked for and deleted; other actions are refused."""
    object_id = client.put(1)
    with serving(client) as (_, flights):
        assert {action.type for action in flights.list_actions()} == {"contains", "delete"}

        def act(name: str) -> list[bytes]:
            results = flights.do_action(flight.Action(name, object_id.binary()))
            return [result.body.to_pybytes() for result in results]

        assert act("contains") == [b"1"]
        assert act("delete") == []
        assert act("contains") == [b"0"]
        with pytest.raises(flight.FlightServerError, match="no action 'burn'"):
            act("burn")


@pytest.mark.parametrize("name", [b"", b"x", b"x" * 40, b"encoded:" + b"1" * 19])
def test_what_is_no_name_is_refused(client: PlasmaClient, name: bytes) -> None:
    """A ticket or descriptor that names no object is an error that says what would."""
    with serving(client) as (_, flights):
        with pytest.raises(flight.FlightServerError, match="20 bytes or 40 hex"):
            flights.do_get(flight.Ticket(name)).read_all()
        for descriptor in (
            flight.FlightDescriptor.for_command(name),
            flight.FlightDescriptor.for_path(name[:20] + b"?"),
            flight.FlightDescriptor.for_path("a", "b"),
        ):
            with pytest.raises(flight.FlightServerError, match=r"20 bytes or 40 hex|one part"):
                flights.get_flight_info(descriptor)


def test_errors_say_what_they_are(client: PlasmaClient) -> None:
    """What is missing, taken or too large is told apart by the error's extra information."""
    object_id = client.put(1)
    with serving(client) as (_, flights):
        with pytest.raises(flight.FlightServerError) as caught:
            flights.do_get(ticket(MISSING)).read_all()
        assert caught.value.extra_info == b"not found"
        with pytest.raises(flight.FlightServerError) as caught:
            put_encoded(flights, object_id, Head(0, b"", 1), [])
        assert caught.value.extra_info == b"exists"
        with pytest.raises(flight.FlightServerError) as caught:
            put_encoded(flights, new_id(), Head(0, b"", 1 << 40), [])
        assert caught.value.extra_info == b"full"


def test_a_server_that_only_reads(client: PlasmaClient) -> None:
    """With read_only objects are served, and neither made nor deleted."""
    object_id = client.put(pa.table({"x": [1]}))
    with serving(client, read_only=True) as (_, flights):
        assert flights.do_get(ticket(object_id)).read_all() == client.get(object_id)
        with pytest.raises(flight.FlightUnauthorizedError, match="only reads"):
            put_encoded(flights, new_id(), Head(0, b"", 0), [])
        with pytest.raises(flight.FlightUnauthorizedError, match="only reads"):
            list(flights.do_action(flight.Action("delete", object_id.binary())))
    assert client.contains(object_id)


def test_what_is_given_up_is_let_go_of(client: PlasmaClient) -> None:
    """A reader that stops in the middle leaves nothing pinned (as the store fixture proves)."""
    object_id = client.put(LARGE)
    with serving(client) as (_, flights):
        reader = flights.do_get(ticket(object_id))
        reader.read_chunk()
        reader.cancel()


# --- the command -----------------------------------------------------------------------------------


def test_the_command_serves_and_ends(store: Store, client: PlasmaClient, tmp_path: Path) -> None:
    """It serves who shows the token, nobody else, and ends with 0 at SIGTERM."""
    (tmp_path / "token").write_text("secret\n")
    object_id = client.put({"a": 1})
    options = ["-s", store.store_socket_name, "--listen", "127.0.0.1:0"]
    with running(*options, "--token-file", str(tmp_path / "token")) as (process, location):
        for token in (None, "wrong", "secret2"):
            with (
                connect(location, token=token) as flights,
                pytest.raises(flight.FlightUnauthenticatedError, match="show the token"),
            ):
                list(flights.list_flights())
        with flight.connect(location) as flights:
            bearer: Any = (b"authorization", b"Bearer secret")
            shown = flight.FlightCallOptions(headers=[bearer])
            assert len(list(flights.list_flights(options=shown))) == 1
        with Store("1MB") as near, near.connect() as here:
            with connect(location, token="secret") as flights:  # noqa: S106 - a test's
                fetch(here, flights, object_id)
            assert here.get(object_id, 0) == {"a": 1}
        process.terminate()
        assert process.wait() == 0


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = directory / "cert.pem", directory / "key.pem"
    cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_path, key_path


def test_tls(store: Store, client: PlasmaClient, tmp_path: Path) -> None:
    """With a certificate it serves who trusts it; others do not get through."""
    cert, key = make_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = make_certificate(tmp_path / "other")
    object_id = client.put(pa.table({"x": [1]}))
    options = ["-s", store.store_socket_name, "--listen", "127.0.0.1:0", "--no-token"]
    with running(*options, "--tls-cert", str(cert), "--tls-key", str(key)) as (_, location):
        assert location.startswith("grpc+tls://")
        with connect(location, tls_root_certs=cert.read_text()) as flights:
            assert flights.do_get(ticket(object_id)).read_all() == client.get(object_id)
        with (
            connect(location, tls_root_certs=other.read_text()) as flights,
            pytest.raises(flight.FlightUnavailableError),
        ):
            list(flights.list_flights())


def test_it_ends_with_a_transfer_that_does_not(store: Store, client: PlasmaClient) -> None:
    """A reader that does not read on keeps it from ending for some seconds only."""
    object_id = client.put_raw_buffer(bytes(80_000_000))
    options = ["-s", store.store_socket_name, "--listen", "127.0.0.1:0", "--no-token"]
    with running(*options) as (process, location), flight.connect(location) as flights:
        reader = flights.do_get(ticket(object_id))
        reader.read_chunk()
        process.terminate()
        assert process.wait() == 0
        del reader


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--token-file"),
        (["--no-token", "--token-file", "x"], 2, "not allowed with"),
        (["--no-token", "--tls-cert", "x"], 2, "go together"),
        (["--no-token", "--listen", "8815"], 2, "HOST:PORT"),
        (["--no-token", "--listen", "::1:8815"], 2, "write [::1]:8815"),
        (["--token-file", "/nowhere"], 1, "/nowhere"),
        (["--token-file", "/dev/null"], 1, "no token in /dev/null"),
        (
            ["--no-token", "--listen", "192.0.2.1:0"],
            1,
            "cannot serve at 192.0.2.1:0: Cannot assign requested address; name another",
        ),
    ],
)
def test_usage(store: Store, arguments: list[str], code: int, said: str) -> None:
    """What cannot be served is refused with a message and an exit code."""
    done = run("-s", store.store_socket_name, *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("token", ["sécret", "two\nlines", "\udcff"])
def test_a_token_that_nobody_can_show(store: Store, tmp_path: Path, token: str) -> None:
    """It is refused at the start."""
    file = tmp_path / "token"
    file.write_bytes(token.encode(errors="surrogateescape"))
    done = run("-s", store.store_socket_name, "--token-file", str(file))
    assert done.returncode == 1
    assert f"no caller can show the token in {file}" in done.stderr


def test_a_certificate_that_is_none(store: Store, tmp_path: Path) -> None:
    """Flight does not say what is wrong; the message says what it may be."""
    file = tmp_path / "certificate"
    file.write_text("none")
    tls = ["--tls-cert", str(file), "--tls-key", str(file)]
    done = run("-s", store.store_socket_name, "--no-token", "--listen", "127.0.0.1:0", *tls)
    assert done.returncode == 1
    assert "see whether --tls-cert and --tls-key are PEM" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows shared memory as files")
def test_a_store_of_another_release(tmp_path: Path) -> None:
    """What cannot be read is refused in one line, which says what helps."""
    path = str(tmp_path / "s")
    with running_store("-m", "10MB", "-s", path) as (_, said):
        with Path("/dev/shm", segment_in(said)[1:]).open("r+b") as file:
            file.seek(8)
            file.write((LAYOUT_VERSION + 1).to_bytes(8, sys.byteorder))
        done = run("-s", path, "--no-token")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run the release that made it" in done.stderr


def test_an_address_in_use(store: Store) -> None:
    """Whoever listens there already, the message says that somebody does."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = run("-s", store.store_socket_name, "--no-token", "--listen", address)
    assert done.returncode == 1
    assert f"cannot serve at {address}: Address already in use; name another" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows which signals are blocked")
@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_while_it_waits_for_a_store(tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends it with 0, and without a word, also where there is no store yet."""
    with subprocess.Popen(
        [*PROGRAM, "-s", str(tmp_path / "s"), "--no-token"], stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: is_held_back(process.pid, number), "it holds the signal back")
        process.send_signal(number)
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def is_held_back(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process blocks a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> number - 1 & 1)


def test_a_fetch_ends_in_time_where_another_one_does_not(
    far: PlasmaClient, client: PlasmaClient
) -> None:
    """Who waits for another process of the host to transfer an object waits no longer than for the object."""
    object_id = far.put(np.arange(1000))
    client.create(object_id, 100)  # as by one that was stopped in the midst of it
    with serving(far) as (_, flights):
        with pytest.raises(flight.FlightTimedOutError, match="by another process of this host"):
            fetch(client, flights, object_id, timeout_ms=300)
        client.abort(object_id)
        assert fetch(client, flights, object_id, timeout_ms=30_000).size


# --- somebody dies ---------------------------------------------------------------------------------


def test_the_store_dies_and_comes_back(tmp_path: Path) -> None:
    """While the store is gone callers are told, and served when it is back."""
    path = str(tmp_path / "s")
    with (
        Store("1MB", socket=path) as store,
        store.connect() as client,
        running("-s", path, "--listen", "127.0.0.1:0", "--no-token") as (_, location),
        flight.connect(location) as flights,
    ):
        object_id = client.put(pa.table({"x": [1]}))
        assert flights.do_get(ticket(object_id)).read_all().num_rows == 1
        store.close()
        with pytest.raises(flight.FlightUnavailableError):
            list(flights.list_flights())
        with Store("1MB", socket=path) as again, again.connect() as writer:
            writer.put(pa.table({"x": [1, 2]}), object_id)
            assert flights.do_get(ticket(object_id)).read_all().num_rows == 2


HALF_A_SERVER = """
    import sys, threading
    import pyarrow as pa
    from pyarrow import flight
    from shmplasma.flight import Head

    schema = Head(0, b"", 10).schema()

    class Half(flight.FlightServerBase):
        def get_flight_info(self, context, descriptor):
            return flight.FlightInfo(schema, descriptor, [], -1, 10)

        def do_get(self, context, ticket):
            def half():
                yield pa.record_batch([pa.array([b"12345"])], schema=schema)
                print("half", flush=True)
                threading.Event().wait()
            return flight.GeneratorStream(schema, half())

    server = Half("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    server.wait()
"""


def test_a_server_is_killed_in_the_middle(client: PlasmaClient) -> None:
    """Half an object of a server that was killed is an error, and leaves nothing."""
    errors: list[BaseException] = []

    def try_to_fetch(location: str) -> None:
        try:
            fetch(client, location, new_id())
        except flight.FlightError as error:
            errors.append(error)

    with Child(HALF_A_SERVER) as server:
        thread = threading.Thread(target=try_to_fetch, args=(f"grpc://127.0.0.1:{server.hear()}",))
        thread.start()
        assert server.hear() == "half"
        until(client.list, "the object is being written")
        server.kill()
        thread.join()
    assert len(errors) == 1
    assert not client.list()


def test_a_fetch_that_takes_too_long(client: PlasmaClient) -> None:
    """Half an object that does not come on in time is an error, and leaves nothing."""
    with Child(HALF_A_SERVER) as server:
        location = f"grpc://127.0.0.1:{server.hear()}"
        with pytest.raises(flight.FlightTimedOutError):
            fetch(client, location, new_id(), timeout_ms=300)
    assert not client.list()


HALF_A_CLIENT = """
    import sys
    import pyarrow as pa
    from pyarrow import flight
    from shmplasma.flight import Head

    flights = flight.connect(sys.argv[1])
    schema = Head(0, b"", 10).schema()
    writer, _ = flights.do_put(flight.FlightDescriptor.for_command(20 * b"x"), schema)
    writer.write_batch(pa.record_batch([pa.array([b"12345"])], schema=schema))
    print("half", flush=True)
    input()
"""


def test_a_client_is_killed_in_the_middle(client: PlasmaClient) -> None:
    """Half an object of a client that was killed leaves nothing, and the server goes on."""
    with serving(client) as (server, flights):
        with Child(HALF_A_CLIENT, f"grpc://127.0.0.1:{server.port}") as writer:
            assert writer.hear() == "half"
            until(client.list, "the object is being written")
            writer.kill()
        until(lambda: not client.list(), "the object is gone")
        put_encoded(flights, ObjectID(20 * b"x"), Head(0, b"", 1), [b"1"])
    assert client.contains(ObjectID(20 * b"x"))


def test_a_fetcher_is_killed_in_the_middle(store: Store, client: PlasmaClient) -> None:
    """When who fetches is killed, who waits for the same object takes over."""
    program = """
        import sys
        import shmplasma
        from shmplasma.flight import fetch
        client = shmplasma.connect(sys.argv[1])
        fetch(client, sys.argv[2], shmplasma.ObjectID(20 * b"y"))
    """
    object_id = ObjectID(20 * b"y")
    with Child(HALF_A_SERVER) as half, Store("1MB") as far_store, far_store.connect() as far:
        far.put("value", object_id)
        location = f"grpc://127.0.0.1:{half.hear()}"
        with (
            Child(program, store.store_socket_name, location) as fetcher,
            serving(far) as (_, flights),
        ):
            assert half.hear() == "half"
            until(client.list, "the object is being written")
            thread = threading.Thread(target=fetch, args=(client, flights, object_id))
            thread.start()
            fetcher.process.send_signal(signal.SIGKILL)
            thread.join()
    assert client.get(object_id, 0) == "value"
