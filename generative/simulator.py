"""Simulators that predict the next frame from the frames so far and the action. Oh et al. 2015 (arXiv 1507.08750), or small fast ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from envs.api import UserError
from generative.api import Clip
from generative.data import frame_weights
from generative.heads import DiscountHead, RewardHead
from generative.local_nets import LocalBody
from generative.nets import small_decoder, small_encoder, to_pixels
from generative.simulator_nets import ActionTransform, FrameLSTM, FrameStack, Memory, NoAction, Predicted, oh_decoder, oh_encoder

Encoder = Literal["feedforward", "recurrent"]
Architecture = Literal["small", "local", "paper"]
Action = Literal["multiplicative", "none"]
CONTEXT_FRAMES = {"feedforward": 4, "recurrent": 11}
FRAMES_AT_ONCE = 1024
OUTCOME_UNITS = 256


class FrameSimulator(nn.Module):
    """Trainable and Simulator: encodes the frames, transforms what it saw by the action, and decodes the next frame (sections 3.1-3.3).

    State: what the encoder remembers, with frames as pixels / 255 less the mean image. Predicted frames are fed back as they come, neither
    rounded nor cut to the range of pixels. Kept from the paper: the above, `paper` networks and their first weights, the curriculum by
    `horizon`, and the objective but for its scale (see `losses`). Ours: heads for reward and discount on what the frame is decoded from,
    and the `small` architecture.

    `horizon` is an attribute that whoever fits may change between updates: how many predictions in a row `losses` feeds back before it
    goes back to true frames. The paper goes from 1 to 3 to 5.

    Args:
        obs_shape: (C, H, W) of the frames; any size for `small`.
        num_actions: A.
        device: where the parameters lie.
        encoder: `feedforward` sees the last `context_frames` at once; `recurrent` sees one a step and remembers them in an LSTM.
        architecture: `paper`, made for (3, 210, 160), where it has 58 million parameters, with the LSTM 91 million; `small`, which never
            convolves at full resolution; `local`, for `feedforward` alone, which never makes one vector of the picture (`local_nets`).
        action: `multiplicative`, or `none` for the paper's baseline that does not see it.
        context_frames: K, known before the first prediction. 0: 4 for `feedforward`, 11 for `recurrent`, as in the paper.
        hidden: units of the encoder's last layer, of the LSTM, and of what the action made of them (2048 in the paper); not of `local`.
        factors: products of what was seen and what is done (2048 in the paper); not of `local`.
        width: channels of the finest scale of `local`.
        residual: whether the decoder tells the change from the frame before instead of the frame (not in the paper), as `local`
            always does. With `small` on Catch at
            64x64 after 300 updates of Adam at 3e-4, the squared error was 2.7e-4 without and 7.7e-4 with it; of four predictions in a row,
            4.2e-4 and 1.7e-3.
        reward_cost: weight of the reward's loss, in nats, against the frame's.
        discount_cost: likewise.
    """

    mean_image: Tensor

    def __init__(
        self,
        obs_shape: Sequence[int],
        num_actions: int,
        device: torch.device | str,
        encoder: Encoder = "feedforward",
        architecture: Architecture = "small",
        action: Action = "multiplicative",
        context_frames: int = 0,
        hidden: int = 512,
        factors: int = 512,
        width: int = 64,
        residual: bool = False,
        reward_cost: float = 1e-3,
        discount_cost: float = 1e-3,
    ) -> None:
        super().__init__()
        for name, value, options in (
            ("encoder", encoder, ("feedforward", "recurrent")),
            ("architecture", architecture, ("small", "local", "paper")),
            ("action", action, ("multiplicative", "none")),
        ):
            if value not in options:
                raise UserError(f"{name} is one of {', '.join(options)}, got {value}")
        for name, count, least in (
            ("context_frames", context_frames, 0),
            ("hidden", hidden, 1),
            ("factors", factors, 1),
            ("width", width, 1),
        ):
            if count < least:
                raise UserError(f"{name} must be at least {least}, got {count}")
        for name, cost in (("reward_cost", reward_cost), ("discount_cost", discount_cost)):
            if not 0 <= cost < float("inf"):
                raise UserError(f"{name} must be 0 or more, got {cost}")
        self.obs_shape = (obs_shape[0], obs_shape[1], obs_shape[2])
        self.num_actions, self.horizon = num_actions, 1
        self.context_frames = context_frames or CONTEXT_FRAMES[encoder]
        self.residual, self.reward_cost, self.discount_cost = residual, reward_cost, discount_cost
        if architecture == "local" and encoder != "feedforward":
            raise UserError(f"architecture=local takes encoder=feedforward, got {encoder}")
        seen = (self.obs_shape[0] * (self.context_frames if encoder == "feedforward" else 1), *self.obs_shape[1:])
        self.local: LocalBody | None = None
        network: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        if architecture == "local":
            self.local = LocalBody(self.context_frames, self.obs_shape, num_actions if action == "multiplicative" else 0, width)
            hidden = self.local.features
        elif architecture == "paper":
            network, self.decoder = oh_encoder(seen, hidden), oh_decoder(hidden, self.obs_shape)
        else:
            network = nn.Sequential(small_encoder(seen, hidden, hidden), nn.ReLU())
            self.decoder = small_decoder(hidden, self.obs_shape, self.obs_shape[0], hidden)
        self.memory: FrameStack | FrameLSTM
        if encoder == "feedforward":
            self.memory = FrameStack(network, self.context_frames)
        else:
            self.memory = FrameLSTM(network, hidden, self.context_frames, residual)
        self.transform: nn.Module = nn.Identity()
        if self.local is None:
            sees = action == "multiplicative"
            self.transform = ActionTransform(hidden, num_actions, factors, hidden) if sees else NoAction(hidden, hidden)
        self.outcome = nn.Sequential(nn.Linear(hidden, OUTCOME_UNITS), nn.ReLU())
        self.reward_head, self.discount_head = RewardHead(OUTCOME_UNITS), DiscountHead(OUTCOME_UNITS)
        self.register_buffer("mean_image", torch.zeros(self.obs_shape))
        self.to(device)

    @property
    def device(self) -> torch.device:
        return self.mean_image.device

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        """One player, `simulator`, with every parameter."""
        return {"simulator": self.parameters()}

    @torch.no_grad()
    def prepare(self, frames: Tensor) -> None:
        """Takes the mean of uint8 (B, C, H, W) training frames as the mean image. Before the first update: what is learned leans on it."""
        self._check_frames(frames)
        total = sum(part.to(self.device).sum(0, dtype=torch.float64) for part in frames.split(FRAMES_AT_ONCE))
        self.mean_image.copy_(total / (255 * len(frames)))

    def predict(self, clip: Clip) -> Predicted:
        """Every frame of the clip after the first K, predicted from those before it, with gradient. UserError where there are too few.

        Before frame t is predicted, the true frame t - 1 is fed in where (t - K) % horizon == 0, else its prediction. A horizon of 1 is
        teacher forcing.
        """
        return self._unroll(self._centre(clip.frames), clip.actions)

    def losses(self, clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yields once: (`simulator`, squared error + reward_cost * reward loss + discount_cost * discount loss, metrics).

        Each is a mean over the predicted frames that are not padding, the squared error over pixels too, on the scale of [0, 1]. The
        paper's objective (section 3.4), half the sum over pixels, is C H W / 2 times that: Adam and RMSProp take the same steps but for
        their epsilon. The transition that ends an episode counts. Metrics, detached: `squared_error`, and in nats `reward_loss` and
        `discount_loss`.
        """
        truth = self._centre(clip.frames)
        images, hidden, positions = self._unroll(truth, clip.actions)
        before = [position - 1 for position in positions]

        def of(values: Tensor, indices: list[int]) -> Tensor:
            return values.to(self.device)[:, indices].transpose(0, 1)  # (P, B, ...)

        weights = of(frame_weights(clip), positions)
        squares = (images - of(truth, positions)).square().flatten(2).mean(2)
        outcome = self.outcome(hidden)
        reward = self.reward_head.loss(self.reward_head(outcome), of(clip.rewards, before))
        discount = self.discount_head.loss(self.discount_head(outcome), of(clip.discounts, before))
        total = weights.sum().clamp(min=1)
        squared_error, reward_loss, discount_loss = ((weights * each).sum() / total for each in (squares, reward, discount))
        metrics = {"squared_error": squared_error, "reward_loss": reward_loss, "discount_loss": discount_loss}
        loss = squared_error + self.reward_cost * reward_loss + self.discount_cost * discount_loss
        yield "simulator", loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def start(self, clip: Clip) -> Memory:
        """State after the clip's last `context_frames` frames, the first repeated on the left where fewer are known."""
        frames = clip.frames[:, -self.context_frames :]
        missing = self.context_frames - frames.shape[1]
        return self.memory.start(self._centre(torch.cat((frames[:, :1].expand(-1, missing, -1, -1, -1), frames), 1)))

    @torch.no_grad()
    def step(self, state: Memory, action: Tensor) -> tuple[Memory, Tensor, Tensor, Tensor]:
        """int64 (B) -> (state, frame uint8 (B, C, H, W), expected reward and discount float32 (B)). The given state stays as it is."""
        assert action.dtype == torch.int64, f"actions are int64, got {action.dtype}"
        assert action.shape == state[0].shape[:1], f"actions are ({len(state[0])},), got {tuple(action.shape)}"
        images, hidden = self._predict(self.memory(state), self.memory.last(state), action.to(self.device))
        outcome = self.outcome(hidden)
        reward, discount = self.reward_head.mean(self.reward_head(outcome)), self.discount_head.mean(self.discount_head(outcome))
        return self.memory.advance(state, images), to_pixels(images + self.mean_image), reward, discount

    def _unroll(self, images: Tensor, actions: Tensor) -> Predicted:
        assert self.horizon >= 1, f"horizon must be at least 1, got {self.horizon}"
        count, needed = images.shape[1], self.context_frames + self.horizon
        if count < needed:
            known = f"{self.context_frames} are known and {self.horizon} predicted"
            raise UserError(f"a clip of {count} frames is too short: {known}, so {needed} are needed")
        return self.memory.unroll(images, actions.to(self.device), self.horizon, self._predict)

    def _predict(self, features: Tensor, last: Tensor | None, actions: Tensor) -> tuple[Tensor, Tensor]:
        if self.local is not None:
            return self.local(features, actions)
        hidden = self.transform(features, actions)
        images = self.decoder(hidden).float()
        if self.residual:
            assert last is not None
            images = images + last
        return images, hidden

    def _centre(self, frames: Tensor) -> Tensor:
        """uint8 (..., C, H, W) -> float32."""
        self._check_frames(frames)
        return frames.to(self.device).float() / 255 - self.mean_image

    def _check_frames(self, frames: Tensor) -> None:
        assert frames.dtype == torch.uint8, f"frames are uint8, got {frames.dtype}"
        assert tuple(frames.shape[-3:]) == self.obs_shape, f"frames are (..., {self.obs_shape}), got {tuple(frames.shape)}"
