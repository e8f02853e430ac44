"""Models of transformers with attn_implementation="mfa": generation with each kind of cache, and training on packed
and padded sequences, in memory that grows as the rows do."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from models import DECODER, GEMMA, VOCABULARY
from mps_flash_attn import register_transformers, sdpa_stats
from stand_in import TIMEOUT

pytestmark = [
    pytest.mark.needs("transformers"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("everything", "one_thread"),
]
NEW = 14


@pytest.fixture(autouse=True)
def transformers():
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with register_transformers():
        yield transformers
    transformers.logging.set_verbosity(before)


BOTH_LAYERS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
SPEECH = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "d_model": 32,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
KINDS = {  # class: its sizes
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "MistralForCausalLM": {"num_key_value_heads": 3, "sliding_window": 7},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": {"num_key_value_heads": 3, "head_dim": 8, **BOTH_LAYERS},
    "GptOssForCausalLM": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        **BOTH_LAYERS,
    },
}


def made(name, attention, **sizes):
    """A model whose weights are large enough for attention to matter."""
    import transformers

    torch.manual_seed(torch.initial_seed())
    model_class = getattr(transformers, name)
    config = model_class.config_class(**sizes)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def decoders(name, **sizes):
    """(on eager attention, on ours)"""
    eager = made(name, "eager", **DECODER | KINDS[name] | sizes)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("mfa")
    assert ours.config._attn_implementation == "mfa"
    return eager, ours


def tokens(*shape):
    return torch.randint(2, VOCABULARY, shape)


def generated(model, **inputs):
    """Greedily, NEW tokens."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | inputs
    return model.generate(**options)[:, -options["max_new_tokens"] :]


def on_ours(function, *arguments, **options):
    sdpa_stats(reset=True)
    found = function(*arguments, **options)
    assert set(sdpa_stats()) == {"replaced"}
    return found


# --- Generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", KINDS)
def test_left_padded_batch(name, cache):
    """Each row of a batch goes on as it does alone, and as on eager attention."""
    eager, ours = decoders(name)
    prompts = [tokens(1, length) for length in (11, 4, 9)]
    batch, mask = torch.zeros(2, 3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 11 - prompt.shape[1] :] = prompt
        mask[row, 11 - prompt.shape[1] :] = 1
    wanted = torch.cat([generated(eager, input_ids=prompt) for prompt in prompts])
    found = on_ours(generated, ours, input_ids=batch, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(found, wanted)


def test_compiled_with_a_static_cache():
    """A mask that was made outside of compiled code is that of "sdpa" within."""
    eager, ours = decoders("LlamaForCausalLM", num_hidden_layers=1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    inputs = {"input_ids": tokens(2, 6), "attention_mask": mask}
    few = {"max_new_tokens": 2, "min_new_tokens": 2}
    wanted = generated(eager, **inputs, **few)
    torch._dynamo.reset()
    ours.forward = torch.compile(ours.forward, backend="aot_eager")
    assert torch.equal(generated(ours, cache_implementation="static", **inputs, **few), wanted)


def speech():
    return {"input_features": torch.randn(2, 8, 40)}


def translated():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, -5:] = 0
    return {"input_ids": tokens(2, 12), "attention_mask": mask}


def seen():
    """Two pictures of 4 x 4 and 2 x 4 patches, each with its text."""
    pictures = torch.tensor([[1, 4, 4], [1, 2, 4]])
    ids = tokens(2, 12).clamp_max(80)
    ids[0, 2:6] = ids[1, 4:6] = 90
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(24, 3 * 2 * 4 * 4),
        "image_grid_thw": pictures,
        "mm_token_type_ids": (ids == 90).long(),
    }


OTHERS = {
    "WhisperForConditionalGeneration": (speech, {"vocab_size": VOCABULARY, "eos_token_id": None, **SPEECH}),
    "T5ForConditionalGeneration": (
        translated,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
        },
    ),
    "Qwen2VLForConditionalGeneration": (
        seen,
        {
            "text_config": DECODER | {"num_key_value_heads": 2, "rope_parameters": ROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            "image_token_id": 90,
            "video_token_id": 91,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    inputs, sizes = OTHERS[name]
    eager = made(name, "eager", **sizes)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("mfa")
    given = inputs()
    assert torch.equal(on_ours(generated, ours, **given), generated(eager, **given))


# --- Continuous batching -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GptOssForCausalLM", "Gemma2ForCausalLM"])
def test_generate_batch(name, transformers, monkeypatch):
    """Prompts of several lengths, in parts of 16 tokens, with a prefix that two of them share; full attention reads the
    pages where they are."""
    from mps_flash_attn.transformers import paged

    pages = []

    def varlen(*arguments, block_table, **options):
        pages.append(block_table)
        return original(*arguments, block_table=block_table, **options)

    original = paged.flash_attention_varlen
    monkeypatch.setattr(paged, "flash_attention_varlen", varlen)
    eager, ours = decoders(name)
    prompts = [tokens(1, length) for length in (5, 40, 17, 34)]
    prompts[3][:, :32] = prompts[1][:, :32]
    wanted = [generated(eager, input_ids=prompt)[0].tolist() for prompt in prompts]
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=16)
    out = on_ours(
        ours.generate_batch,
        [prompt[0].tolist() for prompt in prompts],
        generation_config=config,
        continuous_batching_config=sizes,
    )
    assert [out[key].generated_tokens for key in sorted(out, key=lambda key: int(key.split("_")[-1]))] == wanted
    assert ours.config._attn_implementation == "mfa"
    has_pages = [table is not None for table in pages]
    assert has_pages.count(True) >= (2 if name == "LlamaForCausalLM" else 1) * NEW


# --- Training ------------------------------------------------------------------------------------


def step(model, **inputs):
    """(loss, gradients)"""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("by", ["positions", "numbers", "both"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_packed_step(name, by):
    """One of packed sequences is one of the same sequences in padded rows, in its loss and its gradients."""
    eager, ours = decoders(name)
    lengths = (9, 1, 14)
    texts = [tokens(length) for length in lengths]
    labels = [text.masked_fill(torch.arange(len(text)) == 0, -100) for text in texts]  # the first follows no token
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    shown = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    wanted = step(eager, input_ids=padded, attention_mask=mask, labels=shown)
    found = on_ours(step, ours, input_ids=padded, attention_mask=mask, labels=shown)
    assert_close(found, wanted, rtol=1e-3, atol=1e-5)

    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    given = {"input_ids": torch.cat(texts)[None], "labels": torch.cat(labels)[None]}
    given["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if by != "positions":
        given |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 14, "max_length_k": 14}
    if by == "numbers" and name == "LlamaForCausalLM":  # a mask that knows nothing of sequences; rotations are relative
        given["position_ids"] = torch.arange(24)[None]
    assert_close(on_ours(step, ours, **given), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """The mask of a step is the same where layers are computed again."""
    eager, ours = decoders("MistralForCausalLM")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, -4:] = 0
    given = {"input_ids": tokens(2, 12), "attention_mask": mask}
    given["labels"] = given["input_ids"].masked_fill(mask == 0, -100)
    wanted = step(eager, **given)
    ours.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(on_ours(step, ours, **given), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["padding", "packed"])
def test_lengths_are_read_once(kind, monkeypatch):
    """Numbers are read from tensors once in a step for each kind of layer, and not in each layer."""
    from mps_flash_attn.transformers import masks

    read = []
    for name in ("_with_padding", "_of_sequences"):
        original = getattr(masks, name)
        monkeypatch.setattr(masks, name, lambda *given, own=original: read.append(own) or own(*given))
    _, ours = decoders("Gemma2ForCausalLM", num_hidden_layers=4, layer_types=BOTH_LAYERS["layer_types"] * 2)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    positions = torch.arange(12)[None] % 5
    given = {"attention_mask": mask} if kind == "padding" else {"position_ids": positions, "use_cache": False}
    on_ours(ours, input_ids=tokens(1, 12), **given)
    assert len(read) == 2
    if kind == "packed":
        ours(input_ids=tokens(1, 12), position_ids=positions)  # with a cache, of which transformers' mask knows nothing
        assert len(read) == 3


MEMORY = """
import os, resource, sys, torch
from transformers import MistralConfig, MistralModel
from mps_flash_attn import register_transformers

register_transformers()
torch.set_num_threads(1)
config = MistralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, max_position_embeddings=8192, sliding_window=64)
model = MistralModel._from_config(config, attn_implementation="mfa")

def step(length, kind, row):
    given = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
    if kind == "packed":
        given["position_ids"] = torch.arange(length)[None] % (length // 4)
    else:
        given["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        given["attention_mask"][:, row] = 0
    model(**given).last_hidden_state.sum().backward()

for kind, row in (("left", slice(9)), ("right", slice(-9, None)), ("holes", slice(9, 20)), ("packed", None)):
    for length in (4096, 8192):
        child = os.fork()  # a process has one high-water mark
        if not child:
            step(512, kind, row)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            step(length, kind, row)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(kind, length, used * (1 if sys.platform == "darwin" else 1024), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.cpu("a process of its own")
def test_memory_of_a_step():
    """The high-water mark of a step of training grows as the length does."""
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=settings, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    used = [line.split() for line in done.stdout.splitlines()]
    assert len(used) == 8
    for (kind, _, least), (_, length, most) in zip(used[::2], used[1::2], strict=True):
        assert int(most) < 3 * int(least) and int(most) < int(length) ** 2 // 2, (kind, least, most)
