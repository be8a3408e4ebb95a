"""Says when another node has this node's name.

ROS 2 allows it and says nothing, but services, parameters and transitions then reach one of the
two by chance, and both publish to the same topics. Mostly it is a node that was left running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: A process that was killed stays in the graph for so long (Fast DDS: 20 s) without being there.
_GHOST_S = 30.0


class DuplicateNodeCheck:
    """Looks for nodes of the same name and namespace. `check` is called on a timer."""

    def __init__(
        self, node: Any, *, ghost_s: float = _GHOST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._node = node
        self._ghost_s = ghost_s
        self._clock = clock
        self._since_s: float | None = None
        self.problem = ""
        """What is wrong and what to do, "" when the name is this node's alone."""

    def check(self) -> None:
        """Look again; logs when that has changed."""
        own = (self._node.get_name(), self._node.get_namespace())
        count = self._node.get_node_names_and_namespaces().count(own)
        now_s = self._clock()
        if count < 2:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        name = self._node.get_fully_qualified_name()
        lasting = self._since_s is not None and now_s - self._since_s >= self._ghost_s
        problem = (
            f"{count} nodes are called {name}: requests reach one of them by chance. "
            "End the other, or start this one with namespace:=, or in another ROS_DOMAIN_ID."
            if lasting
            else ""
        )
        if problem and not self.problem:
            self._node.get_logger().warning(problem)
        elif self.problem and not problem:
            self._node.get_logger().info(f"{name} is the only node of this name again")
        self.problem = problem
