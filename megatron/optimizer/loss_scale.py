"""Dynamic loss scaling for fp16, as Megatron's DynamicGradScaler: window, hysteresis, minimum."""

from __future__ import annotations

from megatron.config import TrainingConfig


class LossScaler:
    """The factor on the loss. It follows from whether the global gradient norm was finite, so ranks cannot differ."""

    def __init__(self, config: TrainingConfig) -> None:
        self._minimum = config.min_loss_scale
        self._window = config.loss_scale_window
        self._hysteresis = config.hysteresis
        fixed = config.loss_scale or None  # 0 asks for a dynamic scale, as in DeepSpeed
        self.dynamic = config.fp16 and fixed is None
        self.scale = (config.initial_loss_scale if fixed is None else fixed) if config.fp16 else 1.0
        self._good_steps = 0
        self._overflows_left = config.hysteresis

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may still be the scale's doing."""
        return self.dynamic and self.scale > self._minimum

    def update(self, overflow: bool) -> None:
        """Take in whether this step's gradients overflowed."""
        if not self.dynamic:
            return
        if overflow:
            self._good_steps = 0
            self._overflows_left -= 1
            if self._overflows_left <= 0:
                self.scale = max(self.scale / 2, self._minimum)
            return
        self._good_steps += 1
        if self._good_steps == self._window:
            self._good_steps = 0
            self._overflows_left = self._hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, float | int]:
        """Plain values for a checkpoint."""
        return {"scale": self.scale, "good_steps": self._good_steps, "overflows_left": self._overflows_left}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Take over `state_dict`'s values."""
        self.scale = float(state["scale"])
        self._good_steps = int(state["good_steps"])
        self._overflows_left = int(state["overflows_left"])
