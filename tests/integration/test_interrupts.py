"""Ctrl-C in the middle of a call: what the call has begun is undone, and the client goes on."""

from __future__ import annotations

import signal

import pytest

from tests.processes import Child, wait_until_asleep

UNDONE = """
    import os, select, signal, sys
    from threading import Thread
    import shmplasma as plasma
    from shmplasma.posted import Abort

    store = plasma.Store("10MB")
    client = store.connect()
    missing = plasma.ObjectID.from_random()
    client.contains(missing)
    pid = store.process.pid

    def stop():
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)

    stop()
    print("waits", flush=True)
    try:
        client.create(plasma.ObjectID.from_random(), 5_000_000)
    except KeyboardInterrupt:
        pass
    os.kill(pid, signal.SIGCONT)
    link = client._session._link
    select.select([link.channel], [], [])  # the object is created, and nobody has read of it

    def ask():
        try:
            client.contains(missing)
        except plasma.NotConnectedError:
            pass

    thread = Thread(target=ask, daemon=True)
    if sys.argv[1] == "full":
        stop()
        while link._outbox.append(Abort.KIND, missing.binary()):
            pass
        thread.start()
        while link.channel._given_up:
            pass
        os.kill(pid, signal.SIGCONT)
    else:
        store.process.kill()
        store.process.wait()
        thread.start()
    thread.join(20)
    print("hangs" if thread.is_alive() else "goes on", flush=True)
    if sys.argv[1] == "full" and not thread.is_alive():
        assert not client.list()
        client.disconnect()
    store.close()
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["full", "dead"])
def test_a_creation_is_undone_later(how: str) -> None:
    """Who reads that an interrupted creation was granted undoes it, and waits neither for the outbox nor for a store."""
    with Child(UNDONE, how) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.send_signal(signal.SIGINT)
        assert child.hear() == "goes on"
        assert child.end() == 0
