#!/bin/bash
# The program that is named first, with ROS and the arms' messages in its environment.
source /ros/install/setup.bash
program=$1
shift
exec python3 "/openpi/examples/aloha_real/${program}" "$@"
