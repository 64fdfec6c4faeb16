"""Configs of two layers for every causal architecture of the installed transformers: the default ones, made small.

Sizes go by the names of their fields, which architectures share; what is particular to one is in `PARTICULAR`.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 1280  # the demo's tokenizer has less
NUM_LAYERS = 2

# Largest value -> fields.
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input text_vocab_size audio_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions max_source_positions "
    "model_max_length max_sequence_length seq_length",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff ffn_hidden_size feed_forward_size "
    "intermediate_size_mlp dense_intermediate_size",
    64: "hidden_size n_embd d_model embedding_size embedding_dim word_embed_proj_dim lru_width mamba_d_ssm "
    "attention_hidden_size embed_dim hidden_dim projection_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank sliding_window "
    "attention_window chunk_size attention_chunk_size moe_shared_expert_intermediate_size o_lora_rank conv_dim "
    "mamba_chunk_size mlstm_chunk_size image_size",
    16: "head_dim kv_lora_rank v_head_dim mamba_headdim mamba_head_dim linear_key_head_dim linear_value_head_dim "
    "hidden_size_per_layer_input index_head_dim global_head_dim attention_head_size mamba_d_head laurel_rank",
    8: "qk_nope_head_dim qk_rope_head_dim state_size mamba_d_state ssm_state_size time_step_rank index_topk rotary_dim "
    "patch_size mamba_dt_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_decoder_attention_heads num_encoder_attention_heads num_local_experts n_routed_experts moe_num_experts "
    "mamba_n_heads mamba_num_heads linear_num_value_heads n_mamba_heads num_attention_heads_per_layer",
    NUM_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk top_k "
    "linear_num_key_heads index_n_heads moe_k num_global_key_value_heads moe_top_k top_k_experts",
    1: "n_shared_experts n_group topk_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace "
    "num_shared_experts pretraining_tp zero_expert_num moe_num_shared_experts num_dense_layers moe_layer_start_index",
    0: "num_kv_shared_layers num_nextn_predict_layers",
}
ENCODERS = (
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
    ),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
LIMITS = {name: limit for limit, names in SIZES.items() for name in names.split()}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DERIVED = {"rope_parameters", "rope_scaling", "architectures", "model_type", "id2label", "label2id", "per_layer_config"}

MLA = {"head_dim": 8}  # of the part that is rotated
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2}
GEMMA4 = {"per_layer_config": {1: {"head_dim": 32}}}
DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "head_dim": 16,
    "num_key_value_heads": 4,
    "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 2}},
}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PARTICULAR: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu"), MLA),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), MLA | {"num_key_value_heads": 4}),
    "bamba": MAMBA2,
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "encoder_config": {"hidden_size_global": 64, "vocab_size": VOCABULARY},
        "decoder_config": {"hidden_size_global": 64, "vocab_size": VOCABULARY},
        "patcher_config": {"vocab_size": VOCABULARY},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "ffn_config": {"hidden_size": 64}},
    "deepseek_v2": MLA | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dory": {"layer_types": None, "n_input_layers": 0, "n_recurrent_layers": 2, "n_output_layers": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"text_config": SPECIAL_TOKENS},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 128},
    "granitemoehybrid": MAMBA2,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_assistant": {"text_config": GEMMA4 | {"hidden_size_per_layer_input": 0}},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_assistant": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "mllama": {"text_config": SPECIAL_TOKENS},
    "nemotron": {"num_key_value_heads": 2},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "reformer": {
        "vocab_size": VOCABULARY,
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
    },
    "bailing_hybrid": {"num_expert_group": 1},
    "dots3_note": {
        "text_config": DOTS3 | SPECIAL_TOKENS,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    },
    "dots3_note_text": DOTS3,
    **dict.fromkeys(("qwen4_exp_text",), QWEN4),
    "qwen4_exp": {"text_config": QWEN4},
    "zamba2": {"mamba_headdim": 32, "n_mamba_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128},
    "xlm": {"emb_dim": 64, "causal": True},
    "xlnet": {"d_head": 16},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}
# These predict the token that is masked; as decoders they are causal.
PARTICULAR |= {name: {"is_decoder": True} for name in ENCODERS}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of an architecture, made small.

    Raises:
        Exception: whatever the config's own checks raise.
    """
    kind = CONFIG_MAPPING[model_type]
    default = kind().to_dict()
    values = _shrunk(default) | SPECIAL_TOKENS
    return kind(**_merged(values, PARTICULAR.get(model_type, {})))


def _shrunk(default: dict[str, Any]) -> dict[str, Any]:
    depth = next((default[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in default), None)
    small: dict[str, Any] = {}
    for key, value in default.items():
        if key in DERIVED or value is None:
            continue
        if isinstance(value, dict) and key.endswith(("config", "decoder")):
            small[key] = _shrunk(value) | {key: value[key] for key in ("model_type",) if key in value}
        elif key in LIMITS and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, LIMITS[key])
        elif isinstance(value, list) and len(value) == depth:  # one entry a layer
            small[key] = [min(v, LIMITS.get(key, v)) for v in (value[0], value[-1])]
        else:
            small[key] = value
    return small


def _merged(values: dict[str, Any], particular: dict[str, Any]) -> dict[str, Any]:
    """With `None` for what is to be left to the default."""
    merged = dict(values)
    for key, value in particular.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
