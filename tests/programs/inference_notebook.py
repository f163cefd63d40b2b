# %%
"""A notebook's cells, in the order of the published one: a policy, a live model, and a batch of its data."""

import dataclasses
import os

import jax

from openpi.models import model as _model
from openpi.policies import policy_config as _policy_config
from openpi.shared import download
from openpi.training import config as _config
from openpi.training import data_loader as _data_loader

# %%
config = _config.get_config("their_config:_ARM")
checkpoint_dir = download.maybe_download(os.environ["THEIR_CHECKPOINT"])

policy = _policy_config.create_trained_policy(config, checkpoint_dir)

from their_policy import make_arm_example  # noqa: E402

example = make_arm_example()
result = policy.infer(example)

del policy

print("Actions shape:", result["actions"].shape)

# %%
key = jax.random.key(0)
model = config.model.load(_model.restore_params(checkpoint_dir / "params"))
obs, act = config.model.fake_obs(), config.model.fake_act()
loss = model.compute_loss(key, obs, act)
print("Loss shape:", loss.shape)

# %%
config = dataclasses.replace(config, batch_size=1)
loader = _data_loader.create_data_loader(config, num_batches=1, skip_norm_stats=True)
obs, act = next(iter(loader))

del loader

loss = model.compute_loss(key, obs, act)
print("Loss shape:", loss.shape)
