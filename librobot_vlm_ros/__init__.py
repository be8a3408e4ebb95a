"""Vision-language models for ROS 2: images in; captions, grounded regions and embeddings out.

Rooms, and the one direction of imports between them: ros -> runtime -> models -> core.

    core      frames, requests, results, errors, image decoding, prompts, box geometry
    models    the registry, one file a model family, checkpoints, decoding
    runtime   the engine: one thread owns the model; mailboxes, scheduling, cancellation
    ros       the lifecycle node, parameters, message conversion
    tabletop  the rendered world of the embedded model: scenes, training, evaluation
    bags      reading and writing db3 and MCAP files
    cli       the `librobot-vlm` command

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
