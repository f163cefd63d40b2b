"""Robots that a policy can move, as `openpi_client.realtime.Robot`s, and what their programs share.

One robot or world a file; its library is imported when the robot is made, so that all of this loads without it
(docs/how-to/robots.md):

    aloha (over ros1 or ros2)   droid   ur5 (with robotiq)   trossen   lerobot     robots
    worlds   libero   calvin                                                       simulators
    program, flags, fit, dry_run, motion, cameras, pictures, video, libraries      what programs are made of
"""
