"""SigLIP image encoder: a pre-norm ViT without class token or pooling, one token per patch.

The PyTorch twin of `openpi.models.siglip`. Source: the model specification, section 3.

Legend: b batch, t tokens, d width, n heads, h head width, o output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openpi.models.siglip_config import SiglipConfig
from openpi.models_pytorch import attention
from openpi.models_pytorch.remat import rematerialised

NORM_EPSILON = 1e-6


class Siglip(nn.Module):
    """The `img` subtree: patches, blocks, and the projection to the language width.

    Args:
        num_tokens: patches of an image.
        out_width: of the language model.
    """

    def __init__(self, config: SiglipConfig, *, num_tokens: int, out_width: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = PatchEmbedding(config.patch_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(num_tokens, config.width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_layernorm = LayerNorm(config.width)
        self.head = Linear(config.width, out_width)

    def forward(
        self, images: Float[Tensor, "b height width 3"], *, dtype: torch.dtype, remat: str = "full"
    ) -> Float[Tensor, "b t o"]:
        """Image tokens, top-left patch first.

        Args:
            images: f32 in [-1, 1].
            dtype: of the transformer; patch and position embeddings are added in f32.
        """
        x = self.patch_embedding(images) + self.position_embedding.float()
        x = x.to(dtype)
        for layer in self.layers:
            x = layer(x, remat=remat)
        return self.head(self.post_layernorm(x))


class PatchEmbedding(nn.Module):
    """The 'valid' strided convolution as one matrix product, in f32."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, images: Float[Tensor, "b height width 3"]) -> Float[Tensor, "b t d"]:
        patches = patchify(images.float(), self.weight.shape[-1])
        kernel = self.weight.float().permute(0, 2, 3, 1).flatten(1)  # [d, p*q*c], as patches are flattened
        return F.linear(patches, kernel, self.bias.float())


def patchify(images: Float[Tensor, "b height width c"], patch: int) -> Float[Tensor, "b t ppc"]:
    """Cuts images into flattened patches."""
    b, height, width, c = images.shape
    x = images.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


class Block(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Float[Tensor, "b t d"], *, remat: str) -> Float[Tensor, "b t d"]:
        return rematerialised(self._run, remat, x)

    def _run(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Full self-attention with biases."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)
        self.qkv_proj: Linear | None = None

    def fuse(self) -> None:
        """Makes one layer of three: one product instead of three, for inference."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        self.qkv_proj = Linear(parts[0].weight.shape[1], sum(len(part.weight) for part in parts))
        self.qkv_proj.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.qkv_proj.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        def heads(y: Tensor) -> Float[Tensor, "b t n h"]:
            return y.unflatten(-1, (self.num_heads, -1))

        if self.qkv_proj is None:
            projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        else:
            projected = self.qkv_proj(x).chunk(3, dim=-1)
        q, k, v = map(heads, projected)
        return self.out_proj(attention.attend(q, k, v, None).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class LayerNorm(nn.Module):
    """In f32, whatever the activations are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        normed = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), NORM_EPSILON)
        return normed.to(x.dtype)


class Linear(nn.Module):
    """`x W^T + b` in the dtype of x: weights may be kept in another, f32 masters for example.

    Attributes:
        weight: [out, in]; bias: [out], or None.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
