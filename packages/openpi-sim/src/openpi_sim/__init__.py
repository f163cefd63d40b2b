"""Worlds in MuJoCo: what they share, and those of ALOHA and LIBERO with their experts.

rays       pictures without OpenGL        opengl       who draws where there is some
poses      positions and quaternions      kinematics   joints for a pose
asked      what an expert is asked with   actions      a row of a chunk, checked
"""
