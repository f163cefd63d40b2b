"""pi0 and pi0.5: flow matching over action chunks with a two-expert transformer.

The PyTorch twin of `openpi.models.pi0`, in the same order. Noise and time are arguments. Time runs from 1 (noise) to 0
(data), x_t = t * noise + (1 - t) * actions. Source: the model specification, sections 5 and 6.

Legend: b batch, p prefix tokens (cameras, prompt), s suffix tokens, d width of the action expert, ah action horizon,
ad action dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch import rtc
from openpi.models_pytorch.augment import Draws
from openpi.models_pytorch.gemma import Gemma, KVCache, Modulations, Places
from openpi.models_pytorch.model import (
    DTYPES,
    Observation,
    make_attention_mask,
    preprocess_observation,
)
from openpi.models_pytorch.rtc import Continued
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


class FlowTimes(NamedTuple):
    """The flow times of the Euler steps, which the whole batch shares.

    Attributes:
        times: f32 scalars on the device.
        tables: what depends on nothing else, `embed_time` f[1 1 d] or its modulations; one for each.
    """

    times: Sequence[Tensor]
    tables: Sequence[Tensor | Modulations]


class Pi0(nn.Module):
    """pi0 or pi0.5 (`config.pi05`). Parameters are empty until they are loaded, or made by
    `fresh_parameters`.

    Attributes:
        sampled_by: names of the methods that `sample` is made of: functions of tensors, for a compiler.
    """

    takes_noise = True
    sampled_by = ("embed_prefix", "prepare", "euler_step", "continuing_step")

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
        delay: Int[Tensor, " *b"] | None = None,
    ) -> Float[Tensor, "b ah"]:
        """Flow-matching loss per action step: mean over the action dims of (v - (noise - actions))^2.

        Args:
            actions: normalised and padded (padded dims count).
            noise, time: one draw per sample, or with `config.loss_draws` [n b ah ad] and [n b].
            draws: of the image augmentation; None = no augmentation.
            delay: so many actions are given clean, the loss is that of the others (`rtc.of_postfix`); None = of all.
        """
        observation = self.preprocess(observation, draws)
        if time.ndim == 2:
            prefix = self.encode_prefix(self.embed_prefix(observation))
            return self.loss_over_draws(observation.state, actions, noise, time, *prefix, delay)
        return self.loss(observation, actions, noise, time, delay)

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
        delay: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b ah"]:
        """The loss of a preprocessed observation."""
        return self.squared_errors(observation, actions, noise, time, delay).mean(dim=-1)

    def squared_errors(
        self,
        observation: Observation,
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "b ah ad"],
        time: Float[Tensor, " b"],
        delay: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b ah ad"]:
        """What `loss` is the mean of."""
        time = time if delay is None else rtc.token_times(time, delay, actions.shape[1])
        x_t = noised(actions, noise, time)
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
        errors = (self.velocity(suffix_out) - (noise - actions)).square()
        return errors if delay is None else rtc.of_postfix(errors, delay)

    def loss_over_draws(
        self,
        state: Float[Tensor, "b ad"],
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "n b ah ad"],
        time: Float[Tensor, "n b"],
        prefix_mask: Bool[Tensor, "b p"],
        kv_cache: KVCache,
        delay: Int[Tensor, "n b"] | None = None,
    ) -> Float[Tensor, "b ah"]:
        """Mean of `loss` over n draws of noise, time and delay, with one encoded prefix for all of them."""
        n, b = time.shape

        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(n, dim=0)

        def flat(x: Tensor) -> Tensor:
            return x.transpose(0, 1).flatten(0, 1)

        time = time if delay is None else rtc.token_times(time, delay, actions.shape[1])
        v_t = self.denoise(
            repeated(state),
            flat(noised(actions, noise, time)),
            self.embed_time(flat(time)),
            self.context(repeated(prefix_mask), [(repeated(k), repeated(v)) for k, v in kv_cache]),
        )
        errors = (v_t - flat(noise - actions)).square()
        errors = errors if delay is None else rtc.of_postfix(errors, flat(delay))
        return errors.reshape(b, n, *actions.shape[1:]).mean(dim=(1, -1))

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Tensor, "b ah ad"],
        *,
        num_steps: int = 10,
        tabulate: bool = True,
        continued: Continued | None = None,
    ) -> Float[Tensor, "b ah ad"]:
        """Action chunks, f32: integrates the velocity field from noise (t = 1) to actions (t = 0) in Euler steps.

        The prefix runs once; every step reuses its keys and values.

        Args:
            tabulate: see `flow_times`.
            continued: what the chunks go on from; None = they begin anew.
        """
        flow_times = self.flow_times(num_steps, tabulate=tabulate)
        return self.sample(self.preprocess(observation), noise, flow_times, continued)

    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b ah ad"],
        flow_times: FlowTimes,
        continued: Continued | None = None,
    ) -> Float[Tensor, "b ah ad"]:
        """As `sample_actions`, of a preprocessed observation, with one Euler step for each of `flow_times`."""
        state, x_t, dt = observation.state, noise.float(), -1.0 / len(flow_times.times)
        prefix = self.embed_prefix(observation)
        if continued is None:
            context = self.prepare(prefix)
            for of_time in flow_times.tables:
                x_t = self.euler_step(state, x_t, of_time, context, dt)
            return x_t
        context, x_t = self.prepare(prefix, in_place=not continued.config.needs_gradients), continued.start(x_t)
        for time, of_time in zip(flow_times.times, self.tables_of(flow_times, continued), strict=True):
            x_t = self.continuing_step(state, x_t, time, of_time, context, dt, continued)
        return x_t

    def prepare(self, prefix: Tokens, *, in_place: bool = True) -> Context:
        """What all Euler steps share."""
        return self.context(*self.encode_prefix(prefix), in_place=in_place)

    def euler_step(
        self,
        state: Float[Tensor, "b ad"],
        x_t: Float[Tensor, "b ah ad"],
        of_time: Tensor | Modulations,
        context: Context,
        dt: float,
    ) -> Float[Tensor, "b ah ad"]:
        return x_t + dt * self.denoise(state, x_t, of_time, context)

    def continuing_step(
        self,
        state: Float[Tensor, "b ad"],
        x_t: Float[Tensor, "b ah ad"],
        time: Float[Tensor, ""],
        of_time: Tensor | Modulations,
        context: Context,
        dt: float,
        continued: Continued,
    ) -> Float[Tensor, "b ah ad"]:
        """As `euler_step`, of chunks that go on from others; `time` is that of `of_time`."""

        def velocity(x_t: Tensor) -> Tensor:
            return self.denoise(state, x_t, of_time, context, remat="none")

        return continued.euler_step(velocity, x_t, time, dt)

    @torch.no_grad()
    def flow_times(self, num_steps: int, *, tabulate: bool = True) -> FlowTimes:
        """Of the Euler steps, from 1 downwards.

        Args:
            tabulate: also what the adaptive norms make of the times. Without, every step reads their weights again,
                half of the action expert's.
        """
        # Added up in f32, as a loop would.
        steps = torch.full((num_steps,), -1.0 / num_steps)
        times = torch.cumsum(torch.cat([torch.ones(1), steps[1:]]), dim=0)
        return self.tabulated(times.to(self.action_in_proj.weight.device), tabulate=tabulate)

    def tabulated(self, times: Float[Tensor, " n"], *, tabulate: bool) -> FlowTimes:
        of_times = self.embed_time(times)[:, None, None]
        if not (self.config.pi05 and tabulate):
            return FlowTimes(list(times), list(of_times))
        return FlowTimes(list(times), [self.language.modulations(1, row.to(self.dtype)) for row in of_times])

    def tables_of(self, flow_times: FlowTimes, continued: Continued) -> Sequence[Tensor | Modulations]:
        """The tables for chunks that go on from others: where rows are clean, that of time 0 (data)."""
        if continued.clean_rows is None:
            return flow_times.tables
        is_clean = rtc.frozen_rows(continued.clean_rows, self.config.action_horizon)[..., None]
        is_tabulated = isinstance(flow_times.tables[0], Modulations)
        clean: Any = self.tabulated(torch.zeros(1, device=is_clean.device), tabulate=is_tabulated).tables[0]
        if not is_tabulated:
            tables: Any = flow_times.tables
            return [torch.where(is_clean, clean, of_time) for of_time in tables]
        rows: Any = [zip(clean, of_time, strict=True) for of_time in flow_times.tables]
        return [Modulations(*(torch.where(is_clean, *pair) for pair in row)) for row in rows]

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
        *,
        remat: str | None = None,
    ) -> Float[Tensor, "b ah ad"]:
        """Velocity at x_t, the suffix attending to the cached prefix.

        Args:
            of_time: `embed_time` of the flow times, of each sample or each action; or a table of `flow_times`.
            remat: None = the configuration's.
        """
        (_, suffix_out), _ = self.transformer(
            [None, self.suffix_tokens(state, x_t, of_time)],
            places=context.places,
            of_time=of_time,
            kv_cache=context.kv_cache,
            slots=context.slots,
            remat=remat,
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
        of_tokens = of_time[:, None] if of_time.ndim == 2 else of_time
        hidden = F.silu(F.linear(action_tokens, kernel) + of_tokens)
        state_token = self.state_proj(state)[:, None]
        return torch.cat([state_token, self.action_time_mlp_out(hidden)], dim=1)

    def suffix_blocks(self, batch_size: int, device: torch.device) -> tuple[Bool[Tensor, "b s"], Int[Tensor, " s"]]:
        """`mask` and `ar_mask` of the suffix: the actions are a block, and so is the state."""
        num_blocks = 1 if self.config.pi05 else 2
        num_tokens = self.config.action_horizon + num_blocks - 1
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        return mask, (torch.arange(num_tokens, device=device) < num_blocks).long()

    def embed_time(self, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
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
        remat: str | None = None,
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
            remat=remat or self.config.remat,
        )

    def places(self, positions: Int[Tensor, "b n"], mask: Bool[Tensor, "b n s"]) -> Places:
        return self.language.places(positions, mask, self.dtype)

    def velocity(self, suffix_out: Float[Tensor, "b s d"]) -> Float[Tensor, "b ah ad"]:
        """Plain type promotion: f32 weights keep f32 velocities."""
        layer = self.action_out_proj
        x = suffix_out[:, -self.config.action_horizon :]
        return layer(x.to(torch.promote_types(x.dtype, layer.weight.dtype)))


def noised(
    actions: Float[Tensor, "b ah ad"], noise: Float[Tensor, "*n b ah ad"], time: Float[Tensor, ...]
) -> Float[Tensor, "*n b ah ad"]:
    """x_t at a time of each sample, or of each action."""
    t = time.reshape(*time.shape, *[1] * (noise.ndim - time.ndim))
    return t * noise + (1 - t) * actions


def posemb_sincos(time: Float[Tensor, "*b"], dim: int) -> Float[Tensor, "*b {dim}"]:
    """Sine and cosine features of the flow time, periods 4e-3 to 4, in f32."""
    fractions = torch.linspace(0.0, 1.0, dim // 2, device=time.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fractions
    angle = time.float()[..., None] * (2 * math.pi / period)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
