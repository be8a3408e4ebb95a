"""What this package gains over transformers' processor and `generate`, measured side by side.

    python -m librobot_vlm_ros.bench --device cpu|cuda --out build/bench

Needs torch and transformers, and no ROS. Runs of the two sides are interleaved in one process
(A B A B ...) on the same inputs, each pair on a frame of its own; what is said of them are medians,
and the spread of the pairs' ratios. Both must give the same tokens.
"""
