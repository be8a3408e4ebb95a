"""Errors as data: a stable code, what was wrong, what was expected and what to do.

Codes are part of the interface (they stand in every message as `error_code`): never renumber one.

    VlmError                    base; INTERNAL(900), INVALID_TRANSITION(700), TOPIC_TIMEOUT(701)
    ├── ImageError       100+   what a camera, a file or a client sent is no usable image
    ├── RequestError     200+   a task, prompt, parameter, region or topic that cannot be served
    ├── ModelError       300+   a model that cannot be found, loaded or placed
    ├── InferenceError   400+   a model that failed while answering
    ├── EngineError      500+   the engine refused or ended the work (busy, cancelled, too late)
    └── BagError         600+   bags, files, disk, permissions
"""

from __future__ import annotations

import errno
from enum import IntEnum

from librobot_vlm_ros.core.logtext import escape_for_log

MAX_MESSAGE_CHARS = 2000


class ErrorCode(IntEnum):
    """Every code that a response or result can carry; the constants of `msg/ErrorCode.msg`."""

    OK = 0
    # image
    BAD_IMAGE = 100
    UNKNOWN_ENCODING = 101
    UNSUPPORTED_ENCODING = 102
    BAD_STEP = 103
    BAD_DATA_LENGTH = 104
    EMPTY_IMAGE = 105
    IMAGE_TOO_LARGE = 106
    CORRUPT_COMPRESSED = 107
    NON_FINITE_DEPTH = 108
    # request
    EMPTY_PROMPT = 200
    PROMPT_TOO_LONG = 201
    UNKNOWN_TASK = 202
    TASK_NOT_SUPPORTED = 203
    BAD_PARAMETER = 204
    CONTROL_TOKEN_IN_PROMPT = 205
    NO_FRAME = 206
    FRAME_TOO_OLD = 207
    TOPIC_MISSING = 208
    UNKNOWN_CAMERA = 209
    BAD_REGION = 210
    # model
    UNKNOWN_MODEL = 300
    WEIGHTS_NOT_FOUND = 301
    WEIGHTS_CORRUPT = 302
    BAD_CONFIG = 303
    SHAPE_MISMATCH = 304
    KEY_MISMATCH = 305
    UNSAFE_CHECKPOINT = 306
    TOKENIZER_MISMATCH = 307
    DEVICE_UNAVAILABLE = 308
    DTYPE_UNSUPPORTED = 309
    ATTENTION_UNAVAILABLE = 310
    MODEL_NOT_LOADED = 311
    MISSING_DEPENDENCY = 312
    NAN_WEIGHTS = 313
    LOAD_CANCELLED = 314
    CHECKSUM_MISMATCH = 315
    # inference
    INFERENCE_FAILED = 400
    OUT_OF_MEMORY = 401
    NAN_LOGITS = 402
    # engine
    BUSY = 500
    CANCELLED = 501
    DEADLINE_EXCEEDED = 502
    NOT_ACTIVE = 503
    SHUTTING_DOWN = 504
    # bags and files
    BAG_UNREADABLE = 600
    TOPIC_NOT_IN_BAG = 601
    WRONG_TYPE = 602
    DISK_FULL = 603
    FILE_NOT_FOUND = 604
    PATH_NOT_ALLOWED = 605
    PERMISSION_DENIED = 606
    BAG_TRUNCATED = 607
    # node
    INVALID_TRANSITION = 700
    TOPIC_TIMEOUT = 701
    # a defect of ours
    INTERNAL = 900


class VlmError(Exception):
    """Base of every error of the package; the only kind of exception that leaves a public function.

    `code` is stable, `message` says what was wrong and what was expected (one printable line,
    foreign text in it is escaped), `hint` says what to do ("" where there is nothing to say).
    `str()` joins the three.
    """

    def __init__(self, code: ErrorCode | int, message: str, hint: str = "") -> None:
        self.code = ErrorCode(code)
        self.message = escape_for_log(message, MAX_MESSAGE_CHARS)
        # A hint is written by us and may list ways on lines of their own.
        self.hint = "\n".join(escape_for_log(line, MAX_MESSAGE_CHARS) for line in hint.split("\n"))
        super().__init__(self.code, message, hint)  # args = signature, so that it pickles

    def __str__(self) -> str:
        text = f"{self.code.name}({int(self.code)}): {_sentence(self.message)}"
        return f"{text} {self.hint}" if self.hint else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


class ImageError(VlmError):
    """What a camera, a file or a client sent is no usable image (100 to 199)."""


class RequestError(VlmError):
    """A task, prompt, parameter, region or topic that cannot be served (200 to 299)."""


class ModelError(VlmError):
    """A model that cannot be found, loaded or placed (300 to 399)."""


class InferenceError(VlmError):
    """A model that failed while answering (400 to 499)."""


class EngineError(VlmError):
    """The engine refused or ended the work: busy, cancelled, too late, not active (500 to 599)."""


class BagError(VlmError):
    """Bags, files, disk space and permissions (600 to 699)."""


def bad_image(message: str, hint: str = "") -> ImageError:
    """What somebody sent is no image (BAD_IMAGE)."""
    return ImageError(ErrorCode.BAD_IMAGE, message, hint)


def corrupt_picture(kind: str, what: str) -> ImageError:
    """A file of that kind, such as PNG, is not whole (CORRUPT_COMPRESSED)."""
    return ImageError(
        ErrorCode.CORRUPT_COMPRESSED,
        f"{kind} {what}",
        "The file was cut off or damaged on its way.",
    )


def bad_parameter(message: str, hint: str = "") -> RequestError:
    """A value that somebody gave is wrong (BAD_PARAMETER)."""
    return RequestError(ErrorCode.BAD_PARAMETER, message, hint)


_CLASS_OF_HUNDRED: dict[int, type[VlmError]] = {
    1: ImageError,
    2: RequestError,
    3: ModelError,
    4: InferenceError,
    5: EngineError,
    6: BagError,
}


def make_error(code: ErrorCode | int, message: str, hint: str = "") -> VlmError:
    """An error that came as data, in the class that `code` belongs to.

    A code that this version does not know becomes INTERNAL, its number kept in the message.
    """
    try:
        known = ErrorCode(code)
    except ValueError:
        return VlmError(ErrorCode.INTERNAL, f"unknown error code {code!r}: {message}", hint)
    return _CLASS_OF_HUNDRED.get(int(known) // 100, VlmError)(known, message, hint)


def _is_out_of_memory(exc: BaseException) -> bool:
    """torch's OutOfMemoryError is matched by name and text: the core does not import torch."""
    if isinstance(exc, MemoryError):
        return True
    if not isinstance(exc, RuntimeError):
        return False
    text = str(exc).lower()
    return (
        type(exc).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text  # torch's CPU allocator
    )


def as_vlm_error(exc: BaseException) -> VlmError:
    """Any exception as a coded error.

    A `VlmError` is returned as it is, another exception becomes the `__cause__`. Running out of
    memory, disk space or permission, missing files and packages, and paths that cannot be used have
    codes of their own; everything else is INTERNAL with the exception's type and text.
    """
    if isinstance(exc, VlmError):
        return exc
    error = _translated(exc)
    error.__cause__ = exc
    return error


#: A path that cannot be followed, or is a folder where a file is expected, or the reverse.
_UNUSABLE_PATH = (
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENXIO,
)


def _translated(exc: BaseException) -> VlmError:
    what = f"{type(exc).__name__}: {_text_of(exc)}"
    if _is_out_of_memory(exc):
        return InferenceError(
            ErrorCode.OUT_OF_MEMORY,
            what,
            "Use a smaller model, image, batch or dtype, or free memory on the device.",
        )
    if isinstance(exc, OSError):
        words = _words_of(exc) or what
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return BagError(ErrorCode.DISK_FULL, words, "Free space on that disk and try again.")
        if isinstance(exc, PermissionError) or exc.errno == errno.EROFS:
            return BagError(
                ErrorCode.PERMISSION_DENIED, words, "Let this user read or write that path."
            )
        if isinstance(exc, FileNotFoundError):
            return BagError(ErrorCode.FILE_NOT_FOUND, words, "Check the path.")
        if exc.errno in _UNUSABLE_PATH and exc.filename is not None:
            return BagError(ErrorCode.PATH_NOT_ALLOWED, words, "Check the path.")
    if isinstance(exc, ImportError):
        return ModelError(
            ErrorCode.MISSING_DEPENDENCY, what, "Install that package in this environment."
        )
    return VlmError(
        ErrorCode.INTERNAL, what, "This is a defect of librobot_vlm_ros: please report it."
    )


def _words_of(exc: OSError) -> str:
    """The system's words and the path, without the exception's name and number; "" without them."""
    if not isinstance(exc.strerror, str) or not exc.strerror:
        return ""
    return exc.strerror if exc.filename is None else f"{exc.strerror}: {exc.filename!r}"


def _text_of(exc: BaseException) -> str:
    """`str(exc)`, also where that itself fails."""
    try:
        return str(exc)
    except Exception:  # a broken foreign __str__ must not hide the error
        return "(no text)"
