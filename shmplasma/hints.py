"""Hints: how a getter that waits hears of an object from whoever puts it, without the store in between.

A get that waits is answered by the store when it has read the putter's record: two processes are woken one after the
other, and code that has not run for a while runs in three.  For what most wait for, one object that is put, or created and sealed, under an id
of its putter's choice, one of each is spared.  The store says in the header who waits; the putter sends him a *hint*, a datagram that
says where the record is; the getter reads the record himself and pins what lies there, as long as the store has not.

Theory of operation
-------------------
The header has `WANTED_WORDS` words.  That of an id (its CRC-32 decides) names the get, by request id and by the first board of its
client, that waits for an object there; of several gets it names one, and 0 is none.  Only the store writes them.  The slot that the get
has lent is the client's and the store's alike here, and what stands in it when the reply comes decides.

======================================================  ==========================================================
getter, hinted at record n of an outbox                 store, when it has read the record
======================================================  ==========================================================
G1. record n is there, unread, and makes an object      S0. the object is in the table, SEALED
    readable under the id (`shmplasma.unread`)
G2. a slot of its own says at which offset it lies,     S1. WANTED = 0
    or which entry it has
G3. the lent slot says `TAKEN`                          S2. membarrier
G4. WANTED names this get?                              S3. the lent slot says `TAKEN`: the reply comes without
G5. yes: there is the object; the reply is for nobody       a pin; else: the lent slot is the pin, as for any get
G6. no: both slots are 0 again; wait for the reply; if
    the lent slot is 0 then, look in the table, or begin
    anew
======================================================  ==========================================================

*What has an entry* is looked at once more at G4, after the pin, as by any reader (`shmplasma.pins`).

*Who is told goes first.*  A kernel may put him on the processor of the putter, although another is idle; so the putter gives way when he has hinted, before
he tells the store and goes on.

*Early hints.*  To wake a process takes about as long as to make a small object.  So who puts or creates one hints before he begins, at the record by
which it will be readable: his next one, or the one after that, if he does nothing else before the seal.  Whom that has woken looks for it for a
while before G1.  If it takes longer, counted from before the first hint, or another record comes between, there is a second hint when the record is
there: so who looks, finds it or hears again.  Who does not look, as processes wait for processors, may miss it; the store answers him.
A record that is not the one he wants is of another kind or id, and G1 leaves it alone.

*Who passes G4 has pinned the object before anybody can take it.*  x86-64 keeps the order of stores, and that of loads, but G4 may
pass G2 and G3.  If G4 has read the word before S1 was visible, then the membarrier came after it, so G2 and G3 are visible in S3; and the
lent slot stays as it is until the reply is read.  Takes come after that and find the pin (`shmplasma.pins`, `shmplasma.offset_pins`).  Before S0 the extent is its
putter's lease, which ends only when his records are read: also when he has left, or was killed, or has posted what nobody may.

*The record is what it was in G1, and unread.*  Its place is written again, and counted in ACKNOWLEDGED, only when the store is done with it, and before
that comes S1, which G4 has not seen.  G1 looks at ACKNOWLEDGED all the same: a hint may come from before the death of a store, for a get that had this
one's request id, and its record be that of an object that was deleted since.

*A record that is refused*, as its id is taken, or as its store and its putter have died both and another one has put the object since: the
store does S1 to S3 before the extent goes, which then waits until nobody pins it any more.

*Who fails G4 has nothing yet,* but the reply is on its way.  What was written in G3 may hide the pin of S3, or be overwritten by it; if the slot
is not 0 when the reply has come it is the store's pin, as the store writes nothing to it after the reply.

*A get that ends otherwise* (its time is over, its client leaves) goes through S1 to S3 as well: what was taken is pinned, and its
record is still to be read.

*A store that dies* leaves words, slots and records.  Its successor clears the words, and issues a barrier, before it reads any outbox.

A hint is no more than that: one that is lost, comes late, or says what is not so costs its receiver a look.  No word of it is believed but
that it is worth looking there; the record's word is its putter's, whose bytes the getter wants.  So hints need no answer, no
order and no rights, and where they do not get through (another network namespace, a full queue) the store answers.  Who is sent nothing but
nonsense stops listening.
"""

from __future__ import annotations

from struct import Struct
from typing import Final
from zlib import crc32

from shmplasma.gets import PendingGet
from shmplasma.layout import WANTED_WORDS, HeaderWord
from shmplasma.memory import Memory
from shmplasma.pins import Boards

__all__ = ["HINT", "TAKEN", "Wanted", "wanted_at", "wanted_word"]

HINT: Final = Struct("@IIQ")
"""Request id of the get, the putter's first board, and how many records he had posted with this one."""

TAKEN: Final = 1 << 62
"""In a lent slot: what the get waits for was taken.  It pins nothing."""

_FIRST: Final = int(HeaderWord.WANTED)


def wanted_at(hash32: int) -> int:
    """Return which word of the header is that of an id, by its CRC-32."""
    return _FIRST + hash32 % WANTED_WORDS


def wanted_word(request_id: int, board: int) -> int:
    """Return what names a get.

    Examples
    --------
    >>> divmod(wanted_word(7, 3), 1 << 32)
    (7, 4)
    """
    return request_id << 32 | board + 1


class Wanted:
    """The store's end: the words that say who waits.

    Parameters
    ----------
    words : memoryview
        The segment as native 8-byte words, writable.
    boards : Boards
        The boards.
    memory : Memory
        Issues barriers.

    Notes
    -----
    O(1).
    """

    def __init__(self, words: memoryview, boards: Boards, memory: Memory) -> None:
        self._words = words
        self._boards = boards
        self._memory = memory

    def ask(self, get: PendingGet, object_id: bytes, board: int) -> None:
        """Say that a get waits for an object, if there is a word for it; `board` is its client's first one."""
        at = wanted_at(crc32(object_id))
        if self._memory.has_barrier and not self._words[at]:
            self._words[at] = wanted_word(get.request_id, board)
            get.wanted_at = at

    def withdraw(self, get: PendingGet) -> None:
        """See whether a get was taken, and say so of it; from here on it can not be."""
        if not get.wanted_at:
            return
        self._words[get.wanted_at] = 0
        get.wanted_at = 0
        self._memory.barrier()
        word = self._boards.word(get.request.slots[0])
        if word & TAKEN:
            get.is_taken = True

    def clear(self) -> None:
        """Take back what a store that has died has said; from here on pins tell what was taken."""
        for at in range(_FIRST, _FIRST + WANTED_WORDS):
            if self._words[at]:
                self._words[at] = 0
        self._memory.barrier()
