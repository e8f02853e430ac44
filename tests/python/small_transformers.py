"""Every model of the installed transformers, as small as its configuration allows, with random weights, and inputs for
it: nothing is downloaded. Sizes are reduced by the names of fields; what that does not fit stands in OWN."""

import dataclasses
import importlib
import inspect
import re

import torch

VOCABULARY, BATCH, LENGTH = 96, 3, 12

# The first head that a type of model has; the last is the bare model.
HEADS = (
    "FOR_CAUSAL_LM",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_MASKED_LM",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_MULTIMODAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_CTC",
    "FOR_IMAGE_CLASSIFICATION",
    "FOR_OBJECT_DETECTION",
    "FOR_SEMANTIC_SEGMENTATION",
    "",
)

UNTOUCHED = re.compile(
    "num_channels|in_channels|in_chans|kernel|merge_size|type_vocab|block_size|window_size|chunk|tubelet|stride"
    "|temporal|num_labels|pool|query_pre|^bos_|^eos_|group_size|coordinate_size|shape_size"
)
SIZES = (
    (r".*(vocab_size|num_embeddings|n_vocab|vocab_size_\w+)$", VOCABULARY),
    (r".*(kv_heads|key_value_heads|multi_query_group_num)$", 2),
    (r".*(heads|n_head|num_head|nhead)$", 4),
    (r".*(head_dim|head_size|d_kv|d_head|rotary_dim)$", 8),
    (r"(n_group|topk_group|num_expert_group)$", 1),
    (r".*(experts_per_tok|experts_per_token|top_?k|moe_k)$", 2),
    (r".*experts$", 4),
    (r".*(layers?|depth|blocks)$", 2),
    (r".*(max_\w*position\w*|n_positions|max_seq_len|seq_length|model_max_length)$", 64),
    (r"sliding_window(_size)?$", 5),
    (r".*(image_size|img_size)$", 32),
    (r".*patch_size$", 8),
    (r".*(size|dim|width|d_model|n_embd|d_ff|n_inner|channels|filters|rank|units|d_inner|planes)$", 32),
)
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OWN = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 8}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "gemma3n_text": {
        "intermediate_size": 32,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm5_next_text": {"index_kpool": 1},
    "glm4v_moe_text": MROPE | {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}},
    "glm4v_text": MROPE,
    "glm_image_text": MROPE,
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "inkling_vision": {"hidden_size": 32, "patch_size": 40, "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mimi": {"upsample_groups": 32},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1},
    "paddleocr_vl_text": MROPE,
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32},
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "swin": {"depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
}


def reduced(name, value):
    if UNTOUCHED.search(name):
        return value
    if isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
        most = 1 if re.search("depths|num_layers", name) else 2 if "heads" in name else None
        if most is None and re.search("size|dim|channels", name) and not re.search("patch|window", name):
            most = 32
        return type(value)(value if most is None else (min(one, most) for one in value))
    if type(value) is not int or value <= 0:
        return value
    if re.search(r"token_(id|index)$|_id$", name):
        return value if value < VOCABULARY else 7 + sum(map(ord, name)) % 80
    return next((min(value, most) for pattern, most in SIZES if re.match(pattern, name)), value)


def small(config):
    """A new configuration from reduced fields, which derives the other fields from them again."""
    from transformers import PreTrainedConfig

    fields = {}
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        if isinstance(value, PreTrainedConfig):
            fields[field.name] = small(value)
        elif value is not None and isinstance(field.default, (int, list, tuple)) and type(field.default) is not bool:
            fields[field.name] = reduced(field.name, value)
    heads, groups = (vars(config).get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads == groups and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    kinds = vars(config).get("layer_types")
    if isinstance(kinds, list) and kinds:  # a layer of each kind
        kinds = list(dict.fromkeys(kinds))
        kinds *= 2 // len(kinds) or 1
        fields["layer_types"] = kinds
        fields |= {name: len(kinds) for name in ("num_hidden_layers", "num_layers", "n_layer") if name in fields}
    rope = vars(config).get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        half = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
        fields["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return type(config)(**fields | OWN.get(config.model_type, {}))


def model_classes(step):
    """(a class for each type of model, or one type in `step`; {name of one that cannot be imported: why})"""
    transformers = importlib.import_module("transformers")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    types = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    mappings = [getattr(auto, f"MODEL_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES") for head in HEADS]
    found, missing = {}, {}
    for model_type, config_name in list(types.items())[::step]:
        names = (mapping[model_type] for mapping in mappings if model_type in mapping)
        classes = []
        for name in (name if isinstance(name, str) else name[0] for name in names):
            try:
                model = getattr(transformers, name)
                classes.append((model.config_class.__name__ != config_name, len(classes), model))
            except (ImportError, AttributeError) as error:
                missing[name] = error
        if classes:
            found[min(classes)[2]] = None
    return list(found), missing


def setting(config, *names, default):
    """The first of these fields that the configuration or one of its parts has."""
    from transformers import PreTrainedConfig

    parts = [config]
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, PreTrainedConfig)]
    values = (vars(part).get(name) for name in names for part in parts)
    return next((value for value in values if value is not None), default)


def random(*shape):
    """Rows 0 and 1 of a batch are the same, as in text()."""
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    if shape[0] == BATCH:
        value[1] = value[0]
    return value


def text():
    """(ids, mask): the first two rows differ in their last token only, the third is padded."""
    ids = torch.randint(5, VOCABULARY - 6, (1, LENGTH), generator=torch.Generator().manual_seed(0)).repeat(BATCH, 1)
    ids[1, -1] = 5 if ids[0, -1] > 50 else 90
    mask = torch.ones_like(ids)
    mask[2, -3:] = 0
    return ids, mask


def images(config):
    size = setting(config, "image_size", "img_size", default=32)
    height, width = (size, size) if isinstance(size, int) else size if isinstance(size, (list, tuple)) else (32, 32)
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = setting(config, "num_frames", "frames_per_clip", default=2)
    image = random(BATCH, channels, height, width)
    return [image, image[:, None], image[:, None].repeat(1, frames, 1, 1, 1)]


def patches(config):
    side = setting(config, "patch_size", default=8)
    depth = setting(config, "temporal_patch_size", default=1)
    channels = setting(config, "in_channels", "num_channels", "in_chans", default=3)
    return [random(32, channels * depth * side * side), random(32, channels, side, side)]


def sounds(config):
    names = ("num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", "feature_projection_input_dim")
    mels = setting(config, *names, "input_dim", default=80)
    length = 2 * setting(config, "max_source_positions", default=40)
    shapes = (BATCH, mels, length), (BATCH, length, mels), (BATCH, 2000), (BATCH, 1, 2000)
    return [random(*shape) for shape in shapes]


MEDIA = {
    "pixel_values": images,
    "pixel_values_videos": lambda config: images(config)[2:],
    "input_features": sounds,
    "input_values": sounds,
    "hidden_states": patches,
    "past_values": lambda config: [random(BATCH, setting(config, "context_length", default=32))],
}


def inputs(model):
    """Candidates for the model's arguments; the caller tries them in turn."""
    known = inspect.signature(model.forward).parameters
    ids, mask = text()
    others = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": ids,
        "bbox": torch.zeros(BATCH, LENGTH, 4, dtype=torch.long),
        "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "qformer_input_ids": ids,
    }
    needed = {"bbox", "grid_thw", "image_grid_thw", "qformer_input_ids"}
    others = {
        name: value
        for name, value in others.items()
        if name in known and (name not in needed or known[name].default is known[name].empty or name == "bbox")
    }
    if "input_ids" not in known:
        others.pop("attention_mask", None)
    if not model.config.is_encoder_decoder and "input_ids" in known:
        others.pop("decoder_input_ids", None)
    if "input_ids" in known:
        yield others
    without = {name: value for name, value in others.items() if name not in ("input_ids", "attention_mask")}
    for name in MEDIA:
        for value in MEDIA[name](model.config) if name in known else ():
            yield others | {name: value}
            if without != others:
                yield without | {name: value}
