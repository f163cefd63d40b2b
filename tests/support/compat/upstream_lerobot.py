"""Runs a policy folder in the real LeRobot: `python upstream_lerobot.py FOLDER OBSERVATION.npz SIZES.json OUT.npz`.

Run by the interpreter of an environment with LeRobot 0.6.1 and nothing of this repository. LeRobot builds models of
the released sizes only, so its table of sizes is given a tiny one; everything else is as it is installed. Its
tokenizers are on the hub, so it is handed the recorded tiny one, as an object.
"""

import importlib
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import sentencepiece
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from transformers import AutoProcessor, AutoTokenizer


class TinyTokenizer:
    """The recorded tokenizer, called as LeRobot calls PaliGemma's, which has a line break as a token of its own."""

    bos_token_id, eos_token_id, pad_token_id = 2, 1, 0
    padding_side = "right"

    def __init__(self, path: str):
        self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        self.vocab_size = self._model.vocab_size()

    def __call__(self, texts, max_length, **_):
        texts = [texts] if isinstance(texts, str) else texts
        rows = [self._encode(text)[:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def _encode(self, text: str) -> list:
        body, line_break, _ = text.rpartition("\n") if text.endswith("\n") else (text, "", "")
        return [2, *self._model.encode(body), *(self._model.encode("\n") if line_break else [])]


def shrink(kind: str, sizes: dict, noise: torch.Tensor) -> None:
    """Gives LeRobot's table of sizes tiny ones, and the noise that the flow starts from."""
    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    vision, language = sizes["vision"], sizes["language"]
    module.get_gemma_config = lambda variant: module.GemmaConfig(**language)
    module.sample_noise = lambda *args, **kwargs: noise
    build = module.PaliGemmaForConditionalGenerationWithPiGemma.__init__

    def build_tiny(self, config, *args, **kwargs):
        for field, value in vision.items():
            setattr(config.vision_config, field, value)
        config.projection_dim = config.hidden_size = config.vision_config.projection_dim = language["width"]
        build(self, config, *args, **kwargs)

    module.PaliGemmaForConditionalGenerationWithPiGemma.__init__ = build_tiny


def run(folder: str, observation: str, sizes: str, out: str) -> None:
    given = np.load(observation)
    sizes = json.loads(Path(sizes).read_text())
    tokenizer = TinyTokenizer(sizes["tokenizer"])
    AutoTokenizer.from_pretrained = lambda *args, **kwargs: tokenizer
    AutoProcessor.from_pretrained = lambda *args, **kwargs: None  # of actions, which only training has
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    images = {key: torch.from_numpy(given[key]).permute(2, 0, 1) / 255 for key in given if ".images." in key}
    batch = before({**images, "observation.state": torch.from_numpy(given["state"]), "task": str(given["task"])})
    inputs = {"tokens": batch["observation.language.tokens"], "state": batch["observation.state"]}
    found = {key: value[0].numpy() for key, value in inputs.items()}
    if config.type != "pi0_fast":
        shrink(config.type, sizes, torch.from_numpy(given["noise"])[None])
        policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True).eval()
        with torch.no_grad():
            found["actions"] = after(policy.predict_action_chunk(batch))[0].numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    run(*sys.argv[1:])
