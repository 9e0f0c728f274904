"""The configuration blocks of training: the loop, and the adapter."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.settings.fields import (
    Flag,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
    checked_name,
)

Decay = Annotated[float, Field(ge=0, lt=1)]
# Factor on the learning rate of the loss: low-rank matrices, one of which starts at 0, need about ten times the rate.
ADAPTER_LEARNING_RATE = 10
SampleStrategy = Literal["fixed", "round_robin", "random"]
PairStrategy = Literal["best_worst", "all", "adjacent"]


class AdapterSettings(Settings):
    """A low-rank adapter of peft, which is trained instead of the model's own weights."""

    name: Literal["none", "lora", "dora"] = Field(
        default="none", description="'none' trains all weights; 'lora' and 'dora' train an adapter"
    )
    r: PositiveInt = Field(default=16, description="rank of the adapter's matrices")
    lora_alpha: PositiveInt = Field(
        default=32,
        description="the adapter's output is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with use_rslora",
    )
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="modules to adapt: a list of names or a regular expression; 'all-linear' takes all linear layers but the output layer",
    )
    use_rslora: Flag = Field(default=False, description="rank-stabilised scaling, which helps at high ranks")


class TrainSettings(Settings):
    """The training loop. A step is `batch_size` examples, however they are split over ranks and packs."""

    name: str | None = Field(
        default=None,
        description="a name for the run, by which commands find its policy; changes no result",
    )
    learning_rate: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate; null takes the default of the loss, ten times that for an adapter",
    )
    batch_size: PositiveInt | None = Field(
        default=None,
        description="examples (pairs or ranked lists) in one optimizer step, over all ranks; null takes the default of the loss",
    )
    keep_together: Literal["conversation"] | None = Field(
        default=None,
        description="'conversation' puts the examples of one conversation into the same step, so that its earlier turns are computed once; a step then has batch_size examples on average; null shuffles examples regardless of it",
    )
    pairs: PairStrategy = Field(
        default="best_worst",
        description="pairs formed from a ranked list: the best with the worst, all with different scores, or neighbours in rank",
    )
    num_epochs: PositiveInt = Field(default=1, description="passes over the training examples")
    max_steps: PositiveInt | None = Field(
        default=None, description="maximum number of optimizer steps; null means no limit"
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "constant",
        "constant_with_warmup",
    ] = Field(
        default="linear",
        description="schedule of the learning rate after warm-up, until the last step; as in transformers",
    )
    lr_scheduler_kwargs: dict[str, float | int | str] = Field(
        default={},
        description="further arguments of the schedule under their names in transformers, for example {min_lr_rate: 0.1}",
    )
    warmup_ratio: Share = Field(
        default=0.1,
        description="fraction of the steps in which the learning rate rises; it is above 0 at the first step",
    )
    optimizer: Literal[
        "adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit", "adafactor", "rmsprop", "sgd"
    ] = Field(
        default="adamw",
        description="adamw keeps 8 bytes of state per weight, adamw_bf16 4, adamw_8bit and paged_adamw_8bit 2 (bitsandbytes; paged moves them to the host when GPU memory is full), rmsprop 4, adafactor and sgd almost none",
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="weight decay of matrices; vectors have none"
    )
    adam_beta1: Decay = Field(default=0.9, description="AdamW beta1")
    adam_beta2: Decay = Field(default=0.999, description="AdamW beta2")
    adam_epsilon: PositiveFloat = Field(default=1e-8, description="AdamW epsilon")
    max_grad_norm: NonNegativeFloat = Field(
        default=1.0, description="clip the gradient of a step to this norm; 0 turns clipping off"
    )
    gradient_checkpointing: Flag = Field(
        default=False,
        description="recompute activations in the backward pass: saves memory, takes about a third more time",
    )
    activation_offload: Flag = Field(
        default=False,
        description="keep activations in host memory until the backward pass (GPU only): saves memory, is slower",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="under torchrun: 'ddp' keeps the whole model on every rank, 'fsdp' shards weights, gradients and optimizer state over the ranks",
    )
    seed: NonNegativeInt = Field(
        default=0, description="seed of the order of the examples and of the initial weights of an adapter"
    )
    eval_steps: PositiveInt | None = Field(
        default=None,
        description="steps between evaluations, which also happen at step 0 and at the end; null means five in a run",
    )
    eval_samples: PositiveInt | None = Field(
        default=512, description="held-out examples per evaluation, always the same ones; null means all"
    )
    save_steps: PositiveInt | None = Field(
        default=None, description="steps between checkpoints; null means at every evaluation"
    )
    keep_last: NonNegativeInt = Field(
        default=0,
        description="number of newest checkpoints kept in the finished policy; during training at least two are kept",
    )
    best_metric: str | None = Field(
        default=None,
        description="held-out metric by which the best checkpoint is kept, for example rewards/accuracies",
    )
    save_best: Flag = Field(
        default=False,
        description="publish the checkpoint that is best by best_metric instead of the last weights",
    )
    early_stopping_metric: str | None = Field(
        default=None,
        description="stop when this held-out metric stops improving, for example loss",
    )
    early_stopping_patience: PositiveInt = Field(
        default=3, description="stop after N evaluations in a row without improvement"
    )
    sample_steps: PositiveInt | None = Field(
        default=None,
        description="steps between samples of the policy, with the settings of the block sample, also at step 0 and at the end; null means never",
    )
    sample_prompts: PositiveInt = Field(
        default=4, description="number of prompts sampled each time, from the prompts of the block sample"
    )
    sample_strategy: SampleStrategy = Field(
        default="fixed",
        description="which prompts to sample: always the first ones, the next ones in turn, or a random draw",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="at a step whose loss or gradient is NaN or infinite: stop with an error that names step and rows, or skip the step and count it",
    )
    model_card: Flag = Field(
        default=True,
        description="write a model card (README.md) with a picture of the curves into the folder of the policy",
    )
    resume: str | None = Field(
        default=None,
        description="checkpoint folder to continue from, possibly of another run; null means the newest checkpoint of this run",
    )
    begin_from: str | None = Field(
        default=None,
        description="checkpoint folder of another run of the same model, whose weights and optimizer state a new run begins with, at step 0 of its own data, rates and steps; the reference stays that of the model",
    )
    resume_override: list[str] = Field(
        default=[],
        description="keys that may differ from the run that resume continues, for example [train.learning_rate]",
    )

    def resolved(self, learning_rate: float, batch_size: int, adapter: AdapterSettings) -> "TrainSettings":
        """With the learning rate and the batch size that a loss recommends where these are null."""
        recommended = learning_rate * (1 if adapter.name == "none" else ADAPTER_LEARNING_RATE)
        return self.model_copy(
            update={
                "learning_rate": self.learning_rate or recommended,
                "batch_size": self.batch_size or batch_size,
            }
        )

    @field_validator("name")
    @classmethod
    def _is_no_path(cls, value: str | None) -> str | None:
        return None if value is None else checked_name(value)
