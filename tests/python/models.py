"""Small models of the kinds that people run, from the libraries that they run them with, with random weights: nothing
is downloaded. Each knows nothing of libmfa; those of transformers get the name of the attention function."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY, BATCH, LENGTH = 96, 2, 24


@dataclass
class Kind:
    """How to make a model, and its inputs."""

    make: Callable  # (attention's name, or None) -> module
    inputs: Callable  # () -> keyword arguments of the module
    loss: Callable  # of the module's output
    library: str = "torch"  # where it comes from
    attention: str | None = None  # transformers' own that it is compared with
    generates: bool = False


def kind_of_transformers(model, inputs, attention="sdpa", generates=False, **sizes):
    def make(attention):
        transformers = importlib.import_module("transformers")  # here, since it may be left out
        config = getattr(transformers, model.partition("For")[0] + "Config")
        return getattr(transformers, model)._from_config(config(**sizes), attn_implementation=attention)

    return Kind(make, inputs, lambda output: output.loss, "transformers", attention, generates)


def tokens(length=LENGTH):
    return torch.randint(2, VOCABULARY, (BATCH, length))


def text(left=True):
    """Two rows, the second padded. Padding is excluded from the labels, as is the token after it."""
    given = tokens()
    mask = torch.ones_like(given)
    mask[1, slice(None, 5) if left else slice(-5, None)] = 0
    labels = given.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return {"input_ids": given, "attention_mask": mask, "labels": labels}


def unpadded():
    given = tokens()
    return {"input_ids": given, "labels": given}


def classified():
    return text(left=False) | {"labels": torch.tensor([0, 1])}


def images():
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.tensor([0, 1])}


def translated():
    return {"input_ids": tokens(), "attention_mask": text(left=False)["attention_mask"], "labels": tokens(17)}


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GEMMA = {
    "num_key_value_heads": 3,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}


class UNet(nn.Module):
    """Stable Diffusion's, with cross-attention to a text."""

    def __init__(self):
        super().__init__()
        diffusers = importlib.import_module("diffusers")
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=20,
            attention_head_dim=2,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    def forward(self, sample, text):
        return self.unet(sample, torch.tensor([3, 7]), text).sample


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        diffusers = importlib.import_module("diffusers")
        self.transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            norm_num_groups=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )

    def forward(self, sample):
        labels, steps = torch.tensor([1, 2]), torch.tensor([3, 7])
        return self.transformer(sample, timestep=steps, class_labels=labels).sample


class Encoder(nn.Module):
    """torch.nn's own, with padding."""

    def __init__(self, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding=None, mask=None):
        return self.encoder(x, mask=mask, src_key_padding_mask=padding)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)

    def forward(self, x, y):
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        return self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True)


def squared(output):
    return output.square().mean()


def padded():
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 15:] = True
    return {"x": torch.randn(BATCH, LENGTH, 32), "padding": padding}


KINDS = {
    "llama": kind_of_transformers(
        "LlamaForCausalLM",
        unpadded,
        generates=True,
        num_key_value_heads=2,
        **DECODER,
    ),
    "llama padded": kind_of_transformers("LlamaForCausalLM", text, num_key_value_heads=2, **DECODER),
    "mistral": kind_of_transformers(
        "MistralForCausalLM",
        unpadded,
        generates=True,
        num_key_value_heads=3,
        sliding_window=7,
        **DECODER,
    ),
    "gemma": kind_of_transformers(
        "Gemma2ForCausalLM",
        text,
        attention="eager",  # transformers' sdpa has no softcap
        generates=True,
        **DECODER | GEMMA,
    ),
    "bert": kind_of_transformers(
        "BertForSequenceClassification",
        classified,
        vocab_size=VOCABULARY,
        **ENCODER,
        **NO_DROPOUT,
    ),
    "vit": kind_of_transformers(
        "ViTForImageClassification",
        images,
        image_size=16,
        patch_size=4,
        num_labels=2,
        **ENCODER,
        **NO_DROPOUT,
    ),
    "t5": kind_of_transformers(
        "T5ForConditionalGeneration",
        translated,
        generates=True,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=None,
    ),
    "unet": Kind(
        lambda _: UNet(),
        lambda: {"sample": torch.randn(BATCH, 4, 8, 8), "text": torch.randn(BATCH, 9, 20)},
        squared,
        "diffusers",
    ),
    "dit": Kind(lambda _: DiT(), lambda: {"sample": torch.randn(BATCH, 4, 8, 8)}, squared, "diffusers"),
    "encoder": Kind(lambda _: Encoder(), padded, squared),
    "encoder norm first": Kind(lambda _: Encoder(norm_first=True), padded, squared),
    "encoder decoder": Kind(
        lambda _: EncoderDecoder(),
        lambda: {"x": torch.randn(BATCH, 9, 32), "y": torch.randn(BATCH, 12, 32)},
        squared,
    ),
}


def seeded(make):
    """The result of `make` with this test's seed."""
    torch.manual_seed(torch.initial_seed())
    return make()


def result(output, attention_mask=None, padding=None, **_):
    """The main tensor of a model's output, with 0 where the input is padding."""
    tensor = output if isinstance(output, torch.Tensor) else output.logits
    hidden = padding if padding is not None else attention_mask == 0 if attention_mask is not None else None
    if hidden is not None and tensor.dim() == 3 and tensor.shape[:2] == hidden.shape:
        tensor = tensor.masked_fill(hidden[..., None], 0)
    return tensor
