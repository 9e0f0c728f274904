"""`score(model, pack) -> token log-probs`: the one piece of arithmetic that cache-ref and train share.

A `Scorer` runs the transformer body once over a pack (every prompt once, no padding), takes hidden
states at the positions that predict completion tokens, and turns them into log-probs. At load it
checks itself against the model's own logits; an architecture that cannot take segment attention is
scored one completion at a time instead, said in one line.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.activations import offloaded
from stages.attention import NAME as SEGMENT_ATTENTION
from stages.compute import Compute
from stages.head import TokenLogps, collision_logps
from stages.packs import Pack, build_pack
from stages.rows import Example, Row, RowSet, to_table

# Largest difference, in nats a token at float32, between the engine and the model's own logits.
SELF_CHECK_TOLERANCE = 1e-3


class Scorer(nn.Module):
    """A model that scores packs. Call it like a function; its parameters are the model's."""

    def __init__(
        self,
        model: Any,
        compute: Compute,
        say: Callable[[str], None],
        gradient_checkpointing: bool = False,
        packed: bool | None = None,
    ) -> None:
        """Wrap `model` (a loaded causal LM on the right device), checking which way it can be scored.

        `packed` is the outcome of that check where it was made on another copy of the model.
        """
        super().__init__()
        self.offload = False
        self.model = model
        self.compute = compute
        self.forwards = 0
        config = model.config.get_text_config()
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.softcap = getattr(config, "final_logit_softcapping", None)
        disable_dropout(model)
        model.eval()
        if config._attn_implementation == SEGMENT_ATTENTION:  # wrapped before
            model.set_attn_implementation("sdpa")
        self._native_attention = config._attn_implementation
        self.packed = self._can_pack(say) if packed is None else packed
        if packed:
            model.set_attn_implementation(SEGMENT_ATTENTION)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def forward(self, pack: Pack, collision: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probs of the pack's targets, float32, nats, (tokens,).

        With `collision` also log sum_v pi^2 at the completion tokens, (completion tokens,).
        """
        pack = pack.to(self.compute.device)
        if not self.packed:
            return self._one_by_one(pack, collision)
        self.forwards += 1
        with self._autocast(), offloaded(self.offload):
            body = self.model.get_decoder()
            hidden = body(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                use_cache=False,
                segments=pack.segments,
            ).last_hidden_state[0]
            states = hidden[pack.predictors].to(self.compute.dtype)
            head = self.model.get_output_embeddings()
            logps = TokenLogps.apply(states, head.weight, head.bias, pack.targets, self.scale, self.softcap)
            if not collision:
                return logps
            completions = states[: len(pack.token_rows)].detach()
            return logps, collision_logps(completions, head.weight, head.bias, self.scale, self.softcap)

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """The model as `generate` wants it, under this scorer's arithmetic; set up for scoring again afterwards."""
        training = self.model.training
        self.model.eval()
        self.model.set_attn_implementation(self._native_attention)
        try:
            with self._autocast():
                yield self.model
        finally:
            self.model.set_attn_implementation(SEGMENT_ATTENTION if self.packed else self._native_attention)
            self.model.train(training)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.compute.device.type, dtype=torch.bfloat16, enabled=self.compute.dtype == torch.bfloat16
        )

    def _one_by_one(self, pack: Pack, collision: bool) -> Tensor | tuple[Tensor, Tensor]:
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
                if collision:
                    detached = logits.detach()
                    collisions.append(torch.logsumexp(2 * detached, -1) - 2 * torch.logsumexp(detached, -1))
                begin += fed
                cursor += fed + 1
        found = torch.cat(logps + prompt_logps)
        return (found, torch.cat(collisions)) if collision else found

    def _can_pack(self, say: Callable[[str], None]) -> bool:
        """Whether packed scoring reproduces the model's own logits; the model is left set up for the answer."""
        pack = _trial_pack(self.model.config.get_text_config().vocab_size)
        with torch.no_grad():
            exact = Compute(self.compute.device, torch.float32, self.compute.tokens_per_batch)
            wanted_compute, self.compute = self.compute, exact
            self.packed = False
            expected = self(pack)
            problem = self._try_packed(pack, expected)
            self.compute = wanted_compute
        self.forwards = 0
        if problem:
            self.model.set_attn_implementation(self._native_attention)
            say(f"{type(self.model).__name__} is scored one completion at a time (slower): {problem}.")
        return not problem

    def _try_packed(self, pack: Pack, expected: Any) -> str:
        """Score a trial pack in the packed way; the reason why that cannot be used, or an empty string."""
        if type(self.model.get_output_embeddings()) is not nn.Linear:
            return "its output layer is not a plain linear layer"
        self.packed = True
        try:
            self.model.set_attn_implementation(SEGMENT_ATTENTION)
            difference = float((self(pack) - expected).abs().max())
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"packed scoring fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if not difference <= SELF_CHECK_TOLERANCE:
            return f"packed log-probs differ from its own by {difference:.3g} nats"
        return ""


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
