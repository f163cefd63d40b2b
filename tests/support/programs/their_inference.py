"""Inference from a PyTorch checkpoint, once through a policy and once through the model itself."""

import sys

import jax
import numpy as np
import safetensors.torch
import torch

import their_config
import their_policy
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.policies import policy_config
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
