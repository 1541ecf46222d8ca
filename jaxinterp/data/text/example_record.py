"""Reading `tf.train.Example`, in which TensorFlow Datasets keep records, without TensorFlow.

    message Example  { Features features = 1; }
    message Features { map<string, Feature> feature = 1; }                    an entry: key = 1, value = 2
    message Feature  { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    message BytesList { repeated bytes value = 1; }

A protocol buffer is a sequence of fields: a varint of (number << 3 | type), then a varint (type 0), 8 bytes (1), a
varint length and so many bytes (2), or 4 bytes (5). Sources: tensorflow/core/example/{example,feature}.proto; the
encoding guide of protocol buffers.
"""

from collections.abc import Iterator

FEATURES, ENTRY, KEY, VALUE, BYTES_LIST, ITEM = 1, 1, 1, 2, 1, 1
"""Field numbers, in the order of the messages above."""


def example_features(record: bytes) -> dict[str, list[bytes] | None] | None:
    """The features of an Example by name, None in place of the values of one that holds no bytes; None: it is none.

    Nothing is allocated by a size that the record states without being checked against what is there.
    """
    try:
        parts = list(_messages(record))
        if not parts or any(number != FEATURES for number, _ in parts):
            return None
        found: dict[str, list[bytes] | None] = {}
        for _, features in parts:
            for number, entry in _messages(features):
                pair = dict(_messages(entry))
                if number != ENTRY or not pair.keys() <= {KEY, VALUE} or KEY not in pair:
                    return None
                found[pair[KEY].decode()] = _bytes_of(pair.get(VALUE, b""))
    except (ValueError, UnicodeDecodeError):
        return None
    return found or None


def _bytes_of(feature: bytes) -> list[bytes] | None:
    """The values of a Feature that holds bytes."""
    kinds = list(_messages(feature))
    if not kinds or kinds[-1][0] != BYTES_LIST:
        return None
    return [value for number, value in _messages(kinds[-1][1]) if number == ITEM]


def _messages(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The number and the bytes of every field of type 2.

    Raises:
      ValueError: another type, which no message of an Example has, or content that ends too early.
    """
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        if tag & 7 != 2:
            raise ValueError(f"field of type {tag & 7}")
        length, place = _varint(content, place)
        if length > len(content) - place:
            raise ValueError("the content ends too early")
        yield tag >> 3, content[place : place + length]
        place += length


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """The number that starts at `place`, seven bits a byte, lowest first; and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise ValueError("the content ends too early")
        byte, place = content[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than ten bytes")
