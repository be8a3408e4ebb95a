"""The ROS room: the lifecycle node `vlm`. Nothing is imported here, so that parameters and
arguments can be read without rclpy.

    main                 the process: signals, executor, orderly end
    node                 the node: what follows, put together; `lifecycle` is its base
    model_loading        the model into the engine

    parameters/          declared once (`settings`), on the node (`live_parameters`), as launch
                         arguments (`arguments`)
    inputs/              `camera`: from its topic to a frame in the engine's mailbox; `instruction`
    outputs/             `results`: from a result to its topic; `annotated` frames
    services/            `node_services`, `generate` (the action), and how requests are taken
                         without the executor (`service_thread`)
    monitoring/          diagnostics, log lines that cannot flood, other nodes of this name

    dds                  the transport made ready for images
    rcl_errors           what rcl refuses, coded
"""
