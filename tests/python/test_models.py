"""Whole models with replace_sdpa, and by transformers' interface: their results and gradients do not change."""

import copy

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from models import KINDS, VOCABULARY, result, seeded
from mps_flash_attn import register_transformers, replaced_sdpa, sdpa_stats
from stand_in import FULL

pytestmark = [pytest.mark.usefixtures("everything", "one_thread"), pytest.mark.filterwarnings("ignore")]
STEPS = 50 if FULL else 20
ENTRIES = [(name, "replaced") for name in KINDS if name != "gemma"]  # for softcap there is only the other one
ENTRIES += [(name, "registered") for name, kind in KINDS.items() if kind.attention]


def each(entries):
    """Parametrises a test by these entries; each is skipped if its library is missing."""
    marked = (pytest.param(name, entry, marks=pytest.mark.needs(KINDS[name].library)) for name, entry in entries)
    return pytest.mark.parametrize("name, entry", list(marked))


def pair(name, entry):
    """The same model twice: on PyTorch's attention and on ours."""
    kind = KINDS[name]
    theirs = seeded(lambda: kind.make(kind.attention))
    ours = copy.deepcopy(theirs)
    if entry == "registered":
        register_transformers()
        ours = seeded(lambda: kind.make("mfa"))
        assert ours.config._attn_implementation == "mfa"
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def on_ours(entry, function, *arguments, **options):
    """Returns the function's result, and asserts that all calls of attention ran on libmfa."""
    sdpa_stats(reset=True)
    if entry == "registered":
        done = function(*arguments, **options)
    else:
        with replaced_sdpa():
            done = function(*arguments, **options)
    assert set(sdpa_stats()) == {"replaced"}
    return done


def step(model, kind, inputs):
    """(output, loss, gradient of each parameter)"""
    model.zero_grad()
    output = seeded(lambda: model(**inputs))  # a DiT forgets some labels while it learns
    loss = kind.loss(output)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result(output, **inputs).detach(), loss.detach(), gradients


@each(ENTRIES)
def test_output_loss_and_gradients(name, entry):
    kind = KINDS[name]
    theirs, ours = pair(name, entry)
    inputs = seeded(kind.inputs)
    wanted = step(theirs, kind, inputs)
    found = on_ours(entry, step, ours, kind, inputs)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    for gradient in found[2].values():
        assert gradient.isfinite().all()
    biases = [gradient for parameter, gradient in found[2].items() if "relative_attention_bias" in parameter]
    assert len(biases) == (2 if name == "t5" else 0) and all(bias.any() for bias in biases)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each(ENTRIES)
def test_evaluation(name, entry, mode):
    """Covers torch.nn's own inference path, too."""
    theirs, ours = pair(name, entry)
    inputs = seeded(KINDS[name].inputs)
    with mode():
        wanted = result(theirs.eval()(**inputs), **inputs)
        found = on_ours(entry, lambda: result(ours.eval()(**inputs), **inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each((name, entry) for name, entry in ENTRIES if entry == "replaced" or name == "gemma")
def test_autocast(name, entry):
    theirs, ours = pair(name, entry)
    inputs = seeded(KINDS[name].inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = step(theirs, KINDS[name], inputs)
        found = on_ours(entry, step, ours, KINDS[name], inputs)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=3e-2, atol=3e-2)


@each(ENTRIES)
def test_steps_of_training(name, entry):
    """The loss curves agree; their rounding differences stay far smaller than the progress of training."""
    kind = KINDS[name]

    def train(model):
        optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
        losses = []
        for number in range(STEPS):
            torch.manual_seed(seed + number % 4)
            loss = kind.loss(model(**kind.inputs()))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        return losses

    seed = torch.initial_seed()
    theirs, ours = pair(name, entry)
    wanted = train(theirs)
    found = on_ours(entry, train, ours)
    learnt = max(wanted) - min(wanted)
    apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    assert learnt > 0 and apart <= 0.02 * learnt, (apart, learnt)
    assert max(abs(a - b) for a, b in zip(found[:5], wanted[:5], strict=True)) <= 1e-3 * learnt


@pytest.mark.parametrize("cached", [True, False])
@each((name, entry) for name, entry in ENTRIES if KINDS[name].generates)
def test_greedy_generation(name, entry, cached):
    """Generates the same words with a cache, to which each step adds a key, and without."""
    theirs, ours = (model.eval() for model in pair(name, entry))
    prompt = seeded(lambda: torch.randint(2, VOCABULARY, (2, 6)))
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0

    def speak(model):
        options = {"max_new_tokens": 20, "do_sample": False, "use_cache": cached, "pad_token_id": 0}
        return model.generate(prompt, attention_mask=mask, **options)

    wanted = speak(theirs)
    found = on_ours(entry, speak, ours)
    assert torch.equal(found, wanted) and found.shape[1] >= 20


@each([("llama", "replaced"), ("llama", "registered"), ("gemma", "registered")])
def test_compiled(name, entry):
    """The model compiles to one graph, in which attention is ours."""
    theirs, ours = pair(name, entry)
    inputs = seeded(KINDS[name].inputs)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours.eval(), backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    with torch.no_grad():
        wanted = result(theirs.eval()(**inputs), **inputs)
        with replaced_sdpa():
            found = result(compiled(**inputs), **inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if "attention" in str(node.target)]
    assert operators == ["mfa.attention_forward.default"] * ours.config.num_hidden_layers


def test_padding_as_nested_tensors_stays_pytorchs():
    """nn.TransformerEncoder in evaluation makes nested tensors of padded rows, and zeros of the padding afterwards."""
    encoder = seeded(lambda: KINDS["encoder"].make(None)).encoder.eval()
    encoder.enable_nested_tensor = encoder.use_nested_tensor = True
    inputs = seeded(KINDS["encoder"].inputs)
    with torch.no_grad():
        wanted = encoder(inputs["x"], src_key_padding_mask=inputs["padding"])
        with replaced_sdpa():
            found = encoder(inputs["x"], src_key_padding_mask=inputs["padding"])
    assert torch.equal(found, wanted) and not found[inputs["padding"]].any()
