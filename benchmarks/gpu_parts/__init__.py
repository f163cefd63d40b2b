"""What `on_gpu.py` measures, one subject a file; `table.py` lists it."""
