"""A layer of experts: what a step starts on a GPU, counted on a CPU, and sums of all at once."""

from collections import Counter

import pytest
from helpers.dense import relative
from helpers.families import tiny_model
from helpers.networks import examples
from torch.utils._python_dispatch import TorchDispatchMode

from ekfac_dist import estimate_factors
from ekfac_dist.data import batches
from ekfac_dist.fit import even, group, refit
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.models.capture import experts
from ekfac_dist.passes import one_pass

LAYERS = 2
# Neither start a kernel: these only make, or describe, a tensor.
NO_KERNELS = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}


class Kernels(TorchDispatchMode):
    """Counts the operations that would start a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.number += not func.is_view and name not in NO_KERNELS
        return func(*args, **(kwargs or {}))


class OneKernel:
    """Stands in for the kernel that sums squares, and counts as nothing but one operation."""

    description = "a stand-in"

    def add_(self, lambda_OI, acts_MI, grads_MO, bounds):
        lambda_OI.add_(1.0)


def counts(num_experts, monkeypatch):
    """Kernels of each pass's first step, and tensors sent to its device, by pass."""
    started, sent = Counter(), Counter()
    step, to_device = one_pass._Run._step, batches.to_device

    def counted(run, capture, batch):
        if started[run._name]:
            return step(run, capture, batch)
        with Kernels() as kernels, monkeypatch.context() as patch:
            for module in (batches, experts, even):
                patch.setattr(module, "to_device", sends)
            sends.name = run._name
            step(run, capture, batch)
        started[run._name] = kernels.number

    def sends(tensor, device):
        sent[sends.name] += 1
        return to_device(tensor, device)

    sizes = {"num_experts": num_experts, "num_local_experts": num_experts}
    sizes |= {"num_experts_per_tok": 4, "num_hidden_layers": LAYERS}
    model = tiny_model("MixtralForCausalLM", **sizes).float()
    with monkeypatch.context() as patch:
        patch.setattr(one_pass._Run, "_step", counted)
        patch.setattr(refit, "squares_kernel", lambda device: OneKernel())
        patch.setattr("ekfac_dist.curvature.refit.squares_kernel", lambda device: OneKernel())
        factors = estimate_factors(model, examples(24), labels="data", batch_tokens=400)
    assert len([name for name in factors.modules if ".experts." in name]) == (
        2 * num_experts * LAYERS
    )
    return started, sent


def test_an_expert_starts_few_kernels_and_sends_nothing(monkeypatch):
    few, many = counts(4, monkeypatch), counts(16, monkeypatch)
    more = 12 * LAYERS
    each = {name: (many[0][name] - few[0][name]) / more for name in few[0]}
    # Two products forwards, two backwards; of each of four kinds of vectors one for the covariance,
    # and one for what half of the data says of it.
    assert each["covariance"] <= 12
    # Of the refit two rotations for each matrix, and its squares, those of half of the data too.
    assert each["refit"] <= 20
    assert few[1] == many[1]


class OneByOne:
    """Shows each expert's rows to sums of covariances by themselves."""

    def __init__(self, *args, **kwargs):
        sums = self._sums = CovarianceSums(*args, **kwargs)
        self.on_input, self.on_gradient = sums.on_input, sums.on_gradient

    def __getattr__(self, name):
        if name in ("on_inputs", "on_gradients"):
            raise AttributeError(name)
        return getattr(self._sums, name)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("prompts", [False, True])
def test_covariances_of_experts_at_once_are_those_of_each(family, blocks, prompts, monkeypatch):
    def fit():
        options = {"blocks": blocks, "batch_tokens": 60, "accumulate": "float64"}
        data = examples(16, prompts=prompts)
        return estimate_factors(tiny_model(family), data, labels="data", **options)

    expected = []
    for sums in (CovarianceSums, OneByOne):
        monkeypatch.setattr(group, "CovarianceSums", sums)
        expected.append(fit())
    one, other = expected
    assert list(one.modules) == list(other.modules)
    for name in one.modules:
        assert relative(one.module(name).lambda_OI, other.module(name).lambda_OI) < 1e-12
    halves = [each.manifest["halves"]["modules"] for each in expected]
    for name, of_one in halves[0].items():
        assert of_one == pytest.approx(halves[1][name], rel=1e-9)
