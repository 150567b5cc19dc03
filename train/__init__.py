"""The training program: config, data, mesh, step, loop and checkpoint around the `transformer` library."""
