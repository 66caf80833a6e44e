from pathlib import Path

import pytest

from duo_id.files import atomic_path, write_text


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_path(path) as beside:
        beside.write_text("whole")
        assert beside.parent == path.parent, "a rename is atomic within one folder only"
        assert beside.suffix == ".txt"
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
        with atomic_path(path) as beside:
            beside.write_text("half")
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
        monkeypatch.setattr(f"duo_id.files.os.{name}", lambda *a, call=call, name=name: (order.append(name), call(*a)))
    write_text(tmp_path / "file.txt", "äöü")
    assert order == ["fsync", "replace"]
    assert (tmp_path / "file.txt").read_bytes() == "äöü".encode()
