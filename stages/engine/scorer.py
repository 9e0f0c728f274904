"""`score(model, pack) -> token log-probs`: the one piece of arithmetic that cache-ref and train share.

A `Scorer` runs the transformer body once over a pack (every prompt once, no padding), takes hidden
states at the positions that predict completion tokens, and turns them into log-probs. At load it
checks itself against the model's own logits; an architecture that cannot take segment attention is
scored one completion at a time instead, said in one line.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stages.data.rows import Example, Row, RowSet, to_table
from stages.engine import flex_attention, segment_attention
from stages.engine.activation_offload import offloaded
from stages.engine.lm_head import TokenLogps, collision_logps
from stages.engine.packs import Pack, PackLogps, build_pack
from stages.runtime.compute import Compute

T = TypeVar("T")

# Largest difference, in nats a token at float32, between the engine and the model's own logits.
SELF_CHECK_TOLERANCE = 1e-3
# Ways to attend over a pack, the one to try first first. A CPU has no backward pass of flex_attention.
BACKENDS = {"cuda": (flex_attention.NAME, segment_attention.NAME)}


class Scorer(nn.Module):
    """A model that scores packs. Call it like a function; its parameters are the model's."""

    def __init__(
        self,
        model: Any,
        compute: Compute,
        say: Callable[[str], None],
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        backends: Sequence[str] | None = None,
        checked: str | None = None,
    ) -> None:
        """Wrap `model` (a loaded causal LM on the right device), checking which way it can be scored.

        `backends` are names of attention functions to try, in order; None takes those of the device. `checked`
        is one that was found good on another copy of the model.
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
        model.eval()
        if config._attn_implementation in (segment_attention.NAME, flex_attention.NAME):  # wrapped before
            model.set_attn_implementation("sdpa")
        self._native_attention = config._attn_implementation
        # flex_attention compiles for one length, so every pack is filled up to the token budget.
        self._flex_length = -(-compute.tokens_per_batch // flex_attention.BLOCK) * flex_attention.BLOCK
        self.backend = checked or self._choose_backend(
            backends or BACKENDS.get(compute.device.type, (segment_attention.NAME,)), say
        )
        if checked:
            model.set_attn_implementation(checked)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def forward(self, pack: Pack, with_collisions: bool = False) -> PackLogps:
        """Log-probs of the pack's targets, and with `with_collisions` what WPO normalises by."""
        pack = pack.to(self.compute.device)
        if not self.packed:
            return self._one_by_one(pack, with_collisions)
        self.forwards += 1
        if self.backend == flex_attention.NAME:
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
        training = self.model.training
        self.model.eval()
        self.model.set_attn_implementation(self._native_attention)
        try:
            with self._autocast():
                return sample(self.model)
        finally:
            self.model.set_attn_implementation(self.backend or self._native_attention)
            self.model.train(training)

    @property
    def packed(self) -> bool:
        """Whether packs are scored in one forward pass; else each completion has one of its own."""
        return self.backend is not None

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
        logps, prompt_logps, collisions, cursor = [], [], [], 0
        for segment in pack.segments:
            prompt_end = segment.start + segment.prompt_length
            begin = prompt_end
            for index, fed in enumerate(segment.completion_lengths):
                ids = torch.cat(
                    [pack.input_ids[0, segment.start : prompt_end], pack.input_ids[0, begin : begin + fed]]
                )
                with_prompt = scores_prompts and index == 0
                self.forwards += 1
                with self._autocast():
                    logits = (
                        self.model(
                            input_ids=ids[None],
                            use_cache=False,
                            logits_to_keep=len(ids) if with_prompt else fed + 1,
                        )
                        .logits[0]
                        .float()
                    )
                if with_prompt:
                    prompt_logps.append(_picked(logits[: -fed - 1], ids[1 : segment.prompt_length]))
                logits = logits[-fed - 1 :]
                logps.append(_picked(logits, pack.targets[cursor : cursor + fed + 1]))
                if with_collisions:
                    detached = logits.detach()
                    collisions.append(torch.logsumexp(2 * detached, -1) - 2 * torch.logsumexp(detached, -1))
                begin += fed
                cursor += fed + 1
        completions = torch.cat(logps)
        prompts = torch.cat(prompt_logps) if prompt_logps else completions.new_zeros(0)
        return PackLogps(completions, prompts, torch.cat(collisions) if with_collisions else None)

    def _choose_backend(self, names: Sequence[str], say: Callable[[str], None]) -> str | None:
        """The first backend that reproduces the model's own logits, or None; the model is left set up for it."""
        pack = _trial_pack(self.model.config.get_text_config().vocab_size)
        exact = Compute(self.compute.device, torch.float32, self.compute.tokens_per_batch)
        wanted, self.compute = self.compute, exact
        problems = []
        with torch.no_grad():
            self.backend = None
            expected = self(pack).completion_logps
            for name in names:
                problem = self._try_backend(name, pack, expected)
                if not problem:
                    break
                problems.append(problem)
            else:
                self.backend = None
                self.model.set_attn_implementation(self._native_attention)
        self.compute, self.forwards = wanted, 0
        if not self.packed:
            say(f"{type(self.model).__name__} is scored one completion at a time (slower): {problems[-1]}.")
        elif problems:
            say(f"{type(self.model).__name__} attends by {self.backend}: {problems[0]} with {names[0]}.")
        return self.backend

    def _try_backend(self, name: str, pack: Pack, expected: Any) -> str:
        """Score a trial pack in the packed way; the reason why that cannot be used, or an empty string."""
        if type(self.model.get_output_embeddings()) is not nn.Linear:
            return "its output layer is not a plain linear layer"
        self.backend = name
        try:
            self.model.set_attn_implementation(name)
            difference = float((self(pack).completion_logps - expected).abs().max())
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"packed scoring fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if not difference <= SELF_CHECK_TOLERANCE:
            return f"packed log-probs differ from its own by {difference:.3g} nats"
        return ""


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


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: a policy scored with noise has no exact step 0, and no exact resume."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - Module declares its attributes as tensors


def _trial_pack(vocab_size: int) -> Pack:
    """Two small examples with several completions, of fixed pseudo-random ids."""
    random = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return random.integers(0, vocab_size, length).astype(np.int32)

    examples = [
        Example(
            str(number),
            "trial",
            draw(prompt),
            [Row("ranked", draw(length), np.ones(length, bool)) for length in lengths],
        )
        for number, (prompt, lengths) in enumerate([(9, (5, 1, 7)), (4, (6, 3))])
    ]
    rows = RowSet([to_table(examples, [0, 0])])
    return build_pack(
        rows, [rows.example_rows(example, mismatched=False) for example in range(rows.num_examples)]
    )
