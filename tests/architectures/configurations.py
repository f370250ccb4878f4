"""Small configurations of any model of the `transformers` library, made by the names of configurations' fields."""

import copy
import inspect
import re

from transformers import PretrainedConfig

VOCABULARY = 99
#: Texts are of tokens below; those above stand for images and the like.
NUM_WORDS = 70

#: What a number in a field of a matching name becomes; the first match counts.
NUMBERS = [
    (r"(num|n)_(key_value|kv)_heads|num_kv_heads|multi_query_group_num|n_head_kv", 2),
    (r"num_(conv_pos_)?embedding_groups|num_conv_pos_embedding_groups", 2),
    (r"num_conv_pos_embeddings", 16),
    (r".*(_heads|_head|num_attention_heads|attention_heads|nheads|n_heads)|num_heads.*", 4),
    (r"(attention_|qk_|v_|kv_|mamba_|global_|linear_(key|value)_|decoder_|swa_)?head_(dim|size)|d_kv|d_head", 8),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim", 8),
    (r"kv_lora_rank|q_lora_rank|dt_rank|time_step_rank|mamba_dt_rank|.*lora_rank.*", 8),
    (r"(mamba_)?d_state|state_size|ssm_state_size", 4),
    (r"moe_intermediate_size|shared_expert_intermediate_size|expert_intermediate_size|expert_ffn_hidden_size", 32),
    (
        r".*(intermediate|ffn|inner|feedforward|feed_forward|mlp).*(size|dim|channels)|d_ff|d_inner|n_inner|ffn_hidden_size|.*_ffn_dim|.*mlp_hidden.*",
        64,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts", 4),
    (r"num_experts_per_(tok|token)|moe_topk|moe_k|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|decoder_sparse_step|moe_layer_start_index", 1),
    (
        r".*num_feature_levels|num_encoder_blocks|num_feat_extract_layers|num_adapter_layers|conv_layers|.*num_conv_layers",
        None,
    ),
    (
        r"num_(hidden_)?layers|n_layers?|num_.*_layers|.*(encoder|decoder|hidden)_layers|depth|.*_depth|layers|num_.*blocks|num_self_attends_per_block",
        2,
    ),
    (r".*vocab_size(?!_per).*|.*vocabulary_size", VOCABULARY),
    (
        r"(max|n)_(.*_)?(positions?|position_embeddings|ctx|seq_len|sequence_length)|max_target_positions|n_ctx|seq_length",
        128,
    ),
    (r".*sliding_window|attention_window_size|local_window_size", 8),
    (
        r"(hidden|embed|embedding|emb|projection|d_model|n_embd|d_embed|attention_hidden|backbone_hidden|pooler_hidden|word_embed_proj|output_hidden)(_size|_dim|_dims|_channels)?",
        32,
    ),
    (
        r".*(hidden|embed|embedding|projection|model|proj|output|fusion|rnn|lstm|decoder|encoder|text|vision|audio|classifier_proj)_(hidden_)?(size|dim|dims|channels)|width|dim|out_channels",
        32,
    ),
    (r"(image|img|input|video)_(size|resolution)|resolution", 32),
    (r"(temporal_)?patch_size", None),
    (r"num_frames|frames_per_clip", 4),
    (r"num_queries|num_query_tokens|num_latents|.*num_query.*|resampler_n_latents", 8),
    (r"d_latents", 32),
    (r"num_mel_bins|mel_bins|n_mels|input_feat_per_channel", 16),
    (r"max_source_positions", 32),
    (r"num_codebooks|codebook_num|num_codevectors_per_group", None),
    (r"codebook_size|codebook_dim", 32),
]
RULES = [(re.compile(pattern), number) for pattern, number in NUMBERS]
DROPOUT = re.compile(
    r".*(dropout|drop|pdrop|drop_rate|layerdrop|drop_prob|jitter_noise|drop_path|dropout_prob|dropout_rate|dropout_p).*|mask_(time|feature)_prob"
)
#: Lists: one entry a stage or layer.
DEPTHS = re.compile(r"depths?|layers?_per_stage|num_blocks|blocks|block_sizes")
WIDTHS = re.compile(r".*(hidden_sizes|embed_dims?|dims|channels|widths|neck_hidden_sizes|embed_dim|hidden_size)")

#: Fields that no rule gets right, by the configuration's model type.
MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
SWIN = {"depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET}
WAVES = {
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": (32, 32),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 16,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
}
EXCEPTIONS: dict[str, dict] = {
    "aria": {"projector_patch_to_query_dict": {1: 1, 4: 4, 16: 16}},
    "beit": {"out_indices": [0, 1, 2, 3], "num_hidden_layers": 4},
    "bit": {"num_groups": 4},
    "chameleon": {"vq_config": {"num_res_blocks": 1, "base_channels": 32, "channel_multiplier": [1, 1]}},
    "codegen": {"rotary_dim": 4, "n_ctx": 128},
    "cvt": {
        "embed_dim": [16, 32, 64],
        "num_heads": [1, 2, 4],
        "depth": [1, 1, 1],
        **{name: [0.0, 0.0, 0.0] for name in ("attention_drop_rate", "drop_rate", "drop_path_rate")},
    },
    "data2vec-vision": {"out_indices": [0, 1, 2, 3], "num_hidden_layers": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "depth_anything": {"neck_hidden_sizes": [16, 16], "fusion_hidden_size": 16},
    "dia": {"pad_token_id": 0},
    "donut-swin": SWIN,
    "efficientformer": {"hidden_sizes": [16, 16, 32, 32], "dim": 32},
    "flaubert": {"pad_token_id": 0},
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": {"patch_size": 8}},
    "glm4v_moe_text": {"rope_scaling": MROPE, "head_dim": 8},
    "glm4v_text": {"rope_scaling": MROPE, "head_dim": 8},
    "glpn": {"decoder_hidden_size": 16},
    "gptj": {"rotary_dim": 4},
    "granite_speech": {"encoder_config": {"input_dim": 16, "output_dim": 32}},
    "hgnet_v2": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "hidden_sizes": [16, 16, 16, 16],
    },
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "blip-2": {"image_token_index": 90},
    "idefics3": {"scale_factor": 1, "vision_config": {"patch_size": 8}},
    "smolvlm": {"scale_factor": 1, "vision_config": {"patch_size": 8}},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "longt5": {"decoder_start_token_id": 0},
    "llama4": {"text_config": {"num_local_experts": 2}},
    "maskformer-swin": SWIN,
    "mobilevitv2": {"image_size": 64},
    "moonshine": {"pad_token_id": 0},
    "poolformer": {"hidden_sizes": [16, 32, 64, 128]},
    "pvt": {"hidden_sizes": [16, 32, 64, 128], "image_size": 64},
    "qwen2_5_vl_text": {"rope_scaling": MROPE},
    "qwen2_vl_text": {"rope_scaling": MROPE},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "siglip2": {"vision_config": {"num_patches": 16, "patch_size": 8}},
    "siglip2_vision_model": {"num_patches": 16, "patch_size": 8},
    "swin": SWIN,
    "swinv2": SWIN,
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "textnet": {"image_size": 64, "hidden_sizes": [16, 16, 32, 32, 64], "stem_out_channels": 16},
    "timesfm": {"context_length": 32, "horizon_length": 8, "patch_length": 8, "head_dim": 8},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 0.5},
    "xmod": {"languages": ["en"], "default_language": "en"},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "autoformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]},
    "conditional_detr": DETR,
    "dab-detr": DETR,
    "data2vec-audio": {**WAVES, "conv_pos_kernel_size": 3},
    "deformable_detr": {**DETR, "two_stage": False},
    "detr": DETR,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "efficientnet": {
        "width_coefficient": 0.5,
        "depth_coefficient": 0.5,
        "hidden_dim": 64,
        "image_size": 64,
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 6, 6],
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 90, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "falcon_h1": {**MAMBA_HEADS, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {**MAMBA_HEADS, "layer_types": ["mamba", "attention"]},
    "hubert": WAVES,
    "speecht5": WAVES,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "informer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "jamba": {
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen3_vl_moe_text": {"rope_scaling": MROPE},
    "qwen3_vl_text": {"rope_scaling": MROPE},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_hashes": 1,
        "is_decoder": True,
    },
    "sew": WAVES,
    "shieldgemma2": {"mm_tokens_per_image": 4, "vision_config": {"patch_size": 8}},
    "sew-d": WAVES,
    "swin2sr": {"num_heads": [2, 2], "depths": [1, 1], "embed_dim": 16},
    "swiftformer": {"embed_dims": [16, 16, 32, 32]},
    "table-transformer": DETR,
    "time_series_transformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "unispeech": WAVES,
    "unispeech-sat": WAVES,
    "wav2vec2": WAVES,
    "wav2vec2-conformer": {**WAVES, "vocab_size": VOCABULARY},
    "wavlm": WAVES,
    "zamba": {
        "use_mamba_kernels": False,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "num_mamba_heads": 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "mamba_d_state": 8,
    },
}


def shrink(config_class, **overrides):
    """Returns a small configuration of a class."""
    return config_class(**arguments_of(config_class, overrides))


def arguments_of(config_class, overrides=None):
    default = config_class()
    arguments = {}
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        if name in ("self", "kwargs") or parameter.kind == parameter.VAR_POSITIONAL:
            continue
        value = getattr(default, name, parameter.default)
        small = small_value(name, value)
        if small is not KEEP:
            arguments[name] = small
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig) and not name.startswith("_"):
            arguments[name] = {"model_type": value.model_type, **arguments_of(type(value))}
    merge(arguments, copy.deepcopy(EXCEPTIONS.get(config_class.model_type, {})))
    merge(arguments, overrides or {})
    return arguments


def merge(arguments, others):
    for name, value in others.items():
        if isinstance(value, dict) and isinstance(arguments.get(name), dict):
            merge(arguments[name], value)
        else:
            arguments[name] = value


def _special(name):
    """Returns the token of a field, as `image_token_id`, for which the default is not in the small vocabulary."""
    known = {"pad": 0, "bos": 1, "eos": 2}
    for word, token in known.items():
        if word in name:
            return token
    return NUM_WORDS + sum(map(ord, name.removesuffix("_id").removesuffix("_index"))) % (VOCABULARY - NUM_WORDS)


KEEP = object()


def small_value(name, value):
    if isinstance(value, (bool, str, PretrainedConfig)) or value is None or value is inspect.Parameter.empty:
        return KEEP
    if DROPOUT.fullmatch(name) and isinstance(value, (int, float)):
        return 0.0
    if isinstance(value, float):
        return KEEP
    if isinstance(value, int):
        if re.fullmatch(r".*_(id|index|token)", name):
            return KEEP if value < NUM_WORDS else _special(name)
        for pattern, number in RULES:
            if pattern.fullmatch(name):
                return KEEP if number is None else min(number, value) if value > 0 else KEEP
        return KEEP
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        if DEPTHS.fullmatch(name):
            return type(value)(1 for _ in value)
        if "heads" in name:
            return type(value)(min(item, 2**stage) for stage, item in enumerate(value))
        if WIDTHS.fullmatch(name):
            return type(value)(16 * 2**stage for stage in range(len(value)))
        if re.fullmatch(r"(image|img|input)_size|resolution", name):
            return type(value)(32 for _ in value)
    return KEEP
