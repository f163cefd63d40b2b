"""What a policy call has to compute and to read, counted."""

from typing import Any

from gpu_parts.calls import observation_for, pipeline_of
from gpu_parts.models import pytorch_model
from gpu_parts.sizes import Shape
from openpi import transforms
from openpi.models import compact

NUM_STEPS = 10


def work(shape: Shape) -> dict[str, dict[str, float]]:
    """FLOPs of products of the parts, and bytes of weights and cache that they have to read, of what is used."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config, meta = shape.model, torch.device("meta")
    model = pytorch_model(config, meta)
    observation, state, noise = _used(shape)
    flops = {}
    with torch.no_grad():
        flow_times = model.flow_times(NUM_STEPS)
        with FlopCounterMode(display=False) as counted:
            context = model.prepare(model.embed_prefix(observation))
        flops["prefix"] = counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            for table in flow_times.tables:
                model.euler_step(state, noise, table, context, -0.1)
        flops["denoising"] = counted.get_total_flops()

    def read(*words: str) -> float:
        return sum(p.nbytes for name, p in model.named_parameters() if all(word in name for word in words))

    last = f"blocks.{config.experts[0].depth - 1}.experts.0."
    unread = read(last, "mlp") + read(last, "o_proj") + read(last, "post_attention")
    cache = sum(k.nbytes + v.nbytes for k, v in context.kv_cache)
    moved = {
        "prefix": read("vision.") + read("experts.0.") - unread,
        # The norms' own weights are in the tables of the flow times.
        "denoising": NUM_STEPS * (read("experts.1.") - read("experts.1.", ".dense.") + read("action_") + cache),
    }
    return {part: {"tflop": flops[part] / 1e12, "gb": moved[part] / 1e9} for part in flops}


def _used(shape: Shape) -> tuple[Any, Any, Any]:
    """Observation, state and noise without values, as the sampler cuts those of a real call."""
    import torch

    from openpi.models_pytorch.model import Observation

    config, meta = shape.model, torch.device("meta")
    pipeline = pipeline_of(shape)
    inputs = transforms.compose(pipeline.inputs)(observation_for(shape, pipeline))
    cameras = [key for key in config.image_keys if inputs["image_mask"][key]]
    whole = compact.Extent(tuple(config.image_keys), config.max_token_len)
    used = compact.Extent(tuple(cameras), int(inputs["tokenized_prompt_mask"].sum()))
    length = compact.longer(used, whole).prompt_len
    assert length is not None  # the text is an input
    images = {key: torch.empty(1, *config.image_resolution, 3, device=meta) for key in config.image_keys}
    masks = {key: torch.empty(1, dtype=torch.bool, device=meta) if key in cameras else None for key in images}
    text = torch.empty(1, length, dtype=torch.int64, device=meta)
    state = torch.empty(1, config.action_dim, device=meta)
    noise = torch.empty(1, config.action_horizon, config.action_dim, device=meta)
    return Observation(images, masks, state, text, text.bool()), state, noise
