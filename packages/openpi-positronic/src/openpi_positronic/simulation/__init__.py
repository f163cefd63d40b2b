"""The simulated Franka as a robot: a control loop around a policy, recordings of it, drivers that run episodes."""
