"""`python -m librobot_vlm_ros.cli` is `librobot-vlm`."""

from __future__ import annotations

import sys

from librobot_vlm_ros.cli.main import main

sys.exit(main())
