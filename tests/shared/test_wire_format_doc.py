import re
import struct
from pathlib import Path

import numpy as np
import pytest

from fleetprune import delta, frame, update, values
from fleetprune.delta import apply
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.result import VECTORS
from fleetprune.update import SparseUpdate, decode_update
from fleetprune.values import decode_values, encode_values, value_bytes
from tests.shared.delta_examples import BASE, TARGET

DOC = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8")
VALUES = np.array([7, -7], np.float32)
POSITIONS = np.array([1, 4], np.intp)
UPDATE = SparseUpdate(3, 24, VALUES, POSITIONS).encode(Codec.INT4)


def example(name: str) -> bytes:
    """The bytes of a ```hex block; four spaces set off a comment."""
    (block,) = re.findall(rf"```hex {name}\n(.*?)```", DOC, re.DOTALL)
    return bytes.fromhex("".join(line.split("    ")[0] for line in block.splitlines()))


def section(title: str) -> str:
    """The text under a `## title`."""
    return DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the byte table under a title, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("values", encode_values(VALUES, Codec.INT4)),
        ("positions", encode_positions(POSITIONS, 24)),
        ("update", UPDATE),
        ("frame", encode_frame("RSLT", b"{}", {"update": UPDATE})),
    ],
)
def test_worked_example_is_what_the_code_writes(name, encoded):
    assert example(name).hex(" ") == encoded.hex(" ")


def test_worked_example_is_what_the_code_reads():
    assert decode_values(example("values"), 2, Codec.INT4).tolist() == [7, -7]
    assert decode_positions(example("positions"), 24, 2).tolist() == [1, 4]
    got = decode_update(example("update"), mask_version=3, size=24)
    assert got.dense()[[1, 4]].tolist() == [7, -7]
    assert decode_frame(example("frame"), "RSLT") == (b"{}", {"update": example("update")})


def test_the_delta_is_read_on_every_machine():
    """Compressors differ between builds, so it need not be what this machine writes."""
    assert apply(BASE, example("delta"), len(TARGET)) == TARGET


def test_what_the_text_says_of_deltas_is_so():
    text = section("Delta")
    assert f"two sides of {delta.SIDE.size} bytes" in text
    assert f"at most {delta.MAX_SPREAD} numbers per byte" in text
    assert f"zigzag (0, -1, 1, -2, ...) of {delta.PLANES} bytes" in text
    kinds = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in delta.Kind)
    assert f"(a byte: {kinds})" in text
    forms = ", ".join(f"{form.value} {form.name.lower()}" for form in delta.Form)
    assert f"form ({forms})" in text


def test_lengths_in_the_text_are_right():
    assert f"Update: {len(UPDATE)} bytes." in DOC


@pytest.mark.parametrize(
    ("title", "head", "fields"),
    [("Frame", frame._HEAD, 5), ("Update", update._HEAD, 9), ("Delta", delta.HEAD, 11)],
)
def test_byte_tables_are_those_of_the_code(title, head: struct.Struct, fields):
    fixed = [(int(offset), int(size)) for offset, size, *_ in rows(title)[:fields]]
    assert [offset for offset, _ in fixed] == [sum(s for _, s in fixed[:i]) for i in range(fields)]
    assert sum(size for _, size in fixed) == head.size
    unpacked = re.findall(r"\d*[a-zA-Z]", head.format.lstrip("<"))
    assert [size for _, size in fixed] == [
        struct.calcsize(f"<{one}") for f in unpacked for one in ([f] if "s" in f else list(f))
    ]


def test_magics_and_versions_are_those_of_the_code():
    for title, module in (("Frame", frame), ("Update", update), ("Delta", delta)):
        table = {row[2]: row[3] for row in rows(title)}
        assert table["magic"] == f"`{module.MAGIC.decode()}`"
        assert table["version"] == str(module.VERSION)


def test_codec_numbers_are_those_of_the_code():
    table = {row[2]: row[3] for row in rows("Update")}
    assert table["codec"] == ", ".join(f"{code} {codec}" for codec, code in update._CODES.items())


def test_value_lengths_are_those_of_the_code():
    table = {row[0]: row[1] for row in rows("Values")}
    assert table == {
        "fp32": "4 `n`",
        "fp16": "2 `n`",
        "int8": "2 `b` + `n`",
        "int4": "2 `b` + ceil(`n` / 2)",
    }
    assert values.BLOCK == 64
    n, b = 129, 3
    lengths = [value_bytes(n, codec) for codec in Codec]
    assert lengths == [4 * n, 2 * n, 2 * b + n, 2 * b + (n + 1) // 2]


def test_every_section_of_a_result_is_named():
    assert set(re.findall(r"`(\w+)`", section("Frame").split("kind `RSLT`\n")[1])) >= VECTORS
