"""Python's garbage collector in a process that lives for weeks.

A full collection looks at every object there is: with torch and a model a tenth of a second and
more, in which nothing else runs. So it comes seldom, and what sits in reference cycles piles up for
half an hour. Once everything is loaded, what there is can be left out of it: then collections are
short and come often. What was left out must be taken in again to free a model.
"""

from __future__ import annotations

import gc
import sys

__all__ = ["collect", "settle"]


#: Enough to fill the table of interned strings of a process with ROS in it twice.
_NAMES = 150_000


def settle() -> None:
    """Free what sits in reference cycles, and leave all else out of later collections.

    It is about the whole process: for a program to call, not for a library.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    # Strings that were interned and dropped still fill CPython's table of them (rclpy leaves some
    # at every message). Full, it is made anew beside the old one: the first time it grows, the
    # second time it needs as much again, 2 MB each; after that the two places take turns. Now is
    # better than in half an hour, where it looks like a leak.
    for number in range(_NAMES):
        sys.intern(f"librobot_vlm_ros {number}")


def collect() -> None:
    """Free what sits in reference cycles, also of what `settle` left out."""
    if gc.get_freeze_count():
        settle()
    else:
        gc.collect()
