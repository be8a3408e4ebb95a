"""What the node publishes: results, detections, annotated frames."""
