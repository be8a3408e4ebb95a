"""Keep third-party warnings from becoming errors."""

from __future__ import annotations

import warnings

#: What `python -m` and scripts name this package's modules, too.
_NOT_OURS = r"(?!librobot_vlm_ros\b|__main__\b)"


def let_libraries_warn() -> None:
    """With `PYTHONWARNINGS=error` or `-W error`: warnings of other packages are shown, not raised.

    rclpy's own imports warn (lark, of ROS 2 Jazzy, imports a deprecated module), and the whole
    program would end with them. Those of this package stay errors. Other filters are left as they
    are. To be called before the imports of libraries.
    """
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.filterwarnings("default", module=_NOT_OURS)
