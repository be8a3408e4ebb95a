"""The node under the load of a robot, measured."""
