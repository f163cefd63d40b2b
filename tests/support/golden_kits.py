"""The recorded kits of `tests/golden`: a tiny model of each family, its inputs and what the reference made of them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import flatten, unflatten
from openpi.weights import orbax_io


@dataclasses.dataclass(frozen=True)
class Kit:
    """Parameters are the published tree, NumPy."""

    config: Any
    params: dict
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    meta: dict

    def observation(self, *, all_cameras: bool = False, decode: bool = False) -> dict[str, Any]:
        """Model-side inputs."""
        keys = self.meta.get("image_keys", self.config.image_keys)
        prompt = "decode_prompt" if decode else "tokenized_prompt"
        data = {
            "image": {key: self.inputs[f"image_u8/{key}"] for key in keys},
            "image_mask": {key: self.inputs[f"image_mask/{key}"] | all_cameras for key in keys},
            "state": self.inputs["state"],
            "tokenized_prompt": self.inputs[prompt],
            "tokenized_prompt_mask": self.inputs[f"{prompt}_mask"],
        }
        if "token_ar_mask" in self.inputs:
            data |= {
                "token_ar_mask": self.inputs["token_ar_mask"] * (not decode),
                "token_loss_mask": self.inputs["token_loss_mask"],
            }
        return data


def load_kit(folder: Path) -> Kit:
    meta = json.loads((folder / "meta.json").read_text())
    encoder, dims = SiglipConfig(**meta["siglip"]), meta["config"]
    fields = {key: dims[key] for key in ("action_dim", "action_horizon", "max_token_len", "dtype")}
    if "pi05" in dims:
        config: Any = Pi0Config(
            **fields,
            pi05=dims["pi05"],
            discrete_state_input=dims["discrete_state_input"],
            paligemma_variant=_expert(meta, "paligemma"),
            action_expert_variant=_expert(meta, "action_expert"),
            image_encoder_variant=encoder,
        )
    else:
        config = Pi0FASTConfig(**fields, paligemma_variant=_expert(meta, "paligemma"), image_encoder_variant=encoder)
    params = orbax_io.read_params(folder / "checkpoint" / "params")
    with np.load(folder / "inputs.npz") as inputs, np.load(folder / "outputs.npz") as outputs:
        return Kit(config, params, dict(inputs), dict(outputs), meta)


SMALL = (28, 28)
_FEW_WORDS = 2048  # more than the tokenizer of the recordings has


def small_model(config: Pi0Config) -> Pi0Config:
    """A kit's model for what does not ask for recorded numbers: unoptimized code takes seconds for the 256 patches of a
    picture, each layer is compiled on its own, and most of a checkpoint is words that nobody says.
    """
    kit: Any = config  # whose variants are configs, never names
    layer = {"depth": 1, "vocab_size": _FEW_WORDS}
    return dataclasses.replace(
        config,
        image_resolution=SMALL,
        paligemma_variant=dataclasses.replace(kit.paligemma_variant, **layer),
        action_expert_variant=dataclasses.replace(kit.action_expert_variant, **layer),
        image_encoder_variant=dataclasses.replace(kit.image_encoder_variant, depth=1),
    )


def write_small(folder: Path, target: Path) -> Path:
    """A checkpoint of a kit's weights for `small_model`: the first layers, words and places of patches."""
    params = orbax_io.read_params(folder / "params")
    encoder, llm = params["PaliGemma"]["img"], params["PaliGemma"]["llm"]
    encoder["pos_embedding"] = encoder["pos_embedding"][:, : SMALL[0] // 14 * SMALL[1] // 14]
    llm["embedder"]["input_embedding"] = llm["embedder"]["input_embedding"][:_FEW_WORDS]
    for owner, name in ((encoder["Transformer"], "encoderblock"), (llm, "layers")):
        owner[name] = unflatten({path: leaf[:1] for path, leaf in flatten(owner[name]).items()})
    orbax_io.write_params(target / "params", params)
    shutil.copytree(folder / "assets", target / "assets")
    return target


def _expert(meta: dict, name: str) -> GemmaConfig:
    adapters = meta.get("lora", {}).get({"paligemma": "pg", "action_expert": "ex"}[name], {})
    fields = {"attn": "attn_lora", "ffn": "ffn_lora"}
    return GemmaConfig(**meta[name], **{fields[key]: LoRAConfig(**dims) for key, dims in adapters.items()})
