from __future__ import annotations

import pytest

from shmplasma import tickets
from shmplasma.layout import BOARD_WORDS, REFERENCED
from shmplasma.outbox import PLACES
from shmplasma.posted import Detach, Gone, Lend, Publish, Redeem, Release, Seal
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.references import MAX_OF_A_CLIENT, References
from shmplasma.replies import Created, Done, Failed, Failure, Leased, Number, Welcome
from shmplasma.requests import (
    MAX_HOLDS,
    AskLease,
    Bequeath,
    Delete,
    Evict,
    Flush,
    Hello,
    Hold,
    Post,
    Role,
    holds_told,
)
from shmplasma.table import Table
from shmplasma.tickets import LINGER_NS, TICKET_NS
from tests.conversation import Conversation, Peer, name
from tests.crash.damage import Reopened

X, Y = (bytes([letter]) * 20 for letter in (0x10, 0x11))
TICKET_SECONDS = TICKET_NS / 1e9
LINGER_SECONDS = LINGER_NS / 1e9


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 64 KiB that nobody has talked to."""
    return Conversation()


def put(peer: Peer, object_id: bytes, size: int = 64) -> None:
    """Put a referenced object, as its creator, who holds it under the number 0."""
    request = peer.new(object_id, size, codec=REFERENCED)
    peer.ask(request, Created)
    peer.write(Seal(object_id))
    peer.release(request.slot)


def drop(talk: Conversation, peer: Peer, object_id: bytes, number: int = 0) -> None:
    """Let go of a handle, and let the store do what it has to do."""
    peer.write(Release(object_id, number))
    talk.turn()


def test_the_last_handle(talk: Conversation) -> None:
    """An object goes when its creator's handle goes, if that is the only one."""
    creator = talk.client()
    put(creator, X)
    put(creator, Y)
    drop(talk, creator, X)
    assert talk.ids() == {Y}


def test_a_handle_that_moves(talk: Conversation) -> None:
    """From the sender's to the receiver's there is no moment at which the object is nobody's."""
    sender, receiver = talk.client(), talk.client()
    put(sender, X)
    sender.write(Lend(X, 7, 1))
    drop(talk, sender, X)
    assert talk.ids() == {X}
    receiver.write(Redeem(X, 7, 1))
    talk.turn()
    assert talk.ids() == {X}
    drop(talk, receiver, X, 1)
    assert not talk.ids()


def test_an_outbox_that_is_read_late(talk: Conversation) -> None:
    """Object, loan and receipt may become known in the wrong order; the receiver holds all the same."""
    sender, receiver, third = talk.client(), talk.client(), talk.client()
    request = sender.new(X, codec=REFERENCED)
    sender.ask(request, Created)
    sender.write_silently(Seal(X))
    sender.release(request.slot)
    sender.write_silently(Lend(X, 7, 1))
    receiver.write(Redeem(X, 7, 1))
    receiver.write_silently(Lend(X, 8, 1))
    receiver.write(Release(X, 1))
    third.write(Redeem(X, 8, 1))
    talk.turn()
    drop(talk, sender, X)
    assert talk.ids() == {X}
    assert talk.store.describe().count("references on their way: 0") == 1
    drop(talk, third, X, 1)
    assert not talk.ids()


def ignore(*_: object) -> None:
    """Take no note of whatever it is."""


def read(references: References) -> list[bytes]:
    """End a reading of all outboxes, begin the next one, and return what was found to be nobody's."""
    nobodys = references.judge()
    references.begin_reading()
    return nobodys


def test_a_receipt_that_is_younger_than_the_look_at_the_loan() -> None:
    """A reading may see a receipt, and not the loan, whose outbox it had passed; the next one sees that."""
    references = References(ignore, ignore)
    references.create(X, client=1)
    references.begin_reading()
    references.redeem(X, 7, client=2, number=1, now_ns=0)
    assert not read(references)
    assert references.has_suspects, "there is to be another reading"
    references.lend(X, 7, client=1, receivers=1, now_ns=0)
    assert not read(references)
    assert not len(references.tickets)
    references.release(X, 1, 0)
    assert not read(references)
    references.release(X, 2, 1)
    assert read(references) == [X]
    references.check()


def test_a_receipt_that_is_younger_than_the_look_at_the_object() -> None:
    """So may it see what is said of an object that it does not know yet."""
    references = References(ignore, ignore)
    references.begin_reading()
    references.redeem(X, 7, client=2, number=1, now_ns=0)
    assert not read(references)
    references.create(X, client=1)
    references.lend(X, 7, client=1, receivers=1, now_ns=0)
    references.release(X, 1, 0)
    assert not read(references)
    assert references.n_holds == 1
    assert not len(references.tickets)
    references.check()


def test_tickets_that_are_used_up_leave_nothing_behind() -> None:
    """However many come and go while an older one is on its way, little is remembered, and each that is left has its time."""
    references = References(ignore, ignore)
    references.create(X, 1)
    references.lend(X, 1, 1, 1, 0)
    for number in range(10_000):
        now_ns = number + 1
        references.lend(X, 2 * number + 2, 1, 1, now_ns)
        references.redeem(X, 2 * number + 2, 2, 1, now_ns)
        if not number % 100:
            references.lend(X, 2 * number + 3, 1, 1, now_ns)
    assert len(references.tickets._due._heap) < 2_000
    references.check()
    references.forget_client(1, 10_001)
    references.tickets.forget_sender(1, 10_001)
    references.release(X, 2, 1)
    assert len(references.tickets) == 101
    references.tickets.expire(10_001 + TICKET_NS, at_most=1000)
    assert len(references.tickets) == 0
    references.check()


def test_what_was_on_its_way_when_a_store_died_ends_by_and_by() -> None:
    """Not all in one turn, as many as there may be; what has gone before is no part of it."""
    n_objects = 3 * tickets._OBJECTS_OF_A_RECOVERED
    object_ids = [number.to_bytes(20, "big") for number in range(n_objects)]
    references = References(ignore, ignore)
    references.recover(object_ids, holders=[1], now_ns=0)
    assert not references.tickets.have_times, "a client that may come back is waited for"
    references.check()
    references.forget_object(object_ids[-1])
    references.forget_client(1, now_ns=0)
    references.check()
    left: list[int] = []
    for _ in range(3):
        references.tickets.expire(TICKET_NS, at_most=1)
        left.append(len(references.tickets))
    assert left == [2, 1, 0]
    assert references.tickets.next_due_ns is None
    assert sorted(read(references)) == object_ids[:-1]
    references.check()


def test_what_two_readings_do_not_explain_is_forgotten() -> None:
    """A receipt for what nobody has lent, or made, is not waited for any longer."""
    references = References(ignore, ignore)
    references.create(X, client=1)
    references.begin_reading()
    references.redeem(X, 7, client=2, number=1, now_ns=0)
    references.redeem(Y, 8, client=2, number=2, now_ns=0)
    assert (read(references), references.has_suspects) == ([], True)
    assert (read(references), references.has_suspects) == ([], False)
    references.check()


def test_a_receiver_that_leaves_before_the_object_is_known(talk: Conversation) -> None:
    """What it had received goes with it, though the creator's outbox was not read before."""
    sender, receiver = talk.client(), talk.client()
    request = sender.new(X, codec=REFERENCED)
    sender.ask(request, Created)
    sender.write_silently(Seal(X))
    sender.release(request.slot)
    sender.write_silently(Lend(X, 7, 1))
    receiver.write(Redeem(X, 7, 1))
    talk.disconnect(receiver)
    talk.turn()
    assert talk.ids() == {X}
    drop(talk, sender, X)
    assert not talk.ids()


def test_a_holder_that_dies(talk: Conversation) -> None:
    """Its handles go with it; what it has lent is on its way still, for a while."""
    creator = talk.client()
    put(creator, X)
    put(creator, Y)
    creator.write_silently(Lend(Y, 7, 1))
    talk.disconnect(creator)
    talk.turn()
    assert talk.ids() == {Y}
    talk.later(TICKET_SECONDS - 1)
    assert talk.ids() == {Y}
    talk.later(1)
    assert not talk.ids()


def test_a_loan_that_nobody_takes(talk: Conversation) -> None:
    """It lasts as long as its sender, but keeps the object from being evicted for some time only."""
    sender, other = talk.client(), talk.client()
    put(sender, X)
    sender.write(Lend(X, 7, 1))
    drop(talk, sender, X)
    talk.later(TICKET_SECONDS - 1)
    assert other.ask(Evict(1), Number).value == 0
    assert talk.ids() == {X}
    talk.later(10 * TICKET_SECONDS)
    assert talk.ids() == {X}
    put(other, Y, 65_500)
    assert talk.ids() == {Y}


def test_the_same_bytes_to_many(talk: Conversation) -> None:
    """Who sends one pickle to many need not keep the handle: it lingers after each that takes it."""
    sender, *receivers = (talk.client() for _ in range(4))
    put(sender, X)
    sender.write(Lend(X, 7, 0))
    drop(talk, sender, X)
    for number, receiver in enumerate(receivers, start=1):
        receiver.write(Redeem(X, 7, number))
        drop(talk, receiver, X, number)
        assert talk.ids() == {X}
        talk.later(LINGER_SECONDS - 1)
        assert talk.ids() == {X}
    talk.later(1)
    assert not talk.ids()


@pytest.mark.parametrize("receivers", [0, 1])
def test_a_sender_whose_loans_were_taken_is_not_remembered(
    talk: Conversation, receivers: int
) -> None:
    """However many there were; a store that lives long has had many clients."""
    sender, receiver = talk.client(), talk.client()
    put(sender, X)
    sender.write(Lend(X, 7, receivers))
    receiver.write(Redeem(X, 7, 1))
    talk.disconnect(sender)
    assert not talk.store.ledger.references.tickets._minted_by
    talk.store.check()


def test_a_known_number_of_receivers(talk: Conversation) -> None:
    """A loan for three stands for three, and is used up by the third."""
    sender, receiver = talk.client(), talk.client()
    put(sender, X)
    receiver.write(Redeem(X, 7, 1))  # before the loan is known
    sender.write(Lend(X, 7, 3))
    drop(talk, sender, X)
    drop(talk, receiver, X, 1)
    for number in (2, 3):
        assert talk.ids() == {X}
        receiver.write(Redeem(X, 7, number))
        drop(talk, receiver, X, number)
    assert not talk.ids()


def test_a_second_copy_while_somebody_holds(talk: Conversation) -> None:
    """Bytes that are unpickled again after their loan was used up make one more handle."""
    sender, receiver = talk.client(), talk.client()
    put(sender, X)
    sender.write(Lend(X, 7, 1))
    receiver.write(Redeem(X, 7, 1))
    receiver.write(Redeem(X, 7, 2))
    drop(talk, sender, X)
    drop(talk, receiver, X, 1)
    assert talk.ids() == {X}
    drop(talk, receiver, X, 2)
    assert not talk.ids()


def test_a_handle_of_what_is_gone(talk: Conversation) -> None:
    """A copy that comes too late, and one of an object that was deleted, leave nothing behind."""
    sender, receiver = talk.client(), talk.client()
    put(sender, X)
    put(sender, Y)
    sender.write(Lend(X, 7, 1))
    sender.ask(Delete([X]), Done)
    receiver.write(Redeem(X, 7, 1))
    receiver.write(Redeem(bytes(20), 9, 2))
    talk.turn()
    assert talk.ids() == {Y}
    assert "\nreferences: 1\nreferences on their way: 0\n" in talk.store.describe()
    talk.store.check()


def test_a_fork(talk: Conversation) -> None:
    """A child holds what its parent held when it forked, whatever the parent does before the child says so."""
    parent, child = talk.client(), talk.client()
    put(parent, X)
    put(parent, Y)
    parent.ask(Bequeath(7, [X, Y]), Done)
    drop(talk, parent, X)
    drop(talk, parent, Y)
    assert talk.ids() == {X, Y}
    child.ask(Hold(7, [(X, 0), (Y, 0)]), Done)
    drop(talk, child, X)
    assert talk.ids() == {Y}
    talk.disconnect(child)
    talk.turn()
    assert not talk.ids()


def test_a_fork_whose_child_tells_in_parts(talk: Conversation) -> None:
    """What it was lent is its own until it has told all of it."""
    parent, child = talk.client(), talk.client()
    put(parent, X)
    put(parent, Y)
    parent.ask(Bequeath(7, [X, Y]), Done)
    talk.disconnect(parent)
    child.ask(Hold(0, [(X, 0)]), Done)
    assert talk.ids() == {X, Y}
    child.ask(Hold(0, [(Y, 0)]), Done)
    child.ask(Hold(7, ()), Done)
    assert "references on their way: 0\n" in talk.store.describe()
    assert talk.ids() == {X, Y}


def test_a_fork_whose_child_never_tells(talk: Conversation) -> None:
    """It was killed, or there is none: what it was lent stays for a while, and not for as long as its parent lives."""
    parent = talk.client()
    put(parent, X)
    parent.ask(Bequeath(7, [X]), Done)
    drop(talk, parent, X)
    talk.later(TICKET_SECONDS - 1)
    assert talk.ids() == {X}
    talk.later(1)
    assert not talk.ids()
    assert not talk.store._parts.ledger.references.tickets.n_of(parent.number)


def test_a_fork_of_more_than_is_lent_at_once(talk: Conversation) -> None:
    """A ticket is for so many objects at most, and only so many end in a turn: here one ticket, though two are due."""
    parent = talk.client()
    ids = [name(number) for number in range(4)]
    for object_id in ids:
        put(parent, object_id)
    parent.ask(Bequeath(7, ids[:2]), Done)
    parent.ask(Bequeath(8, [*ids[2:], name(99)]), Done)
    for object_id in ids:
        drop(talk, parent, object_id)
    assert talk.ids() == set(ids)
    talk.store._room.most_at_once = 2
    talk.now_ns += TICKET_NS
    talk.steady_ns += TICKET_NS
    for left in ids[2:], ():
        assert talk.store.ledger.wait_ns == 0
        talk.store.expire(talk.now_ns)
        talk.turn()
        assert talk.ids() == set(left)
    assert talk.store.ledger.wait_ns is None
    parent.tell(Bequeath(9, [X] * (MAX_HOLDS + 1)))
    assert parent.dropped


def test_a_fork_of_who_ends_later(talk: Conversation) -> None:
    """The time of what it has lent to a child is that of the fork still."""
    parent = talk.client()
    put(parent, X)
    parent.ask(Bequeath(7, [X]), Done)
    talk.later(TICKET_SECONDS - 1)
    talk.disconnect(parent)
    assert talk.ids() == {X}
    talk.later(1)
    assert not talk.ids()
    talk.store.check()


def test_a_client_that_tells_much(talk: Conversation) -> None:
    """It does so by parts, of which a turn hears one; a longer one costs the connection."""
    peer = talk.client()
    put(peer, X)
    parts = holds_told([(X, number) for number in range(2 * MAX_HOLDS + 1)])
    assert [len(part.holds) for part in parts] == [MAX_HOLDS, MAX_HOLDS, 1]
    before = talk.store.n_long
    for heard, part in enumerate(parts, start=1):
        peer.tell(part)
        assert talk.store.n_long == before + heard
    assert f"references: {2 * MAX_HOLDS + 1}\n" in talk.store.describe()
    peer.tell(Hold(0, [(X, number) for number in range(MAX_HOLDS + 1)]))
    assert f"more than {MAX_HOLDS} references" in (peer.dropped or "")


def test_many_tickets_that_end_at_once(talk: Conversation) -> None:
    """They end a few a turn."""
    sender = talk.client()
    put(sender, X)
    for ticket in range(1, 9):
        sender.write(Lend(X, ticket, 1))
    talk.disconnect(sender)
    talk.steady_ns += TICKET_NS
    talk.store._room.most_at_once = 3
    left = []
    while talk.store.ledger.wait_ns == 0:
        talk.store.expire(talk.now_ns)
        left.append(len(talk.store._parts.ledger.references.tickets))
    assert left == [5, 2, 0]
    talk.turn()
    assert not talk.ids()


def test_a_clock_that_is_set(talk: Conversation) -> None:
    """The time of what is on its way does not pass by that."""
    sender = talk.client()
    put(sender, X)
    sender.write(Lend(X, 7, 1))
    talk.disconnect(sender)
    talk.now_ns += 10 * TICKET_NS
    talk.store.expire(talk.now_ns)
    talk.turn()
    assert talk.ids() == {X}
    talk.later(TICKET_SECONDS)
    assert not talk.ids()


def test_a_sender_whose_connection_has_ended(talk: Conversation) -> None:
    """What it has on its way stays for as long as its process lives, which the store waits for once."""
    talk.processes_live_on = True
    senders, other = [talk.client(), talk.client()], talk.client()
    for sender, object_id in zip(senders, (X, Y), strict=True):
        put(sender, object_id)
        sender.write(Lend(object_id, object_id[0], 1))
        talk.disconnect(sender)
    talk.turn()
    (process,) = talk.awaited
    assert (process.pid, process.start_time) == (4711, 1)
    talk.later(10 * TICKET_SECONDS)
    assert talk.ids() == {X, Y}
    talk.store.check()
    other.write(Redeem(X, X[0], 1))
    drop(talk, other, X, 1)
    assert talk.ids() == {Y}
    talk.end_process(process)
    talk.later(TICKET_SECONDS - 1)
    assert talk.ids() == {Y}
    talk.later(1)
    assert not talk.ids()
    talk.disconnect(other)
    assert not talk.awaited


def test_a_process_with_too_much_on_its_way(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of one that connects again and again is limited."""
    monkeypatch.setattr("shmplasma.senders.MAX_OF_A_CLIENT", 1)
    talk.processes_live_on = True
    senders = [talk.client() for _ in range(3)]
    for number, sender in enumerate(senders):
        put(sender, name(number))
        sender.write(Lend(name(number), number + 1, 1))
    for sender in senders:
        talk.disconnect(sender)
    talk.later(TICKET_SECONDS)
    assert talk.ids() == {name(0), name(1)}


def test_an_id_that_is_used_anew_while_its_old_object_is_on_its_way(talk: Conversation) -> None:
    """A ticket for several objects forgets one that is deleted: the next of that id does not go, nor stay, with it."""
    parent, child = talk.client(), talk.client()
    put(parent, X)
    put(parent, Y)
    parent.ask(Bequeath(7, [X, Y]), Done)
    parent.ask(Delete([X]), Done)
    put(parent, X)
    talk.store.check()
    child.ask(Hold(7, [(Y, 0)]), Done)
    drop(talk, parent, X)
    assert talk.ids() == {Y}
    parent.ask(Bequeath(8, [Y]), Done)
    parent.ask(Delete([Y]), Done)
    assert not talk.ids()
    assert "references on their way: 0\n" in talk.store.describe()
    talk.store.check()


def test_what_is_pinned_goes_at_its_release(talk: Conversation) -> None:
    """A buffer outlives the handle that it was got by."""
    creator = talk.client()
    put(creator, X)
    _, (slot,) = creator.get(X)
    drop(talk, creator, X)
    assert talk.ids() == {X}
    creator.release(slot)
    talk.wake()
    assert not talk.ids()


def test_a_referenced_object_is_not_evicted(talk: Conversation) -> None:
    """A store that is full of what is held refuses, and says why."""
    creator, other = talk.client(), talk.client()
    put(creator, X, 60_000)
    assert other.ask(other.new(Y, 10_000), Failed).failure is Failure.FULL
    text = creator.ask(creator.new(Y, 10_000), Failed).text
    assert "60000 belong to references, until these are released" in text
    drop(talk, creator, X)
    put(other, Y, 10_000)


def test_a_refusal_looks_at_no_referenced_object(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What belongs to references is not summed up for each that is refused."""
    creator = talk.client()
    held = [name(number) for number in range(200)]
    for object_id in held:
        put(creator, object_id, 320)
    entries: list[int] = []
    size = Table.size

    def counted(self: Table, entry: int) -> int:
        entries.append(entry)
        return size(self, entry)

    monkeypatch.setattr(Table, "size", counted)
    text = creator.ask(creator.new(Y, 10_000), Failed).text
    assert "64000 belong to references, until these are released" in text
    assert len(entries) < len(held)
    drop(talk, creator, held[0])
    text = creator.ask(creator.new(Y, 10_000), Failed).text
    assert "63680 belong to references" in text
    talk.store.check()


def test_a_client_with_too_many(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says that he holds without end loses the connection, and nobody else anything."""
    assert MAX_OF_A_CLIENT >= 1_000_000
    monkeypatch.setattr("shmplasma.references.MAX_OF_A_CLIENT", 3)
    creator, other = talk.client(), talk.client()
    put(creator, X)
    for number in (1, 2, 3, 4):
        other.write(Redeem(X, 7, number))
    assert other.dropped == "it has 3 references"
    talk.disconnect(other)
    creator.tell(Post())
    talk.turn()
    assert talk.ids() == {X}


# -- a store that comes back ------------------------------------------------------------------------


def reopen(talk: Conversation) -> Reopened:
    """Start another store, and let the first one be dead."""
    return Reopened(talk.layout, talk.words, talk.raw)


def welcome(later: Conversation, peer: Peer) -> Peer:
    """Return a connection by which a client of the dead store has asked to go on."""
    claim = later.connect()
    hello = Hello(PROTOCOL_VERSION, Role.CLIENT, "", peer.free_slots[0] // BOARD_WORDS + 1)
    assert claim.ask(hello, Welcome).reclaimed
    claim.outbox, claim.free_slots = peer.outbox, peer.free_slots
    return claim


def tell(peer: Peer, *holds: tuple[bytes, int]) -> None:
    """Say what a client holds, and that this is all."""
    if holds:
        peer.tell(Hold(0, holds))
    peer.tell(Hold(0, ()))


def forget_what_was_on_its_way(talk: Conversation) -> None:
    """Let so much time pass that only holds count."""
    talk.turn()
    talk.later(TICKET_SECONDS)


def test_records_that_a_dead_store_has_not_read(talk: Conversation) -> None:
    """Object, loan, receipt and release are all known to the next store, in whatever order it reads the outboxes."""
    receiver, sender = talk.client(), talk.client()
    for object_id in (X, Y):
        request = sender.new(object_id, codec=REFERENCED)
        sender.ask(request, Created)
        sender.write_silently(Seal(object_id))
        sender.release(request.slot)
        sender.write_silently(Lend(object_id, object_id[0], 1))
        receiver.write_silently(Redeem(object_id, object_id[0], object_id[0]))
        sender.write_silently(Release(object_id, 0))
    receiver.write_silently(Release(X, X[0]))
    later = reopen(talk)
    receiver, sender = welcome(later, receiver), welcome(later, sender)
    tell(sender)
    tell(receiver, (Y, Y[0]))
    assert "references on their way: 1\n" in later.store.describe(), "all of them, by one ticket"
    forget_what_was_on_its_way(later)
    assert later.ids() == {Y}
    drop(later, receiver, Y, Y[0])
    assert not later.ids()


def test_a_release_that_died_with_its_store(talk: Conversation) -> None:
    """What a client does not say that it holds has ended, though its beginning was in the outbox."""
    peer = talk.client()
    request = peer.new(X, codec=REFERENCED)
    peer.ask(request, Created)
    peer.write_silently(Seal(X))
    peer.release(request.slot)
    later = reopen(talk)
    peer = welcome(later, peer)
    tell(peer)
    forget_what_was_on_its_way(later)
    assert not later.ids()


def test_a_release_before_it_is_told_that_there_was_a_hold(talk: Conversation) -> None:
    """What was let go after a client had noted it, and before the store reads that, has ended."""
    peer = talk.client()
    put(peer, X)
    put(peer, Y)
    later = reopen(talk)
    peer = welcome(later, peer)
    peer.write_silently(Release(X, 0))
    later.poll()
    tell(peer, (X, 0), (Y, 0))
    forget_what_was_on_its_way(later)
    assert later.ids() == {Y}


def test_a_receipt_that_is_newer_than_what_is_told(talk: Conversation) -> None:
    """What a client takes between noting what it holds and saying so is its own all the same."""
    peer = talk.client()
    put(peer, X)
    peer.write(Lend(X, 7, 1))
    drop(talk, peer, X)
    later = reopen(talk)
    peer = welcome(later, peer)
    peer.write_silently(Redeem(X, 7, 1))
    later.poll()
    tell(peer)
    forget_what_was_on_its_way(later)
    assert later.ids() == {X}
    drop(later, peer, X, 1)
    assert not later.ids()


def test_a_receipt_that_was_written_before_the_client_is_welcome(talk: Conversation) -> None:
    """It has ended if the client does not say that it holds it, whenever the store reads of it."""
    peer = talk.client()
    put(peer, X)
    peer.write(Lend(X, 7, 1))
    drop(talk, peer, X)
    later = reopen(talk)
    peer.write_silently(Redeem(X, 7, 1))
    peer = welcome(later, peer)
    later.poll()
    tell(peer)
    forget_what_was_on_its_way(later)
    assert not later.ids()


def test_a_client_that_comes_back_and_lets_go_without_end(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to be remembered of it is limited."""
    peer = talk.client()
    later = reopen(talk)
    peer = welcome(later, peer)
    monkeypatch.setattr("shmplasma.references.MAX_OF_A_CLIENT", 3)
    for number in range(3):
        peer.tell(Release(X, number))
    assert peer.dropped is None
    peer.tell(Release(X, 3))
    assert peer.dropped == "it has 3 references"


def test_who_holds_nothing_is_not_waited_for(talk: Conversation) -> None:
    """A client that is idle, as it has let go of all that it had, or had nothing, holds nothing up."""
    peer, idle, _ = talk.client(), talk.client(), talk.client()
    put(peer, X)
    put(idle, Y)
    drop(talk, idle, Y)
    later = reopen(talk)
    peer = welcome(later, peer)
    tell(peer, (X, 0))
    drop(later, peer, X)
    assert later.ids() == {X}
    forget_what_was_on_its_way(later)
    assert not later.ids()


def test_who_may_hold_something_is_waited_for(talk: Conversation) -> None:
    """However many stores have died before it comes back, or ends, what it holds is neither deleted nor evicted."""
    peer, idle = talk.client(), talk.client()
    put(idle, X)
    put(idle, Y)
    drop(talk, idle, Y)
    later = reopen(reopen(talk))
    peer = welcome(later, peer)
    tell(peer)
    later.later(10 * TICKET_SECONDS)
    assert peer.ask(Evict(1), Number).value == 0
    assert later.ids() == {X}
    idle = welcome(later, idle)
    later.later(10 * TICKET_SECONDS)
    assert later.ids() == {X}
    tell(idle, (X, 0))
    forget_what_was_on_its_way(later)
    assert later.ids() == {X}
    later.disconnect(idle)
    later.turn()
    assert not later.ids()


def test_the_end_of_who_was_waited_for(talk: Conversation) -> None:
    """What it held goes when it has ended, and what was on its way is not awaited any longer."""
    idle = talk.client()
    put(idle, X)
    later = reopen(talk)
    later.later(TICKET_SECONDS)
    assert later.ids() == {X}
    idle.number = idle.free_slots[0] // BOARD_WORDS
    later.disconnect(idle)
    forget_what_was_on_its_way(later)
    assert not later.ids()


def test_who_tells_that_he_holds_nothing_is_not_waited_for_by_the_next_store(
    talk: Conversation,
) -> None:
    """What a store knows of its clients is known to a successor."""
    peer = talk.client()
    put(peer, X)
    peer.write(Lend(X, 7, 1))
    later = reopen(talk)
    tell(welcome(later, peer))
    last = reopen(later)
    assert last.ids() == {X}
    last.later(TICKET_SECONDS)
    assert not last.ids()


@pytest.mark.parametrize("noticed", [False, True])
def test_who_ends_while_no_store_is_there(talk: Conversation, noticed: bool) -> None:
    """Its last records tell a successor that it has gone, though its process lives; places for them are always free."""
    peer, other = talk.client(), talk.client()
    put(peer, X)
    peer.release(peer.create(Y))
    later = talk if noticed else reopen(talk)
    for _ in range(PLACES):
        peer.write_silently(Release(X, 99))
    assert peer.outbox.append(Detach.KIND, b"", is_last=True)
    assert peer.outbox.append(Gone.KIND, b"", is_last=True)
    if noticed:
        talk.store.poll(talk.now_ns)  # and dies before it has done what comes of it
        later = reopen(talk)
    else:
        assert Y in later.ids()
        later.poll()
        later.poll()
    assert Y not in later.ids()
    other = welcome(later, other)
    tell(other)
    forget_what_was_on_its_way(later)
    assert not later.ids()
    assert later.store.describe().endswith("\nclients: unnamed (pid 4711)")
    later.store.check()


@pytest.mark.parametrize("at_once", [False, True])
def test_who_leaves_while_no_store_is_there(talk: Conversation, at_once: bool) -> None:
    """A record says so: what it wrote and held goes, what it pins stays."""
    peer, other = talk.client(), talk.client()
    put(peer, X)
    peer.release(peer.create(Y))
    peer.put(name(1))
    (slot,) = peer.get(name(1))[1]
    later = talk if at_once else reopen(talk)
    for _ in range(PLACES):
        peer.write_silently(Release(X, 99))
    assert peer.outbox.append(Detach.KIND, b"", is_last=True)
    if at_once:
        later = reopen(talk)
    later.poll()
    other = welcome(later, other)
    tell(other)
    forget_what_was_on_its_way(later)
    assert later.ids() == {name(1)}
    other.ask(Delete([name(1)]), Done)
    assert other.refused(other.new(X, 65536)) is Failure.FULL
    peer.release(slot)
    later.wake()
    other.ask(other.new(X, 65536), Created)
    later.store.check()


def test_who_goes_on_having_left(talk: Conversation) -> None:
    """Who asks to go on after its record was read is a client that has nothing."""
    peer = talk.client()
    peer.create(Y)
    later = reopen(talk)
    assert peer.outbox.append(Detach.KIND, b"", is_last=True)
    again = welcome(later, peer)
    again.post(Flush())
    later.turn()
    assert again.dropped
    later.store.check()


def test_who_was_dropped_and_ends(talk: Conversation) -> None:
    """What it has been left goes with its last record, before its process does."""
    peer, other = talk.client(), talk.client()
    put(peer, X)
    peer.tell(Hold(0, [(X, number) for number in range(MAX_HOLDS + 1)]))
    assert peer.dropped
    talk.turn()
    assert talk.ids() == {X}
    assert peer.outbox.append(Gone.KIND, b"", is_last=True)
    talk.poll()
    other.ask(Flush(), Done)
    assert not talk.ids()


@pytest.mark.parametrize("leased", [False, True])
def test_a_store_that_dies_when_an_object_is_sealed_and_its_holder_is_not_written_down(
    leased: bool,
) -> None:
    """Its successor waits for the creator all the same."""
    talk = Conversation(16 << 20)
    peer, control = talk.client(), talk.store._parts.boards._control
    board = peer.free_slots[0] // BOARD_WORDS
    if leased:
        offset = peer.ask(AskLease(64), Leased).offset
        peer.write(Publish(X, offset, 64, 0, REFERENCED))
    else:
        put(peer, X)
    control.acknowledge(board, control.acknowledged(board) - 1)
    control.note_holder(board, holds=False)
    later = reopen(talk)
    later.later(10 * TICKET_SECONDS)
    assert later.ids() == {X}
    tell(welcome(later, peer), (X, 0))
    forget_what_was_on_its_way(later)
    assert later.ids() == {X}


def test_what_a_store_knows_of_who_is_away_is_not_all(talk: Conversation) -> None:
    """A client of which it has read that something begins and ends may hold more, as the next store knows as well."""
    peer = talk.client()
    put(peer, X)
    put(peer, Y)
    later = reopen(talk)
    peer.write_silently(Redeem(Y, 7, 1))
    peer.write_silently(Release(Y, 1))
    later.poll()
    last = reopen(later)
    last.later(10 * TICKET_SECONDS)
    assert last.ids() == {X, Y}
    tell(welcome(last, peer), (X, 0))
    forget_what_was_on_its_way(last)
    assert last.ids() == {X}


def test_a_holder_that_puts_by_a_lease() -> None:
    """That it holds something stays written down when a successor moves the cursor of its lease."""
    talk = Conversation(16 << 20)
    peer = talk.client()
    put(peer, X)
    offset = peer.ask(AskLease(64), Leased).offset
    peer.write_silently(Publish(Y, offset, 64, 0, 3))
    last = reopen(reopen(talk))
    last.later(10 * TICKET_SECONDS)
    assert last.ids() == {X, Y}
