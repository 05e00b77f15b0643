"""Senders: processes that have sent references and ended the connections by which they did.  Pure.

A ticket lasts as long as its sender (`shmplasma.tickets`), which is a process.  That of a connection that has ended may live: a
process has no connection for its references while it has none, and ends one that is to be made anew.  So what such a connection
has on its way is passed on to the process, whose end is awaited; where it cannot be seen, its time begins with the connection's end.

A successor knows nothing of this: what is on its way when a store dies has a ticket of its own (`shmplasma.references`).
"""

from __future__ import annotations

from shmplasma.effects import Await
from shmplasma.outgoing import Outgoing
from shmplasma.references import MAX_OF_A_CLIENT
from shmplasma.tickets import Tickets

__all__ = ["Senders"]


class Senders:
    """Those processes, each under the number of the first of its clients that has ended.

    Parameters
    ----------
    tickets, outgoing
        The parts of the store that it needs.
    """

    def __init__(self, tickets: Tickets, outgoing: Outgoing) -> None:
        self._tickets = tickets
        self._outgoing = outgoing
        self._numbers: dict[tuple[int, int], int] = {}
        self._processes: dict[int, tuple[int, int]] = {}

    def add(self, client: int, pid: int, start_time: int, now_ns: int) -> None:
        """Take note that the connection of a client has ended; 0 for a pid that cannot be seen."""
        tickets, process = self._tickets, (pid, start_time)
        count = tickets.n_of(client)
        if not count:
            return
        number = self._numbers.get(process, client)
        if not pid or tickets.n_of(number) + count > 2 * MAX_OF_A_CLIENT:
            tickets.forget_sender(client, now_ns)
        elif number != client:
            tickets.pass_on(client, number)
        else:
            self._numbers[process], self._processes[client] = client, process
            self._outgoing.effects.append(Await(client, pid, start_time))

    def end(self, number: int, now_ns: int) -> None:
        """Take note that a process has ended, or that its end cannot be awaited."""
        del self._numbers[self._processes.pop(number)]
        self._tickets.forget_sender(number, now_ns)
