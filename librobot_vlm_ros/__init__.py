"""Vision-language models for ROS 2: images in; captions, grounded regions and embeddings out.

Rooms, and the one direction of imports between them: ros -> runtime -> models -> core.

    core      frames, requests, results, errors, image decoding, prompts
    models    families, generation, caches, checkpoints, training
    runtime   the engine: one thread owns the model; newest frames, scheduling, cancellation
    ros       the lifecycle node: parameters, inputs, outputs, services, monitoring
    bags      reading, writing and salvaging recordings
    client    talking to a running node
    cli       the `librobot-vlm` command; annotate, replay, doctor and demo are what it does
    tabletop  the rendered world of the embedded model; evaluation has the metrics, bench the speed

The generated messages (`msg`, `srv`, `action`) stand beside these once the package was built with
colcon. Importing this package loads none of them, and neither torch nor rclpy.
"""

from __future__ import annotations

import pkgutil

__all__ = ["__version__"]

__version__ = "0.1.0"

# From a checkout the Python modules lie here and the generated messages in the colcon
# installation: with this, both halves are found whichever comes first on the path.
__path__ = pkgutil.extend_path(__path__, __name__)
