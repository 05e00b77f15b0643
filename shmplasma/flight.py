"""Objects beyond one machine: how they travel by Arrow Flight, and the client's end of it.

`shmplasma.flight_server` has the server's end.  Both build on the client of a store and on nothing else of it.

Forms
-----
*Encoded*: any object, byte by byte.  One column ``data`` of binaries, whose values in a row are the object's data; the
schema's metadata has the rest:

    ============================  ==========================================================
    ``shmplasma.codec``           how the data is to be read (`shmplasma.codecs.Codec`), decimal
    ``shmplasma.metadata``        the object's metadata
    ``shmplasma.data_size``       bytes of data, decimal; may be missing from what is put
    ============================  ==========================================================

*Arrow*: a table, record batch or array as such, for clients that know nothing of all this.

Both are sent in pieces of `PIECE_BYTES`, out of the segment; the encoded form is copied once, into the receiver's
segment.

Names
-----
A ticket, the command of a descriptor, or the only part of its path: an id as 20 bytes or as 40 hexadecimal digits.  It
stands for the Arrow form where there is one; after ``encoded:`` it stands for the encoded form.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import flight

from shmplasma.arrow_errors import PlasmaObjectExists, PlasmaObjectNotFound, PlasmaStoreFull
from shmplasma.connected import wait_seconds
from shmplasma.copying import copy_into
from shmplasma.layout import ID_BYTES, REFERENCED
from shmplasma.objects import ObjectID

if TYPE_CHECKING:
    from shmplasma.client import PlasmaClient
    from shmplasma.reading import Encoded

__all__ = [
    "PIECE_BYTES",
    "REASONS",
    "Head",
    "Name",
    "connect",
    "encoded_batches",
    "fetch",
    "pieces",
    "receive",
    "send",
]

PIECE_BYTES: Final = 4 << 20
"""Measured over loopback on a busy machine, GB/s by bytes in a message, medians of 6 of tables and bytes alike: 256 KiB 0.7,
1 MiB 1.2, 4 MiB 1.4, 16 MiB 1.4, 64 MiB 0.6; a table of 400 MB in one message 0.3.  The smaller of the best takes less memory."""

REASONS: Final[dict[type[Exception], bytes]] = {
    PlasmaObjectNotFound: b"not found",
    PlasmaObjectExists: b"exists",
    PlasmaStoreFull: b"full",
    ValueError: b"invalid",
}
"""What a server says in the extra information of its errors."""

_PREFIX: Final = b"encoded:"
_CODEC: Final = b"shmplasma.codec"
_METADATA: Final = b"shmplasma.metadata"
_DATA_SIZE: Final = b"shmplasma.data_size"
_AGAIN_MS: Final = 500
"""How often to look whether who fetches an object has given up."""
_ROWS: Final = 64
"""Pieces of a table begin on whole words of its bitmaps, which are copied otherwise."""
_COPYING_THREADS: Final = 2


class Name(NamedTuple):
    """Which object is meant, and in which form.

    Attributes
    ----------
    object_id : ObjectID
        The object.
    is_encoded : bool
        Whether the encoded form is meant, even where there is another.

    Examples
    --------
    >>> Name.parse(b"encoded:" + 20 * b"61")
    Name(object_id=ObjectID(6161616161616161616161616161616161616161), is_encoded=True)
    """

    object_id: ObjectID
    is_encoded: bool

    @classmethod
    def parse(cls, text: bytes) -> Name:
        """Return what a ticket, command or path says; raise ValueError when it says nothing."""
        digits = text.removeprefix(_PREFIX)
        if len(digits) == 2 * ID_BYTES:
            with suppress(ValueError):
                digits = bytes.fromhex(digits.decode("ascii"))
        if len(digits) != ID_BYTES:
            raise ValueError(
                f"{text[:60]!r} names no object; write its id as 20 bytes or 40 hexadecimal digits, "
                "after 'encoded:' if need be"
            )
        return cls(ObjectID(digits), text.startswith(_PREFIX))

    @classmethod
    def of(cls, descriptor: flight.FlightDescriptor) -> Name:
        """Return what a descriptor says; raise ValueError when it says nothing."""
        if descriptor.path is None:
            return cls.parse(descriptor.command or b"")
        if len(descriptor.path) != 1:
            raise ValueError("the path of an object has one part, its id")
        return cls.parse(descriptor.path[0])

    def ticket(self) -> bytes:
        """Return the name as bytes."""
        return _PREFIX * self.is_encoded + self.object_id.binary()


class Head(NamedTuple):
    """What a stream in the encoded form says of its object.

    Attributes
    ----------
    codec : int
        How the data is to be read.
    metadata : bytes
        The object's metadata.
    data_size : int or None
        Bytes of data; None if this is not known beforehand.
    """

    codec: int
    metadata: bytes
    data_size: int | None

    @classmethod
    def of(cls, schema: pa.Schema) -> Head | None:
        """Return what a schema says, None for one of another form; raise ValueError when it makes no sense."""
        said = schema.metadata or {}
        if _CODEC not in said:
            return None
        if len(schema) != 1 or schema.field(0).type not in (pa.binary(), pa.large_binary()):
            raise ValueError("an encoded object travels as one column of binaries")
        size = int(said[_DATA_SIZE]) if _DATA_SIZE in said else None
        codec = int(said[_CODEC])
        if not 0 <= codec < REFERENCED or (size is not None and size < 0):
            raise ValueError(f"no object has the codec {codec} and the size {size}")
        return cls(codec, said.get(_METADATA, b""), size)

    def schema(self) -> pa.Schema:
        """Return the schema of a stream."""
        said: dict[bytes | str, bytes | str] = {
            _CODEC: b"%d" % self.codec,
            _METADATA: self.metadata,
        }
        if self.data_size is not None:
            said[_DATA_SIZE] = b"%d" % self.data_size
        return pa.schema([pa.field("data", pa.binary(), nullable=False)], said)


def encoded_batches(encoded: Encoded) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Return an object's schema and stream in the encoded form; nothing is copied."""
    data = encoded.data
    schema = Head(encoded.codec, encoded.metadata.to_pybytes(), data.size).schema()
    batches = []
    for start in range(0, data.size, PIECE_BYTES):
        piece = data.slice(start, min(PIECE_BYTES, data.size - start))
        ends = pa.py_buffer(np.array([0, piece.size], np.int32).tobytes())
        column = pa.Array.from_buffers(pa.binary(), 1, [None, ends, piece])
        batches.append(pa.RecordBatch.from_arrays([column], schema=schema))
    return schema, batches


def pieces(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield a table's rows in batches of about `PIECE_BYTES`; nothing is copied."""
    for batch in table.to_batches():
        rows = batch.num_rows
        if batch.nbytes > PIECE_BYTES:
            rows = max(_ROWS, rows * PIECE_BYTES // batch.nbytes // _ROWS * _ROWS)
        for start in range(0, batch.num_rows, max(rows, 1)):
            yield batch.slice(start, rows)


def receive(
    client: PlasmaClient,
    object_id: ObjectID,
    head: Head,
    reader: Iterable[flight.FlightStreamChunk],
) -> pa.Buffer:
    """Store an object that comes in the encoded form, and return its data, which keeps the object.

    Parameters
    ----------
    client : PlasmaClient
        A client of the store that is to have it.
    object_id : ObjectID
        Its name there.
    head : Head
        What the schema has said.
    reader : iterable of pyarrow.flight.FlightStreamChunk
        The stream.  Its pieces go straight to the segment if the size is known, and are collected if not.

    Raises
    ------
    PlasmaObjectExists, PlasmaStoreFull
        Before anything is read, if the size is known.
    ValueError
        The stream does not have the bytes that were announced; nothing stays in the store.
    """
    chunks = _chunks(reader)
    size = head.data_size
    if size is None:
        collected = list(chunks)
        size = sum(chunk.size for chunk in collected)
        chunks = iter(collected)
    room = client.create_encoded(object_id, size, head.metadata, head.codec)
    try:
        _fill(np.frombuffer(memoryview(room), np.uint8), chunks)
    except BaseException:
        del room
        client.abort(object_id)
        raise
    client.seal(object_id)
    data: pa.Buffer = client.get_buffers(object_id)
    return data


def _fill(target: np.ndarray[Any, np.dtype[np.uint8]], chunks: Iterable[pa.Buffer]) -> None:
    position = 0
    for chunk in chunks:
        end = position + chunk.size
        if end > target.size:
            raise ValueError(f"more bytes came than the {target.size} that were announced")
        copy_into(target[position:end], chunk, _COPYING_THREADS)
        position = end
    if position != target.size:
        raise ValueError(f"{position} bytes came, and {target.size} were announced")


def _chunks(reader: Iterable[flight.FlightStreamChunk]) -> Iterator[pa.Buffer]:
    for chunk in reader:
        if chunk.data is None:  # metadata of the sender's own
            continue
        column: Any = chunk.data.column(0)
        column.validate(full=True)  # its offsets are the sender's, and lead anywhere
        if column.null_count:
            raise ValueError("a piece of an encoded object is null")
        _, ends, data = column.buffers()
        if len(column):
            # What is in a row lies in a row; its items, as scalars, would be copies.
            width = np.int32 if column.type == pa.binary() else np.int64
            bounds = np.frombuffer(ends, width)[column.offset : column.offset + len(column) + 1]
            yield data.slice(int(bounds[0]), int(bounds[-1] - bounds[0]))


# --- the client's end -----------------------------------------------------------------------------


class _Bearer(flight.ClientMiddleware):
    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def sending_headers(self) -> dict[str, list[str] | list[bytes]]:
        return {"authorization": [f"Bearer {self._token}"]}


class _BearerFactory(flight.ClientMiddlewareFactory):
    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def start_call(self, info: flight.CallInfo) -> flight.ClientMiddleware:  # noqa: ARG002 - Flight's signature
        return _Bearer(self._token)


def connect(
    location: str, *, token: str | None = None, tls_root_certs: str | None = None
) -> flight.FlightClient:
    """Return a plain Flight client that shows a token with each of its calls.

    Parameters
    ----------
    location : str
        ``grpc://HOST:PORT``, or ``grpc+tls://HOST:PORT``.
    token : str, optional
        What `shmplasma-flight` was started with.
    tls_root_certs : str, optional
        Certificates (PEM), one of which must have signed the server's; those of the system if not given.
    """
    middleware: list[flight.ClientMiddlewareFactory] = []
    if token is not None:
        middleware.append(_BearerFactory(token))
    return flight.FlightClient(location, tls_root_certs=tls_root_certs, middleware=middleware)


def fetch(
    client: PlasmaClient,
    remote: flight.FlightClient | str,
    object_ids: ObjectID | Iterable[ObjectID],
    timeout_ms: float | None = -1,
) -> Any:
    """Bring objects from another host's store to the local one, unless they are there already.

    Parameters
    ----------
    client : PlasmaClient
        A client of the local store.
    remote : FlightClient or str
        The other host's `shmplasma-flight`, by `connect`; or its location, if it needs no token.
    object_ids : iterable of ObjectID, or one ObjectID
        Which objects; they have the same ids here.
    timeout_ms : float, optional
        How long each object may take, in milliseconds; None and -1 are without limit.

    Returns
    -------
    list of pyarrow.Buffer
        The objects' data, as of `PlasmaClient.get_buffers`; while a buffer lives its object is not evicted.  For one
        id its buffer alone.

    Raises
    ------
    PlasmaObjectNotFound
        There is no object with this id on the other host, or it is not sealed.  Other objects may have been fetched.
    PlasmaStoreFull
        The local store has no room.
    pyarrow.flight.FlightError
        The other host does not answer, or refuses; nothing stays of what came half.

    Notes
    -----
    Of all processes of a host, the first that asks for an object transfers it; the others wait for that.  If it gives
    up or dies, one of them takes over.  What was fetched is read by the local store's clients as if it had been put
    here: fetch only from hosts whose pickles you would load.
    """
    single = isinstance(object_ids, ObjectID)
    ids = [object_ids] if isinstance(object_ids, ObjectID) else list(object_ids)
    options = _options(timeout_ms)
    held: dict[ObjectID, pa.Buffer] = {}
    wanted = list(dict.fromkeys(ids))
    seconds = wait_seconds(timeout_ms)
    end = None if seconds is None else time.monotonic() + seconds * len(wanted)
    with _connected(remote) as flights:
        while wanted:
            for object_id in wanted:
                buffer = client.get_buffers(object_id, 0)
                if buffer is None:
                    buffer = _transfer(client, flights, object_id, options)
                if buffer is not None:
                    held[object_id] = buffer
            wanted = [object_id for object_id in wanted if object_id not in held]
            if wanted and end is not None and time.monotonic() >= end:
                raise flight.FlightTimedOutError(
                    f"{len(wanted)} objects are being fetched by another process of this host, and are not there in time"
                )
            client.get_buffers(wanted, _AGAIN_MS)  # somebody else is fetching them
    buffers = [held[object_id] for object_id in ids]
    return buffers[0] if single else buffers


def _transfer(
    client: PlasmaClient,
    flights: flight.FlightClient,
    object_id: ObjectID,
    options: flight.FlightCallOptions,
) -> pa.Buffer | None:
    """Fetch an object; None if it exists here by now, or somebody else is fetching it."""
    name = Name(object_id, is_encoded=True).ticket()
    with _plasma_errors():
        # Asked for before its bytes are, so that only one of us asks for these.
        info = flights.get_flight_info(flight.FlightDescriptor.for_command(name), options)
        head = Head.of(info.schema)
        if head is None:
            raise ValueError("the other host does not know the encoded form")
        try:
            return receive(client, object_id, head, _stream(flights, name, options))
        except PlasmaObjectExists:
            return None


def _stream(
    flights: flight.FlightClient, name: bytes, options: flight.FlightCallOptions
) -> Iterator[flight.FlightStreamChunk]:
    reader = flights.do_get(flight.Ticket(name), options)
    try:
        yield from reader
    except BaseException:
        reader.cancel()
        raise


def send(
    client: PlasmaClient,
    remote: flight.FlightClient | str,
    object_ids: ObjectID | Iterable[ObjectID],
    timeout_ms: float | None = -1,
) -> None:
    """Put objects of the local store into another host's store, under the same ids.

    Parameters are those of `fetch`.

    Raises
    ------
    PlasmaObjectNotFound
        There is no such sealed object here.
    PlasmaObjectExists, PlasmaStoreFull
        The other host's store raised it.
    pyarrow.flight.FlightError
        The other host does not answer, or refuses; nothing stays of what came half.
    """
    ids = [object_ids] if isinstance(object_ids, ObjectID) else list(object_ids)
    options = _options(timeout_ms)
    with _connected(remote) as flights, _plasma_errors():
        for object_id in ids:
            encoded = client.get_encoded(object_id, 0)
            if encoded is None:
                raise PlasmaObjectNotFound(f"there is no sealed object {object_id.binary().hex()}")
            schema, batches = encoded_batches(encoded)
            descriptor = flight.FlightDescriptor.for_command(object_id.binary())
            writer, _ = flights.do_put(descriptor, schema, options)
            with writer:
                for batch in batches:
                    writer.write_batch(batch)


@contextmanager
def _connected(remote: flight.FlightClient | str) -> Iterator[flight.FlightClient]:
    if isinstance(remote, flight.FlightClient):
        yield remote
    else:
        with connect(remote) as flights:
            yield flights


def _options(timeout_ms: float | None) -> flight.FlightCallOptions:
    return flight.FlightCallOptions(timeout=wait_seconds(timeout_ms))


@contextmanager
def _plasma_errors() -> Iterator[None]:
    """Raise what a server has refused with as a local store would."""
    try:
        yield
    except flight.FlightServerError as error:
        for kind, reason in REASONS.items():
            if error.extra_info == reason:
                text, _, _ = str(error).partition(". Detail: ")
                raise kind(f"the other host says: {text}") from error
        raise
