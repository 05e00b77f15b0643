from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.errors import Holder, ProtocolError
from shmplasma.layout import ENTRY_BYTES, ID_BYTES
from shmplasma.messages import Message
from shmplasma.posted import Abort, Claim, Detach, Lend, Publish, Redeem, Release, Remove, Seal
from shmplasma.protocol import MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Frame
from shmplasma.replies import (
    ABSENT,
    NOTIFICATION,
    Created,
    Done,
    Failed,
    Failure,
    Leased,
    Listing,
    Number,
    Objects,
    Reply,
    Text,
    Welcome,
    decode_reply,
)
from shmplasma.requests import (
    AnswerNow,
    AskLease,
    Attach,
    Bequeath,
    Contains,
    Create,
    Debug,
    Delete,
    Evict,
    Flush,
    Get,
    Grow,
    Hello,
    Hold,
    Keep,
    List,
    Post,
    Request,
    Role,
    SetOptions,
    Trim,
    decode_request,
)

IDS = st.binary(min_size=ID_BYTES, max_size=ID_BYTES)
U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
S64 = st.integers(-(2**63), 2**63 - 1)
TIMEOUTS = st.integers(-1, 2**63 - 1)
TEXTS = st.text(max_size=20)
HOLDERS = st.lists(
    st.builds(Holder, TEXTS, U32, TEXTS, U64, st.floats(allow_nan=False)), max_size=5
)
PATHS = st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20)).map(
    lambda name: name.replace(b"\0", b"").decode(errors="surrogateescape")
)


def get_of(wait: bool, wanted: list[tuple[bytes, int]], hinted: bool) -> Get:
    """Return a get of these pairs of id and slot."""
    hinted = hinted and wait and len(wanted) == 1
    return Get(wait, [pair[0] for pair in wanted], tuple(pair[1] for pair in wanted), hinted)


REQUESTS: dict[type[Any], st.SearchStrategy[Request]] = {
    Hello: st.builds(Hello, U16, st.sampled_from(Role), TEXTS, U32),
    Attach: st.just(Attach()),
    Create: st.builds(Create, IDS, S64, S64, U32, U32, st.booleans(), TIMEOUTS),
    Seal: st.builds(Seal, IDS),
    Abort: st.builds(Abort, IDS),
    Get: st.builds(get_of, st.booleans(), st.lists(st.tuples(IDS, U32), max_size=8), st.booleans()),
    AnswerNow: st.builds(AnswerNow, U32),
    Contains: st.builds(Contains, IDS),
    Delete: st.builds(Delete, st.lists(IDS, max_size=8)),
    Evict: st.builds(Evict, S64),
    List: st.builds(List, U64),
    SetOptions: st.builds(SetOptions, U64, TEXTS),
    Debug: st.just(Debug()),
    Grow: st.just(Grow()),
    Detach: st.just(Detach()),
    AskLease: st.builds(AskLease, U64),
    Publish: st.builds(Publish, IDS, U64, U64, U32, U32, st.booleans()),
    Claim: st.builds(Claim, IDS, U64, U64, U32, U32, U32, U32),
    Flush: st.just(Flush()),
    Post: st.just(Post()),
    Keep: st.builds(Keep, st.booleans(), st.lists(IDS, max_size=8)),
    Lend: st.builds(Lend, IDS, U64, U32),
    Remove: st.builds(Remove, IDS, U64),
    Redeem: st.builds(Redeem, IDS, U64, U64),
    Release: st.builds(Release, IDS, U64),
    Hold: st.builds(Hold, U64, st.lists(st.tuples(IDS, U64), max_size=8)),
    Bequeath: st.builds(Bequeath, U64, st.lists(IDS, max_size=8)),
    Trim: st.just(Trim()),
}


def octets(n: int) -> st.SearchStrategy[bytes]:
    """Return a strategy for so many bytes."""
    return st.binary(min_size=n, max_size=n)


LISTINGS = st.integers(0, 8).flatmap(
    lambda n: st.builds(Listing, U64, octets(4 * n), octets(ENTRY_BYTES * n))
)
REPLIES: dict[type[Any], st.SearchStrategy[Reply]] = {
    Welcome: st.builds(
        Welcome,
        st.binary(min_size=16, max_size=16),
        U32,
        st.booleans(),
        st.booleans(),
        PATHS,
        PATHS,
    ),
    Done: st.just(Done()),
    Failed: st.builds(Failed, st.sampled_from(Failure), TEXTS, HOLDERS, *[U64] * 10),
    Created: st.builds(Created, U64),
    Objects: st.builds(Objects, st.lists(st.tuples(U64, U64, U64, U32), max_size=8)),
    Number: st.builds(Number, S64),
    Listing: LISTINGS,
    Text: st.builds(Text, TEXTS),
    Leased: st.builds(Leased, U64, U64, U64, U64),
}
STRATEGIES: dict[type[Any], st.SearchStrategy[Any]] = {**REQUESTS, **REPLIES}
MESSAGES = st.one_of(*STRATEGIES.values())


def decoder_of(message: Message) -> Callable[[Frame], Message]:
    """Return the function that decodes messages of this one's direction."""
    return decode_request if type(message) in REQUESTS else decode_reply


def assert_decodes_or_is_refused(decode: Callable[[Frame], Message], frame: Frame) -> None:
    """Check that a body is a message, then one which can be sent on, or a ProtocolError."""
    try:
        message = decode(frame)
    except ProtocolError:
        return
    assert type(message) in STRATEGIES
    again = decode(Frame(frame.kind, 1, message.encode()))
    # By their bytes, as an age that was made NaN does not equal itself.
    assert (type(again), again.encode()) == (type(message), message.encode())


def test_all_messages_are_known_here() -> None:
    """No message is left out of these tests, and no kind is given twice."""
    assert set(REQUESTS) == set(get_args(Request))
    assert set(REPLIES) == set(get_args(Reply))
    assert len({cls.KIND for cls in STRATEGIES}) == len(STRATEGIES)
    assert max(cls.KIND for cls in REQUESTS) < min(cls.KIND for cls in REPLIES)


@pytest.mark.parametrize("cls", STRATEGIES)
@given(st.data())
def test_a_message_comes_back_as_it_was_sent(cls: type[Any], data: st.DataObject) -> None:
    """Encoding and decoding is the identity, for the extremes of each field too."""
    message = data.draw(STRATEGIES[cls])
    frame = Frame(message.KIND, 1, message.encode())
    assert decoder_of(message)(frame) == message


@pytest.mark.parametrize("cls", STRATEGIES)
@given(st.data())
def test_a_body_that_was_cut_or_extended_harms_nobody(cls: type[Any], data: st.DataObject) -> None:
    """Bytes that are missing or too many make another message or a ProtocolError."""
    message = data.draw(STRATEGIES[cls])
    body = message.encode()
    body = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=30))
    assert_decodes_or_is_refused(decoder_of(message), Frame(message.KIND, 1, body))


@pytest.mark.parametrize("cls", STRATEGIES)
@given(st.data())
def test_a_body_that_was_changed_harms_nobody(cls: type[Any], data: st.DataObject) -> None:
    """Bytes that were changed make another message or a ProtocolError."""
    message = data.draw(STRATEGIES[cls])
    body = bytearray(message.encode())
    for at in data.draw(st.sets(st.integers(0, max(0, len(body) - 1)), max_size=4)):
        if body:
            body[at] = data.draw(st.integers(0, 255))
    assert_decodes_or_is_refused(decoder_of(message), Frame(message.KIND, 1, bytes(body)))


@given(U16 | st.sampled_from([cls.KIND for cls in STRATEGIES]), st.binary(max_size=100))
def test_garbage_harms_nobody(kind: int, body: bytes) -> None:
    """Any body under any kind is a message or a ProtocolError, in both directions."""
    for decode in (decode_request, decode_reply):
        assert_decodes_or_is_refused(decode, Frame(kind, 1, body))


@given(MESSAGES)
def test_a_message_of_the_other_direction_is_refused(message: Message) -> None:
    """A client sends no replies, and a store no requests."""
    other = decode_reply if decoder_of(message) is decode_request else decode_request
    with pytest.raises(ProtocolError, match=f"no message of the kind {message.KIND} may come here"):
        other(Frame(message.KIND, 1, message.encode()))


FIXED = (
    Attach,
    Create,
    Seal,
    Abort,
    AnswerNow,
    Contains,
    Evict,
    List,
    Debug,
    Grow,
    Detach,
    AskLease,
    Publish,
    Flush,
    Done,
    Created,
    Number,
    Leased,
)


@pytest.mark.parametrize("cls", FIXED)
@given(st.data())
def test_a_body_of_fixed_length_has_no_other(cls: type[Any], data: st.DataObject) -> None:
    """One byte more or less than such a message has is refused."""
    message = data.draw(STRATEGIES[cls])
    body = message.encode()
    for wrong in {body + b"\0", body[:-1]} - {body}:
        with pytest.raises(ProtocolError, match=f"a malformed {cls.__name__}"):
            decoder_of(message)(Frame(message.KIND, 1, wrong))


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (Hello, bytes(2) + b"\3\0" + bytes(4)),
        (Hello, bytes(8) + b"\xff"),
        (Hello, bytes(7)),
        (Get, b""),
        (Get, b"\0\1\0\0\0"),
        (Get, b"\0\1\0\0\0" + bytes(23)),
        (Get, b"\0\0\0\0\0" + bytes(24)),
        (Get, b"\2\0\0\0\0"),
        (Get, b"\0\xff\xff\xff\xff" + bytes(24)),
        (Delete, bytes(21)),
        (SetOptions, bytes(7)),
        (SetOptions, bytes(8) + b"\xc3"),
        (Welcome, bytes(22) + b"posix"),
        (Welcome, bytes(22) + b"posix\0/path\0more"),
        (Welcome, bytes(21)),
        (Failed, bytes(42)),
        (Failed, bytes(41)),
        (Objects, bytes(27)),
        (Listing, bytes(7)),
        (Listing, bytes(11)),
        (Listing, bytes(12 + 1)),
        (Listing, bytes(8) + b"\1\0\0\0" + bytes(131)),
        (Text, b"\xff"),
    ],
)
def test_each_way_to_be_malformed_is_noticed(message: type[Any], body: bytes) -> None:
    """Wrong roles, lengths that disagree, texts that are no UTF-8, numbers that name nothing."""
    decode = decode_request if message in REQUESTS else decode_reply
    with pytest.raises(ProtocolError, match=f"a malformed {message.__name__}"):
        decode(Frame(message.KIND, 1, body))


def test_a_refusal_may_name_any_file() -> None:
    """What is no UTF-8 in its text is replaced: the text is for people."""
    body = Failed(Failure.FULL, "make room in /d\udcff").encode()
    assert Failed.decode(body).text == "make room in /d?"


def test_a_get_of_65536_objects_fits() -> None:
    """The longest get that the protocol promises, and its answer, are within the limits."""
    ids = [n.to_bytes(20, "big") for n in range(65536)]
    assert len(Get(True, ids, range(65536)).encode()) <= MAX_REQUEST_BYTES
    assert len(Objects([(2**64 - 1,) * 3 + (0,)] * 65536).encode()) <= MAX_REPLY_BYTES


def test_nothing_that_is_there_looks_absent() -> None:
    """An object of no bytes at the segment's first data offset differs from an absent one."""
    assert Objects([ABSENT]) == decode_reply(Frame(Objects.KIND, 1, bytes(28)))
    assert decode_reply(Frame(Objects.KIND, 1, Objects([(4096, 0, 0, 0)]).encode())) != Objects(
        [ABSENT]
    )


def test_a_notification_can_be_read_by_plasmas_clients() -> None:
    """Id and two signed sizes, as Plasma's clients decode them."""
    assert NOTIFICATION.pack(20 * b"a", 1, -1) == 20 * b"a" + b"\1" + bytes(7) + b"\xff" * 8
