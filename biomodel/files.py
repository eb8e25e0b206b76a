"""Writing files so that a reader sees the old content or the whole new one, never a part.

Everything is written beside its target under a temporary name and renamed at the end. A failure or an interruption
removes the temporary file and leaves what was there before untouched.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biomodel.errors import OutputError

__all__ = ["atomic_folder", "atomic_write"]

_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space or choose another output folder.",
    errno.EDQUOT: "Your disk quota is used up: free some space or choose another output folder.",
    errno.EACCES: "You may not write there: choose another output folder or change its permissions.",
    errno.EPERM: "You may not write there: choose another output folder or change its permissions.",
    errno.EROFS: "That file system is read-only: choose another output folder.",
    errno.ENOTDIR: "A part of that path is a file, not a folder: choose another output path.",
    errno.EEXIST: "A part of that path is a file, not a folder: choose another output path.",
    errno.ENAMETOOLONG: "The name is too long: choose a shorter one.",
}


def _output_error(path: Path, error: OSError) -> OutputError:
    remedy = _REMEDIES.get(error.errno or 0, "Choose another output path.")
    reason = error.strerror or str(error) or type(error).__name__
    return OutputError(f"{path}: cannot be written ({reason}). {remedy} Nothing was changed.")


def _beside(path: Path) -> Path:
    # The full name stays at the end, because writers choose the format by the suffix (.nii.gz, .json).
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(target, error) from error


def _is_about(error: OSError, temporary: Path) -> bool:
    # An input file that cannot be read inside the block is not a failure to write this target.
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return named == temporary or temporary in named.parents


def _flush_to_disk(path: Path) -> None:
    # A full disk may only show here, before the rename, instead of as an empty file after a crash.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; put it in place when the block ends well, remove it otherwise.

    Parameters
    ----------
    path
        Where the file shall lie. Missing parent folders are made.
    overwrite
        Whether an existing file may be replaced (by the whole new one, in one step).

    Yields
    ------
    pathlib.Path
        Path to write to, with the same ending as `path`.

    Raises
    ------
    OutputError
        If the file cannot be written (full disk, no permission, read-only, a folder of that name), or the file exists
        and `overwrite` is false. What was at `path` is unchanged then.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; expected the name of a file. Choose another output path.")
    if not overwrite and target.exists():
        raise OutputError(f"{target}: exists already and is left as it is. Choose another name or remove it first.")
    if target.is_symlink():
        target = target.resolve()
    temporary = _beside(target)
    _make_parent(target)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if _is_about(error, temporary):
            raise _output_error(target, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Give a new temporary folder beside `path`; rename it to `path` when the block ends well, remove it otherwise.

    Parameters
    ----------
    path
        Where the folder shall lie. An existing empty folder counts as free.
    overwrite
        Whether an existing folder may be replaced as a whole.
    marker
        Name of a file that an existing folder must hold before it may be replaced, so that a mistyped path never costs
        a folder of another kind.

    Yields
    ------
    pathlib.Path
        The empty temporary folder.

    Raises
    ------
    OutputError
        If the folder cannot be written, or exists and may not be replaced. What was there is unchanged then.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file; expected a folder. Choose another output path.")
        occupied = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise _output_error(target, error) from error
    if occupied and not overwrite:
        raise OutputError(
            f"{target}: exists already and is left as it is. Choose another folder, or allow it with overwrite=True."
        )
    if occupied and marker is not None and not (target / marker).is_file():
        raise OutputError(
            f"{target}: holds no {marker}, so it is not replaced even with overwrite=True. Choose another folder."
        )
    temporary = _beside(target)
    retired = _beside(target)
    _make_parent(target)
    try:
        temporary.mkdir()
        yield temporary
        if occupied:
            os.rename(target, retired)
        try:
            os.rename(temporary, target)
        except BaseException:
            if occupied:
                os.rename(retired, target)
            raise
    except OutputError as error:
        # A file inside the folder could not be written: name its place in the target, not in the temporary folder.
        raise OutputError(str(error).replace(str(temporary), str(target))) from error
    except OSError as error:
        if _is_about(error, temporary):
            raise _output_error(target, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)
