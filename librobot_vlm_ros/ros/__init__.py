"""The ROS room: the lifecycle node `vlm` and what it is made of.

Nothing is imported here, so that parameters and arguments can be read without rclpy.

    parameter, settings, grammar   the parameters: declaration, bounds, notations     (no rclpy)
    arguments, transport           command line and launch arguments, DDS profile     (no rclpy)
    node, lifecycle, vlm_node      the node, guarded transitions, the process
    live_parameters, parameter_requests   the parameters on the node, as clients ask for them
    camera, matching, decoder      images in
    publishing, annotate           results out
    services, generate, on_demand  questions
    intake, deferred               requests taken beside the executor, answered later
    diagnostics, reporting         what goes wrong, said once
    refusals                       what rcl refuses, coded                            (no rclpy)
"""
