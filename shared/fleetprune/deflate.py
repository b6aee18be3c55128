"""Raw deflate (RFC 1951) with a bound on what is inflated.

Without zlib's header and checksum: what uses it has its own. Another zlib build may deflate the
same bytes differently, and reads them all the same.
"""

import zlib
from typing import Final

from fleetprune.errors import WireError

_RAW: Final = -15


def deflate(data: bytes, *, match: bool, dictionary: bytes = b"") -> bytes:
    """Deflate `data`.

    Args:
        data: Any bytes.
        dictionary: What both sides have; repeats of its last 32 KiB are found.
        match: Look for repeats too. False: Huffman codes and runs of one byte alone, for data with
            a skewed distribution but few repeats, where matching costs time and bytes. Runs cost
            no time to look for, and are what frozen layers' changes of zero are.
    """
    strategy = zlib.Z_DEFAULT_STRATEGY if match else zlib.Z_RLE
    deflater = zlib.compressobj(wbits=_RAW, strategy=strategy, zdict=dictionary)
    return deflater.compress(data) + deflater.flush()


def inflate(data: bytes, longest: int, what: str, dictionary: bytes = b"") -> bytes:
    """Inflate unverified bytes, never more than `longest` + 1 of them.

    Args:
        data: One whole deflate stream.
        longest: Most bytes accepted.
        what: Plural, how the message calls them.
        dictionary: That which `deflate` had.

    Raises:
        WireError: The stream is broken, cut short, followed by more, or inflates to too much.
    """
    inflater = zlib.decompressobj(_RAW, zdict=dictionary)
    try:
        out = inflater.decompress(data, longest + 1)
    except zlib.error as e:
        raise WireError(f"{what} are not a deflate stream") from e
    if len(out) > longest:
        raise WireError(f"{what} inflate to more than {longest} bytes")
    if not inflater.eof:
        raise WireError(f"deflated {what} are cut short")
    if inflater.unused_data:
        raise WireError(f"{len(inflater.unused_data)} bytes after the deflated {what}")
    return out
