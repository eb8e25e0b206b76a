"""Files appear whole or not at all."""

import os

import pytest

from biomodel.errors import OutputError
from biomodel.files import atomic_folder, atomic_write


def test_replaces_in_one_step(tmp_path):
    target = tmp_path / "deep" / "summary.json"
    with atomic_write(target) as path:
        assert path.parent == target.parent and path.name.endswith("summary.json")
        path.write_text("one")
        assert not target.exists()
    with atomic_write(target) as path:
        path.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert os.listdir(target.parent) == ["summary.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_other_failures_pass_and_leave_the_old_file(tmp_path, error):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_write(target) as path:
        path.write_text("new")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (28, "The disk is full"),
        (13, "You may not write there"),
        (30, "read-only"),
        (122, "quota"),
        (5, "Choose another"),
    ],
)
def test_disk_errors_become_output_errors(tmp_path, number, remedy):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(OutputError, match=f"a.json: cannot be written.*{remedy}.*Nothing was changed"):
        with atomic_write(target) as path:
            path.write_text("new")
            raise OSError(number, os.strerror(number))
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_missing_input_is_no_output_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.json"):
        (tmp_path / "input").read_text()


def test_forgetting_to_write_is_told(tmp_path):
    with pytest.raises(OutputError), atomic_write(tmp_path / "a.json"):
        pass


def test_refusals(tmp_path):
    (tmp_path / "a.json").write_text("old")
    for target, options, message in (
        (tmp_path, {}, "is a folder"),
        (tmp_path / "a.json", {"overwrite": False}, "exists already and is left as it is"),
        (tmp_path / "a.json" / "b", {}, "is a file, not a folder"),
    ):
        with pytest.raises(OutputError, match=message), atomic_write(target, **options):
            pytest.fail("not reached")
    assert (tmp_path / "a.json").read_text() == "old"


def test_links_stay_links(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_folder(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as path:
        (path / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(OutputError, match="exists already"), atomic_folder(target):
        pytest.fail("not reached")
    with atomic_folder(target, overwrite=True) as path:
        (path / "b").write_text("2")
        assert os.listdir(target) == ["a"]
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["out"]


def test_folder_whose_rename_fails_gives_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("1")
    real, calls = os.rename, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match="out: cannot be written"), atomic_folder(target, overwrite=True) as path:
        (path / "b").write_text("2")
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["out"]
