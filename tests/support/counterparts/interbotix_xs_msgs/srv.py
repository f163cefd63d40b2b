from ros_messages import service

_joints = {"cmd_type": "", "name": ""}
Reboot = service("Reboot", **_joints, enable=False, smart_reboot=False)
TorqueEnable = service("TorqueEnable", **_joints, enable=False)
OperatingModes = service(
    "OperatingModes", **_joints, mode="", profile_type="", profile_velocity=0, profile_acceleration=0
)
