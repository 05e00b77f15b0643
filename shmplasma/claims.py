"""Claims: how a client takes an id of its own choice for an object, without a message.

A put under a fresh id, which nobody else has yet, needs no word of the store: room comes from the client's lease, and the record in
its outbox says what is there (`shmplasma.leases`, `shmplasma.outbox`).  Under an id that the caller has chosen somebody has to see to
it that only one object gets it.  Creators do so among themselves, by a lock on the id.

Theory of operation
-------------------
The lock of an id is that on byte ``crc32(id)`` of the segment's file, by an open file description: each client, and the store, has one
of its own.  Whoever creates an object under a chosen id has its lock while he looks whether the id is free, until the object is in
the table.

=======================================================  =========================================================
client, within 1. to 5. of `shmplasma.leases`            store, for a `Create`
=======================================================  =========================================================
C0. it has an unread record under this lock: `Create`    S1. is the id in the table?  yes: it exists
C1. lock the id; somebody else has it: `Create`          S2. lock the id; somebody has it: see below
C2. i = INSERTIONS; i is odd: `Create`                   S3. insert the object
C3. follow the chain; the id is there: `Create`          S4. unlock
C4. INSERTIONS is not i: C2 again, or `Create`
C5. the pin: a slot says where the object lies
C6. `Claim`, or `Publish`, to the outbox
C7. unlock, some time after the store has read that
=======================================================  =========================================================

*Nobody is in the table who was not seen.*  A reader who follows a chain may miss an object (`shmplasma.table`): he stands on an entry
that is removed, it is used anew, and leads him into another chain.  The store raises INSERTIONS before it writes to an entry that it uses
anew, and x86-64 keeps the order of stores, and that of loads: if he saw anything of the new entry in C3, he sees the new number in C4.
An insertion that was under way at C2 does not lead him astray: its entry was out of all chains before, so no link that he loads
after C2 leads there but the one that makes it part of its own chain.  A successor that writes the chains of a dead
store anew has made INSERTIONS odd before, and makes it even, and another number, when it is done.  What a dead store has left in no
chain is no object, nor becomes one again (`shmplasma.table`: freed first, unlinked then).

*Nobody gets into the table before the record is read.*  A client's own unread records are those that it has locks for (C0).  Who else
inserts under this id has its lock, and the client keeps it until ACKNOWLEDGED has passed its record.  The store has given it the description by which it locks, and has a descriptor of that as well; so the locks of a
client that is killed last until the store has read its outbox.  Who connects again to a store locks by what that gives him before he keeps the connection
(`shmplasma.link`); so if it ends before, what he has locked stays so, and goes with his process.  There are three exceptions.  Fresh ids are random.  The store does without
a lock that somebody has for nothing.  And where the store and a client have died both, nobody has the client's locks any more, before its
outbox is read: another one may claim the same id.  A successor reads the outboxes of the dead last, and drops what comes too late, as if
it had been evicted; so objects that are to be kept are not claimed.

*A lock that somebody has for nothing.*  Clients unlock lazily, with a claim or a seal after the record is read; one
that makes no more claims, or was interrupted between C1 and C6, still has some.  When the store finds an id locked, it reads all
outboxes and tries again; if it is locked still, it recalls all leases.  Claims are made within a lease only: when none is left, every
client has written all that it has claimed to its outbox, this has been read, and no other claim is under way or begins, as leases are the
store's to grant.  So what is locked then is locked for nothing, and the object is inserted.  A client that was stopped in the midst of a
claim is not waited for: the id is refused, as if its object was there already.

Ids that nobody chose
    What is put under a fresh id takes no lock, so nobody else can tell by one that its record is unread; but whoever has put it knows the id
    at once, and so may others whom he tells, and one of them may create under it again.  Therefore such ids bear a mark
    (`shmplasma.objects.fresh_id`).  Under an id with the mark nobody claims, and the store answers a `Create` only when it has read all
    outboxes: the put had written its record before it returned, so it is found.  An id that somebody has chosen and that looks so costs him a
    round trip, and nothing else.

The pin
    The entry of the object, which a slot holds otherwise, is not known to the client at C5.  So the slot says at which offset the object
    lies (`shmplasma.offset_pins`).  The slot is the client's throughout, and is cleared like any other.  Before the record is
    read the extent is the lease's, and after a death the successor reads the records first.

What is inserted by a `Claim` is an object like that of a `Create`: its creator seals or aborts it, and it goes with him.
"""
