"""Our losses against TRL's own loss code on the same random log-probs: losses and gradients.

In: nothing. Out: `benchmarks/results/losses_vs_trl.json` and a table `.md` beside it; exit code 1 when a loss
or a gradient differs by more than 1e-6. Run from the repository root:

    python benchmarks/losses_vs_trl.py

TRL gets an environment of its own in `.bench-venv`, made on the first run. What runs is the code of the
installed trainers, unchanged: `DPOTrainer._compute_loss`, `KTOTrainer._compute_loss`,
`CPOTrainer.get_batch_loss_metrics` and `ORPOTrainer.get_batch_loss_metrics`. The trainers are made without
their constructors (no weights, no data set); in place of a model they call a function that returns our random
log-probs or logits. float64 throughout, except where TRL itself computes in float32 (its odds ratio, and its
alpha divergence, which accepts nothing wider).
"""

import json
import platform
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peer import VENV, peer_python

BAR = 1e-6
NUM_PAIRS, NUM_BATCHES, LENGTH, VOCAB = 8, 20, 16, 11

DPO_FAMILY = [
    # (our block, TRL's settings, remark)
    ({"name": "dpo"}, {"loss_types": ["sigmoid"]}, ""),
    ({"name": "dpo", "ld_alpha": 0.4}, {"loss_types": ["sigmoid"], "ld_alpha": 0.4}, ""),
    (
        {"name": "dpo", "f_divergence": "forward_kl"},
        {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"},
        "",
    ),
    (
        {"name": "dpo", "f_divergence": "js_divergence"},
        {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"},
        "",
    ),
    (
        {"name": "dpo", "f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        "float32",
    ),
    ({"name": "rdpo"}, {"loss_types": ["robust"], "label_smoothing": 0.1}, ""),
    ({"name": "dpo_norm"}, {"loss_types": ["sigmoid_norm"]}, ""),
    (
        {"name": "dpo_norm", "ld_alpha": 0.4},
        {"loss_types": ["sigmoid_norm"], "ld_alpha": 0.4},
        "",
    ),
    ({"name": "ipo"}, {"loss_types": ["ipo"]}, "normalize: mean; TRL has no sum"),
    ({"name": "hinge"}, {"loss_types": ["hinge"]}, ""),
    ({"name": "exo"}, {"loss_types": ["exo_pair"], "label_smoothing": 1e-3}, "TRL keeps eps in float32"),
    ({"name": "nca"}, {"loss_types": ["nca_pair"]}, ""),
    ({"name": "sppo"}, {"loss_types": ["sppo_hard"]}, ""),
    ({"name": "aot"}, {"loss_types": ["aot"]}, "one micro-batch, so TRL's ranks are the step's"),
    (
        {"name": "aot_unpaired"},
        {"loss_types": ["aot_unpaired"]},
        "one micro-batch, so TRL's ranks are the step's",
    ),
    ({"name": "apo_zero"}, {"loss_types": ["apo_zero"]}, ""),
    ({"name": "apo_down"}, {"loss_types": ["apo_down"]}, ""),
    ({"name": "discopop"}, {"loss_types": ["discopop"]}, ""),
    ({"name": "wpo"}, {"loss_types": ["sigmoid"], "use_weighting": True}, ""),
    ({"name": "sft"}, {"loss_types": ["sft"]}, "one micro-batch, so TRL's token mean is the step's"),
    (
        {
            "name": "mixture",
            "parts": [
                {"weight": 0.8, "loss": {"name": "dpo"}},
                {"weight": 0.2, "loss": {"name": "apo_zero"}},
                {"weight": 1.0, "loss": {"name": "sft"}},
            ],
        },
        {"loss_types": ["sigmoid", "apo_zero", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        "",
    ),
    (
        {"name": "bco"},
        {"loss_types": ["bco_pair"]},
        "bco_pair; our delta held at 0 and our loss doubled, see below",
    ),
]

REFERENCE_FREE = [
    # (our block, trainer, TRL's settings, equal chosen lengths, remark)
    (
        {"name": "simpo"},
        "CPO",
        {"loss_type": "simpo", "simpo_gamma": 1.0},
        False,
        "TRL's gamma = ratio x beta; cpo_alpha 0",
    ),
    (
        {"name": "simpo", "label_smoothing": 0.1},
        "CPO",
        {"loss_type": "simpo", "simpo_gamma": 1.0, "label_smoothing": 0.1},
        False,
        "cpo_alpha 0",
    ),
    (
        {"name": "alphapo"},
        "CPO",
        {"loss_type": "simpo", "alpha": 0.25, "simpo_gamma": 0.1},
        False,
        "what TRL makes of loss_type alphapo",
    ),
    (
        {"name": "cpo"},
        "CPO",
        {"loss_type": "sigmoid", "cpo_alpha": 1.0},
        True,
        "chosen completions of equal length",
    ),
    ({"name": "orpo"}, "ORPO", {}, True, "chosen of equal length, no prompt in TRL's NLL; odds in float32"),
]

DEFINITIONS = [
    "cdpo: TRL's DPOTrainer accepts label_smoothing for sigmoid and ignores it. Compared with the same formula in"
    " CPOTrainer.cpo_loss, given log-ratios for log-probs.",
    "bco: TRL 1.16 has no BCO trainer; its bco_pair has no delta and adds both sides of a pair. Compared with our delta"
    " held at 0 and our mean over rows doubled.",
    "cpo: ours takes the mean NLL per token of each pair, TRL the mean over the tokens of a micro-batch. Equal when the"
    " chosen completions are of equal length; the row `cpo, unequal lengths` measures the difference.",
    "orpo: as cpo, and TRL's NLL covers the prompt too, as ours does with nll_span: sequence. With the default,"
    " nll_span: completion, they differ; the row `orpo, with prompts` measures it.",
    "sft, aot, aot_unpaired, kto: the statistic (token count, ranks, z) is the optimizer step's here and a"
    " micro-batch's in TRL. Compared on one micro-batch, where both are the same.",
    "simpo: TRL's simpo_gamma is gamma, ours is gamma / beta; TRL's cpo_alpha is 1 unless set to 0.",
    "ld_alpha: rewards are of whole completions here, of length-desensitised ones in TRL. Losses agree.",
    "Not in TRL 1.16, so without a row: odpo, ipo with normalize: sum, weights per pair, bco with its delta.",
]


def main() -> None:
    if Path(sys.prefix) != VENV:
        sys.exit(subprocess.run([str(peer_python()), str(Path(__file__).resolve())], cwd=ROOT).returncode)
    sys.exit(compare())


def compare() -> int:
    rows = [row(block, name_of(block), remark, dpo_runs(block, peer)) for block, peer, remark in DPO_FAMILY]
    rows.append(row({"name": "cdpo"}, "cdpo", "CPOTrainer.cpo_loss on log-ratios", cdpo_runs()))
    for block, peer in [
        ({"name": "kto", "desirable_weight": 1.2}, {"loss_type": "kto", "desirable_weight": 1.2}),
        ({"name": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
    ]:
        remark = "one micro-batch, so TRL's z is the step's" if block["name"] == "kto" else ""
        rows.append(row(block, name_of(block), remark, kto_runs(block, peer)))
    for block, trainer, peer, equal_lengths, remark in REFERENCE_FREE:
        rows.append(
            row(
                block,
                name_of(block),
                remark,
                reference_free_runs(block, trainer, peer, equal_lengths, prompt=1),
            )
        )
    sequence = {"name": "orpo", "nll_span": "sequence"}
    remark = "prompts of 4 tokens, chosen of equal length; odds in float32"
    rows.append(row(sequence, name_of(sequence), remark, reference_free_runs(sequence, "ORPO", {}, True, 4)))
    differs = [
        ("cpo, unequal lengths", REFERENCE_FREE[3], 1),
        ("orpo, with prompts", REFERENCE_FREE[4], 4),
    ]
    for name, (block, trainer, peer, _, _), prompt in differs:
        runs = reference_free_runs(block, trainer, peer, prompt > 1, prompt=prompt)
        rows.append(row(block, name, "a known difference of definition, see below", runs, same=False))
    write(rows)
    worst = max(
        max(r["peer_max_abs_diff"], r["peer_max_abs_grad_diff"]) for r in rows if r["same_definition"]
    )
    print(f"largest difference {worst:.1e} (bar {BAR:.0e})")
    return int(worst > BAR)


def name_of(block) -> str:
    """The name and the options that are set."""
    if block["name"] == "mixture":
        return "mixture " + " + ".join(f"{part['weight']} {part['loss']['name']}" for part in block["parts"])
    return " ".join([block["name"], *(f"{k}={v}" for k, v in block.items() if k != "name")])


def row(block, name, remark, runs, same=True) -> dict:
    """The largest differences over all batches, of the mean loss and of its gradient."""
    differences = [
        ((ours - theirs).abs().item(), (our_grad - their_grad).abs().max().item())
        for ours, our_grad, theirs, their_grad in runs
    ]
    loss_diff, grad_diff = (max(values) for values in zip(*differences, strict=True))
    print(f"{name:60s} {loss_diff:.1e} {grad_diff:.1e}  {remark}", flush=True)
    return {
        "name": name,
        "loss": block["name"],
        "peer_max_abs_diff": loss_diff,
        "peer_max_abs_grad_diff": grad_diff,
        "same_definition": same,
        "remark": remark,
    }


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
    return Batch(rows, torch.arange(2 * NUM_PAIRS) < NUM_PAIRS, index, index + NUM_PAIRS)


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


def write(rows) -> None:
    import torch
    import transformers
    import trl

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    result = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/losses_vs_trl.py",
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "rows": rows,
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "losses_vs_trl.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# Our losses against TRL's",
        "",
        f"`{result['command']}`, {result['date']}, {', '.join(f'{k} {v}' for k, v in versions.items())};"
        f" {result['machine']}.",
        "",
        f"Largest difference over {NUM_BATCHES} random batches of {NUM_PAIRS} pairs: of the mean loss, and of its"
        f" gradient with respect to each completion token's log-prob (simpo, alphapo, cpo, orpo: each logit)."
        f" The bar is {BAR:.0e}. float64 unless remarked.",
        "",
        "| loss | loss differs by | gradient differs by | remark |",
        "|---|---|---|---|",
        *(
            f"| {r['name']} | {r['peer_max_abs_diff']:.1e} | {r['peer_max_abs_grad_diff']:.1e} | {r['remark']} |"
            for r in rows
        ),
        "",
        "## Known differences of definition",
        "",
        *(f"- {text}" for text in DEFINITIONS),
        "",
    ]
    (folder / "losses_vs_trl.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
