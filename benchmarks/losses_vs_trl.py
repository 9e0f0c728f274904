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
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loss_cases import DEFINITIONS, DPO_FAMILY, REFERENCE_FREE
from benchmarks.loss_runs import NUM_BATCHES, NUM_PAIRS, cdpo_runs, dpo_runs, kto_runs, reference_free_runs
from benchmarks.peer import VENV, peer_python

BAR = 1e-6


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
