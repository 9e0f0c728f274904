"""Which loss is compared with what of TRL, and where the definitions differ."""

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
    (
        {"name": "exo", "label_smoothing": 1e-3},
        {"loss_types": ["exo_pair"], "label_smoothing": 1e-3},
        "TRL keeps eps in float32",
    ),
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
    (
        {"name": "wpo", "clamp_weights": False},
        {"loss_types": ["sigmoid"], "use_weighting": True},
        "TRL does not bound the weights",
    ),
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
    "wpo: the authors' code bounds the product of the weights at 1, ours by default; TRL does not. Compared without.",
    "ld_alpha: rewards are of whole completions here, of length-desensitised ones in TRL. Losses agree.",
    "Not in TRL 1.16, so without a row: odpo, rpo, dpop, chipo, cal_dpo, simper, plackett_luce, infonca, exo_rw, qrpo,"
    " ipo with normalize: sum, apo_zero and apo_down with normalize: mean, weights per pair, bco with its delta.",
]
