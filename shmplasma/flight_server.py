"""An Arrow Flight server over a store (`shmplasma.flight` says how objects travel and what they are called).

Flight calls the methods from threads of its own, many at a time; they share one client of the store, which is made for
that.  What a stream is made of keeps its object pinned until Flight lets go of it, be it sent or given up.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pyarrow as pa
from pyarrow import flight

from shmplasma.arrow_errors import NotConnectedError, PlasmaObjectNotFound
from shmplasma.flight import REASONS, Head, Name, encoded_batches, pieces, receive
from shmplasma.payloads import Codec
from shmplasma.reading import Encoded

if TYPE_CHECKING:
    from shmplasma.client import PlasmaClient

__all__ = ["StoreFlightServer"]

_STREAMS: Final = frozenset({Codec.TABLE, Codec.RECORD_BATCH, Codec.ARRAY, Codec.CHUNKED_ARRAY})
"""What is an Arrow stream as it lies in the store."""


class StoreFlightServer(flight.FlightServerBase):
    """Serves the objects of a store; it serves as soon as it is made.

    Parameters
    ----------
    client : PlasmaClient
        Of the store; to be disconnected after the server's shutdown.
    location : str
        Where to listen: ``grpc://HOST:PORT``, or ``grpc+tls://HOST:PORT``; port 0 for any that is free.
    token : str, optional
        What callers have to show, as ``authorization: Bearer TOKEN``.  Without one everybody is served.
    tls_certificates : list of (str, str), optional
        Certificate chain and key (PEM), for ``grpc+tls``.
    read_only : bool, optional
        Whether to refuse puts and deletes.

    Notes
    -----
    =====================  ==================================================================================
    ``do_get``             a sealed object
    ``do_put``             makes an object: in the encoded form what it says, else a table
    ``get_flight_info``    its schema, size in bytes and, in the Arrow form, rows
    ``list_flights``       all sealed objects, with their sizes; the criteria are the beginning of their ids, in hexadecimal.  No object
                           counts as read by that, hence no schemas
    ``do_action``          ``contains``: ``1`` or ``0``; ``delete``.  The body is an object's name
    =====================  ==================================================================================

    Refusals are `pyarrow.flight.FlightServerError` with one of `shmplasma.flight.REASONS` as extra information; while the
    store is gone, `pyarrow.flight.FlightUnavailableError`.
    """

    def __init__(
        self,
        client: PlasmaClient,
        location: str = "grpc://127.0.0.1:0",
        *,
        token: str | None = None,
        tls_certificates: list[tuple[str, str]] | None = None,
        read_only: bool = False,
    ) -> None:
        self._client = client
        self._read_only = read_only
        middleware: dict[str, flight.ServerMiddlewareFactory] = {}
        if token is not None:
            middleware["token"] = _TokenFactory(token)
        super().__init__(location, tls_certificates=tls_certificates, middleware=middleware)

    def do_get(
        self, context: flight.ServerCallContext, ticket: flight.Ticket
    ) -> flight.RecordBatchStream:
        """Send an object."""
        with _flight_errors():
            name = Name.parse(ticket.ticket)
            encoded = self._find(name)
            if _is_arrow(name, encoded):
                table = pa.ipc.open_stream(encoded.data).read_all()
                batches, schema = list(pieces(table)), table.schema
            else:
                schema, batches = encoded_batches(encoded)
            return flight.RecordBatchStream(pa.Table.from_batches(batches, schema))

    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        """Make an object of what comes."""
        with _flight_errors():
            self._refuse_writing()
            object_id = Name.of(descriptor).object_id
            head = Head.of(reader.schema)
            if head is not None:
                receive(self._client, object_id, head, reader)
            else:
                # How large it becomes in the segment is not known before all of it is there.
                table = reader.read_all()
                table.validate(full=True)  # its offsets are the sender's, and lead anywhere
                self._client.put(table, object_id)

    def get_flight_info(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        """Describe an object."""
        with _flight_errors():
            name = Name.of(descriptor)
            encoded = self._find(name)
            if _is_arrow(name, encoded):
                table = pa.ipc.open_stream(encoded.data).read_all()
                return _info(table.schema, name, encoded.data.size, table.num_rows)
            schema, batches = encoded_batches(encoded)
            return _info(schema, name, encoded.data.size, len(batches))

    def get_schema(  # type: ignore[override]  # the stubs are wrong
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.SchemaResult:
        """Return the schema of an object."""
        return flight.SchemaResult(self.get_flight_info(context, descriptor).schema)

    def list_flights(  # type: ignore[override]  # likewise
        self, context: flight.ServerCallContext, criteria: bytes
    ) -> Iterator[flight.FlightInfo]:
        """List the sealed objects."""
        with _flight_errors():
            objects = self._client.list()
        beginning = criteria.decode("ascii", "replace").lower()
        for object_id, about in objects.items():
            if about["state"] == "sealed" and object_id.binary().hex().startswith(beginning):
                name = Name(object_id, is_encoded=False)
                yield _info(pa.schema([]), name, about["data_size"], -1)

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[bytes]:
        """Carry out an action."""
        with _flight_errors():
            object_id = Name.parse(action.body.to_pybytes()).object_id
            if action.type == "contains":
                return [b"%d" % self._client.contains(object_id)]
            if action.type == "delete":
                self._refuse_writing()
                self._client.delete(object_id)
                return []
            raise ValueError(f"there is no action {action.type!r}; there are contains and delete")

    def list_actions(  # type: ignore[override]  # likewise
        self, context: flight.ServerCallContext
    ) -> list[flight.ActionType]:
        """List the actions."""
        return [
            flight.ActionType("contains", "whether there is a sealed object of this name: 1 or 0"),
            flight.ActionType("delete", "delete the object of this name, at its last release"),
        ]

    def _find(self, name: Name) -> Encoded:
        encoded = self._client.get_encoded(name.object_id, 0)
        if encoded is None:
            raise PlasmaObjectNotFound(f"there is no sealed object {name.object_id.binary().hex()}")
        return encoded

    def _refuse_writing(self) -> None:
        if self._read_only:
            raise flight.FlightUnauthorizedError("this server only reads: --read-only")


def _is_arrow(name: Name, encoded: Encoded) -> bool:
    return encoded.codec in _STREAMS and not name.is_encoded


def _info(schema: pa.Schema, name: Name, size_bytes: int, rows: int) -> flight.FlightInfo:
    text = b"encoded:" * name.is_encoded + name.object_id.binary().hex().encode()
    # No location: the ticket is for whoever has given it.
    endpoint = flight.FlightEndpoint(name.ticket(), [])
    descriptor = flight.FlightDescriptor.for_path(text)
    return flight.FlightInfo(schema, descriptor, [endpoint], rows, size_bytes)


@contextmanager
def _flight_errors() -> Iterator[None]:
    """Raise the store's errors as Flight's, which alone reach the caller as they are."""
    try:
        yield
    except NotConnectedError as error:
        raise flight.FlightUnavailableError(str(error)) from error
    except tuple(REASONS) as error:
        reason = next(REASONS[kind] for kind in REASONS if isinstance(error, kind))
        raise flight.FlightServerError(str(error), reason) from error


class _TokenFactory(flight.ServerMiddlewareFactory):
    """Refuses calls without the token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._expected = f"Bearer {token}".encode()

    def start_call(
        self,
        info: flight.CallInfo,
        headers: dict[str, list[str] | list[bytes]],
    ) -> flight.ServerMiddleware | None:
        for name, values in headers.items():
            if name.lower() == "authorization":
                for value in values:
                    shown = value if isinstance(value, bytes) else value.encode()
                    if hmac.compare_digest(shown, self._expected):
                        return None
        raise flight.FlightUnauthenticatedError("show the token of this server: --token-file")
