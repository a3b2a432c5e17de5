"""Atomic writes: the old content or the new, whatever fails."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from effbert import files
from effbert.files import DiskFullError, atomic_dir, atomic_path, read_kept, remove_partial, write_atomic


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_and_bytes_are_written_and_replaced(tmp_path):
    target = tmp_path / "a.txt"
    write_atomic(target, "naïve\n")
    assert target.read_bytes() == "naïve\n".encode()
    write_atomic(str(target), b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_damaged_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "row.json"
    path.write_text('{"a": 1}')
    assert read_kept(path, "makes it anew", "a") == {"a": 1}
    for damaged in (b"", b'{"a": ', b"[]", b'{"b": 1}', b"\xff"):
        path.write_bytes(damaged)
        for delete, named in ((None, "it"), (tmp_path, tmp_path)):
            with pytest.raises(ValueError) as caught:
                read_kept(path, "makes it anew", "a", delete=delete)
            assert str(caught.value) == f"{path} is damaged: delete {named}, and the same command makes it anew"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_kept(path, "makes it anew")


def test_the_temporary_path_keeps_folder_and_suffix(tmp_path):
    with atomic_path(tmp_path / "model.safetensors") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".safetensors"
        temporary.write_bytes(b"x")


def test_what_a_killed_writer_left_goes_with_the_next_write_of_the_same_path(tmp_path):
    code = (
        "import os, sys; from effbert.files import atomic_dir, atomic_path\n"
        "with atomic_dir(sys.argv[1] + '/model') as folder, atomic_path(sys.argv[1] + '/a[1]') as file:\n"
        "    (folder / 'weights').write_text('half'); file.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 2 and all(name.startswith(files.PARTIAL) for name in left)
    with atomic_path(tmp_path / "b") as mine:  # of another path, and in use
        mine.write_text("b")
        write_atomic(tmp_path / "b", "other")
        assert mine.exists() and set(left) < set(os.listdir(tmp_path))
    write_atomic(tmp_path / "a[1]", "whole")
    with atomic_dir(tmp_path / "model"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a[1]", "b", "model"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failing_body_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a"
    write_atomic(target, "old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_line_that_names_the_path_and_loses_nothing(tmp_path, monkeypatch, call):
    target = tmp_path / "a"
    write_atomic(target, "old")
    monkeypatch.setattr(files.os, call, full_disk)
    with pytest.raises(DiskFullError) as caught:
        write_atomic(target, "new")
    message = str(caught.value)
    assert str(target) in message and "no space left on device" in message and "\n" not in message
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_below_torch_save_is_recognised(tmp_path):
    class FullFile:
        def write(self, data):
            full_disk()

        def flush(self):
            pass

    with pytest.raises(DiskFullError), atomic_path(tmp_path / "a.pt") as temporary:
        temporary.touch()
        torch.save({"weights": torch.zeros(1000)}, FullFile())
    assert os.listdir(tmp_path) == []


def test_another_os_error_keeps_its_type(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "missing" / "a", "x")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "best"
    for names in (["a", "b"], ["c"]):
        with atomic_dir(target) as temporary:
            for name in names:
                (temporary / "sub").mkdir(exist_ok=True)
                (temporary / "sub" / name).write_text(name)
        assert sorted(os.listdir(target / "sub")) == names
    assert os.listdir(tmp_path) == ["best"]


@pytest.mark.parametrize("fails_at", ["body", "last rename"])
def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, fails_at):
    target = tmp_path / "best"
    target.mkdir()
    (target / "a").write_text("old")
    replace = os.replace

    def failing_replace(source, destination):
        if destination == target and not os.path.exists(source / "a"):
            full_disk()
        replace(source, destination)

    with pytest.raises(DiskFullError), atomic_dir(target) as temporary:
        (temporary / "b").write_text("new")
        if fails_at == "body":
            full_disk()
        monkeypatch.setattr(files.os, "replace", failing_replace)
    assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["best"]


def test_what_a_killed_process_left_is_swept_up_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / f"{files.PARTIAL}1-a").write_text("half")
    (tmp_path / f"{files.PARTIAL}2-best").mkdir()
    (tmp_path / f"{files.PARTIAL}2-best" / f"{files.PARTIAL}3-a").write_text("half")
    (tmp_path / "deep" / "a").write_text("whole")
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == ["deep"] and os.listdir(tmp_path / "deep") == ["a"]
