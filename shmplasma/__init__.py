"""shmplasma: an in-memory object store for the Python processes of one machine.

Processes put NumPy arrays, Arrow tables, data frames and any other values into one shared-memory segment and
get them back without copying.  ``import shmplasma as plasma`` runs code that was written for
``pyarrow.plasma``.

The names below are imported at their first use, so that the server starts without Arrow and NumPy.  `StoreExecutor`
is not in ``__all__``: it needs the extra ``[loky]``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pyarrow import Buffer as PlasmaBuffer

    from shmplasma.arrow_errors import (
        NotConnectedError,
        PlasmaObjectAlreadySealed,
        PlasmaObjectExists,
        PlasmaObjectNotFound,
        PlasmaStoreFull,
    )
    from shmplasma.client import (
        ObjectArray,
        ObjectInfo,
        ObjectNotAvailable,
        PlasmaClient,
        connect,
    )
    from shmplasma.codecs import DeserializationError, SerializationError
    from shmplasma.embedded import Store, start_plasma_store
    from shmplasma.errors import (
        ExternalStoreError,
        Holder,
        ShmPlasmaError,
        StoreNotStartedError,
    )
    from shmplasma.executor import StoreExecutor as StoreExecutor
    from shmplasma.objects import ObjectID
    from shmplasma.serialization import SerializationContext, register_serializer
    from shmplasma.sharing import get_context, share
    from shmplasma.store_ref import StoreRef

__version__: Final = "0.1.0"

__all__ = [
    "DeserializationError",
    "ExternalStoreError",
    "Holder",
    "NotConnectedError",
    "ObjectArray",
    "ObjectID",
    "ObjectInfo",
    "ObjectNotAvailable",
    "PlasmaBuffer",
    "PlasmaClient",
    "PlasmaObjectAlreadySealed",
    "PlasmaObjectExists",
    "PlasmaObjectNotFound",
    "PlasmaStoreFull",
    "SerializationContext",
    "SerializationError",
    "ShmPlasmaError",
    "Store",
    "StoreNotStartedError",
    "StoreRef",
    "connect",
    "get_context",
    "register_serializer",
    "share",
    "start_plasma_store",
]

_HOMES: Final = {
    "shmplasma.arrow_errors": (
        "NotConnectedError",
        "PlasmaObjectAlreadySealed",
        "PlasmaObjectExists",
        "PlasmaObjectNotFound",
        "PlasmaStoreFull",
    ),
    "shmplasma.client": (
        "ObjectArray",
        "ObjectInfo",
        "ObjectNotAvailable",
        "PlasmaClient",
        "connect",
    ),
    "shmplasma.codecs": ("DeserializationError", "SerializationError"),
    "shmplasma.embedded": ("Store", "start_plasma_store"),
    "shmplasma.errors": (
        "ExternalStoreError",
        "Holder",
        "ShmPlasmaError",
        "StoreNotStartedError",
    ),
    "shmplasma.executor": ("StoreExecutor",),
    "shmplasma.objects": ("ObjectID",),
    "shmplasma.serialization": ("SerializationContext", "register_serializer"),
    "shmplasma.sharing": ("get_context", "share"),
    "shmplasma.store_ref": ("StoreRef",),
}


def __getattr__(name: str) -> Any:
    if name == "PlasmaBuffer":
        # Buffers are Arrow's own, which cannot be subclassed in Python.
        globals()[name] = import_module("pyarrow").Buffer
        return globals()[name]
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(home)
            globals().update({each: getattr(module, each) for each in names})
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
