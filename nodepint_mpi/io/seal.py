"""The seal of a file: a digest of all its bytes, in the file itself, looked at before any use.

HDF5 may crash on a damaged file or return wrong values, so no damaged file is handed to it. The
seal is put into the free block that HDF5 leaves at the head of a file, as text (`head -n 5` shows
it); a file without a seal was never finished. The digest is that of the list of digests of fixed
pieces, so ranks share the work and any number of ranks finds the same.
"""

import hashlib
import os
import re
import zlib
from pathlib import Path

from mpi4py import MPI

from nodepint_mpi.io.hdf5 import USERBLOCK_BYTES, error_text

FORMAT = 1
"""Version of the files' layout; a reader refuses any other."""

_MAGIC = b"nodepint checkpoint\n"
_HEAD = re.compile(rb"format (\d+)\nbytes (\d+)\nsha256 ([0-9a-f]{64})\n")
_PIECE_BYTES = 16 * 2**20


def digest_file(control: MPI.Intracomm, path: Path, n_bytes: int) -> tuple[str, str]:
    """Digest all bytes after the head of a file.

    Collective over `control`; `n_bytes` is the size of the file, equal on all ranks.

    Returns:
        The digest and an empty text; or, if a rank could not read its pieces, an empty digest
        and the reason. Equal on all ranks.
    """
    starts = range(USERBLOCK_BYTES, n_bytes, _PIECE_BYTES)
    try:
        own, reason = _digest_pieces(path, starts[control.rank :: control.size], n_bytes), ""
    except OSError as error:
        own, reason = [], f"rank {control.rank}: {error_text(error)}"
    parts = control.gather((own, reason))
    result = ("", "")
    if parts is not None:
        reason = next((why for _, why in parts if why), "")
        digest = hashlib.sha256()
        for piece in range(0 if reason else len(starts)):
            digest.update(parts[piece % control.size][0][piece // control.size])
        result = ("" if reason else digest.hexdigest(), reason)
    return control.bcast(result)


def write_seal(path: Path, digest: str) -> None:
    """Seal a closed file and bring it to the disk. Local. Raises OSError."""
    text = f"format {FORMAT}\nbytes {path.stat().st_size}\nsha256 {digest}\n".encode()
    head = _MAGIC + text + b"crc32 %08x\n" % zlib.crc32(text)
    with open(path, "r+b") as file:
        file.write(head.ljust(USERBLOCK_BYTES, b"\0"))
        file.flush()
        os.fsync(file.fileno())


def find_damage(control: MPI.Intracomm, path: Path) -> str:
    """Compare a file with its seal.

    Collective over `control`.

    Returns:
        Empty if every byte is as it was when the file was sealed, else what is wrong. Equal on
        all ranks.
    """
    n_bytes, expected, damage = control.bcast(_read_seal(path) if control.rank == 0 else None)
    if damage:
        return damage
    digest, damage = digest_file(control, path, n_bytes)
    if damage:
        return damage
    return "" if digest == expected else "its content does not match its SHA-256"


def read_format(path: Path) -> int:
    """Format version of a file, without opening it as HDF5; `FORMAT` if it has none. Local."""
    try:
        with open(path, "rb") as file:
            head = file.read(USERBLOCK_BYTES)
    except OSError:
        return FORMAT
    match = _parse(head)
    return int(match[1]) if match else FORMAT


def _read_seal(path: Path) -> tuple[int, str, str]:
    """Size and digest a file should have, and what is wrong with its head or its size."""
    try:
        n_bytes = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(USERBLOCK_BYTES)
    except OSError as error:
        return 0, "", error_text(error)
    if not head.rstrip(b"\0"):
        return 0, "", "it was never finished"
    match = _parse(head)
    if match is None:
        return 0, "", "its head is not that of a checkpoint, or damaged"
    if int(match[2]) != n_bytes:
        return 0, "", f"it has {n_bytes} bytes instead of {int(match[2])}"
    return n_bytes, match[3].decode(), ""


def _parse(head: bytes) -> re.Match[bytes] | None:
    """The fields of a head, if it is whole to the last byte."""
    text = head[len(_MAGIC) :].rstrip(b"\0")
    body, crc = text[:-15], text[-15:]
    whole = len(head) == USERBLOCK_BYTES and head.startswith(_MAGIC)
    if not whole or crc != b"crc32 %08x\n" % zlib.crc32(body):
        return None
    return _HEAD.fullmatch(body)


def _digest_pieces(path: Path, starts: range, n_bytes: int) -> list[bytes]:
    digests, buffer = [], memoryview(bytearray(min(_PIECE_BYTES, n_bytes)))
    with open(path, "rb", buffering=0) as file:
        for start in starts:
            file.seek(start)
            piece, n_read = buffer[: n_bytes - start], 0
            while n_read < len(piece):
                n_more = file.readinto(piece[n_read:])
                if not n_more:
                    raise OSError(f"it is shorter than {n_bytes} bytes")
                n_read += n_more
            digests.append(hashlib.sha256(piece).digest())
    return digests
