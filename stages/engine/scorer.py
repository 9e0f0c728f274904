"""`score(model, pack) -> token log-probs`: the one piece of arithmetic that cache-ref and train share.

A `Scorer` runs the transformer body once over a pack (what rows begin with once, no padding), takes hidden
states at the positions that predict completion tokens, and turns them into log-probs. At load it
checks itself against the model's own logits; an architecture that cannot take a pack is scored in
right-padded batches instead, or one completion at a time, said in one line.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stages.data.rows import RowSet
from stages.engine import flex_attention, tree_attention
from stages.engine.activation_offload import offloaded
from stages.engine.checkpointing import disable_dropout, enable_checkpointing
from stages.engine.compiled_layers import compile_layers, not_compiled
from stages.engine.lm_head import TokenLogps, collision_logps, collisions_of
from stages.engine.packing import plan_packs
from stages.engine.packs import POSITION_MULTIPLE, Pack, PackLogps, inputs_of, part_of
from stages.engine.padded_batches import FEWEST_ROWS, examples_alike, padded_batches, padded_length
from stages.engine.prefix_tree import TreeIndex
from stages.engine.row_lengths import forget_longer_rows
from stages.engine.self_check import Way, can_checkpoint, choose_way
from stages.runtime.compute import Compute

T = TypeVar("T")

# Positions of a padded batch on a CPU, with gradient.
SMALL_BATCH = 512
# Ways to attend over a pack, the one to try first first. A CPU has no backward pass of flex_attention.
BACKENDS = {"cuda": (flex_attention.NAME, tree_attention.NAME)}


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
        self.softcap = _logit_softcap(config)
        disable_dropout(model)
        forget_longer_rows(model)
        model.eval()
        if config._attn_implementation in (tree_attention.NAME, flex_attention.NAME):  # wrapped before
            model.set_attn_implementation("sdpa")
        # flex_attention compiles for one length, so every pack is filled up to the token budget.
        self._flex_length = -(-compute.tokens_per_batch // flex_attention.BLOCK) * flex_attention.BLOCK
        names = backends or BACKENDS.get(compute.device.type, (tree_attention.NAME,))
        self.way = checked or Way()
        if not checked:
            self.way = choose_way(self, names, log)
            if gradient_checkpointing:
                self.way = replace(self.way, checkpoints=can_checkpoint(self, log))
        if gradient_checkpointing and self.way.checkpoints:
            enable_checkpointing(model)
        if compute.compile:
            if self.way.backend is None:
                log(
                    f"The layers of {type(model).__name__} are not compiled: its rows are not scored in packs."
                )
            else:
                compile_layers(model, compute.device)

    def forward(self, pack: Pack, with_collisions: bool = False) -> PackLogps:
        """Log-probs of the pack's targets, and with `with_collisions` what WPO normalises by."""
        pack = pack.to(self.compute.device)
        together = self.way.packs(pack)
        unpacked = self._padded if self.way.padded else self._one_by_one
        if together.all():
            return self._packed(pack, with_collisions)
        if not together.any():
            return unpacked(pack, with_collisions)
        parts = [(part_of(pack, together), self._packed), (part_of(pack, ~together), unpacked)]
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
                "block_masks": flex_attention.BlockMasks(TreeIndex(pack.runs), self.compute.device)
            }
        else:
            visible = {"tree": TreeIndex(pack.runs)}
        with self._autocast(), offloaded(self._activation_offload):
            body = _body(self.model)
            hidden = body(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                use_cache=False,
                **visible,
            ).last_hidden_state[0]
            return self._logps_of(hidden[pack.predictors[pack.distinct]], pack, with_collisions)

    def _padded(self, pack: Pack, with_collisions: bool) -> PackLogps:
        """Score the rows of a pack in right-padded batches."""
        self._attend(self.way.attention)
        rows = list(pack.row_tokens())
        fed = [torch.cat([prompt, completion[:-1]]) for prompt, completion in rows]
        states: dict[int, Tensor] = {}  # (tokens, width) of each row
        with self._autocast(), offloaded(self._activation_offload):
            body = _body(self.model)
            for batch in padded_batches([len(ids) for ids in fed], self._padded_budget()):
                self.forwards += 1
                hidden = body(input_ids=_right_padded([fed[row] for row in batch]), use_cache=False)[0]
                states.update({row: hidden[place, : len(fed[row])] for place, row in enumerate(batch)})
            predictors = [states[row][len(prompt) - 1 :] for row, (prompt, _) in enumerate(rows)]
            first = 0
            for example in pack.examples:
                if example.is_scored:
                    predictors.append(states[first][: example.prompt_length - 1])
                first += example.num_rows
            return self._logps_of(torch.cat(predictors)[pack.distinct], pack, with_collisions)

    def _padded_budget(self) -> int:
        """Positions of a padded batch."""
        # With gradient on a CPU, a recurrence written in Python takes 1.5 times as long a row in batches of 8 as in
        # batches of 2, because it saves the state of each position; other layers gain nothing beyond 512 positions.
        is_small = self.compute.device.type == "cpu" and torch.is_grad_enabled()
        return min(SMALL_BATCH, self.compute.tokens_per_batch) if is_small else self.compute.tokens_per_batch

    def _logps_of(self, states: Tensor, pack: Pack, with_collisions: bool) -> PackLogps:
        """Log-probs of the pack's targets from the hidden states that predict distinct ones: (distinct targets, width)."""
        states = states.to(self.compute.dtype)
        head = self.model.get_output_embeddings()
        # A matmul of a few rows rounds differently, and a pack may have a single target.
        few = max(0, POSITION_MULTIPLE - len(states))
        filled = nn.functional.pad(states, (0, 0, 0, few))
        targets = nn.functional.pad(pack.targets[pack.distinct], (0, few))
        logps = TokenLogps.apply(filled, head.weight, head.bias, targets, self.scale, self.softcap)
        completions, prompts = logps[pack.copies].tensor_split([len(pack.token_rows)])
        if not with_collisions:
            return PackLogps(completions, prompts)
        own = pack.copies[: len(pack.token_rows)]
        collisions = collision_logps(states.detach(), head.weight, head.bias, self.scale, self.softcap)
        return PackLogps(completions, prompts, collisions[own])

    def in_generation_mode(self, sample: Callable[[Any], T]) -> T:
        """Call `sample(model)` with the model switched to generation mode, under autocast, then switch back.

        In generation mode the model is in evaluation mode and attends as it does without this engine.
        """
        # A method and no context manager, because FSDP gathers the weights around calls of registered methods.
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self._attend(self.way.attention)
        try:
            with self._autocast(), not_compiled():
                return sample(self.model)
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def rows_alone(self) -> Iterator[None]:
        """Within it every row has a forward pass of its own."""
        way, self.way = self.way, replace(self.way, backend=None, padded=False)
        try:
            with not_compiled():
                yield
        finally:
            self.way = way

    @property
    def packed(self) -> bool:
        """Whether packs are scored in one forward pass; else their rows in padded batches, or each in one of its own."""
        return self.way.backend is not None

    def plan(self, rows: RowSet, groups: Sequence[np.ndarray]) -> list[list[int]]:
        """Which groups, each the row numbers of one example, are scored together: their numbers, within the token budget."""
        if self.packed:
            return plan_packs([inputs_of(rows, group) for group in groups], self.compute.tokens_per_batch)
        fed = rows.prompt_lengths + rows.completion_lengths - 1
        return examples_alike([fed[group].tolist() for group in groups], self.compute.tokens_per_batch)

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
        self._attend(self.way.attention)
        logps, prompt_logps, collisions = [], [], []
        scored = [one.is_scored and not index for one in pack.examples for index in range(one.num_rows)]
        for (prompt, targets), with_prompt in zip(pack.row_tokens(), scored, strict=True):
            logits = self._logits(prompt, targets, with_prompt)
            if with_prompt:
                prompt_logps.append(_picked(logits[: -len(targets)], prompt[1:]))
            logits = logits[-len(targets) :]
            logps.append(_picked(logits, targets))
            if with_collisions:
                collisions.append(collisions_of(logits.detach()))
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


def _right_padded(rows: Sequence[Tensor]) -> Tensor:
    """Token ids of rows of one padded length, filled with zeros and up to the fewest rows of a batch: (rows, positions)."""
    shape = max(FEWEST_ROWS, len(rows)), padded_length(max(len(ids) for ids in rows))
    padded = rows[0].new_zeros(shape)
    for place, ids in enumerate(rows):
        padded[place, : len(ids)] = ids
    return padded


def _logit_scale(config: Any) -> float:
    """What an architecture multiplies its logits by; a name not known here is caught by the self-check."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if config.model_type == "hyperclovax":
        return float(config.logits_scaling)
    names = ("logits_scaling", "logits_mup_width_multiplier")
    return 1.0 / next((float(value) for name in names if (value := getattr(config, name, None))), 1.0)


def _logit_softcap(config: Any) -> float | None:
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _body(model: Any) -> Any:
    """What makes hidden states of token ids."""
    body = model.get_decoder()
    # Where a part of the model has an unusual name, transformers finds the model itself, or its output layer.
    return model.model if body is model or isinstance(body, nn.Linear) else body


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each target under the logits of its position."""
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
