from __future__ import annotations

import pytest

import shmplasma as plasma
from tests.processes import run_python

WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("dask", "distributed", "joblib", "loky", "rich", "sklearn", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def test_the_package_can_be_looked_at_without_extras() -> None:
    """``import *``, `help` and `inspect` need only what is always installed."""
    run_python(
        WITHOUT_EXTRAS
        + """
import inspect, pydoc
import shmplasma
from shmplasma import *

assert connect is shmplasma.connect
assert "ObjectID" in dict(inspect.getmembers(shmplasma))
assert "start_plasma_store" in pydoc.plain(pydoc.render_doc(shmplasma))
"""
    )


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "import shmplasma; shmplasma.StoreExecutor",
            "StoreExecutor needs loky: pip install 'shmplasma[loky]'",
        ),
        (
            "from shmplasma import StoreExecutor",
            "StoreExecutor needs loky: pip install 'shmplasma[loky]'",
        ),
        (
            "import shmplasma.dask",
            "shmplasma.dask needs distributed: pip install 'shmplasma[dask]'",
        ),
        (
            "import shmplasma.joblib",
            "shmplasma.joblib needs joblib: pip install 'shmplasma[joblib]'",
        ),
        ("import shmplasma.torch", "shmplasma.torch needs torch: pip install 'shmplasma[torch]'"),
    ],
)
def test_a_missing_extra_is_named(statement: str, message: str) -> None:
    """Whoever uses an integration without its extra is told how to install that."""
    said = run_python(
        WITHOUT_EXTRAS
        + f"""
try:
    {statement}
except ModuleNotFoundError as error:
    print(error)
"""
    )
    assert said == message + "\n"


def test_a_name_that_is_not_there() -> None:
    """It is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        plasma.Nothing  # noqa: B018
