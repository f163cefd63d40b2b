"""Inference from a PyTorch checkpoint, once through a policy and once through the model itself."""

import sys

import jax
import numpy as np
import safetensors.torch
import torch

import their_config
import their_policy
from openpi import transforms
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.policies import policy as _policy
from openpi.policies import policy_config
from openpi.training import checkpoints as _checkpoints
from openpi.training import data_loader as _data_loader

checkpoint_dir = sys.argv[1]
config = their_config.get_config("pi0_arm")

policy = policy_config.create_trained_policy(config, checkpoint_dir, pytorch_device="cpu")
result = policy.infer(their_policy.make_arm_example())
print("Actions shape:", result["actions"].shape)

device = torch.device("cpu")
model = PI0Pytorch(config.model).to(device)
safetensors.torch.load_model(model, f"{checkpoint_dir}/model.safetensors")
model.eval()
noise = np.random.default_rng(0).standard_normal((config.model.action_horizon, config.model.action_dim), np.float32)
again = config.model.load_pytorch(config, f"{checkpoint_dir}/model.safetensors").state_dict()
print("Read by the configuration:", all(torch.equal(again[name], value) for name, value in model.state_dict().items()))

loader = _data_loader.create_data_loader(config, framework="pytorch", num_batches=1)
for observation, actions in loader:
    observation = jax.tree.map(lambda x: x.to(device), observation)
    actions = actions.to(torch.float32)
    with torch.no_grad():
        losses = model(observation, actions)
    print("Losses:", tuple(losses.shape), bool(torch.isfinite(losses).all()))
    sampled = model.sample_actions(device, observation, num_steps=3)
    print("Sampled:", tuple(sampled.shape), np.asarray(sampled).dtype)

# A policy put together by hand, as in a fork's own `create_trained_policy`.
example = their_policy.make_arm_example()
data_config = config.data.create(config.assets_dirs, config.model)
norm_stats = _checkpoints.load_norm_stats(f"{checkpoint_dir}/assets", data_config.asset_id)
by_hand = _policy.Policy(
    model,
    transforms=[
        transforms.InjectDefaultPrompt(None),
        *data_config.data_transforms.inputs,
        transforms.Normalize(norm_stats, use_quantiles=data_config.use_quantile_norm),
        *data_config.model_transforms.inputs,
    ],
    output_transforms=[
        *data_config.model_transforms.outputs,
        transforms.Unnormalize(norm_stats, use_quantiles=data_config.use_quantile_norm),
        *data_config.data_transforms.outputs,
    ],
    sample_kwargs={"num_steps": 3},
    metadata=config.policy_metadata,
    is_pytorch=True,
    pytorch_device="cpu",
)
ready = policy_config.create_trained_policy(
    config, checkpoint_dir, pytorch_device="cpu", sample_kwargs={"num_steps": 3}, dtype="float32"
)
found, expected = (each.infer(example, noise=noise)["actions"] for each in (by_hand, ready))
print("By hand:", np.allclose(found, expected, atol=1e-4))
