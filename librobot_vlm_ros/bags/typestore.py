"""Message definitions for reading and writing bags without a ROS installation.

The store holds ROS 2 Jazzy's own types and this package's, the latter read from the `.msg` files
that ship with it, so that there is one definition of each message.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from librobot_vlm_ros.core import BagError, ErrorCode
from librobot_vlm_ros.core.files import package_file

PACKAGE = "librobot_vlm_ros"


_jazzy = functools.cache(lambda: get_typestore(Stores.ROS2_JAZZY))


@functools.cache
def package_typestore() -> Typestore:
    """ROS 2 Jazzy's messages and this package's (`librobot_vlm_ros/msg/Caption` and so on).

    Raises `BagError` (FILE_NOT_FOUND) when the package's `.msg` files are not there.
    """
    one = package_file("msg/InferenceInfo.msg")
    if one is None:
        raise BagError(
            ErrorCode.FILE_NOT_FOUND,
            f"the message definitions of {PACKAGE} (msg/*.msg) were not found",
            "Build the package with colcon and source its install/setup.bash, or run from a "
            "checkout.",
        )
    types: dict[str, Any] = {}
    for path in sorted(one.parent.glob("*.msg")):
        name = f"{PACKAGE}/msg/{path.stem}"
        types.update(get_types_from_msg(path.read_text(encoding="utf-8"), name))
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(types)
    return store


def extended_typestore(bag_types: Mapping[str, Any]) -> Typestore:
    """A store in which the definitions that a bag carries win over the ones known here.

    A bag recorded with an older version of a message can only be read with that version.
    """
    try:
        known = package_typestore()
    except BagError:  # a bag of other messages needs none of ours; one of ours brings its own
        known = _jazzy()
    if all(known.fielddefs.get(name) == fields for name, fields in bag_types.items()):
        return known
    store = get_typestore(Stores.EMPTY)
    store.register({**known.fielddefs, **bag_types})
    return store
