"""Models of Hugging Face transformers with our losses: values and gradients as with transformers' own."""

import inspect
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import peak_bytes, short
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed", minversion="5.24")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss import loss_utils  # noqa: E402

from fusedloss.integrations import transformers as integration  # noqa: E402
from fusedloss.integrations.linear_logits import LinearLogits  # noqa: E402

CLASSES = 300
SIZE = {
    "vocab_size": CLASSES,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QUERIES = {"num_key_value_heads": 1, "head_dim": 8}
BERT = BertConfig(**SIZE, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "GPT-2, tied": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=CLASSES, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    "Gemma 2, with a soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZE, **QUERIES, final_logit_softcapping=0.5, attn_implementation="eager")
    ),
    "Qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, **QUERIES)),
    "Cohere, with a scale": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.25)),
    "BERT, with a bias": lambda: BertForMaskedLM(BERT),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=CLASSES,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0,
            decoder_start_token_id=0,
        )
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_linear = pytest.mark.parametrize("linear", [False, True], ids=["", "linear"])


@pytest.fixture(autouse=True)
def native_again():
    yield
    integration.unapply()


def model_of(name="Llama", dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).train()


def batch(rows=2, tokens=9):
    ids = torch.randint(3, CLASSES, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **arguments):
    """The outputs, and the gradient of every parameter."""
    model.zero_grad()
    outputs = model(**batch() | arguments)
    outputs.loss.backward()
    return outputs, {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


FORWARD = {"cross_entropy", "linear_cross_entropy", "bce_with_logits"}


class Kernels(TorchDispatchMode):
    """Which of our losses have run."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        loss = function.overloadpacket.__name__.removesuffix("_with_grad")
        if function.namespace == "fusedloss" and loss in FORWARD:
            self.ran[loss] += 1
        return function(*args, **(kwargs or {}))


def assert_close(found, expected, tolerance):
    (outputs, gradients), (native, native_gradients) = found, expected
    assert outputs.loss.dtype == native.loss.dtype
    torch.testing.assert_close(outputs.loss, native.loss, rtol=tolerance, atol=0)
    assert gradients.keys() == native_gradients.keys()
    for name, gradient in gradients.items():
        size = native_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, native_gradients[name], rtol=0, atol=tolerance * max(size, 1e-4))
    torch.testing.assert_close(outputs.logits, native.logits, rtol=0, atol=0)


@each_model
@each_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_step_is_that_of_transformers(name, linear, dtype, autocast):
    model = model_of(name, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(model)
        with integration.apply(linear=linear), Kernels() as kernels:
            found = step(model)
    assert kernels.ran == {"linear_cross_entropy" if linear else "cross_entropy": 1}
    assert type(found[0].logits) is (LinearLogits if linear else torch.Tensor)
    assert_close(found, expected, 3e-2 if autocast or dtype == torch.bfloat16 else 1e-5)


@each_linear
@pytest.mark.parametrize("count", [5, torch.tensor(5), torch.tensor([2.5])], ids=["number", "tensor", "real"])
def test_num_items_in_batch(linear, count):
    model = model_of()
    expected = step(model, num_items_in_batch=count)
    with integration.apply(linear=linear):
        assert_close(step(model, num_items_in_batch=count), expected, 1e-5)


@each_linear
def test_shift_labels_and_logits_to_keep(linear):
    model = model_of()
    labels = batch()["labels"][:, -4:]
    kept = {"labels": labels, "logits_to_keep": 4}
    ignored = {"labels": labels.where(labels != -100, 7), "ignore_index": 7}
    shifted = {"shift_labels": batch()["labels"], "logits_to_keep": 0}
    several = [kept, kept | ignored, shifted]
    expected = [model(**batch() | each) for each in several]
    with integration.apply(linear=linear):
        for each, native in zip(several, expected, strict=True):
            found = model(**batch() | each)
            torch.testing.assert_close(found.loss, native.loss, rtol=1e-6, atol=0)
            assert torch.equal(found.logits, native.logits)
        assert model(**batch() | {"labels": None, "shift_labels": labels}).loss is None  # as ever


def config(**values):
    return type("Config", (), {"problem_type": None, **values})


LOGITS, IDS = torch.randn(4, 6, 10), torch.arange(24).view(4, 6) % 10
LOSSES = {
    "causal": ("ForCausalLM", (LOGITS, IDS, 10), {}),
    "causal, of shifted labels": ("ForCausalLM", (LOGITS, None, 10), {"shift_labels": IDS, "ignore_index": 3}),
    "causal, of many": ("ForCausalLM", (LOGITS, IDS, 10), {"num_items_in_batch": torch.tensor(7)}),
    "masked": ("ForMaskedLM", (LOGITS, IDS, 10), {"ignore_index": 3, "num_items_in_batch": 7}),
    "tokens": ("ForTokenClassification", (LOGITS, IDS, config(num_labels=10)), {}),
    "sequences": ("ForSequenceClassification", (IDS[:, 0], LOGITS[:, 0], config(num_labels=10)), {}),
    "several classes": ("ForSequenceClassification", (LOGITS[1].sigmoid(), LOGITS[0], config(num_labels=10)), {}),
    "regression": (
        "ForSequenceClassification",
        (LOGITS[1], LOGITS[0], config(num_labels=10, problem_type="regression")),
        {},
    ),
    "questions": ("ForQuestionAnswering", (LOGITS[0], LOGITS[1], IDS[:, :1].repeat(2, 1)[:6], IDS.flatten()[:6]), {}),
    "segments": ("ForSemanticSegmentation", (LOGITS.view(2, 5, 4, 6), IDS.view(2, 3, 4) % 5), {"ignore_index": 2}),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_losses_of_the_table(case, dtype, autocast):
    name, arguments, options = LOSSES[case]

    def loss_and_gradients():
        given = [
            each.detach().to(dtype).requires_grad_()
            if isinstance(each, torch.Tensor) and each.is_floating_point()
            else each
            for each in arguments
        ]
        model = type("Model", (PreTrainedModel,), {"__init__": lambda self: None, "loss_type": name})()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Kernels() as kernels:
            loss = model.loss_function(*given, **options)
        leaves = [each for each in given if isinstance(each, torch.Tensor) and each.requires_grad]
        return loss, torch.autograd.grad(loss, leaves, allow_unused=True), kernels.ran.total()

    expected, native, before = loss_and_gradients()
    with integration.apply():
        found, ours, ran = loss_and_gradients()
    assert before == 0
    assert ran == {"questions": 2, "regression": 0}.get(case, 1)
    assert found.dtype == expected.dtype
    half = dtype == torch.bfloat16 or autocast
    torch.testing.assert_close(found, expected, rtol=1e-2 if half else 1e-6, atol=0)
    for our, theirs in zip(ours, native, strict=True):
        torch.testing.assert_close(our, theirs, rtol=0, atol=1e-2 if half else 1e-7)


def test_the_document_says_of_each_entry_of_the_table_what_becomes_of_it():
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row}
    kin = {name for name in loss_utils.LOSS_MAPPING if name.endswith(("ObjectDetection", "Segmentation"))}
    assert named <= loss_utils.LOSS_MAPPING.keys()
    assert loss_utils.LOSS_MAPPING.keys() - named <= kin


def test_the_table_itself_stays_as_the_trainer_expects_it():
    before = dict(loss_utils.LOSS_MAPPING)
    with integration.apply():
        assert before == loss_utils.LOSS_MAPPING
        assert loss_utils.LOSS_MAPPING["ForCausalLM"] is loss_utils.ForCausalLMLoss


def swapped():
    return [vars(owner).get(name) for owner, name, _ in integration._REPLACED]


def test_apply_and_unapply():
    native = swapped()
    ours = [replacement for *_, replacement in integration._REPLACED]
    integration.apply()
    assert swapped() == ours
    integration.unapply()
    assert swapped() == native
    with integration.apply(), integration.apply(linear=True) as block, block:
        assert swapped() == ours
    assert swapped() == native
    with pytest.raises(ZeroDivisionError), integration.apply():
        raise ZeroDivisionError
    assert swapped() == native
    first, second = integration.apply().__enter__(), integration.apply().__enter__()
    first.__exit__()
    assert swapped() == ours
    second.__exit__()
    assert swapped() == native


def test_what_others_install_meanwhile_stays(monkeypatch):
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", loss_utils.fixed_cross_entropy)  # puts it back afterwards
    theirs = object()
    with integration.apply():
        loss_utils.fixed_cross_entropy = theirs
    assert loss_utils.fixed_cross_entropy is theirs


def test_linear_is_in_force_as_long_as_its_block():
    model = model_of()
    with integration.apply():
        with integration.apply(linear=True):
            assert type(model(**batch()).logits) is LinearLogits
        assert type(model(**batch()).logits) is torch.Tensor


def test_a_loss_of_the_models_own_is_kept():
    model = model_of()
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 5
    with integration.apply():
        assert model(**batch()).loss == 5


def test_a_loss_of_the_models_own_may_be_set_meanwhile():
    model = model_of()
    with integration.apply():
        model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 5
        assert model(**batch()).loss == 5
    assert model(**batch()).loss == 5


@each_linear
@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_a_batch_in_which_nothing_counts(linear, count):
    model, ignored = model_of(), torch.full_like(batch()["labels"], -100)
    with integration.apply(linear=linear):
        outputs, gradients = step(model, labels=ignored, num_items_in_batch=count)
    assert outputs.loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["ForCausalLM", "ForMaskedLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_logits_that_are_cut(name, dtype):
    """As BLIP-2 cuts them: transformers' copy to float32 makes them contiguous, and nobody copies here."""
    model = type("Model", (PreTrainedModel,), {"__init__": lambda self: None, "loss_type": name})()
    logits = LOGITS.to(dtype)[:, 2:]
    arguments = {"logits": logits, "labels": IDS[:, 2:].contiguous(), "vocab_size": 10}
    expected = loss_utils.LOSS_MAPPING[name](**arguments | {"logits": logits.contiguous()})
    with integration.apply():
        torch.testing.assert_close(model.loss_function(**arguments), expected)


def test_without_labels_logits_are_plain():
    model, ids = model_of().eval(), batch()["input_ids"]
    arguments = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected, generated = model(ids), model.generate(ids, **arguments)
    with integration.apply(linear=True):
        found = model(ids)
        assert type(found.logits) is torch.Tensor
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(model.generate(ids, **arguments), generated)


def test_outputs_can_be_kept():
    model = model_of().eval()
    with integration.apply(linear=True), torch.no_grad():
        outputs = model(**batch())
        again = pickle.loads(pickle.dumps(outputs))
        assert type(again.logits) is torch.Tensor
        assert torch.equal(again.logits, model(batch()["input_ids"]).logits)
        assert torch.equal(torch.cat([outputs.to_tuple()[1], outputs.logits]), again.logits.repeat(2, 1, 1))


@each_linear
def test_a_compiled_model(linear):
    model = model_of()
    expected = step(model)
    for compiled in (torch.compile(model, backend="aot_eager"), model_of()):
        with integration.apply(linear=linear):
            if compiled is not model and isinstance(compiled, LlamaForCausalLM):
                compiled.compile(backend="aot_eager")
            torch._dynamo.reset()
            outputs, gradients = step(compiled)
        assert type(outputs.logits) is torch.Tensor
        gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
        assert_close((outputs, gradients), expected, 1e-5)


@each_linear
def test_checkpoints_of_activations(linear):
    model = model_of()
    expected = step(model)
    model.gradient_checkpointing_enable()
    with integration.apply(linear=linear):
        assert_close(step(model), expected, 1e-5)


@each_linear
def test_meta_tensors(linear):
    with torch.device("meta"):
        model = model_of(dtype=torch.bfloat16)
        arguments = {name: each.to("meta") for name, each in batch().items()}
    with integration.apply(linear=linear):
        outputs, gradients = step(model, **arguments)
    assert outputs.loss.dtype == torch.float32
    assert gradients.keys() == dict(model.named_parameters()).keys()


def test_wrappers_that_cast_the_outputs():
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is not installed")
    model = model_of()
    forward = operations.convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    expected = forward(**batch())
    with integration.apply(linear=True), Kernels() as kernels:
        model.forward = forward
        found = model(**batch())
        assert type(found.logits) is LinearLogits
    assert kernels.ran == {"linear_cross_entropy": 1}
    assert found.logits.dtype == found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-3, atol=0)
    assert torch.equal(found.logits, expected.logits)


def test_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for adapted, spared in ((["q_proj"], True), (["q_proj", "lm_head"], False)):
        lora = peft.LoraConfig(target_modules=adapted, task_type="CAUSAL_LM", init_lora_weights="gaussian")
        model = peft.get_peft_model(model_of(), lora)
        expected = step(model)
        with integration.apply(linear=True):
            found = step(model)
        assert len(found[1]) == (4 if spared else 6)
        assert type(found[0].logits) is (LinearLogits if spared else torch.Tensor)
        assert_close(found, expected, 1e-5)


class Adapted(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def adapted(model):
    model.lm_head.__class__ = Adapted


def replaced(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda input: 3 * forward(input)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


@pytest.mark.parametrize("changed", [adapted, replaced, parametrized])
def test_another_head_computes_its_logits(changed):
    model = model_of()
    changed(model)
    expected = step(model)
    with integration.apply(linear=True), Kernels() as kernels:
        found = step(model)
    assert type(found[0].logits) is torch.Tensor
    assert kernels.ran["cross_entropy"] == 1
    assert_close(found, expected, 1e-5)


def test_hooks_of_a_head_see_its_logits():
    model, seen = model_of(), []
    model.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output.square().mean()))
    expected = step(model)
    with integration.apply(linear=True):
        assert_close(step(model), expected, 1e-5)
    assert seen[0] == seen[1]


def test_a_step_never_holds_all_logits():
    rows, classes = 2048, 2000
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**SIZE | size | {"vocab_size": classes}))
    ids = torch.randint(classes, (rows // 64, 64))
    bytes_of_logits = 4 * rows * classes

    def run():
        model(input_ids=ids, labels=ids).loss.backward()

    assert peak_bytes(run) > 2 * bytes_of_logits
    with integration.apply(linear=True):
        assert peak_bytes(run) < bytes_of_logits / 2


def test_other_losses_than_those_it_knows_are_refused(monkeypatch):
    def other(logits, labels, vocab_size, temperature=1.0):
        raise AssertionError

    monkeypatch.setattr(integration, "_OURS", [(other, integration.ForCausalLMLoss)])
    with pytest.raises(RuntimeError, match=r"knows the losses of transformers 5.24; in .* ForCausalLMLoss is another"):
        integration.apply()


def test_without_transformers_it_says_so():
    code = "import sys; sys.modules['transformers'] = None; import fusedloss.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: fusedloss.integrations.transformers needs transformers 5.24 or newer" in done.stderr


def test_arguments_have_transformers_names():
    for native, ours in integration._OURS:
        defaults = [
            {name: each.default for name, each in inspect.signature(f).parameters.items()} for f in (native, ours)
        ]
        assert defaults[0] == defaults[1]
