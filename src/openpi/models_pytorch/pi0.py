"""pi0 and pi0.5: flow matching over action chunks with a two-expert transformer.

The PyTorch twin of `openpi.models.pi0`, in the same order. Noise and time are arguments. Time runs from 1 (noise) to 0
(data), x_t = t * noise + (1 - t) * actions. Source: the model specification, sections 5 and 6.

Legend: b batch, p prefix tokens (cameras, prompt), s suffix tokens, d width of the action expert, ah action horizon,
ad action dim.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch.augment import Draws
from openpi.models_pytorch.gemma import Gemma, KVCache, Modulations, Places
from openpi.models_pytorch.model import (
    DTYPES,
    Observation,
    make_attention_mask,
    preprocess_observation,
)
from openpi.models_pytorch.siglip import Linear, Siglip

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the flow-time embedding
ALIGNED_KEYS = 16


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Embedded tokens on their way into the transformer.

    Attributes:
        embedded: f[b n d].
        mask: bool[b n], true on real tokens.
        ar_mask: int[n], 1 where a new attention block starts.
    """

    embedded: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    ar_mask: Int[Tensor, " n"]


class Context(NamedTuple):
    """What the suffix meets at every flow time: where it stands, what it may attend to, and the prefix.

    Attributes:
        kv_cache: of the prefix.
        slots: int64[s], room in the cache for the suffix's keys and values; None = they are appended to a copy.
    """

    places: Places
    kv_cache: KVCache
    slots: Int[Tensor, " s"] | None


class Pi0(nn.Module):
    """pi0 or pi0.5 (`config.pi05`). Parameters are empty until they are loaded, or made by
    `fresh_parameters`.

    Attributes:
        sampled_by: names of the methods that `sample` is made of: functions of tensors, for a compiler.
    """

    takes_noise = True
    sampled_by = ("embed_prefix", "prepare", "euler_step")

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = DTYPES[config.dtype]
        prefix, suffix = config.experts
        d, ad, patch = suffix.width, config.action_dim, config.image_encoder.patch_size
        num_patches = (config.image_resolution[0] // patch) * (config.image_resolution[1] // patch)
        self.vision = Siglip(config.image_encoder, num_tokens=num_patches, out_width=prefix.width)
        self.language = Gemma(config.experts, adaptive=(False, config.pi05))
        self.action_in_proj = Linear(ad, d)
        self.action_out_proj = Linear(d, ad)
        if config.pi05:
            self.time_mlp_in = Linear(d, d)
            self.time_mlp_out = Linear(d, d)
        else:
            self.state_proj = Linear(ad, d)
            self.action_time_mlp_in = Linear(2 * d, d)
            self.action_time_mlp_out = Linear(d, d)

    def unread_parameters(self) -> list[str]:
        """Names of the parameters that no loss depends on: in its last layer the prefix only gives keys and values."""
        last = f"language.blocks.{len(self.language.blocks) - 1}.experts.0."
        parts = ("self_attn.q_proj.", "self_attn.o_proj.", "post_attention_layernorm.", "mlp.")
        unread = (*(last + part for part in parts), "language.norms.0.")
        return [name for name, _ in self.named_parameters() if name.startswith(unread)]

    # --- the mathematics --------------------------------------------------------------------------------------

    def forward(
        self,
        observation: Observation,
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "*b ah ad"],
        time: Float[Tensor, " *b"],
        draws: Draws | None = None,
    ) -> Float[Tensor, "b ah"]:
        """Flow-matching loss per action step: mean over the action dims of (v - (noise - actions))^2.

        Args:
            actions: normalised and padded (padded dims count).
            noise, time: one draw per sample, or with `config.loss_draws` [n b ah ad] and [n b].
            draws: of the image augmentation; None = no augmentation.
        """
        observation = self.preprocess(observation, draws)
        if time.ndim == 2:
            prefix = self.encode_prefix(self.embed_prefix(observation))
            return self.loss_over_draws(observation.state, actions, noise, time, *prefix)
        return self.loss(observation, actions, noise, time)

    def preprocess(self, observation: Observation, draws: Draws | None = None) -> Observation:
        return preprocess_observation(
            observation,
            draws=draws if self.config.augmentation else None,
            image_keys=self.config.image_keys,
            image_resolution=self.config.image_resolution,
        )

    def loss(
        self,
        observation: Observation,
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "b ah ad"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b ah"]:
        """The loss of a preprocessed observation."""
        return self.squared_errors(observation, actions, noise, time).mean(dim=-1)

    def squared_errors(
        self,
        observation: Observation,
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "b ah ad"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b ah ad"]:
        """What `loss` is the mean of."""
        x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        prefix = self.embed_prefix(observation)
        of_time = self.embed_time(time)
        suffix = self.embed_suffix(observation.state, x_t, of_time)
        mask = torch.cat([prefix.mask, suffix.mask], dim=1)
        ar_mask = torch.cat([prefix.ar_mask, suffix.ar_mask])
        (_, suffix_out), _ = self.transformer(
            [prefix.embedded, suffix.embedded],
            places=self.places(torch.cumsum(mask, dim=1) - 1, make_attention_mask(mask, ar_mask)),
            of_time=of_time,
            reads_prefix=False,
        )
        return (self.velocity(suffix_out) - (noise - actions)).square()

    def loss_over_draws(
        self,
        state: Float[Tensor, "b ad"],
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "n b ah ad"],
        time: Float[Tensor, "n b"],
        prefix_mask: Bool[Tensor, "b p"],
        kv_cache: KVCache,
    ) -> Float[Tensor, "b ah"]:
        """Mean of `loss` over n draws of noise and time, with one encoded prefix for all of them."""
        n, b = time.shape

        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(n, dim=0)

        def flat(x: Tensor) -> Tensor:
            return x.transpose(0, 1).flatten(0, 1)

        t = time[..., None, None]
        v_t = self.denoise(
            repeated(state),
            flat(t * noise + (1 - t) * actions),
            self.embed_time(flat(time)),
            self.context(repeated(prefix_mask), [(repeated(k), repeated(v)) for k, v in kv_cache]),
        )
        errors = (v_t - flat(noise - actions)).square().reshape(b, n, *actions.shape[1:])
        return errors.mean(dim=(1, -1))

    @torch.no_grad()
    def sample_actions(
        self, observation: Observation, noise: Float[Tensor, "b ah ad"], *, num_steps: int = 10, tabulate: bool = True
    ) -> Float[Tensor, "b ah ad"]:
        """Action chunks, f32: integrates the velocity field from noise (t = 1) to actions (t = 0) in Euler steps.

        The prefix runs once; every step reuses its keys and values.

        Args:
            tabulate: see `time_tables`.
        """
        return self.sample(self.preprocess(observation), noise, self.time_tables(num_steps, tabulate=tabulate))

    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b ah ad"],
        tables: list[Tensor | Modulations],
    ) -> Float[Tensor, "b ah ad"]:
        """As `sample_actions`, of a preprocessed observation, with one Euler step for each of `time_tables`."""
        context = self.prepare(self.embed_prefix(observation))
        x_t, dt = noise.float(), -1.0 / len(tables)
        for of_time in tables:
            x_t = self.euler_step(observation.state, x_t, of_time, context, dt)
        return x_t

    def prepare(self, prefix: Tokens) -> Context:
        """What all Euler steps share."""
        return self.context(*self.encode_prefix(prefix), in_place=True)

    def euler_step(
        self,
        state: Float[Tensor, "b ad"],
        x_t: Float[Tensor, "b ah ad"],
        of_time: Tensor | Modulations,
        context: Context,
        dt: float,
    ) -> Float[Tensor, "b ah ad"]:
        return x_t + dt * self.denoise(state, x_t, of_time, context)

    @torch.no_grad()
    def time_tables(self, num_steps: int, *, tabulate: bool = True) -> list[Tensor | Modulations]:
        """What depends on the flow time only, for each Euler step.

        Args:
            tabulate: also what the adaptive norms make of it. Without, every step reads their weights again, half of
                the action expert's.
        """
        # Added up in f32, as a loop would.
        steps = torch.full((num_steps,), -1.0 / num_steps)
        times = torch.cumsum(torch.cat([torch.ones(1), steps[1:]]), dim=0)
        of_times = self.embed_time(times.to(self.action_in_proj.weight.device))
        if not (self.config.pi05 and tabulate):
            return list(of_times[:, None])
        return [self.language.modulations(1, row[None].to(self.dtype)) for row in of_times]

    def encode_prefix(self, prefix: Tokens) -> tuple[Bool[Tensor, "b p"], KVCache]:
        """Runs PaliGemma over the prefix; the suffix needs only its keys and values."""
        _, kv_cache = self.transformer(
            [prefix.embedded, None],
            places=self.places(torch.cumsum(prefix.mask, dim=1) - 1, make_attention_mask(prefix.mask, prefix.ar_mask)),
            of_time=None,
            reads_prefix=False,
        )
        return prefix.mask, kv_cache

    def context(self, prefix_mask: Bool[Tensor, "b p"], kv_cache: KVCache, *, in_place: bool = False) -> Context:
        """
        Args:
            in_place: make room in the cache, so that steps need not copy the prefix; for sampling, which needs no
                gradients.
        """
        suffix_mask, ar_mask = self.suffix_blocks(len(prefix_mask), prefix_mask.device)
        within = make_attention_mask(suffix_mask, ar_mask)
        num_prefix, num_suffix = prefix_mask.shape[1], suffix_mask.shape[1]
        mask = torch.cat([prefix_mask[:, None].expand(-1, num_suffix, -1), within], dim=2)
        positions = prefix_mask.sum(dim=1, keepdim=True) + torch.cumsum(suffix_mask, dim=1) - 1
        if not in_place:
            return Context(self.places(positions, mask), kv_cache, None)
        # Attention kernels copy masks whose rows are not aligned, in each layer again.
        room = -(num_prefix + num_suffix) % ALIGNED_KEYS + num_suffix
        padded = [(F.pad(k, (0, 0, 0, 0, 0, room)), F.pad(v, (0, 0, 0, 0, 0, room))) for k, v in kv_cache]
        slots = num_prefix + torch.arange(num_suffix, device=prefix_mask.device)
        return Context(self.places(positions, F.pad(mask, (0, room - num_suffix))), padded, slots)

    def denoise(
        self,
        state: Float[Tensor, "b ad"],
        x_t: Float[Tensor, "b ah ad"],
        of_time: Tensor | Modulations,
        context: Context,
    ) -> Float[Tensor, "b ah ad"]:
        """Velocity at x_t, the suffix attending to the cached prefix.

        Args:
            of_time: `embed_time` of the flow times, or an entry of `time_tables`.
        """
        (_, suffix_out), _ = self.transformer(
            [None, self.suffix_tokens(state, x_t, of_time)],
            places=context.places,
            of_time=of_time,
            kv_cache=context.kv_cache,
            slots=context.slots,
        )
        return self.velocity(suffix_out)

    def embed_prefix(self, observation: Observation) -> Tokens:
        """Image tokens of every camera that the batch has, then the prompt; one bidirectional block."""
        keys = [key for key in self.config.image_keys if observation.image_masks[key] is not None]
        # One call for all cameras: they are alike.
        images = torch.cat([observation.images[key] for key in keys])
        tokens = self.vision(images, dtype=self.dtype, remat=self.config.remat).chunk(len(keys))
        embedded = list(tokens)
        camera_masks: Any = observation.image_masks
        masks = [camera_masks[key][:, None].expand(tokens[0].shape[:2]) for key in keys]
        if observation.tokenized_prompt is not None:
            embedded.append(self.language.embed_tokens(observation.tokenized_prompt, self.dtype))
            masks.append(observation.tokenized_prompt_mask)
        mask = torch.cat(masks, dim=1)
        return Tokens(torch.cat(embedded, dim=1), mask, torch.zeros_like(mask[0], dtype=torch.int64))

    def embed_suffix(
        self, state: Float[Tensor, "b ad"], x_t: Float[Tensor, "b ah ad"], of_time: Tensor | Modulations
    ) -> Tokens:
        """Action tokens, for pi0 after a state token."""
        return Tokens(self.suffix_tokens(state, x_t, of_time), *self.suffix_blocks(len(x_t), x_t.device))

    def suffix_tokens(
        self, state: Float[Tensor, "b ad"], x_t: Float[Tensor, "b ah ad"], of_time: Tensor | Modulations
    ) -> Float[Tensor, "b s d"]:
        action_tokens = self.action_in_proj(x_t)
        if self.config.pi05:
            return action_tokens
        assert isinstance(of_time, Tensor)
        kernel = self.action_time_mlp_in.weight[:, : action_tokens.shape[-1]].to(action_tokens.dtype)
        hidden = F.silu(F.linear(action_tokens, kernel) + of_time[:, None])
        state_token = self.state_proj(state)[:, None]
        return torch.cat([state_token, self.action_time_mlp_out(hidden)], dim=1)

    def suffix_blocks(self, batch_size: int, device: torch.device) -> tuple[Bool[Tensor, "b s"], Int[Tensor, " s"]]:
        """`mask` and `ar_mask` of the suffix: the actions are a block, and so is the state."""
        num_blocks = 1 if self.config.pi05 else 2
        num_tokens = self.config.action_horizon + num_blocks - 1
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        return mask, (torch.arange(num_tokens, device=device) < num_blocks).long()

    def embed_time(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """What the suffix needs of the flow time: pi0.5's condition; of pi0, the bias of its first action-time layer.

        That layer takes [action token, embedded time] side by side. The time's half is the same for all tokens.
        """
        if self.config.pi05:
            hidden = F.silu(self.time_mlp_in(posemb_sincos(time, self.time_mlp_in.weight.shape[1])))
            # The trained condition has a second swish after the output layer.
            return F.silu(self.time_mlp_out(hidden))
        layer = self.action_time_mlp_in
        width = layer.weight.shape[1] // 2
        time_emb = posemb_sincos(time, width)
        assert layer.bias is not None
        return F.linear(time_emb, layer.weight[:, width:].to(time_emb.dtype), layer.bias.to(time_emb.dtype))

    def transformer(
        self,
        embedded: list[Tensor | None],
        *,
        places: Places,
        of_time: Tensor | Modulations | None,
        kv_cache: KVCache | None = None,
        slots: Int[Tensor, " n"] | None = None,
        reads_prefix: bool = True,
    ) -> tuple[list[Any], KVCache]:
        """Both experts over their tokens (None = absent); returns their outputs and the cache, see `Gemma.forward`."""
        num_prefix = 0 if embedded[0] is None else embedded[0].shape[1]
        return self.language(
            embedded,
            places,
            adarms_cond=[None, of_time if self.config.pi05 else None],
            kv_cache=kv_cache,
            slots=slots,
            unread=(0 if reads_prefix or not self.config.skip_unused else num_prefix, 0),
            dtype=self.dtype,
            remat=self.config.remat,
        )

    def places(self, positions: Int[Tensor, "b n"], mask: Bool[Tensor, "b n s"]) -> Places:
        return self.language.places(positions, mask, self.dtype)

    def velocity(self, suffix_out: Float[Tensor, "b s d"]) -> Float[Tensor, "b ah ad"]:
        """Plain type promotion: f32 weights keep f32 velocities."""
        layer = self.action_out_proj
        x = suffix_out[:, -self.config.action_horizon :]
        return layer(x.to(torch.promote_types(x.dtype, layer.weight.dtype)))


def posemb_sincos(time: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b {dim}"]:
    """Sine and cosine features of the flow time, periods 4e-3 to 4, in f32."""
    fractions = torch.linspace(0.0, 1.0, dim // 2, device=time.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fractions
    angle = time.float()[:, None] * (2 * math.pi / period)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
