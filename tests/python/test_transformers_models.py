"""Every model of the installed transformers on libmfa: its results are those of eager attention, or it is refused with
a sentence of ours that names it."""

import copy
import importlib
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch

from mps_flash_attn import register_transformers, replaced_sdpa, sdpa_stats
from small_transformers import BATCH, LENGTH, inputs, model_classes, random, small, text
from stand_in import FULL

pytestmark = [
    pytest.mark.needs("transformers"),
    pytest.mark.cpu("what is refused is the same for all backends, and the sweep is long"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("everything", "one_thread"),
]
UNSUPPORTED = re.compile(
    r'^attn_implementation is "mfa", but \w+ .*; use attn_implementation="(sdpa|eager)".* this model$'
)
TOLERANCE = 1e-4  # of the largest number of a tensor


@pytest.fixture(autouse=True)
def transformers():
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with register_transformers():
        yield transformers
    transformers.logging.set_verbosity(before)


# --- all of them ---------------------------------------------------------------------------------


@dataclass
class Sweep:
    classes: int
    ran: list = field(default_factory=list)  # on ours, by name
    without: list = field(default_factory=list)  # accepted, and has no attention in this forward pass
    refused: list = field(default_factory=list)
    replaced: list = field(default_factory=list)  # on ours, by replaced_sdpa()
    causal: list = field(default_factory=list)  # of all that ran
    like_sdpa: list = field(default_factory=list)  # equal to transformers' "sdpa", which differs from its eager
    untried: dict = field(default_factory=lambda: defaultdict(list))  # {why: names}
    wrong: list = field(default_factory=list)

    def report(self, seconds):
        yield f"{self.classes} classes of transformers in {seconds:.0f} s of processor time"
        yield f"{len(self.ran)} on libmfa by name, {len(self.replaced)} by replaced_sdpa()"
        yield f"{len(self.causal)} of them causal; {len(self.without)} without attention: {', '.join(self.without)}"
        yield f"{len(self.like_sdpa)} as transformers' sdpa, unlike its eager: {', '.join(self.like_sdpa)}"
        yield f"{len(self.refused)} refused: {', '.join(self.refused)}"
        yield f"{sum(map(len, self.untried.values()))} not tried:"
        for why, names in sorted(self.untried.items(), key=lambda item: -len(item[1])):
            yield f"    {len(names)} {why}: {', '.join(names)}"


def made(model_class, config, attention):
    """A model with weights that are large enough for attention to matter."""
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(0, 0.3, generator=generator)
    return model


@torch.no_grad()
def outputs(model, arguments):
    torch.manual_seed(0)
    output = model(**arguments)
    values = output.values() if isinstance(output, dict) else output
    return [one for one in values if isinstance(one, torch.Tensor) and one.is_floating_point() and one.dim() > 1]


def of_tokens(tensor):
    return tensor.dim() == 3 and tensor.shape[:2] == (BATCH, LENGTH)


def furthest(found, wanted):
    """The largest difference of tensors outside of padding, relative to their largest number; NaN equals NaN."""
    kept = text()[1].bool()
    for one, other in zip(found, wanted, strict=True):
        one, other = (one[kept], other[kept]) if of_tokens(other) else (one, other)
        largest = other.nan_to_num().abs().max().clamp_min(1e-6)
        equal = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(equal, 0.0, (one - other).abs()).nan_to_num(torch.inf).max() / largest
        yield apart.item()


def differ(found, wanted, least=()):
    """Whether they differ by more than rounding: than TOLERANCE, or `least` for models that amplify rounding."""
    least = least or [0] * len(wanted)
    distances = zip(furthest(found, wanted), least, strict=True)
    return len(found) != len(wanted) or any(apart > max(TOLERANCE, rounding) for apart, rounding in distances)


def roundings(model, arguments, wanted):
    """The difference that rounding may cause: eight times that of eager attention in float32 and in float64, which is
    large for models that amplify rounding."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    arguments = {name: one.double() if one.is_floating_point() else one for name, one in arguments.items()}
    return [8 * apart for apart in furthest(wanted, outputs(model, arguments))]


def looks_ahead(tensors):
    """Whether the last token, in which alone rows 0 and 1 differ, changes anything before it; None if not known."""
    rows = [tensor for tensor in tensors if of_tokens(tensor)]
    before = [((one[0, :-1] - one[1, :-1]).abs().max() / one.abs().max()).item() for one in rows]
    return any(not change <= 1e-6 for change in before) if rows else None


def reason(stage, error):
    if error is None:
        return stage
    line = next(iter(str(error).strip().splitlines()), "")
    library = re.search(r"requires the (\w+) library|No module named '(\w+)'", line)
    return f"needs {library[1] or library[2]}" if library else f"{stage}: {type(error).__name__}"


def try_class(model_class, sweep):
    name = model_class.__name__
    try:
        config = small(model_class.config_class())
    except Exception as error:
        return sweep.untried[reason("no small configuration", error)].append(name)
    try:
        model = made(model_class, config, "mfa")
    except Exception as error:
        if UNSUPPORTED.match(str(error)):
            sweep.refused.append(name)
            return try_refused(model_class, config, sweep)
        try:
            made(model_class, config, "eager")
        except Exception:
            return sweep.untried[reason("not made", error)].append(name)
        return sweep.wrong.append(f"{name}: {error!r}")
    model.set_attn_implementation("eager")
    wanted = tried = None
    for arguments in inputs(model):
        try:
            wanted = outputs(model, arguments)
            break
        except Exception as error:
            tried = tried or error
    if not wanted:
        return sweep.untried[reason("no input found", tried)].append(name)
    by_name = on_ours(model, "mfa", arguments, wanted, sweep)
    if by_name:
        sweep.ran.append(name)
        sweep.causal += [name] if looks_ahead(wanted) is False else []
    elif by_name is not None and not computes_attention(model, arguments):
        sweep.without.append(name)
    elif by_name is not None:
        sweep.wrong.append(f"{name}: it computes attention, and ours was not called")
    if model_class._supports_sdpa and on_ours(model, "sdpa", arguments, wanted, sweep):
        sweep.replaced.append(name)


def try_refused(model_class, config, sweep):
    """What the sentence recommends in place of ours, where that is "sdpa"."""
    if not model_class._supports_sdpa:
        return
    try:
        eager, model = (made(model_class, config, attention) for attention in ("eager", "sdpa"))
        arguments = next(inputs(eager))
        wanted = outputs(eager, arguments)
    except Exception:
        return  # no input known; it counts as refused
    if on_ours(model, None, arguments, wanted, sweep):
        sweep.replaced.append(model_class.__name__)


def on_ours(model, attention, arguments, wanted, sweep):
    """Whether libmfa was called; None if it was not tried. Errors are recorded."""
    name = type(model).__name__
    try:
        if attention:
            model.set_attn_implementation(attention)
    except ValueError:
        return None if attention == "sdpa" else sweep.wrong.append(f"{name} cannot be switched back")  # to a part of it
    sdpa_stats(reset=True)
    try:
        if attention == "mfa":
            found = outputs(model, arguments)
        else:
            with replaced_sdpa():
                found = outputs(model, arguments)
    except ValueError as error:
        return sweep.wrong.append(f"{name}: {error!r}")
    stats = sdpa_stats()
    if set(stats) - {"replaced"}:
        sweep.wrong.append(f"{name}, {attention}: {stats}")
    if looks_ahead(wanted) is False and looks_ahead(found):
        sweep.wrong.append(f"{name}, {attention}: it looks ahead")
    if differ(found, wanted) and differ(found, wanted, roundings(model, arguments, wanted)):
        model.set_attn_implementation("sdpa")
        if differ(found, outputs(model, arguments)):
            sweep.wrong.append(f"{name}, {attention}: its output differs")
        else:
            sweep.like_sdpa.append(f"{name} ({attention})")
    return bool(stats)


def computes_attention(model, arguments):
    class Softmax(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.seen += "_softmax" in str(function) and arguments[0].dim() > 2 and "log" not in str(function)
            return function(*arguments, **(options or {}))

    with Softmax() as mode:
        outputs(model, arguments)
    return bool(mode.seen)


def test_every_class(capsys):
    """Without MFA_TEST_FULL, of every fourth type of model."""
    started = time.process_time()
    classes, missing = model_classes(1 if FULL else 4)
    sweep = Sweep(len(classes) + len(missing))
    for name, error in missing.items():
        sweep.untried[reason("not imported", error)].append(name)
    for model_class in classes:
        try_class(model_class, sweep)
    with capsys.disabled():
        print("", *sweep.report(time.process_time() - started), sep="\n")
    assert not sweep.wrong, "\n".join(sweep.wrong)
    tried = len(sweep.ran) + len(sweep.refused) + len(sweep.without)
    assert tried >= 0.7 * sweep.classes and len(sweep.ran) >= 0.45 * sweep.classes
    assert len(sweep.refused) >= 0.1 * sweep.classes
    assert len(sweep.replaced) >= 0.45 * sweep.classes and len(sweep.causal) >= 0.25 * sweep.classes
    assert len(sweep.without) <= 0.05 * sweep.classes and len(sweep.like_sdpa) <= 0.02 * sweep.classes


# --- each way to a model -------------------------------------------------------------------------

# Of each rule some, with what else could go wrong: no causality, a KeyError, sparse attention left out.
ITSELF = ("BloomForCausalLM", "MptForCausalLM", "XGLMForCausalLM", "RoFormerModel", "GPTJForCausalLM", "GPTNeoModel")
TABLE = ("SamModel", "SamHQModel", "Data2VecVisionModel")
COMPARISON = ("FalconForCausalLM", "DeepseekV32ForCausalLM", "Gemma4ForCausalLM")
EXTENDED = ("DeepseekV4ForCausalLM",)


def prompt():
    return {"input_ids": text()[0], "attention_mask": text()[1]}


def refused(name):
    """Asserts that an error names this class."""
    return pytest.raises(ValueError, match=rf'^attn_implementation is "mfa", but {name} ')


@pytest.mark.parametrize("name", [*ITSELF, *TABLE, *COMPARISON, *EXTENDED])
def test_refused_when_made(name, transformers):
    """The model is rejected when it is made, and the implementation that the error recommends can be made."""
    model_class = getattr(transformers, name)
    config = small(model_class.config_class())
    with refused(name) as caught:
        model_class._from_config(copy.deepcopy(config), attn_implementation="mfa")
    instead = re.search(r'use attn_implementation="(\w+)"', str(caught.value))[1]
    assert (instead == "sdpa") == (name not in ITSELF + EXTENDED)
    assert made(model_class, config, instead).config._attn_implementation == instead
    whys = {ITSELF: "itself", TABLE: "a table of its own, ", COMPARISON: 'the name "sdpa" only', EXTENDED: "extends"}
    assert next(why for names, why in whys.items() if name in names) in str(caught.value)


def test_each_way_to_make_one(transformers, tmp_path):
    config = small(transformers.BloomConfig())
    made(transformers.BloomForCausalLM, config, "eager").save_pretrained(tmp_path)
    with refused("BloomForCausalLM"):
        transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="mfa")
    with refused("BloomModel"):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="mfa")
    with refused("BloomForCausalLM"):
        transformers.BloomForCausalLM(transformers.BloomConfig(attn_implementation="mfa"))


def test_another_name_is_checked_too(transformers):
    method = transformers.PreTrainedModel.get_correct_attn_implementation
    with register_transformers("ours"):
        assert transformers.PreTrainedModel.get_correct_attn_implementation is method
        with pytest.raises(ValueError, match=r'^attn_implementation is "ours", but BloomModel '):
            transformers.BloomModel._from_config(small(transformers.BloomConfig()), attn_implementation="ours")


def test_transformers_that_is_too_old(transformers, monkeypatch):
    monkeypatch.delattr(transformers.PreTrainedModel, "get_correct_attn_implementation")
    with pytest.raises(ImportError, match=rf"^transformers is {transformers.__version__}, .* or use replace_sdpa"):
        register_transformers()


def test_switched(transformers):
    """transformers skips models that cannot be switched; others raise."""
    bloom = made(transformers.BloomForCausalLM, small(transformers.BloomConfig()), "eager")
    bloom.set_attn_implementation("mfa")
    assert bloom.config._attn_implementation == "eager"
    git = made(transformers.GitForCausalLM, small(transformers.GitConfig()), "eager")
    with refused("GitForCausalLM"):
        git.set_attn_implementation("mfa")


def test_changed_by_assignment(transformers):
    """A model whose attention was set by assignment is checked when it requests a mask."""
    bloom = made(transformers.BloomForCausalLM, small(transformers.BloomConfig()), "eager")
    bloom.config._attn_implementation = "mfa"
    with refused("BloomPreTrainedModel"):
        bloom(**prompt())
    olmo = made(transformers.OlmoForCausalLM, small(transformers.OlmoConfig()), "eager")
    wanted = outputs(olmo, prompt())
    olmo.config._attn_implementation = "mfa"
    torch._dynamo.reset()
    compiled = torch.compile(olmo, backend="eager", fullgraph=True)
    assert not differ(outputs(compiled, prompt()), wanted)
    assert not differ(outputs(olmo, prompt()), wanted) and sdpa_stats() == {"replaced": olmo.config.num_hidden_layers}


def test_parts(transformers):
    """The error names the part of a model, which may have another attention."""
    parts = small(transformers.ViTConfig()), small(transformers.TrOCRConfig())
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model_class = transformers.VisionEncoderDecoderModel
    with refused("TrOCRForCausalLM"):
        made(model_class, config, "mfa")
    arguments = {"pixel_values": random(BATCH, 3, 32, 32), "decoder_input_ids": text()[0]}
    wanted = outputs(made(model_class, config, "eager"), arguments)
    mixed = made(model_class, config, {"": "mfa", "encoder": "mfa", "decoder": "eager"})
    sdpa_stats(reset=True)
    found = outputs(mixed, arguments)
    assert not differ(found, wanted) and looks_ahead(found) is False
    assert sdpa_stats() == {"replaced": mixed.config.encoder.num_hidden_layers}


OTHERS = """
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
{imports}

class OwnAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        {code}

class OwnModel(PreTrainedModel):
    config_class = LlamaConfig
    {flag} = True

    def __init__(self, config):
        super().__init__(config)
        self.attention = OwnAttention(config)
"""
INTERFACE = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS"
THEIRS = {
    "table": ("_supports_sdpa", "self.attention = CLASSES[config._attn_implementation](config)", "CLASSES"),
    "comparison": ("_supports_sdpa", 'self.fused = config._attn_implementation == "sdpa"', 'for the name "sdpa"'),
    "no interface": ("_supports_attention_backend", "self.scale = 1", "itself"),
    "no flag": ("_supports_flash_attn", "self.attention = ALL_ATTENTION_FUNCTIONS", "itself"),
    "interface": ("_supports_sdpa", "self.attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]", None),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_code_of_others(kind, transformers, tmp_path, monkeypatch):
    """A model that is not transformers' own is checked by the same rules."""
    flag, code, reason = THEIRS[kind]
    name = f"others_{kind.replace(' ', '_')}"
    imports = "" if kind == "no interface" else INTERFACE
    (tmp_path / f"{name}.py").write_text(OTHERS.format(flag=flag, code=code, imports=imports))
    monkeypatch.syspath_prepend(tmp_path)
    model_class = importlib.import_module(name).OwnModel
    config = small(transformers.LlamaConfig())
    if reason:
        with refused("OwnModel") as caught:
            model_class._from_config(config, attn_implementation="mfa")
        assert reason in str(caught.value)
    else:
        assert model_class._from_config(config, attn_implementation="mfa").config._attn_implementation == "mfa"


HELPER = """
from transformers.masking_utils import create_causal_mask

def attend(config, x):
    return x + create_causal_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None)
"""
HIDDEN = """
import others_helper
from transformers import PreTrainedConfig, PreTrainedModel

class HiddenConfig(PreTrainedConfig):
    model_type = "hidden"

class HiddenModel(PreTrainedModel):
    config_class = HiddenConfig

    def forward(self, x):
        return others_helper.attend(self.config, x)
"""


def test_code_in_another_file(tmp_path, monkeypatch):
    """Code in another file is found when the model requests a mask."""
    (tmp_path / "others_helper.py").write_text(HELPER)
    (tmp_path / "others_hidden.py").write_text(HIDDEN)
    monkeypatch.syspath_prepend(tmp_path)
    others = importlib.import_module("others_hidden")
    model = others.HiddenModel._from_config(others.HiddenConfig(), attn_implementation="mfa")
    with refused("HiddenModel"):
        model(torch.zeros(1, 4, 4))


def test_weights_are_refused(transformers):
    olmo = made(transformers.OlmoForCausalLM, small(transformers.OlmoConfig()), "mfa")
    with pytest.raises(ValueError, match=r'^output_attentions is True, but .* attn_implementation must be "eager"$'):
        olmo(**prompt(), output_attentions=True)


def test_sinks_are_trained(transformers):
    """gpt-oss: its sliding windows, its sinks and their gradients."""
    config = small(transformers.GptOssConfig())
    losses, gradients = [], []
    for attention in ("eager", "mfa"):
        model = made(transformers.GptOssForCausalLM, config, attention).train()
        sdpa_stats(reset=True)
        loss = model(**prompt(), labels=text()[0]).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert sdpa_stats() == {"replaced": config.num_hidden_layers}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert any("sinks" in name for name in gradients[0]) and gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], wanted, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
