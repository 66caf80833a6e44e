import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from duo_id.common.errors import UserError
from duo_id.common.files import atomic_path, whole_folder, write_text


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent, "a rename is atomic within one folder only"
        assert temporary.suffix == ".txt"
        assert not path.exists()
    (tmp_path / "plain").touch()
    assert path.read_text() == "whole"
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_nothing_beside(tmp_path: Path) -> None:
    folder = tmp_path / "name"
    folder.mkdir()
    with pytest.raises(OSError, match="name"):
        write_text(folder, "text")
    assert list(tmp_path.iterdir()) == [folder]


def test_data_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        call = getattr(__import__("os"), name)
        monkeypatch.setattr(
            f"duo_id.common.files.os.{name}", lambda *a, call=call, name=name: (order.append(name), call(*a))
        )
    write_text(tmp_path / "file.txt", "äöü")
    assert order == ["fsync", "replace"]
    assert (tmp_path / "file.txt").read_bytes() == "äöü".encode()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_written(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "file.txt"
    if exists:
        target.write_text("old")
    (tmp_path / "middle").symlink_to(target)
    link = tmp_path / "link"
    link.symlink_to("middle")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "middle").is_symlink()
    assert target.read_text() == "new"
    assert list((tmp_path / "far").iterdir()) == [target]


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a pipe"), (bound_socket, "a socket")])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_refused_and_stays(
    make: Callable[[Path], None], kind: str, linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "special"
    make(path)
    status = path.stat()
    if linked:
        path = tmp_path / "link"
        path.symlink_to("special")
    with pytest.raises(UserError, match=rf"{path.name} is {kind}, .*give another path"):
        write_text(path, "text")
    assert os.path.samestat(status, (tmp_path / "special").stat())
    assert path.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked


def test_a_pipe_that_appears_meanwhile_is_refused_too(tmp_path: Path) -> None:
    def written() -> None:
        with atomic_path(tmp_path / "pipe"):
            os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UserError, match="is a pipe"):
        written()
    assert (tmp_path / "pipe").is_fifo()


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(UserError, match="leads nowhere"):
        write_text(tmp_path / "one", "text")


def killed_in(block: Callable[[], object]) -> None:
    """Run a block in a process that is killed at its end."""
    child = os.fork()
    if child == 0:
        try:
            block()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    def half() -> None:
        with atomic_path(tmp_path / "file.txt") as temporary, whole_folder(tmp_path / "folder") as work:
            temporary.write_text("half")
            (work / "inner").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed_in(half)
    others = {tmp_path / name for name in (".file.txt.lock", ".file.txt.abcdefgh.bak", ".filextxt.abcdefgh.txt")}
    for path in others:
        path.touch()
    assert len(list(tmp_path.iterdir())) == 2 + len(others)
    write_text(tmp_path / "file.txt", "whole")
    with whole_folder(tmp_path / "folder") as work:
        (work / "inner").write_text("whole")
    assert set(tmp_path.iterdir()) == others | {tmp_path / "file.txt", tmp_path / "folder"}


def test_of_two_that_make_a_folder_the_second_is_told(tmp_path: Path) -> None:
    def second() -> None:
        with whole_folder(tmp_path / "folder") as work:
            (work / "ours").touch()
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "theirs").touch()

    with pytest.raises(UserError, match="folder was created by another process"):
        second()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "theirs"]


@pytest.mark.parametrize("name", [None, "part.arrow"])
def test_a_folder_that_cannot_be_written_is_named(name: str | None, tmp_path: Path) -> None:
    """A full disk names no file, and libraries name one without its folder."""
    with pytest.raises(OSError, match="No space left") as full, whole_folder(tmp_path / "folder"):
        raise OSError(errno.ENOSPC, "No space left on device", name)
    assert full.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as missing, whole_folder(tmp_path / "folder"):
        (tmp_path / "source").read_text()
    assert missing.value.filename == str(tmp_path / "source")


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as temporary, whole_folder(tmp_path / "folder") as work:
        child = os.fork()
        if child == 0:
            try:
                write_text(tmp_path / "file", "theirs")
                with whole_folder(tmp_path / "folder"):
                    pass
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert temporary.exists()
        assert work.exists()
        (tmp_path / "folder").rmdir()
        temporary.write_text("ours")
    assert (tmp_path / "file").read_text() == "ours"
