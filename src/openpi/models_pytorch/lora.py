"""Low-rank adapters for the Gemma weights: the PyTorch twin of `openpi.models.lora`.

Factors have the shapes of the published tree without its layer axis, so that they pass between the backends as they
are. Source: the model specification, section 9.1.

Legend: b batch, t tokens, d model width, n heads, h head width, i in, o out, r rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openpi.models.gemma_config import LoRAConfig

INIT_STDDEV = 0.01


class Adapter(nn.Module):
    """Factors A `[..., i, r]` and B `[..., r, o]` next to a weight.

    Attributes:
        scaling: of the update; the MLP's adapters have none, see `GemmaConfig`.
    """

    def __init__(self, lead: tuple[int, ...], i: int, o: int, lora: LoRAConfig, *, is_scaled: bool = True) -> None:
        super().__init__()
        self.scaling = lora.scaling if is_scaled else 1.0
        self.a = nn.Parameter(torch.empty(*lead, i, lora.rank))
        self.b = nn.Parameter(torch.empty(*lead, lora.rank, o))


class HeadsAdapter(Adapter):
    """Of queries, keys or values: a pair of factors for each head."""

    def __init__(self, num_heads: int, d: int, h: int, lora: LoRAConfig) -> None:
        super().__init__((num_heads,), d, h, lora)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t nh"]:
        low = torch.einsum("btd,ndr->btnr", x, self.a.to(x.dtype))
        return self.scaling * torch.einsum("btnr,nrh->btnh", low, self.b.to(x.dtype)).flatten(2)

    def update(self) -> Float[Tensor, "d nh"]:
        """What the adapter adds to the weight, in f32."""
        return self.scaling * torch.einsum("ndr,nrh->dnh", self.a.detach().float(), self.b.detach().float()).flatten(1)


class OutAdapter(Adapter):
    """Of the attention's output: one update shared by all heads, although B is stored per head.

    Published adapters were trained with the rank-space vector summed over heads before B, and B summed over heads:
    keep both sums.
    """

    def __init__(self, num_heads: int, h: int, d: int, lora: LoRAConfig) -> None:
        super().__init__((num_heads,), h, d, lora)

    def forward(self, x: Float[Tensor, "b t nh"]) -> Float[Tensor, "b t d"]:
        low = x @ self.a.to(x.dtype).flatten(0, 1)
        return self.scaling * torch.einsum("btr,nrd->btd", low, self.b.to(x.dtype))

    def update(self) -> Float[Tensor, "nh d"]:
        """As of `HeadsAdapter`."""
        return self.scaling * (self.a.detach().float().flatten(0, 1) @ self.b.detach().float().sum(dim=0))


class DenseAdapter(Adapter):
    """Of a weight of the MLP."""

    def __init__(self, i: int, o: int, lora: LoRAConfig) -> None:
        super().__init__((), i, o, lora, is_scaled=False)

    def forward(self, x: Float[Tensor, "b t i"]) -> Float[Tensor, "b t o"]:
        return (x @ self.a.to(x.dtype)) @ self.b.to(x.dtype)

    def update(self) -> Float[Tensor, "i o"]:
        """As of `HeadsAdapter`."""
        return self.scaling * (self.a.detach().float() @ self.b.detach().float())
