"""Zip archives of arrays (`.npz`, PyTorch's `.pt`): opened by reading the directory; members have honest sizes.

A directory can claim any size, and a compressed member unpack to a thousand times its own: both are checked before
anything is read. Where members are read lazily, the file is opened anew.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxinterp.core.errors import UserError

UNPACKED = 8
"""Weights do not shrink much: what unpacks to more than so many times the file, and `SPARE`, is refused."""

SPARE = 2**24
"""Bytes beyond it: small files may hold arrays of zeros."""


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Within it, what goes wrong with an archive is raised as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"{path} is damaged or truncated: {type(error).__name__}: {error}") from error


def members(path: Path, *, compressed: bool) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name; reads its directory only.

    Args:
      compressed: whether members may be compressed.
    Raises:
      UserError: the file is not a zip archive, has two members of one name, an encrypted or (where not allowed) a
        compressed one, or claims more bytes than there can be.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise UserError(f"{path} is not a zip archive: it is of an older or another format, or damaged.")
    size = path.stat().st_size
    with damage(path), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    found = {info.filename: info for info in infos}
    if len(found) != len(infos):
        raise UserError(f"{path} has two members of one name; the file is damaged.")
    for info in infos:
        stored = info.compress_type == zipfile.ZIP_STORED
        if info.flag_bits & 0x1 or not (stored or (compressed and info.compress_type == zipfile.ZIP_DEFLATED)):
            raise UserError(f"{path}: member {info.filename!r} is encrypted or compressed, where it should be plain.")
        if info.compress_size > size or (stored and info.file_size != info.compress_size):
            raise UserError(
                f"{path}: member {info.filename!r} claims {info.file_size} bytes of a file of {size}; it is damaged."
            )
    total = sum(info.file_size for info in infos)
    if total > (UNPACKED * size + SPARE if compressed else size):
        raise UserError(f"{path} of {size} bytes claims to unpack to {total}: weights do not compress so well.")
    return found


def read_member(path: Path, info: zipfile.ZipInfo) -> bytes:
    """The bytes of one member, whose size `members` has checked.

    Raises:
      UserError: they are not what the directory says.
    """
    with damage(path), zipfile.ZipFile(path) as archive, archive.open(info) as member:
        data = member.read(info.file_size)
    if len(data) != info.file_size:
        raise UserError(f"{path}: member {info.filename!r} has {len(data)} bytes of {info.file_size}: truncated.")
    return data
