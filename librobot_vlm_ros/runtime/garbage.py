"""Python's garbage collector in a process that lives for weeks.

A full collection looks at every object there is: with torch and a model a tenth of a second and
more, in which nothing else runs. Once everything is loaded, what there is can be left out of it:
then collections are short. What was left out must be taken in again to free a model.
"""

from __future__ import annotations

import gc

__all__ = ["collect", "settle"]


def settle() -> None:
    """Free what sits in reference cycles, and leave all else out of later collections.

    It is about the whole process: for a program to call, not for a library.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Free what sits in reference cycles, also of what `settle` left out."""
    if gc.get_freeze_count():
        settle()
    else:
        gc.collect()
