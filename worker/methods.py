"""Find a method of purification by the name the catalogue gives it."""

from collections.abc import Callable, Mapping

from worker.purify.anp import AdversarialNeuronPruning
from worker.purify.auto import TriggerRewriting
from worker.purify.awm import AdversarialWeightMasking
from worker.purify.clp import ChannelLipschitzPruning
from worker.purify.fine_tuning import FineTuning
from worker.purify.ibau import ImplicitBackdoorUnlearning
from worker.purify.method import Method

# Each takes the fields of the parameters model that the catalogue pairs with its name. The method
# ``none`` is not here: it changes nothing, so there is nothing to run.
METHODS: Mapping[str, Callable[..., Method]] = {
    "auto": TriggerRewriting,
    "awm": AdversarialWeightMasking,
    "anp": AdversarialNeuronPruning,
    "clp": ChannelLipschitzPruning,
    "fine_tuning": FineTuning,
    "ibau": ImplicitBackdoorUnlearning,
}
