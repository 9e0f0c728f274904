"""`score(model, pack) -> token log-probs`: the one piece of arithmetic that cache-ref and train share.

A `Scorer` runs the transformer body once over a pack (every prompt once, no padding), takes hidden
states at the positions that predict completion tokens, and turns them into log-probs. At load it
checks itself against the model's own logits; an architecture that cannot take segment attention is
scored one completion at a time instead, said in one line.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stages.engine import flex_attention, segment_attention
from stages.engine.activation_offload import offloaded
from stages.engine.checkpointing import disable_dropout, enable_checkpointing
from stages.engine.lm_head import TokenLogps, collision_logps
from stages.engine.packs import Pack, PackLogps, part_of
from stages.engine.row_lengths import forget_longer_rows
from stages.engine.self_check import Way, can_checkpoint, choose_way
from stages.runtime.compute import Compute

T = TypeVar("T")

# Ways to attend over a pack, the one to try first first. A CPU has no backward pass of flex_attention.
BACKENDS = {"cuda": (flex_attention.NAME, segment_attention.NAME)}


class Scorer(nn.Module):
    """A model that scores packs. Call it like a function; its parameters are the model's."""

    def __init__(
        self,
        model: Any,
        compute: Compute,
        log: Callable[[str], None],
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        backends: Sequence[str] | None = None,
        checked: Way | None = None,
    ) -> None:
        """Wrap `model` (a loaded causal LM on the right device), checking which way it can be scored.

        `backends` are names of attention functions to try, in order; None takes those of the device. `checked`
        is the way that was found good on another copy of the model. Raises `AlignError` where there is none.
        """
        super().__init__()
        self.model = model
        self.compute = compute
        self._activation_offload = activation_offload
        self.forwards = 0
        config = model.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        disable_dropout(model)
        forget_longer_rows(model)
        model.eval()
        if config._attn_implementation in (segment_attention.NAME, flex_attention.NAME):  # wrapped before
            model.set_attn_implementation("sdpa")
        # flex_attention compiles for one length, so every pack is filled up to the token budget.
        self._flex_length = -(-compute.tokens_per_batch // flex_attention.BLOCK) * flex_attention.BLOCK
        names = backends or BACKENDS.get(compute.device.type, (segment_attention.NAME,))
        self.way = checked or Way()
        if not checked:
            self.way = choose_way(self, names, log)
            if gradient_checkpointing:
                self.way = replace(self.way, checkpoints=can_checkpoint(self, log))
        if gradient_checkpointing and self.way.checkpoints:
            enable_checkpointing(model)

    def forward(self, pack: Pack, with_collisions: bool = False) -> PackLogps:
        """Log-probs of the pack's targets, and with `with_collisions` what WPO normalises by."""
        pack = pack.to(self.compute.device)
        together = self.way.packs(pack)
        if together.all():
            return self._packed(pack, with_collisions)
        if not together.any():
            return self._one_by_one(pack, with_collisions)
        alone = [np.arange(len(together)) == row for row in np.flatnonzero(~together)]
        parts = [
            (part_of(pack, together), self._packed),
            *((part_of(pack, row), self._one_by_one) for row in alone),
        ]
        return _joined(
            [(score(part, with_collisions), tokens, prompts) for (part, tokens, prompts), score in parts]
        )

    def _packed(self, pack: Pack, with_collisions: bool) -> PackLogps:
        """Score the rows of a pack together."""
        self._attend(self.way.backend)
        self.forwards += 1
        if self.way.backend == flex_attention.NAME:
            pack = pack.filled(self._flex_length)
            visible: dict[str, Any] = {
                "block_masks": flex_attention.BlockMasks(pack.segments, self.compute.device)
            }
        else:
            visible = {"segments": pack.segments}
        with self._autocast(), offloaded(self._activation_offload):
            body = self.model.get_decoder()
            hidden = body(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                use_cache=False,
                **visible,
            ).last_hidden_state[0]
            states = hidden[pack.predictors].to(self.compute.dtype)
            head = self.model.get_output_embeddings()
            logps = TokenLogps.apply(states, head.weight, head.bias, pack.targets, self.scale, self.softcap)
            completions, prompts = logps.tensor_split([len(pack.token_rows)])
            if not with_collisions:
                return PackLogps(completions, prompts)
            own_states = states[: len(pack.token_rows)].detach()
            collisions = collision_logps(own_states, head.weight, head.bias, self.scale, self.softcap)
            return PackLogps(completions, prompts, collisions)

    def in_generation_mode(self, sample: Callable[[Any], T]) -> T:
        """Call `sample(model)` with the model switched to generation mode, under autocast, then switch back.

        In generation mode the model is in evaluation mode and attends as it does without this engine.
        """
        # A method and no context manager, because FSDP gathers the weights around calls of registered methods.
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self._attend(self.way.attention)
        try:
            with self._autocast():
                return sample(self.model)
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def rows_alone(self) -> Iterator[None]:
        """Within it every row has a forward pass of its own."""
        way, self.way = self.way, replace(self.way, backend=None)
        try:
            yield
        finally:
            self.way = way

    @property
    def packed(self) -> bool:
        """Whether packs are scored in one forward pass; else each completion has one of its own."""
        return self.way.backend is not None

    def _attend(self, name: str | None) -> None:
        """Set the attention of all layers, where it is another."""
        if name != self.model.config.get_text_config()._attn_implementation:
            self.model.set_attn_implementation(name)

    @contextmanager
    def weights_cast_once(self) -> Iterator[None]:
        """Within it, autocast keeps its low-precision copies of the weights from one pack to the next.

        For passes with gradient between two changes of the weights: a copy made without gradient would
        be used with it, and a copy of old weights with new ones.
        """
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.compute.device.type, dtype=torch.bfloat16, enabled=self.compute.dtype == torch.bfloat16
        )

    def _one_by_one(self, pack: Pack, with_collisions: bool) -> PackLogps:
        """Score each completion in a forward pass of its own, through the model's own attention and logits."""
        scores_prompts = len(pack.targets) > len(pack.token_rows)
        self._attend(self.way.attention)
        logps, prompt_logps, collisions, cursor = [], [], [], 0
        for segment in pack.segments:
            prompt = pack.input_ids[0, segment.start : segment.start + segment.prompt_length]
            for index, fed in enumerate(segment.completion_lengths):
                targets = pack.targets[cursor : cursor + fed + 1]
                logits = self._logits(prompt, targets, scores_prompts and index == 0)
                if scores_prompts and index == 0:
                    prompt_logps.append(_picked(logits[: -len(targets)], prompt[1:]))
                logits = logits[-len(targets) :]
                logps.append(_picked(logits, targets))
                if with_collisions:
                    detached = logits.detach()
                    collisions.append(torch.logsumexp(2 * detached, -1) - 2 * torch.logsumexp(detached, -1))
                cursor += fed + 1
        completions = torch.cat(logps)
        prompts = torch.cat(prompt_logps) if prompt_logps else completions.new_zeros(0)
        return PackLogps(completions, prompts, torch.cat(collisions) if with_collisions else None)

    def _logits(self, prompt: Tensor, completion: Tensor, of_prompt: bool) -> Tensor:
        """Logits that predict a row's completion, and its prompt from the second token on if asked, float32."""
        ids = torch.cat([prompt, completion if self.way.whole else completion[:-1]])
        self.forwards += 1
        with self._autocast():
            kept = len(ids) if of_prompt else len(completion) + self.way.whole
            logits = self.model(input_ids=ids[None], use_cache=False, logits_to_keep=kept).logits[0].float()
        return logits[:-1] if self.way.whole else logits


def _joined(parts: Sequence[tuple[PackLogps, Tensor, Tensor]]) -> PackLogps:
    """The log-probs of a pack from those of its parts, and which of its completion and prompt tokens these scored."""
    completions, prompts = (
        torch.cat([chosen.nonzero()[:, 0] for chosen in masks]).argsort()
        for masks in zip(*(tokens for _, *tokens in parts), strict=True)
    )
    collisions = [found.collision_logps for found, *_ in parts if found.collision_logps is not None]
    return PackLogps(
        torch.cat([found.completion_logps for found, *_ in parts])[completions],
        torch.cat([found.prompt_logps for found, *_ in parts])[prompts],
        torch.cat(collisions)[completions] if collisions else None,
    )


def _logit_scale(config: Any) -> float:
    """What an architecture multiplies its logits by; a name not known here is caught by the self-check."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return divisor if config.model_type == "hyperclovax" else 1.0 / divisor


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each target under the logits of its position."""
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
