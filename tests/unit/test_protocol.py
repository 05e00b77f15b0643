from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.errors import ProtocolError
from shmplasma.protocol import Frame, FrameDecoder, encode_frame

if TYPE_CHECKING:
    from typing_extensions import Buffer  # in collections.abc from Python 3.12 on

LIMIT = 64
HEADER_BYTES = 12

FRAMES = st.builds(
    Frame, st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=LIMIT)
)
# Frames, and now and then something that is none.
STREAMS = st.lists(
    FRAMES.map(lambda frame: encode_frame(*frame)) | st.binary(max_size=30), max_size=6
).map(b"".join)


def decode(pieces: Iterable[bytes]) -> tuple[list[Frame], str]:
    """Return the frames that come out of these pieces, and why the stream ended early, if it did."""
    decoder = FrameDecoder(LIMIT)
    frames: list[Frame] = []
    for piece in pieces:
        try:
            frames += decoder.feed(piece)
        except ProtocolError as error:
            return frames, str(error)
    return frames, "in a frame" if decoder.incomplete else ""


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    """Return the stream in pieces, which end at these places."""
    ends = sorted({min(place, len(stream)) for place in places} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_a_frame_is_twelve_bytes_and_its_body() -> None:
    """Length, request id, kind and two zeros, little-endian: what peers of other languages rely on."""
    assert encode_frame(0x0102, 0x03040506, b"body") == (b"\4\0\0\0\6\5\4\3\2\1\0\0body")


@given(st.lists(FRAMES))
def test_what_is_encoded_is_decoded(frames: list[Frame]) -> None:
    """Frames come out as they went in, in order, and leave nothing behind."""
    stream = b"".join(encode_frame(*frame) for frame in frames)
    assert decode([stream]) == (frames, "")


@given(STREAMS, st.lists(st.integers(0, 400)))
def test_the_cuts_of_a_stream_do_not_matter(stream: bytes, places: list[int]) -> None:
    """Whole, byte by byte, and cut anywhere, a stream gives the same frames and the same end.

    Where it is no stream of frames those before the fault may come out with it or not, as a fault in
    what was fed at once is raised instead of returning what came before.
    """
    whole = decode([stream])
    bytewise = decode([stream[at : at + 1] for at in range(len(stream))])
    pieces = decode(cut(stream, places))
    assert whole[1] == bytewise[1] == pieces[1]
    if whole[1] in {"", "in a frame"}:
        assert whole[0] == bytewise[0] == pieces[0]
    else:
        assert pieces[0] == bytewise[0][: len(pieces[0])]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200)))
def test_garbage_raises_one_exception_type(garbage: bytes, places: list[int]) -> None:
    """Whatever comes, the decoder returns frames within the limit or raises ProtocolError."""
    frames, _ = decode(cut(garbage, places))
    assert all(len(frame.body) <= LIMIT for frame in frames)
    assert garbage.startswith(b"".join(encode_frame(*frame) for frame in frames))


def test_the_limit_is_the_longest_body() -> None:
    """A body of exactly the limit passes; one byte more is refused by its header alone."""
    frame = Frame(1, 2, bytes(LIMIT))
    assert FrameDecoder(LIMIT).feed(encode_frame(*frame)) == [frame]
    header = encode_frame(1, 2, bytes(LIMIT + 1))[:HEADER_BYTES]
    with pytest.raises(ProtocolError, match=r"kind 1 with 65 bytes \(the limit is 64\)"):
        FrameDecoder(LIMIT).feed(header)


@pytest.mark.parametrize("at", [10, 11])
def test_the_zeros_of_a_header_are_checked(at: int) -> None:
    """A header whose last two bytes are not zero belongs to another protocol."""
    header = bytearray(encode_frame(1, 2, b""))
    header[at] = 1
    with pytest.raises(ProtocolError, match="not a frame"):
        FrameDecoder(LIMIT).feed(bytes(header))


def test_a_stream_must_not_end_within_a_frame() -> None:
    """The decoder knows at each byte whether a frame has begun that has not ended."""
    decoder = FrameDecoder(LIMIT)
    assert not decoder.incomplete
    stream = encode_frame(1, 2, b"ab") + encode_frame(3, 4, b"")
    seen = []
    for at in range(len(stream)):
        decoder.feed(stream[at : at + 1])
        seen.append(decoder.incomplete)
    assert seen == [True] * 13 + [False] + [True] * 11 + [False]
    assert decoder.feed(b"") == []
    assert not decoder.incomplete


class CountedBuffer(bytearray):
    """A buffer that counts the bytes which are copied into it, out of it, and within it."""

    copied_bytes = 0

    def __iadd__(self, data: Buffer) -> Self:  # type: ignore[override]  # as bytearray's own
        self.copied_bytes += len(memoryview(data))
        return super().__iadd__(data)

    def __getitem__(self, key: slice) -> bytearray:  # type: ignore[override]  # slices only
        part = super().__getitem__(key)
        self.copied_bytes += len(part)
        return part

    def __delitem__(self, key: SupportsIndex | slice) -> None:
        before = len(self)
        super().__delitem__(key)
        if len(self) != before:
            self.copied_bytes += len(self)


@pytest.mark.parametrize("piece_bytes", [1, 2, 11, 13, 100, 4096, 65536])
@pytest.mark.parametrize("body_bytes", [0, 1, 100, 100_000])
def test_a_trickle_costs_no_more_than_its_bytes(piece_bytes: int, body_bytes: int) -> None:
    """Each byte is moved a bounded number of times, however small the pieces and long the frames."""
    decoder = FrameDecoder(1 << 20)
    buffer = CountedBuffer()
    decoder._buffer = buffer
    n_frames = 200_000 // (HEADER_BYTES + body_bytes)
    stream = encode_frame(1, 2, bytes(body_bytes)) * n_frames
    n_decoded = sum(
        len(decoder.feed(stream[at : at + piece_bytes]))
        for at in range(0, len(stream), piece_bytes)
    )
    assert n_decoded == n_frames
    assert decoder._buffer is buffer
    assert buffer.copied_bytes <= 3 * len(stream)


def test_the_buffer_holds_one_incomplete_frame_at_most() -> None:
    """After any piece less than a longest frame is kept, though the pieces are many frames long."""
    decoder = FrameDecoder(LIMIT)
    rng = random.Random(7)
    stream = b"".join(encode_frame(1, 2, bytes(rng.randrange(LIMIT + 1))) for _ in range(300))
    at = 0
    while at < len(stream):
        end = at + rng.randrange(1, 500)
        decoder.feed(stream[at:end])
        at = end
        assert len(decoder._buffer) < LIMIT + HEADER_BYTES
    assert not decoder.incomplete


@given(st.lists(FRAMES))
def test_the_decoder_knows_how_much_it_lacks(frames: list[Frame]) -> None:
    """Who feeds as many bytes as are missing reads no byte of the frame after."""
    decoder = FrameDecoder(LIMIT)
    stream = b"".join(encode_frame(*frame) for frame in frames)
    at = 0
    for frame in frames:
        decoded: list[Frame] = []
        while not decoded:
            missing = decoder.missing_bytes
            assert 1 <= missing <= LIMIT + HEADER_BYTES
            decoded = decoder.feed(stream[at : at + missing])
            at += missing
        assert decoded == [frame]
        assert not decoder.incomplete
    assert at == len(stream)
