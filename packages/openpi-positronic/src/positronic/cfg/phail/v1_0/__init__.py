"""Their version 1.0."""
