"""Which kernels a call takes: by the tensor's device, by the argument, by use_backend."""

import pytest
import torch
from conftest import HAS_GPU, HAS_TRITON
from support import LOSSES

import fusedloss
from fusedloss import backend

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def launches(monkeypatch):
    """The names of Triton's kernels that are started."""
    from fusedloss.triton import cross_entropy, elementwise, launch, nll, rescale

    names = []

    def start(function, *arguments, **options):
        names.append(function.fn.__name__)
        launch.start(function, *arguments, **options)

    for module in (cross_entropy, elementwise, nll, rescale):
        monkeypatch.setattr(module, "start", start)
    return names


def sample(name="cross_entropy", device="cpu"):
    return LOSSES[name].sample(4, 3, device=device)


def test_backends_says_what_there_is_and_why_not():
    found = fusedloss.backends()
    assert list(found) == ["cpu", "cuda", "triton"]
    assert found["cpu"] == ""
    assert (found["cuda"] == "") == (bool(fusedloss.build_info()["cuda"]) and HAS_GPU)
    assert (found["triton"] == "") == HAS_TRITON  # interpreted, where there is no GPU
    assert all(isinstance(reason, str) for reason in found.values())


@needs_triton
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_argument_decides(loss, launches):
    input, target = loss.sample(4, 3, device=DEVICE)
    expected = loss.ours(input, target)
    launches.clear()
    torch.testing.assert_close(loss.ours(input, target, backend="triton"), expected)
    assert launches
    launches.clear()
    loss.ours(input, target, backend=DEVICE if fusedloss.backends()[DEVICE] == "" else None)
    assert (launches == []) == (fusedloss.backends()[DEVICE] == "")


@needs_triton
def test_a_module_remembers_its_backend(launches):
    input, target = sample(device=DEVICE)
    fusedloss.CrossEntropyLoss(backend="triton")(input, target)
    assert launches
    assert repr(fusedloss.CrossEntropyLoss(backend="triton")) == repr(torch.nn.CrossEntropyLoss())


@needs_triton
def test_backward_takes_the_backend_of_forward(launches):
    input, target = sample(device=DEVICE)
    with fusedloss.use_backend("triton"):
        loss = fusedloss.cross_entropy(input.requires_grad_(), target, grad_in_forward=False)
        reduced = fusedloss.cross_entropy(input, target)
    launches.clear()
    loss.backward()
    assert launches == ["_gradient"]
    (reduced * 2).backward()
    assert launches == ["_gradient", "_rescale"]


@needs_triton
def test_double_backward_stays_with_the_backend(launches):
    input, target = sample(device=DEVICE)
    loss = fusedloss.cross_entropy(input.requires_grad_(), target, backend="triton")
    launches.clear()
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    assert "_gradient" in launches
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(input, target), input, create_graph=True)[0]
    seconds = [torch.autograd.grad(g.square().sum(), input)[0] for g in (gradient, expected)]
    torch.testing.assert_close(*seconds)


def test_use_backend_nests_and_ends_with_its_block():
    with fusedloss.use_backend("cpu"):
        with fusedloss.use_backend("triton"):
            assert backend._override == "triton"
            with fusedloss.use_backend(None):
                assert backend._override is None
            assert backend._override == "triton"
        assert backend._override == "cpu"
    assert backend._override is None

    class Stop(Exception):
        pass

    with pytest.raises(Stop), fusedloss.use_backend("triton"):
        raise Stop
    assert backend._override is None


def test_one_object_can_be_entered_twice():
    choice = fusedloss.use_backend("triton")
    with choice, choice:
        assert backend._override == "triton"
    assert backend._override is None


@needs_triton
def test_a_compiled_call_follows_use_backend(launches):
    input, target = sample(device=DEVICE)
    compiled = torch.compile(lambda x, t: fusedloss.cross_entropy(x, t), fullgraph=True, backend="aot_eager")
    expected = compiled(input, target)
    launches.clear()
    with fusedloss.use_backend("triton"):
        torch.testing.assert_close(compiled(input, target), expected)
        assert launches == ["_forward"]


@pytest.mark.parametrize(
    "call", [lambda: fusedloss.use_backend("eager"), lambda: fusedloss.nll_loss(*sample("nll"), backend="eager")]
)
def test_an_unknown_backend_is_refused(call):
    with pytest.raises(ValueError, match="backend must be one of 'cpu', 'cuda', 'triton' or None, got 'eager'"):
        call()


def test_a_tensor_on_another_device_is_refused():
    with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on cuda, got one on cpu"):
        fusedloss.cross_entropy(*sample(), backend="cuda")


@needs_triton
def test_without_an_interpreter_triton_refuses_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    backend._decide.cache_clear()
    with pytest.raises(RuntimeError, match="backend='triton' needs tensors of a GPU, got one on cpu"):
        fusedloss.cross_entropy(*sample(), backend="triton")
    backend._decide.cache_clear()


class Input:
    """As much of a tensor on CUDA as the choice looks at."""

    is_cpu = is_meta = False
    device = torch.device("cuda", 0)


def chosen(monkeypatch, archs, capability, triton="", wish=None, available=True):
    monkeypatch.setattr(backend, "build_info", lambda: {"cuda": archs})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backend, "_missing_triton", lambda: triton)
    backend._decide.cache_clear()
    try:
        chosen = backend.namespace(wish, Input)
        assert backend.operators(wish, Input) is backend._DIRECT[chosen]
        return "triton" if chosen is torch.ops.fusedloss_triton else "cuda"
    finally:
        backend._decide.cache_clear()


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("8.0 9.0", (9, 0), "cuda"),
        ("8.0 9.0", (8, 6), "cuda"),  # code runs on later minor versions
        ("8.6", (8, 0), "triton"),  # and on no earlier ones
        ("8.0 9.0", (7, 5), "triton"),
        ("8.0 9.0", (10, 0), "triton"),
        ("8.0 9.0+PTX", (12, 0), "cuda"),  # PTX is compiled for any later device
        ("9.0+PTX", (8, 0), "triton"),
        ("9.0a", (9, 0), "cuda"),
        ("", (9, 0), "triton"),
    ],
)
def test_cuda_before_triton_where_the_build_covers_the_device(archs, capability, expected, monkeypatch):
    assert chosen(monkeypatch, archs, capability) == expected
    assert chosen(monkeypatch, archs, capability, wish="triton") == "triton"


def test_no_kernels_at_all_is_an_error_that_says_what_to_do(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"no kernels for tensors on cuda:0: .*FUSEDLOSS_CUDA=1.*; no Triton"):
        chosen(monkeypatch, "", (9, 0), triton="no Triton")
    with pytest.raises(NotImplementedError, match=r"built for 8.0, not for compute capability 7.5"):
        chosen(monkeypatch, "8.0", (7, 5), wish="cuda")
