"""Image helpers of the data path: the client's, so that robot and server prepare images alike."""

from openpi_client.image_tools import convert_to_uint8, resize_with_pad

__all__ = ["convert_to_uint8", "resize_with_pad"]
