"""What this package gains over transformers' processor and `generate`, measured side by side.

    python -m librobot_vlm_ros.bench --device cpu|cuda --out build/bench

Needs torch and transformers, and no ROS. Runs of the two sides are interleaved in one process
(A B A B ...) on the same inputs, each pair on a frame of its own. The rows give medians over the
pairs and the spread of their ratios. Both sides must give the same tokens.
"""
