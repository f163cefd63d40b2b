"""Names of Positronic that its users write in commands, forwarding to openpi."""
