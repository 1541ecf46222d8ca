"""The reader of PyTorch's files has no power to run anything: hostile pickles are refused, and allocate nothing."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.interchange.torch_file import open_torch
from tests.interchange.refused import MEGABYTE, refused

GOLDEN = Path(__file__).parent / "goldens" / "dictionary_learning-AutoEncoder" / "ae.pt"


def rewritten(path: Path, edit: Callable[[dict[str, bytes]], Any]) -> Path:
    """The golden's archive with its members edited, at `path`."""
    with zipfile.ZipFile(GOLDEN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def with_pickle(path: Path, program: bytes) -> Path:
    return rewritten(path, lambda members: members.update({"ae/data.pkl": program}))


class Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def hostile(mark: Path) -> dict[str, tuple[bytes, str]]:
    """Programs that would make the file `mark`, or worse, and what their refusal names."""
    command = f"touch {mark}"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    doubled = b"".join(b"\x94h" + bytes([n]) + b"\x86" for n in range(60))
    shared = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    return {
        "protocol 2": (pickle.dumps({"bias": Shell(command)}, protocol=2), r"'(posix|nt)\.system'"),
        "protocol 4": (pickle.dumps({"bias": Shell(command)}, protocol=4), r"'(posix|nt)\.system'"),
        "protocol 0": (f"cos\nsystem\n(S'{command}'\ntR.".encode(), r"'os\.system'"),
        "inst": (f"(S'{command}'\nios\nsystem\n.".encode(), "opcode STRING"),
        "inst without arguments": (b"(ios\ngetcwd\n.", "opcode INST 'os getcwd'"),
        "obj": (b"(cos\nsystem\no.", r"'os\.system'"),
        "eval": (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", r"'builtins\.eval'"),
        "attribute by dots": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"'os\.system'"),
        "numpy": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.", "numpy.core.multiarray._reconstruct"),
        "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
        "a tensor of no storage": (b"\x80\x02" + tensor + b"(K\x01K\x00)))tR.", "a call of 'torch._utils._rebuild"),
        "a storage called": (b"\x80\x02ctorch\nFloatStorage\nK\x01\x85R.", "a call of 'torch.FloatStorage'"),
        "a number called": (b"\x80\x02K\x01)R.", "a call of something without a name"),
        "state of an object": (b"\x80\x02}}X\x01\x00\x00\x00aK\x01sb.", "BUILD of an object"),
        "another persistent object": (b"\x80\x02X\x01\x00\x00\x00aQ.", "a persistent object that is not a storage"),
        "a key that takes for ever to hash": (b"\x80\x02})" + shared + b"K\x01s.", "dictionary with other keys"),
        "a module that takes for ever to print": (
            b"\x80\x04\x8c\x01x" + doubled + b"\x8c\x01y\x93.",
            "a global whose name is not text",
        ),
        "an attribute that takes for ever to print": (
            b"\x80\x04\x8c\x02os\x8c\x01x" + doubled + b"\x93.",
            "a global whose name is not text",
        ),
        "numbers instead of tensors": (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "entry 'a' is not a tensor"),
        "no dictionary": (b"\x80\x02K\x01.", "holds no state dict, but a int"),
        "no end": (b"\x80\x02}", "not a readable pickle"),
        "an empty stack": (b"\x80\x02R.", "not a readable pickle"),
        "no mark": (b"\x80\x02t.", "not a readable pickle"),
        "a memo that is not there": (b"\x80\x02h\x07.", "not a readable pickle"),
        "text that is not there": (b"\x80\x02X\xff\xff\xff\x7fa.", "not a readable pickle"),
        "nothing": (b"", "not a readable pickle"),
    }


@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_hostile_pickles_run_nothing(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    program, message = hostile(mark)[name]
    path = with_pickle(tmp_path / "ae.pt", program)
    refused(lambda: open_torch(path), message)
    assert not mark.exists()


def test_the_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    """Unpickled, they run: the test above would notice."""
    mark = tmp_path / "it-ran"
    for name in ("protocol 2", "protocol 4", "protocol 0", "inst"):
        mark.unlink(missing_ok=True)
        pickle.loads(hostile(mark)[name][0])
        assert mark.exists(), name


TERA = b"\x8a\x06" + (10**12).to_bytes(6, "little")
BIAS = b"X\x04\x00\x00\x00bias"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x18K\x0c\x86", TERA + b"K\x0c\x86", r"claims size \[1000000000000, 12\] within a storage of 288 numbers"),
        (b"K\x18K\x0c\x86", b"K\x18K\x0d\x86", r"claims size \[24, 13\] within a storage of 288"),
        (b"M \x01t", TERA + b"t", "of 1000000000000 numbers of 4 bytes, but it has 1152 bytes"),
        (b"M \x01t", b"J\xff\xff\xff\xfft", "of -1 numbers of 4 bytes"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00X", "storage 'X' .* but it is missing"),
        (b"FloatStorage", b"DoubleStorage", "of 8 bytes, but it has 48 bytes"),
        (b"FloatStorage", b"BoolStorage", "'torch.BoolStorage'"),
    ],
)
def test_absurd_sizes_allocate_nothing(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    def edit(members: dict[str, bytes]) -> None:
        assert old in members["ae/data.pkl"]
        members["ae/data.pkl"] = members["ae/data.pkl"].replace(old, new)

    path = rewritten(tmp_path / "ae.pt", edit)
    refused(lambda: open_torch(path), message)


def test_one_number_cannot_be_claimed_to_be_many(tmp_path: Path) -> None:
    """Strides of 0 are how an expanded tensor is saved: refused, as 10^12 numbers could be one."""

    def edit(members: dict[str, bytes]) -> None:
        program = members["ae/data.pkl"]
        assert b"K\x18K\x0c\x86" in program and b"K\x01K\x18\x86" in program
        program = program.replace(b"K\x18K\x0c\x86", TERA + TERA + b"\x86").replace(
            b"K\x01K\x18\x86", b"K\x00K\x00\x86"
        )
        members["ae/data.pkl"] = program

    with pytest.raises(UserError, match="within a storage of 288 numbers"):
        open_torch(rewritten(tmp_path / "ae.pt", edit))


def test_truncated_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    whole, path = GOLDEN.read_bytes(), tmp_path / "ae.pt"
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"not a zip archive|damaged or truncated"):
            open_torch(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + whole)
    with pytest.raises(UserError, match="not a zip archive: it is of an older"):
        open_torch(path)
    rewritten(path, lambda members: members.pop("ae/data.pkl"))
    with pytest.raises(UserError, match=r"has 0 members data\.pkl"):
        open_torch(path)
    rewritten(path, lambda members: members.update({"ae/byteorder": b"big"}))
    with pytest.raises(UserError, match="byteorder"):
        open_torch(path)
    with_pickle(path, b"\x80\x02" + b"}0" * MEGABYTE)
    with pytest.raises(UserError, match=r"data\.pkl has \d+ bytes, more than any state dict"):
        open_torch(path)


def test_a_directory_that_lies_is_refused(tmp_path: Path) -> None:
    """A member that claims a terabyte, and one that unpacks to far more than the file."""
    whole = bytearray(GOLDEN.read_bytes())
    entry = whole.rfind(b"PK\x01\x02", 0, whole.rfind(b"ae/data/0"))
    whole[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path = tmp_path / "ae.pt"
    path.write_bytes(whole)
    refused(lambda: open_torch(path), "claims 4294967280 bytes")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ae/data.pkl", bytes(10 * MEGABYTE))
    refused(lambda: open_torch(path), "encrypted or compressed")


def test_strided_tensors_are_read_as_they_were_saved() -> None:
    """The encoder of an AutoEncoder is saved as the transpose that it is."""
    tensors = open_torch(GOLDEN)
    encoder = tensors["encoder.weight"]
    whole = encoder.read(slice(None), None)
    assert whole.shape == encoder.shape == (24, 12)
    np.testing.assert_array_equal(encoder.read(slice(2, 5), slice(3, 9)), whole[2:5, 3:9])
    with zipfile.ZipFile(GOLDEN) as archive:
        storages = {
            np.frombuffer(archive.read(name), np.float32).tobytes() for name in archive.namelist() if "data/" in name
        }
    assert whole.tobytes() in storages or np.ascontiguousarray(whole.T).tobytes() in storages
