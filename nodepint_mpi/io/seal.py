"""The seal of a file: a digest of what HDF5 has to understand, looked at before HDF5 sees the file.

HDF5 may crash on a damaged file or return wrong values, so no damaged file is handed to it. Only
the values of the large arrays over all slices are left out: HDF5 does not look into them, and each
of their rows has a checksum, itself under the seal, that is compared when the row is read. So each
byte is read once and guarded once. What is left out is said in the seal.

The seal is put into the free block that HDF5 leaves at the head of a file, as text (`head -n 6`
shows it); a file without a seal was never finished. The digest is that of the list of digests of
fixed pieces, so ranks share the work and any number of ranks finds the same.
"""

import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.io.hdf5 import USERBLOCK_BYTES

if TYPE_CHECKING:  # trained models also load without MPI
    from mpi4py import MPI

FORMAT = 4
"""Version of the files' layout; a reader refuses any other."""

_MAGIC = b"nodepint checkpoint\n"
_VERSION = re.compile(rb"format (\d+)\n")
_HEAD = re.compile(rb"format \d+\nbytes (\d+)\napart((?: \d+\+\d+)*)\nxxh3_128 ([0-9a-f]{32})\n")
_PIECE_BYTES = 16 * 2**20
_MOST_APART = 8  # the head has room for no more, whatever the numbers


class Alone:
    """One process in the place of ranks, without MPI."""

    rank, size = 0, 1

    def bcast(self, value: Any) -> Any:
        """What was given."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """What was given, as that of the only rank."""
        return [value]


class Span(NamedTuple):
    """Bytes of a file."""

    start: int
    n_bytes: int


class Seal(NamedTuple):
    """Size of a file, what has checksums of its own, and the digest of all else after the head."""

    n_bytes: int
    apart: tuple[Span, ...]
    digest: str


def choose_apart(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The largest of some spans, as many as a seal can name, in order. Local."""
    largest = sorted(spans, key=lambda span: span.n_bytes)[-_MOST_APART:]
    return tuple(sorted(largest))


def digest_file(
    control: "MPI.Intracomm | Alone", path: Path, n_bytes: int, apart: tuple[Span, ...] = ()
) -> tuple[str, str]:
    """Digest the bytes after the head of a file.

    Collective over `control`; all arguments are equal on all ranks.

    Args:
        control: The ranks that share the work.
        path: The file.
        n_bytes: Its size.
        apart: What is left out, in order.

    Returns:
        The digest and an empty text; or, if a rank could not read its pieces, an empty digest
        and the reason. Equal on all ranks.
    """
    pieces = _pieces(n_bytes, apart)
    try:
        own, reason = _digest_pieces(path, pieces[control.rank :: control.size], n_bytes), ""
    except OSError as error:
        own, reason = [], f"rank {control.rank}: {error_text(error)}"
    parts = control.gather((own, reason))
    result = ("", "")
    if parts is not None:
        reason = next((why for _, why in parts if why), "")
        digest = xxhash.xxh3_128()
        for piece in range(0 if reason else len(pieces)):
            digest.update(parts[piece % control.size][0][piece // control.size])
        result = ("" if reason else digest.hexdigest(), reason)
    return control.bcast(result)


def write_seal(path: Path, seal: Seal) -> None:
    """Seal a closed file. Local. Raises OSError."""
    apart = "".join(f" {span.start}+{span.n_bytes}" for span in seal.apart)
    text = f"format {FORMAT}\nbytes {seal.n_bytes}\napart{apart}\nxxh3_128 {seal.digest}\n".encode()
    head = _MAGIC + text + b"crc32 %08x\n" % zlib.crc32(text)
    assert len(head) <= USERBLOCK_BYTES  # 455 bytes if all numbers have 20 digits
    with open(path, "r+b") as file:
        file.write(head.ljust(USERBLOCK_BYTES, b"\0"))


def find_damage(control: "MPI.Intracomm | Alone", path: Path) -> str:
    """Compare a file with its seal.

    Collective over `control`.

    Returns:
        Empty if every byte under the seal is as it was, else what is wrong. Equal on all ranks.
    """
    seal, damage = control.bcast(_read_seal(path) if control.rank == 0 else None)
    if damage:
        return damage
    digest, damage = digest_file(control, path, seal.n_bytes, seal.apart)
    if damage:
        return damage
    return "" if digest == seal.digest else "its content does not match its seal"


def read_format(path: Path) -> int:
    """Format version of a file, without opening it as HDF5; `FORMAT` if it has none. Local."""
    try:
        with open(path, "rb") as file:
            match = _VERSION.match(_body(file.read(USERBLOCK_BYTES)))
    except OSError:
        return FORMAT
    return int(match[1]) if match else FORMAT


def _read_seal(path: Path) -> tuple[Seal, str]:
    """The seal of a file, and what is wrong with its head or its size."""
    none = Seal(0, (), "")
    try:
        n_bytes = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(USERBLOCK_BYTES)
    except OSError as error:
        return none, error_text(error)
    if not head.rstrip(b"\0"):
        return none, "it was never finished"
    match = _HEAD.fullmatch(_body(head))
    if match is None:
        return none, "its head is not that of a checkpoint, or damaged"
    if int(match[1]) != n_bytes:
        return none, f"it has {n_bytes} bytes instead of {int(match[1])}"
    apart = tuple(Span(*map(int, text.split(b"+"))) for text in match[2].split())
    ends = [USERBLOCK_BYTES, *(span.start + span.n_bytes for span in apart)]
    starts = [*(span.start for span in apart), n_bytes]
    if any(start < end for start, end in zip(starts, ends, strict=True)):
        return none, "its seal leaves out what is not in the file, or twice"
    return Seal(n_bytes, apart, match[3].decode()), ""


def _body(head: bytes) -> bytes:
    """The text of a head without its CRC-32, or nothing if it is not whole to the last byte."""
    text = head[len(_MAGIC) :].rstrip(b"\0")
    body, crc = text[:-15], text[-15:]
    whole = len(head) == USERBLOCK_BYTES and head.startswith(_MAGIC)
    return body if whole and crc == b"crc32 %08x\n" % zlib.crc32(body) else b""


def _pieces(n_bytes: int, apart: tuple[Span, ...]) -> list[Span]:
    """All bytes after the head but those apart, in pieces."""
    starts = [USERBLOCK_BYTES, *(span.start + span.n_bytes for span in apart)]
    ends = [*(span.start for span in apart), n_bytes]
    return [
        Span(start, min(_PIECE_BYTES, high - start))
        for low, high in zip(starts, ends, strict=True)
        for start in range(low, high, _PIECE_BYTES)
    ]


def _digest_pieces(path: Path, pieces: list[Span], n_bytes: int) -> list[bytes]:
    most = max((piece.n_bytes for piece in pieces), default=0)
    digests, buffer = [], memoryview(bytearray(most))
    with open(path, "rb", buffering=0) as file:
        for start, size in pieces:
            file.seek(start)
            piece, n_read = buffer[:size], 0
            while n_read < size:
                n_more = file.readinto(piece[n_read:])
                if not n_more:
                    raise OSError(f"it is shorter than {n_bytes} bytes")
                n_read += n_more
            digests.append(xxhash.xxh3_128_digest(piece))
    return digests
