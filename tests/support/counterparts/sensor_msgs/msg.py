from ros_messages import message

JointState = message("JointState", header=None, name=[], position=[], velocity=[], effort=[])
Image = message("Image", header=None, height=0, width=0, encoding="", is_bigendian=0, step=0, data=b"")
