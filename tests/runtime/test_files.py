"""Files are the old ones or the new ones, whatever happens in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stocklora.base_models.folders import made_whole
from stocklora.cli.console import UserError
from stocklora.runtime import files
from stocklora.runtime.files import BUNDLED_PRICES, bundled_folder, replacing, sha256_of, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "价格\nline\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "价格\nline\n".encode()
    assert names(tmp_path / "a" / "b") == ["c.txt"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), UserError("no"), OSError("network down")])
def test_a_failed_block_keeps_the_old_file_and_its_own_error(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.csv"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".csv"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_permissions_follow_the_umask_and_stay_on_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    old_umask = os.umask(0o022)
    try:
        write_text(path, "x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o600)
        write_text(path, "y")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(old_umask)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "a.txt"
    real.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    dangling = tmp_path / "dangling.txt"
    dangling.symlink_to(tmp_path / "real" / "b.txt")
    write_text(dangling, "made")
    assert (tmp_path / "real" / "b.txt").read_text() == "made"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(timeout=10)
    assert got == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_long_names(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".csv", "价" * 80 + ".csv", "a." + "y" * 200):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder; give a file name"),
        ("file/a.csv", "is a file, not a folder"),
        ("file/deeper/a.csv", "cannot write"),
        ("n" * 300, "cannot write"),
    ],
)
def test_impossible_places(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        write_text(tmp_path / name, "x")
    assert names(tmp_path) == ["file", "folder"]


def test_current_folder_and_empty_name(in_folder: Path) -> None:
    write_text(Path("a.txt"), "x")
    assert names(in_folder) == ["a.txt"]
    with pytest.raises(UserError, match="is a folder"):
        write_text(Path(""), "x")


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    path.write_text("old")
    with pytest.raises(UserError, match="the disk is full"), replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    # torch reports a failed write as a RuntimeError without a reason
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="the disk is full"), replacing(path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.pth"]


def test_a_failed_rename_is_reported_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(UserError, match="cannot write .*Permission denied"):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == []


def test_writers_at_once_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    texts = [letter * 200_000 for letter in "abcd"]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["a.txt"]


def test_json_is_strict_and_plain(tmp_path: Path) -> None:
    content = {
        "int": np.int64(3),
        "float": np.float32(0.5),
        "nan": float("nan"),
        "inf": np.inf,
        "array": np.array([1.0, np.nan]),
        "path": Path("a/b"),
        "tuple": (1, None, True),
        3: "键",
    }
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "键" in text
    assert json.loads(text) == {
        "int": 3,
        "float": 0.5,
        "nan": None,
        "inf": None,
        "array": [1.0, None],
        "path": str(Path("a/b")),
        "tuple": [1, None, True],
        "3": "键",
    }


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(content=plain_json)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.mktemp("j") / "a.json"
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content


@given(data=st.binary(max_size=2000))
def test_sha256(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("s") / "a"
    path.write_bytes(data)
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()


def test_an_installation_without_what_is_bundled_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "__file__", str(tmp_path / "stocklora" / "runtime" / "files.py"))
    (tmp_path / "data" / "sample").mkdir(parents=True)  # another project's
    with pytest.raises(UserError, match="install the project again"):
        bundled_folder()
    (tmp_path / "stocklora" / "_sample").mkdir(parents=True)
    (tmp_path / "stocklora" / "_sample" / BUNDLED_PRICES).touch()
    assert bundled_folder() == tmp_path / "stocklora" / "_sample"


def test_bytes_then_name_then_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order a power cut leaves the old file or the new one."""
    order = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        order.append("name")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "a.txt", "x")
    assert order == ["file", "name", "folder"]


def test_all_of_a_folder_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in (source, *Path(source).rglob("*"))} <= synced
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "rename", renamed)
    with made_whole(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        for path in (folder / "config.json", folder / "inner" / "weights"):
            path.write_text("x", encoding="utf-8")
    assert synced == {tmp_path.stat().st_ino}


def test_a_writer_that_comes_amid_another_one_does_not_disturb_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("first, and", encoding="utf-8")
        write_text(path, "second")
        assert path.read_text(encoding="utf-8") == "second"
        with temporary.open("a", encoding="utf-8") as stream:
            stream.write(" whole")
    assert path.read_text(encoding="utf-8") == "first, and whole"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no names for open pipes")
def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    (tmp_path / "stdout").symlink_to(f"/dev/fd/{writer}")
    write_text(tmp_path / "stdout", "x")
    assert os.read(reader, 9) == b"x"
    for end in (reader, writer):
        os.close(end)


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    def by_another(text: str) -> None:
        """Write in a process that has not been here before."""
        if (child := os.fork()) == 0:
            write_text(tmp_path / "a.txt", text)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    ready, child = os.pipe(), os.fork()
    if child == 0:
        with replacing(tmp_path / "b.txt"):
            os.write(ready[1], b".")
            signal.pause()
    os.read(ready[0], 1)
    by_another("first")
    left = set(names(tmp_path)) - {"a.txt"}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert [name[:3] for name in left] == [".b."]  # of the other process, which lived
    (tmp_path / ".b.mine.txt").write_text("somebody's own file with a similar name")
    by_another("second")
    assert names(tmp_path) == [".b.mine.txt", "a.txt"]
