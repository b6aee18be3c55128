import hashlib

from fleetprune_agent.parts import MAX_PARTS, Parts


def test_interrupted_pulls_do_not_pile_up_nor_do_their_maps(tmp_path):
    """A kill between a file's move and its map's removal leaves the map alone."""
    folder = tmp_path / "parts"
    parts = Parts(folder, 4)
    for i in range(9):
        (folder / f"{i}.part").write_bytes(b"")
        (folder / f"{i}.part.map").write_bytes(b"")
    (folder / "alone.part.map").write_bytes(b"")
    data = b"content"
    digest = hashlib.sha256(data).hexdigest()

    def fetch(part):
        for index in range(part.count):
            part.write(index, data[4 * index : 4 * index + 4])

    parts.fill("name", len(data), digest, tmp_path / "into", fetch)
    assert (tmp_path / "into").read_bytes() == data
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == 2 * (MAX_PARTS - 1)
    assert all(f"{name}.map" in left for name in left if name.endswith(".part"))
