"""Programs that use the node: an rclpy session, the node as a child process, an example policy."""
