"""The public evaluations of Positronic."""
