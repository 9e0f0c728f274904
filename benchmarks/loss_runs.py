"""One loss on random log-probs, by our code and by TRL's: a generator of (our mean loss, its gradient, theirs, its gradient)."""

from collections import defaultdict
from types import SimpleNamespace

NUM_PAIRS, NUM_BATCHES, LENGTH, VOCAB = 8, 20, 16, 11


def dpo_runs(block, peer):
    """DPOTrainer on random per-token log-probs with completions of 3 to 15 tokens."""
    import torch
    from trl import DPOTrainer

    dtype = torch.float32 if block.get("f_divergence") == "alpha_divergence" else torch.float64
    for seed in range(NUM_BATCHES):
        data = token_logps(seed, dtype)
        loss = ours(block)
        trainer = bare(
            DPOTrainer,
            beta=getattr(loss, "beta", 0.1) if block["name"] != "mixture" else 0.1,
            args=SimpleNamespace(discopop_tau=getattr(loss, "tau", None), gradient_checkpointing_kwargs=None),
            precompute_ref_logps=False,
            **{
                "ld_alpha": None,
                "f_divergence_type": "reverse_kl",
                "label_smoothing": 0.0,
                "use_weighting": False,
                "loss_weights": [1.0],
            }
            | peer,
        )
        trainer.ref_model = model_of(data.ref_token_logps, data)
        leaf = data.token_logps.clone().requires_grad_()
        inputs = {"input_ids": data.input_ids, "attention_mask": data.input_ids, "completion_mask": data.mask}
        theirs = trainer._compute_loss(model_of(leaf, data), inputs, False)
        yield *our_run(block, data), theirs.detach(), torch.autograd.grad(theirs, leaf)[0] * data.mask[:, 1:]


def kto_runs(block, peer):
    """KTOTrainer on the same rows, the chosen ones desirable; mismatched rows of their own."""
    import torch
    from trl import KTOTrainer

    for seed in range(NUM_BATCHES):
        data, mismatched = token_logps(seed, torch.float64), token_logps(1000 + seed, torch.float64)
        drift = 0.4 * (-1) ** seed  # z > 0 in one half of the batches, clamped to 0 in the other
        ref_kl = mismatched.token_logps.sum(1) - drift * mismatched.mask.sum(1)
        trainer = bare(
            KTOTrainer,
            beta=0.1,
            calculate_KL=peer["loss_type"] == "kto",
            precompute_ref_logps=True,
            **{"desirable_weight": 1.0, "undesirable_weight": 1.0} | peer,
        )
        leaf = data.token_logps.clone().requires_grad_()
        policy, policy_on_mismatched = model_of(leaf, data), model_of(mismatched.token_logps, mismatched)

        def model(input_ids, data=data, policy=policy, other=policy_on_mismatched, **kwargs):
            return policy() if input_ids is data.input_ids else other()

        inputs = {
            "input_ids": data.input_ids,
            "attention_mask": data.input_ids,
            "completion_mask": data.mask,
            "label": torch.arange(2 * NUM_PAIRS) < NUM_PAIRS,
            "ref_logps": data.ref_token_logps.sum(1),
            "ref_KL_logps": ref_kl,
            "KL_input_ids": mismatched.input_ids,
            "KL_attention_mask": mismatched.input_ids,
            "KL_completion_mask": mismatched.mask,
        }
        theirs = trainer._compute_loss(model, inputs, False)
        kl = (mismatched.token_logps.sum(1) - ref_kl).mean()
        yield (
            *our_run(block, data, kl),
            theirs.detach(),
            torch.autograd.grad(theirs, leaf)[0] * data.mask[:, 1:],
        )


def cdpo_runs():
    """CPOTrainer's smoothed sigmoid, fed log-ratios where it expects log-probs."""
    import torch
    from trl.experimental.cpo import CPOTrainer

    for seed in range(NUM_BATCHES):
        data = token_logps(seed, torch.float64)
        trainer = bare(CPOTrainer, beta=0.1, alpha=0.0, loss_type="sigmoid", label_smoothing=0.1)
        leaf = data.token_logps.clone().requires_grad_()
        losses, *_ = trainer.cpo_loss(*(leaf - data.ref_token_logps).sum(1).chunk(2))
        theirs = losses.mean()
        yield (
            *our_run({"name": "cdpo"}, data),
            theirs.detach(),
            torch.autograd.grad(theirs, leaf)[0] * data.mask[:, 1:],
        )


def reference_free_runs(block, trainer_name, peer, equal_lengths, prompt):
    """CPOTrainer and ORPOTrainer on random logits; nothing predicts a first token, so a prompt of 1 adds none."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    from stages.losses import Rows

    for seed in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCAB, (2 * NUM_PAIRS, LENGTH), generator=generator)
        lengths = torch.randint(3, LENGTH - prompt + 1, (2 * NUM_PAIRS,), generator=generator)
        if equal_lengths:
            lengths[:NUM_PAIRS] = 7
        position = torch.arange(LENGTH)
        attention = (position < prompt + lengths[:, None]).long()
        completion = attention.bool() & (position >= prompt)
        labels = ids.masked_fill(~completion, -100)
        leaf = torch.randn(
            2 * NUM_PAIRS, LENGTH, VOCAB, generator=generator, dtype=torch.float64
        ).requires_grad_()

        sides = {"chosen": slice(0, NUM_PAIRS), "rejected": slice(NUM_PAIRS, None)}
        columns = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        inputs = {
            f"{side}_{key}": value[rows] for side, rows in sides.items() for key, value in columns.items()
        }
        loss = ours(block)
        trainer = bare(
            {"CPO": CPOTrainer, "ORPO": ORPOTrainer}[trainer_name],
            beta=loss.beta,
            is_encoder_decoder=False,
            pad_token_id=0,
            padding_value=0,
            **{"alpha": 0.0, "label_smoothing": 0.0, "cpo_alpha": 0.0} | peer,
        )
        theirs, _ = trainer.get_batch_loss_metrics(
            lambda *_, leaf=leaf, **__: SimpleNamespace(logits=leaf), inputs
        )
        their_grad = torch.autograd.grad(theirs, leaf, retain_graph=True)[0]

        token_logps = leaf[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        rows = Rows(
            logps=(token_logps * completion[:, 1:]).sum(1),
            num_tokens=lengths.double(),
            prompt_logps=token_logps[:, : prompt - 1].sum(1),
            num_prompt_tokens=torch.full_like(lengths, prompt - 1).double(),
        )
        mean = loss(batch_of(rows), step_of(rows)).losses.mean()
        yield mean.detach(), torch.autograd.grad(mean, leaf)[0], theirs.detach(), their_grad


def our_run(block, data, kl=None):
    """Our mean loss over the same rows and its gradient with respect to each completion token's log-prob."""
    import torch

    from stages.losses import Rows

    leaf = data.token_logps.clone().requires_grad_()
    num_tokens = data.mask.sum(1)
    shared = data.mask[:, 1:].bool() & (
        data.mask[:, 1:].cumsum(1) <= torch.minimum(*num_tokens.chunk(2)).repeat(2)[:, None]
    )
    rows = Rows(
        logps=leaf.sum(1),
        num_tokens=num_tokens.to(leaf.dtype),
        ref_logps=data.ref_token_logps.sum(1),
        shared_logps=(leaf * shared).sum(1),
        ref_shared_logps=(data.ref_token_logps * shared).sum(1),
        collision_logps=data.log_sum_sq_probs.sum(1) / num_tokens,
    )
    loss, factor, state = ours(block), 1.0, {}
    if loss.name == "bco":
        rewards = loss.beta * rows.logratios.detach().sum()
        factor, state = 2.0, {"reward_sum": -rewards.item(), "reward_count": 1.0}
    mean = factor * loss(batch_of(rows), step_of(rows, kl, state)).losses.mean()
    return mean.detach(), torch.autograd.grad(mean, leaf)[0] * data.mask[:, 1:]


def ours(block):
    from stages.losses import parse_loss

    return parse_loss(block)


def batch_of(rows):
    import torch

    from stages.losses import Batch

    index = torch.arange(NUM_PAIRS)
    is_chosen = torch.arange(2 * NUM_PAIRS) < NUM_PAIRS
    return Batch(rows, is_chosen, index, index + NUM_PAIRS, index.repeat(2), NUM_PAIRS)


def step_of(rows, kl=None, state=None):
    from stages.losses import Step

    return Step(kl=kl, tokens_per_pair=rows.num_tokens[:NUM_PAIRS].mean().item(), state=state or {})


def token_logps(seed, dtype) -> SimpleNamespace:
    """Log-probs of tokens, 0 outside the completions, as a fused head returns them; policy near reference."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (2 * NUM_PAIRS, LENGTH - 1)
    lengths = torch.randint(3, LENGTH, (2 * NUM_PAIRS, 1), generator=generator)
    # Position 0 is the prompt's, then the completion; log-probs belong to positions 1 and later.
    mask = ((torch.arange(LENGTH) >= 1) & (torch.arange(LENGTH) <= lengths)).long()

    def normal(scale):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    reference = -0.1 - normal(2).abs()
    policy = (reference + normal(0.6)).clamp(max=-0.01)
    columns = {
        "token_logps": policy,
        "ref_token_logps": reference,
        "log_sum_sq_probs": -0.1 - normal(1).abs(),
    }
    columns = {key: (value * mask[:, 1:]).to(dtype) for key, value in columns.items()}
    # A tensor of its own for every batch, whose identity the stand-in for the model can recognise.
    return SimpleNamespace(
        **columns, mask=mask, input_ids=torch.ones(2 * NUM_PAIRS, LENGTH, dtype=torch.long)
    )


def model_of(token_logps, data):
    """A function in place of a model with TRL's fused head; entropies and top-1 flags only feed metrics."""
    import torch

    outputs = SimpleNamespace(
        log_probs=token_logps,
        log_sum_sq_probs=data.log_sum_sq_probs,
        entropy=torch.zeros_like(data.token_logps),
        mean_logits=torch.zeros_like(data.token_logps),
        is_top1=torch.zeros_like(data.token_logps, dtype=torch.bool),
    )
    return lambda *args, **kwargs: outputs


def bare(trainer_class, **settings):
    """A trainer with these attributes and no others: no weights, no data, one process."""
    import torch

    def identity(value):
        return value

    trainer = trainer_class.__new__(trainer_class)
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=identity, gather_for_metrics=identity, unwrap_model=identity
    )
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    trainer.aux_loss_enabled = False
    for key, value in settings.items():
        setattr(trainer, key, value)
    return trainer
