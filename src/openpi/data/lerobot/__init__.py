"""LeRobot datasets: read formats v2.0, v2.1 and v3.0, write v3.0."""
