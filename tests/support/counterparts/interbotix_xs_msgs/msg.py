from ros_messages import message

JointGroupCommand = message("JointGroupCommand", name="", cmd=[])
JointSingleCommand = message("JointSingleCommand", name="", cmd=0.0)
