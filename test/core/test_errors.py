"""Errors: stable codes, readable text, and every other exception translated into one of them."""

from __future__ import annotations

import errno
import pickle
import re
from pathlib import Path

import pytest

from librobot_vlm_ros import core
from librobot_vlm_ros.core import (
    BagError,
    EngineError,
    ErrorCode,
    ImageError,
    InferenceError,
    ModelError,
    RequestError,
    VlmError,
    as_vlm_error,
    make_error,
)

REPOSITORY = Path(__file__).parents[2]


def test_the_codes_are_those_of_the_message():
    text = (REPOSITORY / "msg" / "ErrorCode.msg").read_text()
    stated = {name: int(value) for name, value in re.findall(r"^uint16 (\w+)=(\d+)", text, re.M)}
    assert stated == {code.name: code.value for code in ErrorCode}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.BAD_STEP, ImageError),
        (ErrorCode.EMPTY_PROMPT, RequestError),
        (ErrorCode.UNKNOWN_MODEL, ModelError),
        (ErrorCode.OUT_OF_MEMORY, InferenceError),
        (ErrorCode.BUSY, EngineError),
        (ErrorCode.DISK_FULL, BagError),
        (ErrorCode.INVALID_TRANSITION, VlmError),
        (ErrorCode.INTERNAL, VlmError),
    ],
)
def test_an_error_that_came_as_data_gets_its_class_back(code, kind):
    error = make_error(int(code), "text", "hint")
    assert type(error) is kind
    assert (error.code, error.message, error.hint) == (code, "text", "hint")


def test_a_code_from_a_newer_version_is_kept_in_the_text():
    error = make_error(4711, "something new")
    assert error.code is ErrorCode.INTERNAL
    assert "4711" in error.message


def test_the_text_holds_name_number_message_and_hint():
    error = ImageError(ErrorCode.BAD_STEP, "step is 3 bytes, expected 6", "Check the driver.")
    assert str(error) == "BAD_STEP(103): step is 3 bytes, expected 6. Check the driver."
    assert str(ImageError(100, "why?")) == "BAD_IMAGE(100): why?"


def test_foreign_text_cannot_forge_log_lines():
    error = RequestError(ErrorCode.UNKNOWN_TASK, "task 'x\n[INFO] all is well\x1b[2K'")
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert str(RequestError(200, "a", "1. this\n2. that")).endswith("1. this\n2. that")


def test_a_message_is_bounded():
    assert len(str(ImageError(100, "x" * 10**6))) < 2200


def test_errors_survive_a_trip_to_another_process():
    error = pickle.loads(pickle.dumps(ImageError(ErrorCode.BAD_STEP, "a\nb", "c")))
    assert type(error) is ImageError
    assert (error.code, error.message, error.hint) == (103, "a\\nb", "c")


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("exception", "code", "kind"),
    [
        (MemoryError(), ErrorCode.OUT_OF_MEMORY, InferenceError),
        (RuntimeError("CUDA out of memory. Tried 2 GiB"), ErrorCode.OUT_OF_MEMORY, InferenceError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 401, InferenceError),
        (OutOfMemoryError("x"), ErrorCode.OUT_OF_MEMORY, InferenceError),
        (RuntimeError("shapes differ"), ErrorCode.INTERNAL, VlmError),
        (OSError(errno.ENOSPC, "No space left on device"), ErrorCode.DISK_FULL, BagError),
        (OSError(errno.EDQUOT, "Quota exceeded"), ErrorCode.DISK_FULL, BagError),
        (PermissionError(errno.EACCES, "no"), ErrorCode.PERMISSION_DENIED, BagError),
        (OSError(errno.EROFS, "Read-only file system"), ErrorCode.PERMISSION_DENIED, BagError),
        (FileNotFoundError(errno.ENOENT, "no"), ErrorCode.FILE_NOT_FOUND, BagError),
        (OSError(errno.ELOOP, "loop", "a"), ErrorCode.PATH_NOT_ALLOWED, BagError),
        (OSError(errno.ENAMETOOLONG, "long", "a"), ErrorCode.PATH_NOT_ALLOWED, BagError),
        (NotADirectoryError(errno.ENOTDIR, "file", "a"), ErrorCode.PATH_NOT_ALLOWED, BagError),
        (IsADirectoryError(errno.EISDIR, "folder", "a"), ErrorCode.PATH_NOT_ALLOWED, BagError),
        (OSError(errno.EIO, "broken"), ErrorCode.INTERNAL, VlmError),
        (ImportError("No module named 'x'"), ErrorCode.MISSING_DEPENDENCY, ModelError),
        (ZeroDivisionError("division by zero"), ErrorCode.INTERNAL, VlmError),
        (MuteError(), ErrorCode.INTERNAL, VlmError),
        (KeyboardInterrupt(), ErrorCode.INTERNAL, VlmError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_exceptions_become_coded_ones(exception, code, kind):
    error = as_vlm_error(exception)
    assert type(error) is kind
    assert error.code == code
    assert error.__cause__ is exception
    if isinstance(error, BagError):  # the system's own words say it
        assert error.message.split(":")[0] == exception.strerror
    else:
        assert type(exception).__name__ in error.message


def test_a_file_that_is_missing_is_named_without_the_exceptions_words(tmp_path):
    try:
        (tmp_path / "nothing").read_bytes()
    except OSError as missing:
        error = as_vlm_error(missing)
    assert error.message == f"No such file or directory: '{tmp_path / 'nothing'}'"


def test_a_coded_error_stays_itself():
    error = EngineError(ErrorCode.BUSY, "full")
    assert as_vlm_error(error) is error


def test_the_room_exports_what_it_says_and_nothing_else():
    public = {
        name
        for name, value in vars(core).items()
        if not name.startswith("_") and not isinstance(value, type(core)) and name != "annotations"
    }
    assert public == set(core.__all__)
    assert len(core.__all__) == len(set(core.__all__))
