"""What the standing tasks look for now, and its number, so that a policy can tell old results from
new.
"""

from __future__ import annotations

import threading

from librobot_vlm_ros.core import clean_prompt, escape_for_log

__all__ = ["Instruction"]


class Instruction:
    """The current instruction. The number counts up from 1 with each different text; 0 is none so
    far.
    """

    def __init__(self, text: str = "") -> None:
        self._lock = threading.Lock()
        self.text = ""
        self.number = 0
        self.set(text)

    def set(self, text: str) -> int:
        """Make `text` the instruction; its number. The same text again keeps its number."""
        cleaned = clean_prompt(text, required=False)
        with self._lock:
            if cleaned != self.text:
                self.text = cleaned
                self.number += 1
            return self.number

    @property
    def shown(self) -> str:
        """The text as a log may show it."""
        return escape_for_log(self.text)
