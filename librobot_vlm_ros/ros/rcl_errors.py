"""What ROS refuses for reasons that the operator can mend: its log's folder, names, SROS2.

rcl says these things as plain texts, some of them without the name of what was refused.
"""

from __future__ import annotations

import os
import re

from librobot_vlm_ros.core import (
    BagError,
    ErrorCode,
    ModelError,
    VlmError,
    bad_parameter,
)

_STEPS = "config/sros2/README.md has the steps"
# Without security rcl fails so only for what the package's own tests would show.
_ENDPOINT = re.compile(r"failed to create (subscription|publisher|service|client)", re.IGNORECASE)
_RIGHTS = {
    "subscription": "subscribe to",
    "publisher": "publish",
    "service": "offer",
    "client": "call",
}


def coded_rcl_error(error: BaseException, name: str = "") -> VlmError | None:
    """What rcl's error says, coded and with what to do; None for anything else. A `VlmError` is
    returned as it is.

    Args:
        error: what rclpy raised.
        name: the topic or service that was to be made, where the caller knows it.
    """
    if isinstance(error, VlmError):
        return error
    text = " ".join(str(error).split())
    if "log directory" in text:
        return BagError(
            ErrorCode.PERMISSION_DENIED,
            f"ROS cannot write its log: {text}",
            "Set ROS_LOG_DIR (or ROS_HOME, or HOME) to a folder that this user may write.",
        )
    if "security libraries" in text:
        return ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"ROS_SECURITY_ENABLE is set, and this middleware was built without security: {text}",
            "Take one that was built with it, as those of the ROS distributions are.",
        )
    if "SECURITY ERROR" in text or "find all security files" in text:
        return BagError(
            ErrorCode.FILE_NOT_FOUND,
            f"ROS_SECURITY_ENABLE is set, and the enclave's files are not there: {text}",
            "Name the enclave (--ros-args --enclave /vlm, or ROS_SECURITY_ENCLAVE_OVERRIDE=/vlm; "
            f"/vlm_client for clients), check ROS_SECURITY_KEYSTORE, or make the keys: {_STEPS}.",
        )
    if "invalid node name" in text or "Trying to set parameter" in text:
        return bad_parameter(
            f"the node cannot start so: {text}", "Correct the name, the namespace or the parameter."
        )
    refused = _ENDPOINT.search(text)
    if refused is None or os.environ.get("ROS_SECURITY_ENABLE") != "true":
        return None
    kind = refused[1].lower()
    what = f"{_RIGHTS[kind]} {name}" if name else f"have this {kind}"
    return BagError(
        ErrorCode.PERMISSION_DENIED,
        f"by the SROS2 policy this enclave may not {what}: {text}",
        "The lines of SECURITY in the output name it. Put it into the policy (its names hold for "
        f"one name and namespace of the node) and make the keys again: {_STEPS}.",
    )
