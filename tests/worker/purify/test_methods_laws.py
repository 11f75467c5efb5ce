"""Law: what every method owes its caller, whatever it does with the weights."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.catalogue.architectures import SmallCnnArguments
from worker.architectures.registry import build
from worker.purify.anp import AdversarialNeuronPruning
from worker.purify.auto import TriggerRewriting
from worker.purify.awm import AdversarialWeightMasking
from worker.purify.clp import ChannelLipschitzPruning
from worker.purify.errors import InvalidParameter, NotEnoughData, NotFinite
from worker.purify.fine_tuning import FineTuning
from worker.purify.ibau import ImplicitBackdoorUnlearning
from worker.purify.method import Method, Purified

pytestmark = pytest.mark.usefixtures("short_searches")

BATCH = 5
# Short runs, with every kind of randomness that the method has.
METHODS: dict[str, Method] = {
    "auto": TriggerRewriting(
        steps=3, rounds=1, restarts=2, restart_steps=2, copies=1, strengths=(0.1, 1.0), force=True
    ),
    "awm": AdversarialWeightMasking(
        epochs=2, passes=2, batch_size=BATCH, tau=20.0, augmentations=1, flip=True
    ),
    "clp": ChannelLipschitzPruning(u=1.0),
    "fine_tuning": FineTuning(epochs=2, batch_size=BATCH, augmentations=1, flip=True),
    "fine_tuning, statistics kept": FineTuning(epochs=2, batch_statistics=False, cosine=False),
    "anp": AdversarialNeuronPruning(iterations=6, batch_size=BATCH, threshold=0.9),
    "anp, statistics kept": AdversarialNeuronPruning(
        iterations=6, batch_statistics=False, perturbation_steps=2, max_accuracy_drop=1.0
    ),
    "ibau": ImplicitBackdoorUnlearning(rounds=2, batch_size=BATCH, fixed_point_iterations=2),
    "ibau, by sgd": ImplicitBackdoorUnlearning(rounds=1, passes=2, optimiser="sgd", portion=0.5),
}
# The order of the images does not matter in the one step of a full batch.
RANDOM = METHODS.keys() - {"clp", "fine_tuning, statistics kept"}
STEPS = {
    # Squares (one chunk of them and the best alone, three for what scatters, four classes, and what
    # lies around the best); margins (one step at a glance, and two), patches twice, warps twice; what
    # leads to the suspects, at first and in a round; then patches on the result of that round, and of
    # each strength, for squares alone and for all; and perturbations on a result for squares, and on
    # the original.
    "auto": (2 + 3 + 4 + 1) + (1 + 2) + 2 * 3 + 2 * 2 + (1 + 1) * (4 * 2) + (1 + 2 * 2) * 2 + 2 * 2,
    # AWM: 4 steps in each half of 2 epochs, from 24 images with their copies.
    "awm": 2 * 2 * 2 * 4,
    "clp": 3,
    "fine_tuning": 2 * 4,
    "fine_tuning, statistics kept": 2 * 1,
    "anp": 6,
    "anp, statistics kept": 6,
    "ibau": 2 * 2 * 2,
    "ibau, by sgd": 2 * 2,
}
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def model() -> nn.Module:
    """Return a small model in training mode, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    network = build("small_cnn", SmallCnnArguments(classes=4, channels=1, width=4))
    for _ in range(5):
        network(torch.rand(16, 1, 8, 8))
    return network


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    """Return twelve images of four classes."""
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(12) % 4


def same(one: Purified, two: Purified) -> bool:
    """Tell whether two results are equal to the bit."""
    return (
        one.history == two.history
        and one.findings == two.findings
        and one.masks.keys() == two.masks.keys()
        and one.values.keys() == two.values.keys()
        and all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)
        and all(torch.equal(one.values[name], two.values[name]) for name in one.values)
    )


@every_method
def test_same_seed_gives_the_same_bytes(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """The result is a function of the arguments and the seed, and of nothing else."""
    method = METHODS[name]
    one = method.purify(model, *samples, seed=1)
    torch.rand(7)  # Whatever the caller draws in between must not matter.
    assert same(one, method.purify(model.eval(), *samples, seed=1))
    if name in RANDOM:
        assert not same(one, method.purify(model, *samples, seed=2))


@every_method
def test_model_and_global_generator_are_left_alone(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """Weights, buffers, modes, gradients, hooks and torch's generator are as before."""
    before = copy.deepcopy(model.state_dict())
    generator = torch.random.get_rng_state()
    given = [tensor.clone() for tensor in samples]
    METHODS[name].purify(model, *samples, seed=0)
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(given, samples, strict=True))
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert getattr(module, "track_running_stats", True)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_changes_fit_the_state_dict_in_any_precision(
    name: str, dtype: torch.dtype, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """Masks are float32 in [0, 1]; values are float32; all finite, on the CPU, of known names."""
    model = model.to(dtype)
    purified = METHODS[name].purify(model, *samples, seed=0)
    changed = purified.apply(model.state_dict())
    assert changed.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert changed[key].dtype == tensor.dtype
        assert changed[key].shape == tensor.shape
        assert bool(changed[key].isfinite().all())
    for mask in purified.masks.values():
        assert (mask.dtype, mask.device.type) == (torch.float32, "cpu")
        assert bool(((mask >= 0) & (mask <= 1)).all())
    for values in purified.values.values():
        assert (values.dtype, values.device.type) == (torch.float32, "cpu")
    assert purified.masks or purified.values


@every_method
def test_half_precision_is_computed_in_float32(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """A half-precision model gives what its float32 twin gives, to the bit."""
    model = model.half()
    twin = copy.deepcopy(model).float()
    method = METHODS[name]
    assert same(method.purify(model, *samples, seed=0), method.purify(twin, *samples, seed=0))


@every_method
def test_float64_images_are_computed_in_float64(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """New values come in float64 then, and are not float32 in disguise."""
    images, labels = samples
    purified = METHODS[name].purify(model.double(), images.double(), labels, seed=0)
    assert all(values.dtype == torch.float64 for values in purified.values.values())
    assert all(
        not torch.equal(values, values.float().double()) for values in purified.values.values()
    )


@every_method
def test_progress_counts_to_its_total(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """It runs from 1 to the number of steps, one by one; what it raises ends the run."""
    seen: list[tuple[int, int]] = []
    METHODS[name].purify(
        model, *samples, seed=0, progress=lambda step, total: seen.append((step, total))
    )
    assert seen == [(step, STEPS[name]) for step in range(1, STEPS[name] + 1)]

    class Cancelled(Exception):
        """Raised by the caller."""

    def cancel(step: int, _total: int) -> None:
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        METHODS[name].purify(model, *samples, seed=0, progress=cancel)


@every_method
def test_preprocess_is_part_of_the_network(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """Scaling outside of the model changes it as scaling inside does."""

    class Scaled(nn.Module):
        """A model that scales by itself."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            """Scale, then answer."""
            logits: Tensor = self.inner((images - 0.5) / 0.25)
            return logits

    outside = METHODS[name].purify(
        model, *samples, preprocess=lambda images: (images - 0.5) / 0.25, seed=0
    )
    inside = METHODS[name].purify(Scaled(model), *samples, seed=0)
    renamed = Purified(
        masks={key.removeprefix("inner."): mask for key, mask in inside.masks.items()},
        values={key.removeprefix("inner."): values for key, values in inside.values.items()},
        history=inside.history,
        findings=inside.findings,
    )
    assert same(outside, renamed)


ODD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "one class": lambda images, labels: (images, torch.zeros_like(labels)),
    "one sample": lambda images, labels: (images[:1], labels[:1]),
    "two samples": lambda images, labels: (images[:2], labels[:2]),
    "black images": lambda images, labels: (torch.zeros_like(images), labels),
    "white images": lambda images, labels: (torch.ones_like(images), labels),
    "half precision": lambda images, labels: (images.half(), labels),
}


@every_method
@pytest.mark.parametrize("kind", ODD)
def test_odd_samples_end_in_a_finite_model(
    name: str, kind: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """One class, one sample and constant images are no reason to fail, nor to give NaN."""
    images, labels = ODD[kind](*samples)
    method = METHODS[name]
    if len(images) == 1 and getattr(method, "batch_statistics", False) and name == "anp":
        with pytest.raises(NotEnoughData, match="batch_statistics"):
            method.purify(model, images, labels, seed=0)
        return
    changed = method.purify(model, images, labels, seed=0).apply(model.state_dict())
    assert all(bool(tensor.isfinite().all()) for tensor in changed.values())


@every_method
@pytest.mark.parametrize("key", ["conv2.weight", "bn1.weight"])
def test_broken_weights_are_refused(
    name: str, key: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """A weight that is no number ends the run by name, and not in a broken model."""
    with torch.no_grad():
        model.get_parameter(key).view(-1)[0] = math.nan
    with pytest.raises(NotFinite):
        METHODS[name].purify(model, *samples, seed=0)


@every_method
def test_samples_are_needed_but_by_the_one_that_looks_at_none(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """Without an image there is nothing to train on; labels and images go in pairs."""
    images, labels = samples
    method = METHODS[name]
    with pytest.raises(InvalidParameter, match="12 images but 11 labels"):
        method.purify(model, images, labels[:-1], seed=0)
    if name == "clp":
        assert same(
            method.purify(model, images[:0], labels[:0], seed=0),
            method.purify(model, images, labels, seed=1),
        )
    else:
        with pytest.raises(NotEnoughData):
            method.purify(model, images[:0], labels[:0], seed=0)


@every_method
def test_repr_tells_every_hyper_parameter(name: str) -> None:
    """A method is a value: equal fields are equal methods, and its repr builds it again."""
    method: Any = METHODS[name]
    assert dataclasses.replace(method) == method
    assert all(f"{field.name}=" in repr(method) for field in dataclasses.fields(method))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.epochs = 3


BAD: list[tuple[Callable[..., Method], dict[str, Any]]] = [
    (TriggerRewriting, {"steps": 0}),
    (TriggerRewriting, {"rounds": -1}),
    (TriggerRewriting, {"restarts": 0}),
    (TriggerRewriting, {"restart_steps": 0}),
    (TriggerRewriting, {"layers": 0}),
    (TriggerRewriting, {"ridge": 0.0}),
    (TriggerRewriting, {"ridge": math.nan}),
    (TriggerRewriting, {"strengths": ()}),
    (TriggerRewriting, {"strengths": (0.1, math.inf)}),
    (TriggerRewriting, {"strengths": (0.0,)}),
    (TriggerRewriting, {"copies": -1}),
    (TriggerRewriting, {"reach": -1}),
    (TriggerRewriting, {"precision": "float8"}),
    (ChannelLipschitzPruning, {"u": -0.1}),
    (ChannelLipschitzPruning, {"u": math.nan}),
    (ChannelLipschitzPruning, {"u": math.inf}),
    (FineTuning, {"epochs": 0}),
    (FineTuning, {"batch_size": 0}),
    (FineTuning, {"lr": 0.0}),
    (FineTuning, {"lr": math.nan}),
    (FineTuning, {"momentum": 1.0}),
    (FineTuning, {"momentum": -0.1}),
    (FineTuning, {"weight_decay": -1e-4}),
    (FineTuning, {"augmentations": -1}),
    (AdversarialNeuronPruning, {"iterations": 0}),
    (AdversarialNeuronPruning, {"batch_size": -1}),
    (AdversarialNeuronPruning, {"perturbation_steps": 0}),
    (AdversarialNeuronPruning, {"eps": math.inf}),
    (AdversarialNeuronPruning, {"eps": -0.1}),
    (AdversarialNeuronPruning, {"alpha": 1.1}),
    (AdversarialNeuronPruning, {"alpha": -0.1}),
    (AdversarialNeuronPruning, {"threshold": math.nan}),
    (AdversarialNeuronPruning, {"max_accuracy_drop": 2.0}),
    (AdversarialNeuronPruning, {"lr": 0.0}),
    (AdversarialNeuronPruning, {"momentum": 1.0}),
    (ImplicitBackdoorUnlearning, {"rounds": 0}),
    (ImplicitBackdoorUnlearning, {"passes": 0}),
    (ImplicitBackdoorUnlearning, {"batch_size": 0}),
    (ImplicitBackdoorUnlearning, {"fixed_point_iterations": 0}),
    (ImplicitBackdoorUnlearning, {"inner_lr": 0.0}),
    (ImplicitBackdoorUnlearning, {"perturbation_lr": math.nan}),
    (ImplicitBackdoorUnlearning, {"penalty": -1.0}),
    (ImplicitBackdoorUnlearning, {"radius": -1.0}),
    (ImplicitBackdoorUnlearning, {"portion": 0.0}),
    (ImplicitBackdoorUnlearning, {"portion": 1.1}),
    (ImplicitBackdoorUnlearning, {"lr": math.inf}),
    (ImplicitBackdoorUnlearning, {"optimiser": "lbfgs"}),
]


@pytest.mark.parametrize(("build_method", "given"), BAD)
def test_hyper_parameters_out_of_bounds_are_named(
    build_method: Callable[..., Method], given: dict[str, Any]
) -> None:
    """A bad value is refused before any work, and the message begins with its name."""
    with pytest.raises(InvalidParameter, match=f"^{next(iter(given))} must be"):
        build_method(**given)


def test_every_hyper_parameter_with_a_bound_has_a_bad_value_above() -> None:
    """Only switches have no bad value."""
    tried = {(build_method, name) for build_method, given in BAD for name in given}
    for kind in (
        TriggerRewriting, ChannelLipschitzPruning, FineTuning, AdversarialNeuronPruning,
        ImplicitBackdoorUnlearning,
    ):  # fmt: skip
        bounded = {(kind, f.name) for f in dataclasses.fields(kind) if f.type is not bool}
        assert bounded <= tried


@every_method
@pytest.mark.gpu
def test_runs_on_the_accelerator(
    name: str, model: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    """In float64 a device comes to what the CPU comes to, and gives it back on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    images, labels = samples[0].double(), samples[1]
    expected = METHODS[name].purify(model.double(), images, labels, seed=0)
    purified = METHODS[name].purify(model.cuda(), images, labels, seed=0)
    for found, meant in ((purified.masks, expected.masks), (purified.values, expected.values)):
        assert found.keys() == meant.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, meant[key], rtol=1e-5, atol=1e-6)
