from ros_messages import message

RGBGrayscaleImage = message("RGBGrayscaleImage", header=None, images=[])
