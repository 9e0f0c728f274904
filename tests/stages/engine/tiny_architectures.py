"""Every decoder-only architecture that transformers registers, tiny and random, with its features switched on.

`CASES` maps `kind/feature` to the keys of a configuration; `build` makes the model. Windows, chunks and rotary
thresholds are small, so that the rows of `make_rows` lie on both sides of each.
"""

import copy
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.data.rows import Example, Row, RowSet, to_table

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 256
WINDOW = 24
# Rows of up to this many tokens keep the short rotary factors.
ORIGINAL = 64
# Used where a configuration has the key and gives it a value.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512
    ),
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), WINDOW
    ),
    **dict.fromkeys(("local_attention", "keep_window_size", "index_topk", "floor_scale"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "pad_vocab_size_multiple"), 1),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "qk_rope_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 20.0,
}
# Registered for causal language modelling, and no language model that could be scored alone.
NOT_BUILT = {
    "gemma3n": "its image tower needs timm; gemma3n_text is its language model",
    "gemma4_assistant": "drafts with the keys and values of another model",
    "gemma4_unified_assistant": "drafts with the keys and values of another model",
    "musicgen": "predicts audio codebooks, not text",
    "musicgen_melody": "predicts audio codebooks, not text",
}
LATENT = (
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
)
LATENT += ("longcat_flash", "minicpm3", "youtu")
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
MROPES = {"sliding_attention": MROPE, "full_attention": MROPE}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
BLT_PART = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
# What a kind needs besides, or instead; None leaves a key at its default.
OWN: dict[str, dict[str, Any]] = {
    **{key: {"num_key_value_heads": 4} for key in LATENT},
    **{
        key: {"num_key_value_heads": 4, "index_head_dim": 16, "index_n_heads": 2}
        for key in ("axk2", "deepseek_v32", "glm_moe_dsa")
    },
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), DELTA),
    **{key: {**DELTA, **INDEXER} for key in ("qwen4_exp", "qwen4_exp_text")},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {
        "patcher_config": BLT_PART,
        "encoder_config": {**BLT_PART, "hidden_size_global": 64},
        "decoder_config": {**BLT_PART, "hidden_size_global": 64},
        "global_config": {**BLT_PART, "hidden_size": 64},
        "encoder_hash_byte_group_vocab": 200,
        "patching_threshold": 5.0,
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": MROPES,
    },
    "cpmant": {
        "dim_head": 16,
        "dim_ff": 96,
        "position_bias_num_buckets": 16,
        "position_bias_max_distance": 64,
    },
    "ctrl": {"dff": 96},
    "dbrx": {
        "head_dim": None,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {
        **PER_LAYER,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    **{key: {**PER_LAYER, "global_head_dim": 32} for key in ("gemma4", "gemma4_text")},
    **{key: {"global_head_dim": 32} for key in ("gemma4_unified", "gemma4_unified_text")},
    "git": {"vision_config": VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"initializer_range": 0.05},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hy_v4": {"index_head_dim": 16, "index_n_heads": 2},
    "inkling_text": {"rel_extent": 32, "sliding_window_size": WINDOW},
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    "minimax": {"head_dim": 16, "block_size": 16},
    "ministral": {"head_dim": 16},
    "mixtral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 16,
    },
    "olmo_hybrid": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "phi4_multimodal": {
        "vision_config": {**VISION, "crop_size": 32, "feature_layer": -1},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "feature_layer": -1,
        },
    },
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 16,
    },
    "xlnet": {"max_position_embeddings": None, "d_inner": 96, "d_head": 16},
    "xlstm": {"v_head_dim": None, "qk_head_dim": None, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": HYBRID, "layer_types": None, "head_dim": None},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": HYBRID,
        "layer_types": None,
        "head_dim": None,
        "n_mamba_heads": 8,
        "chunk_size": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Keys of a configuration around that of the language model.
AROUND: dict[str, dict[str, Any]] = {
    "emu3": {},
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma4": {
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    },
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 16}},
    "got_ocr2": {
        "vision_config": {**VISION, "output_channels": 16, "global_attn_indexes": [0], "mlp_dim": 32}
    },
    "mllama": {},
}
# Features that a kind has and that its defaults leave off.
OFF_BY_DEFAULT: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {
        "alibi": {"alibi": True},
        "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"parallel_attn": False, "multi_query": False},
    },
    "big_bird": {"block sparse": {"attention_type": "block_sparse", "block_size": 8, "is_decoder": True}},
    "deepseek_v2": {"no query rank": {"q_lora_rank": None}},
    "gemma3_text": {"bidirectional": {"use_bidirectional_attention": True}},
    "gemma4_text": {
        "experts": {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "shared keys": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
    },
    "granitemoehybrid": {"rope": {"position_embedding_type": "rope"}},
    "gpt_bigcode": {"many heads": {"multi_query": False}},
    "inkling_text": {"log scaling": {"log_scaling_n_floor": WINDOW}},
    "laguna": {"windows": {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}},
    "mellum": {"windows": {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}},
    "mpt": {"no alibi": {"attn_config": {"alibi": False}}},
    "reformer": {
        "lsh": {
            "attn_layers": ["local", "lsh"],
            "lsh_attn_chunk_length": 16,
            "num_buckets": 4,
            "hash_seed": 0,
        }
    },
    "xlnet": {"one way": {"attn_type": "uni"}},
    "zamba2": {"rope": {"use_mem_rope": True}},
    "zaya": {"windows": {"sliding_window": WINDOW, "layer_types": ["hybrid", "hybrid_sliding"]}},
}
BIDIRECTIONAL_BY_DEFAULT = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
)
BIDIRECTIONAL_BY_DEFAULT += (
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)

# Other rotary embeddings that every kind with `rope_parameters` may be given.
ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


KEPT = (
    "rope_theta",
    "partial_rotary_factor",
    "mrope_section",
    "llama_4_scaling_beta",
    "original_max_position_embeddings",
)


def features(kind: str) -> dict[str, dict[str, Any]]:
    """What may be switched on in a kind, as changes of its small configuration; the first is nothing."""
    whole = build_config(kind)
    plain = whole.get_text_config()
    keys = plain.to_dict()
    found: dict[str, dict[str, Any]] = {"plain": {}, **OFF_BY_DEFAULT.get(kind, {})}
    if "tie_word_embeddings" in keys and kind not in AROUND:
        found["untied" if plain.tie_word_embeddings else "tied"] = {
            "tie_word_embeddings": not plain.tie_word_embeddings
        }
    if "use_sliding_window" in keys:
        found["windows"] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    elif keys.get("sliding_window", 0) is None and "windows" not in found:
        found["windows"] = {"sliding_window": WINDOW}
    if kind in BIDIRECTIONAL_BY_DEFAULT:
        full = {"attention_type": "original_full"} if "attention_type" in keys else {}
        found["decoder"] = {"is_decoder": True, **full}
    if kind == "xlm":
        found["causal"] = {"causal": True}
    if isinstance(keys.get("rope_parameters"), dict):
        sizes = _num_frequencies(whole)
        found |= {name: _with_rope(plain, change, sizes) for name, change in ROPES.items()}
    return found


def _with_rope(config: Any, change: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The keys that give a configuration another kind of rotary embedding."""
    parameters = config.to_dict()["rope_parameters"]
    nested = any(isinstance(value, dict) for value in parameters.values())
    layers = parameters if nested else {"": parameters}
    changed = {}
    for layer, old in layers.items():
        if old is None or old["rope_type"] == "proportional":
            changed[layer] = old
            continue
        size = sizes.get(layer, 0)
        long = {"short_factor": [1.0] * size, "long_factor": [1.0 + index for index in range(size)]}
        mscales = {"short_mscale": 1.1, "long_mscale": 1.3} if config.model_type == "phimoe" else {}
        kept = {key: old[key] for key in KEPT if key in old}
        changed[layer] = {**kept, **change, **(long if change["rope_type"] == "longrope" else {}), **mscales}
    keys: dict[str, Any] = {"rope_parameters": changed if nested else changed[""]}
    if "original_max_position_embeddings" in config.to_dict():
        keys["original_max_position_embeddings"] = ORIGINAL
    if change["rope_type"] == "dynamic":  # the length up to which nothing is scaled
        keys["max_position_embeddings"] = ORIGINAL
    return keys


def _num_frequencies(config: Any) -> dict[str, int]:
    """How many rotary frequencies the layers of a type have."""
    with torch.device("meta"):
        buffers = dict(_model_of(config).named_buffers())
    return {
        name.rpartition(".")[2].removesuffix("original_inv_freq").removesuffix("_"): len(buffer)
        for name, buffer in buffers.items()
        if name.endswith("original_inv_freq")
    }


# transformers' eager attention adds falcon's ALiBi twice, so its sdpa is the truth there.
TRUTH = {"falcon/alibi": "sdpa"}


def build_config(kind: str, **changes: Any) -> Any:
    """The small configuration of a kind; `changes` win."""
    text = CONFIG_MAPPING[kind]().get_text_config()
    values = text.to_dict()  # a per-layer key counts as a key
    known = {key for key in SMALL if values.get(text.attribute_map.get(key, key)) is not None}
    if hasattr(text, "qk_rope_head_dim"):  # the width of a head is made of parts there
        known.discard("head_dim")
    keys = {key: SMALL[key] for key in known} | _layers(text) | OWN.get(kind, {}) | changes
    small = type(text)(**{key: value for key, value in keys.items() if value is not None})
    if kind not in AROUND:
        return small
    return CONFIG_MAPPING[kind](text_config=small.to_dict(), **AROUND[kind])


def _layers(config: Any) -> dict[str, Any]:
    """One layer of each type, where the defaults mix types."""
    types = list(dict.fromkeys(config.to_dict().get("layer_types") or ()))
    if len(types) < 2:
        return {}
    keys = {"num_hidden_layers": len(types), "layer_types": types}
    if mlps := list(dict.fromkeys(config.to_dict().get("mlp_layer_types") or ())):
        keys["mlp_layer_types"] = (mlps * len(types))[: len(types)]
    return keys


def build(config: Any, attention: str = "eager") -> torch.nn.Module:
    """A model with random weights, none of them zero, large enough for peaked distributions."""
    torch.manual_seed(0)
    model = _model_of(config, attention).float().eval()
    # hrm_text runs its layers many times over: with larger weights rounding alone moves its log-probs by 1e-3.
    noise = 0.02 if config.model_type == "hrm_text" else 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def _model_of(config: Any, attention: str = "eager") -> torch.nn.Module:
    """As `load_model` does, the architecture's own attention where it does not have this one."""
    try:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    except ValueError:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def make_rows() -> RowSet:
    """Rows at, below and above each threshold; `ORIGINAL` and one more with one prompt."""
    random = np.random.default_rng(0)

    def draw(length: int) -> np.ndarray:
        return random.integers(3, 250, length).astype(np.int32)

    shapes = [(70, (40, 1, 55)), (5, (ORIGINAL - 5, ORIGINAL - 4, 33)), (120, (20, 90)), (6, (18, 19, 3))]
    examples = [
        Example(
            str(n), f"made:{n}", draw(prompt), [Row("ranked", draw(k), np.ones(k, bool)) for k in lengths]
        )
        for n, (prompt, lengths) in enumerate(shapes)
    ]
    return RowSet([to_table(examples, [0] * len(examples))])


def alone(model: torch.nn.Module, rows: RowSet, row: int) -> torch.Tensor:
    """Log-probs of a row's completion by a model that has seen no other row, fed the whole of it, in float64."""
    fresh = copy.deepcopy(model)
    prompt, completion = rows.prompt(row), rows.completion(row)
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = fresh(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
