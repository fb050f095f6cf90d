"""Image folders: several captions a file, links, names of any kind."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial

from dalle.data import folder as folder_module
from dalle.data.folder import FolderPairs, find_pictures
from dalle.data.pairs import all_captions, draw_caption, fingerprints
from dalle.data.sources import load_pairs
from support.pictures import PNG


def put(folder, files):
    for name, content in files.items():
        name = name if isinstance(name, bytes) else name.encode()
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def test_each_line_is_a_caption(tmp_path, capsys):
    lines = "\ufeff two\u2028\twords\0 e\u0301 \r\n\r\n  third\rfourth\n\u200b\n".encode()
    put(tmp_path, {"a.png": PNG, "a.txt": lines, "b.png": PNG, "b.txt": b"alone\n"})
    pairs = load_pairs(str(tmp_path), image_size=8)
    assert list(pairs.captions) == ["two words \u00e9", "alone"]
    assert pairs.several == {0: ("two words \u00e9", "third", "fourth")}
    assert all_captions(pairs) == ["two words \u00e9", "third", "fourth", "alone"]
    line = (
        "data: 1 caption files hold several lines, 4 captions in all; one of a picture's is drawn"
    )
    assert line in capsys.readouterr().err
    assert {draw_caption(pairs, 1, None)} == {"alone"}
    drawn = Counter(draw_caption(pairs, 0, partial(int, seed)) for seed in range(900))
    assert set(drawn) == set(pairs.several[0]) and min(drawn.values()) > 240
    assert folder_module.MAX_CAPTION_BYTES == 65536
    before = fingerprints(pairs)
    put(tmp_path, {"a.txt": lines.replace(b"fourth", b"fifth")})
    after = fingerprints(FolderPairs(tmp_path))
    assert before["captions"] != after["captions"] and before["pictures"] == after["pictures"]


def test_links_to_folders_are_followed_and_cycles_end(tmp_path):
    for name in "abc":
        put(tmp_path, {f"store/{name}/{name}.png": PNG, f"store/{name}/{name}.txt": b"x"})
    put(tmp_path, {"set/own/o.png": PNG, "set/own/o.txt": b"own", "set/e.txt": b"e"})
    folder = tmp_path / "set"
    (folder / "a_link").symlink_to(tmp_path / "store/a")
    (folder / "all").symlink_to(tmp_path / "store")  # holds what a_link leads to once more
    (folder / "b_cycle").symlink_to(folder)
    (folder / "own" / "self").symlink_to("self")
    (folder / "own" / "up").symlink_to("..")
    (folder / "again").symlink_to(folder / "own")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    (folder / "d.png").symlink_to(tmp_path / "store/a/a.png")
    (folder / "d.txt").symlink_to(tmp_path / "store/a/a.txt")
    (folder / "e.png").symlink_to(tmp_path / "nothing.png")
    (folder / "note").symlink_to("y" * 300)  # a name that no file can have
    pairs = FolderPairs(folder)
    found = [str(path.relative_to(folder)) for path in pairs.paths]
    assert found == ["a_link/a.png", "all/b/b.png", "all/c/c.png", "d.png", "own/o.png"]
    assert pairs.skipped == {"link to a folder that is there already": 4, "link to nothing": 4}
    assert find_pictures(folder) == sorted([*pairs.paths, folder / "e.png"])
    (tmp_path / "root").symlink_to(folder)
    assert len(FolderPairs(tmp_path / "root")) == 5


def test_names_of_any_kind(tmp_path):
    """Composed and decomposed, not UTF-8, with line ends; several files for one name."""
    put(tmp_path, {
        "mu\u0308ller.png": PNG, "m\u00fcller.txt": b"a portrait", "line\nend.png": PNG,
        b"caf\xe9.png": PNG, b"caf\xe9.txt": b"latin", b"b\xe9.png": PNG[:20], b"b\xe9.txt": b"x",
        "line\nend.txt": b"line", "two.jpg": b"broken", "two.png": PNG, "two.TXT": b"second",
        "two.txt": b"first", "g.gif": b"GIF89a", "v.tiff": b"II*", "x.csv": b"", ".h.png": PNG,
    })  # fmt: skip
    pairs = FolderPairs(tmp_path)
    assert sorted(pairs.captions) == ["a portrait", "first", "latin", "line"]
    assert pairs.skipped == {
        "unreadable header": 1, "not a picture": 1, "second caption file of a picture": 1,
        "picture of another format": 2, "neither picture nor caption": 1,
    }  # fmt: skip
    assert all(pairs.load(i).shape == (24, 40, 3) for i in range(4))
