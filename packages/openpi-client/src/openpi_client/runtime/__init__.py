"""A control loop: environment, agent, subscribers."""
