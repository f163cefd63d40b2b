"""LIBERO: a Franka at tables and in kitchens, 130 tasks in five suites. 10 rows a second; needs the extra `sim`."""
