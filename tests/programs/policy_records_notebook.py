# %%
"""A notebook's cells that look at what a policy was asked: the folder of `serve_policy.py --record`."""

import pathlib

import numpy as np

record_path = pathlib.Path("policy_records")
num_steps = len(list(record_path.glob("step_*.npy")))

records = []
for i in range(num_steps):
    record = np.load(record_path / f"step_{i}.npy", allow_pickle=True).item()
    records.append(record)

# %%
print("length", len(records))
print("keys", sorted(records[0]))

# %%
from PIL import Image  # noqa: E402


def get_image(step: int) -> Image.Image:
    return Image.fromarray(records[step]["inputs/arm/camera"])


print("size", get_image(num_steps - 1).size)

# %%
actions = np.stack([record["outputs/actions"] for record in records])
print("actions", actions.shape)
