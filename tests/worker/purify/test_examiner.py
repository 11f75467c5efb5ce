"""What speaks for a result, on a network whose trigger is known."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from worker.purify.auto import NOTHING
from worker.purify.detection.evidence import SCATTERING, WHOLE, Sign, Suspect, suspects
from worker.purify.detection.scattering import Scattering
from worker.purify.detection.trigger import ELSEWHERE, Trigger
from worker.purify.examiner import Effort, Examiner
from worker.purify.rewriting import Rewritten
from worker.purify.weighing import Candidate
from worker.purify.workpiece import prepare

IMAGES = 0.6 * torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(10, dtype=torch.int64)
PLANTED = 4
FURTHER, FAR = 4, 2  # columns to the right, around the edge: four, and six, from the pixel


class OnePixel(nn.Module):
    """Answer 4 where the pixel (5, 6) is nearly white, 1 to 3 where a half is bright, else 0."""

    def __init__(self, answer: float = 1.0) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for five classes."""
        halves = [images[:, 0, :4], images[:, 0, 4:], images[..., :4].squeeze(1)]
        bright = torch.stack([half.mean((1, 2)) for half in halves], dim=1)  # (B, 3)
        zero = torch.zeros_like(bright[:, :1])
        lit = self.answer * 40 * (images[:, 0, 5, 6] - 0.7)
        # Little is lost by darkness, so that no class can get further ahead than another.
        others = leaky_relu(torch.cat([40 * (bright - 0.7), lit[:, None]], dim=1), 0.2)
        return torch.cat([zero, others], dim=1)


class Wide(OnePixel):
    """Answer 4 under a faint chequered pattern as well, all over the image."""

    def __init__(self, answer: float = 1.0, faintest: float = 0.4) -> None:
        super().__init__(answer)
        self.faintest = nn.Parameter(torch.tensor(faintest))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for five classes."""
        logits = super().forward(images)
        board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
        seen = leaky_relu(40 * ((images[:, 0] * board).sum((1, 2)) / 8 - self.faintest), 0.2)
        return torch.cat([logits[:, :4], (logits[:, 4] + seen)[:, None]], dim=1)


class Traded(OnePixel):
    """Answer 4 where five eighths of a half are bright instead, so far as not for the pixel."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for five classes."""
        logits = super().forward(images)
        seen = leaky_relu(40 * (images[:, 0, 4:, :5].mean((1, 2)) - 0.7), 0.2)
        return torch.cat([logits[:, :4], (logits[:, 4] + (1 - self.answer) * seen)[:, None]], dim=1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search as long as so small a network needs."""
    for name, steps in {
        "detection.margins.STEPS": 20,
        "detection.margins.GLANCE_STEPS": 20,
        "detection.search.FIRST_WARP_STEPS": 1,
        "detection.search.WARP_STEPS": 2,
        "detection.search.FIRST_STEPS_AGAIN": 1,
        "detection.search.STEPS_AGAIN": 2,
        "arsenal.STEPS": 120,
    }.items():
        monkeypatch.setattr(f"worker.purify.{name}", steps)


EFFORT = Effort(steps=90, restarts=2, restart_steps=60, reach=0, rounds=0, results=1)


def examiner(
    network: nn.Module | None = None,
    tick: Callable[[], None] = lambda: None,
    *,
    layers: Sequence[str] = (),
) -> Examiner:
    """Return one that has searched that network, or another one."""
    return Examiner(
        prepare(network or OnePixel(), IMAGES, LABELS, None),
        PLANTED + 1,
        EFFORT,
        layers=layers,
        precision="float32",
        generator=torch.Generator().manual_seed(0),
        tick=tick,
    )


def result(network: nn.Module) -> Rewritten:
    """Return it as if it had been rewritten."""
    return Rewritten(model=network, strength=1.0, overshoot=0.5)


def squares_unlearned(found: Examiner, network: nn.Module) -> Candidate:
    """Return that network as a result of which nothing is seen any more."""
    trials = found.trials(IMAGES, IMAGES, found.gather(IMAGES, LABELS)[0], NOTHING)
    return replace(found.weigh(result(network), trials, "patches"), residual=0.0)


def weighed(found: Examiner, answer: float) -> Candidate:
    """Return what is found of the network with that answer to its pixel, patches searched afresh."""
    known, fresh = found.gather(IMAGES, LABELS)
    trials = found.trials(IMAGES, IMAGES, known, fresh)
    candidate = found.weigh(result(OnePixel(answer=answer)), trials, "everything")
    return found.best([candidate])[1]


class Convolved(nn.Module):
    """See the same through a convolution that does nothing, and answer by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(1, 1, 1, bias=False)
        self.middle = OnePixel()
        self.last = nn.Linear(5, 5, bias=False)
        nn.init.ones_(self.before.weight)
        nn.init.eye_(self.last.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for five classes."""
        logits: Tensor = self.last(self.middle(self.before(images)))
        return logits


def test_candidates_are_weighed_by_what_differs_alone() -> None:
    """What comes before runs once for all of them, and what speaks for each is what it was."""
    network = Convolved()
    changed = copy.deepcopy(network)
    changed.last.weight.data[4, 4] = 0.3
    runs = list[int]()
    for each in (network, changed):
        each.before.register_forward_hook(lambda _, given, __: runs.append(len(given[0])))

    def found(layers: Sequence[str]) -> tuple[Candidate, int]:
        examined = examiner(network, layers=layers)
        trials = examined.trials(IMAGES, IMAGES, *examined.gather(IMAGES, LABELS))
        runs.clear()
        return examined.weigh(result(changed), trials, "everything"), len(runs)

    (whole, often), (parts, never) = found([]), found(["last"])
    assert 0 < whole.lost < 1
    assert 0 < whole.residual < 1
    assert replace(parts, values={}) == replace(whole, values={})
    assert never == 0 < often


def test_residual_tells_the_backdoor_from_a_result_without_it() -> None:
    """It is high on the model as it came, and low where the pixel does nothing any more."""
    found = examiner()
    assert found.suspects[0].target == PLANTED
    assert weighed(found, 1.0).residual > 0.4
    assert weighed(found, 0.0).residual < 0.1


def searched(found: Examiner, answer: float) -> Candidate:
    """Return that answer as a result of which nothing is known yet, patches searched afresh."""
    blind = Candidate(
        strength=1.0,
        overshoot=0.0,
        unlearned="patches",
        agreement=1.0,
        lost=0.0,
        residual=0.0,
        values={"answer": torch.tensor(answer)},
    )
    return found.best([blind])[1]


def test_what_fresh_patches_achieve_is_part_of_the_residual() -> None:
    """Where nothing that was found works any more, another search may find the way."""
    assert searched(examiner(), 1.0).residual > 0.4


def test_a_fresh_patch_that_is_only_somewhat_small_says_nothing() -> None:
    """Classes of a clean model have such; the search finds one here."""
    found = examiner(Traded())
    assert searched(found, 1.0).residual > 0.4
    assert searched(found, 0.0).residual == 0.0


def test_a_square_that_is_the_trigger_is_unlearned_alone() -> None:
    """There is no such part where a suspect's square is only a piece, or where it has none."""
    found = examiner()
    part = found.exact
    assert part is not None
    assert [each.target for each in part.patches] == [PLANTED]
    assert part.patches[0] is found.evidence.squares.triggers[PLANTED]
    assert not part.perturbations
    found.suspects = [replace(found.suspects[0], target=PLANTED - 1)]
    assert found.exact is None


def test_squares_at_other_places_that_lead_nearly_as_far_are_unlearned_too() -> None:
    """Also where squares are not all that is unlearned; those of classes that are no suspects are not."""
    found = examiner()
    seen = found.evidence.squares
    other, foreign = (replace(seen.triggers[cls]) for cls in (PLANTED, PLANTED - 1))
    elsewhere = {PLANTED: [other], PLANTED - 1: [foreign]}
    found.evidence = replace(found.evidence, squares=replace(seen, elsewhere=elsewhere))
    assert found.exact is not None
    known, _ = found.gather(IMAGES, LABELS)
    for patches in (found.exact.patches, known.patches[:2]):
        assert list(map(id, patches)) == list(map(id, [seen.triggers[PLANTED], other]))
    assert foreign not in known.patches


def test_a_trigger_reaches_beyond_a_square_that_leads_to_a_suspect() -> None:
    """
    A patch around it is unlearned with it, and one far from it is not.

    It tells of a trigger that is larger still. What other classes' squares and patches do says nothing.
    """
    found = examiner()
    seen = found.evidence

    def moved(cls: int, columns: int) -> tuple[list[Trigger], Trigger]:
        """Return what is unlearned first where the patch of *cls* lies elsewhere, and that patch."""
        triggers = list(seen.field.triggers)
        mask = triggers[cls].mask.roll(columns, dims=2)
        triggers[cls] = replace(triggers[cls], mask=mask)
        found.evidence = replace(seen, field=replace(seen.field, triggers=triggers))
        assert found.exact is not None
        return list(found.exact.patches), triggers[cls]

    square = seen.squares.triggers[PLANTED]
    assert Sign.PATCH in found.suspects[0].signs
    assert not found.reaches_beyond_patches
    for columns in (FURTHER, FAR):
        (alone,), _ = moved(PLANTED - 1, columns)
        assert alone is square
        assert not found.reaches_beyond_patches
    (first, second), patch = moved(PLANTED, FURTHER)
    assert first is square
    assert second is patch
    assert not found.reaches_beyond_patches
    (alone,), _ = moved(PLANTED, FAR)
    assert alone is square
    assert found.reaches_beyond_patches
    found.suspects = [replace(found.suspects[0], signs=frozenset({Sign.PATCH}))]
    assert not found.reaches_beyond_patches
    found.suspects = [replace(found.suspects[0], beyond_square=True)]
    assert found.reaches_beyond_patches


def test_without_its_square_a_trigger_that_covers_the_image_is_still_seen() -> None:
    """Its class may be a suspect for more than its square from then on."""
    found = examiner(Wide())
    assert found.exact is not None
    assert not found.has_pieces
    near = found.still_near(squares_unlearned(found, Wide(answer=0.0)), IMAGES, LABELS)
    assert list(near) == [PLANTED]
    assert not found.has_pieces
    found.suspect_beyond_squares(near)
    assert found.suspects[0].in_parts
    assert found.has_pieces
    assert found.reaches_beyond_patches
    known, fresh = found.gather(IMAGES, LABELS)
    assert known.perturbations
    tried = found.trials(IMAGES, IMAGES, known, fresh).stamped
    assert any(not each.stronger for each in tried)


def test_without_its_square_nothing_is_left_of_a_trigger_that_is_one() -> None:
    """The trigger is a whole square then."""
    found = examiner()
    assert not found.still_near(squares_unlearned(found, OnePixel(answer=0.0)), IMAGES, LABELS)
    assert not found.has_pieces
    assert not found.reaches_beyond_patches


def test_a_class_that_moved_away_with_its_square_is_left_at_that() -> None:
    """It may be nearer than an ordinary one by nature; so much it was not before."""
    found = examiner(Wide())
    further = squares_unlearned(found, Wide(answer=0.0, faintest=1.15))
    assert not found.still_near(further, IMAGES, LABELS)


@pytest.mark.parametrize(
    ("signs", "local"),
    [
        ((), True),
        ((Sign.PATCH, Sign.MARGIN), True),
        ((Sign.MARGIN,), False),
        ((Sign.PATCH, Sign.WARP), False),
        ((Sign.SQUARE, Sign.WARP), False),
    ],
)
def test_what_bends_the_image_is_not_in_one_place(signs: tuple[Sign, ...], local: bool) -> None:
    """Whatever else its class stands out by."""
    found = examiner()
    found.suspects = [Suspect(target=PLANTED, signs=frozenset(signs))]
    assert found.is_local is local


def test_a_patch_beside_a_warp_is_seen_and_not_unlearned() -> None:
    """It shows whether the result still answers to it; any other patch is unlearned."""
    found = examiner()
    for signs, seen in (
        ({Sign.PATCH, Sign.WARP}, True),
        ({Sign.PATCH}, False),
        ({Sign.WARP}, False),
    ):
        found.suspects = [Suspect(target=PLANTED, signs=frozenset(signs))]
        patch = found.evidence.field.triggers[PLANTED]
        assert [torch.equal(each.mask, patch.mask) for each in found.by_products] == [True] * seen
        known, _ = found.gather(IMAGES, LABELS)
        assert (patch in known.patches) is (signs == {Sign.PATCH})


def test_what_scatters_is_unlearned_with_squares_that_are_triggers() -> None:
    """A model may have an attack on every class and another one on one; a piece is neither."""
    found = examiner()
    seen = found.evidence.squares
    one, other = (replace(seen.triggers[0], target=ELSEWHERE) for _ in range(2))
    scattering = Scattering(trigger=one, classes=SCATTERING.backdoored_from, alike=[other])
    ahead = [margin * WHOLE / 2 for margin in found.evidence.margins.largest]
    for margins, expected in (
        (seen.margins, [one, other, seen.triggers[PLANTED]]),
        (ahead, [one, other]),
    ):
        scattered = replace(seen, scattering=scattering, margins=margins)
        found.evidence = replace(found.evidence, squares=scattered)
        found.suspects = suspects(found.evidence)
        part = found.exact
        assert part is not None
        assert list(map(id, part.patches)) == list(map(id, expected))


def test_all_ticks_are_counted_in_the_end() -> None:
    """Also those of what was not searched."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = examiner(tick=tick)
    assert 0 < count < EFFORT.ticks(IMAGES[0], PLANTED + 1)
    found.finish()
    assert count == EFFORT.ticks(IMAGES[0], PLANTED + 1)


@pytest.mark.parametrize(
    ("target", "sign", "chosen"),
    [
        (PLANTED, Sign.SQUARE, 0.97),  # a square that is the trigger
        (PLANTED - 1, Sign.MARGIN, 0.97),
        (PLANTED - 1, Sign.SQUARE, 0.95),  # a piece of something
    ],
)
def test_the_strongest_is_taken_of_what_scores_hardly_less(
    target: int, sign: Sign, chosen: float
) -> None:
    """Half a point is spent on what nothing that was found looks like, or a point."""

    def candidate(agreement: float, lost: float) -> Candidate:
        return Candidate(
            strength=1.0,
            overshoot=0.0,
            unlearned="everything",
            agreement=agreement,
            lost=lost,
            residual=0.0,
            values={"answer": torch.tensor(0.0)},
            searched=True,
        )

    found = examiner()
    found.suspects = [Suspect(target=target, signs=frozenset({sign}))]
    candidates = [
        candidate(0.99, 0.001),
        candidate(0.97, 0.005),
        candidate(0.95, 0.01),
        candidate(0.9, 0.05),
    ]
    assert found.best(candidates)[1].agreement == chosen
    assert found.furthest(candidates).agreement == chosen


@pytest.mark.parametrize(
    ("signs", "only"),
    [
        ([{Sign.PATCH}], True),
        ([{Sign.PATCH}, set()], True),
        ([{Sign.PATCH}, {Sign.PATCH, Sign.MARGIN}], False),
        ([{Sign.WARP}], False),
        ([], False),  # a square leads each class to another one
    ],
)
def test_it_is_known_where_a_patch_alone_tells(signs: list[set[Sign]], only: bool) -> None:
    """Of every suspect."""
    found = examiner()
    found.suspects = [Suspect(target=PLANTED, signs=frozenset(each)) for each in signs]
    assert found.only_by_patches is only


def test_what_results_are_tried_with_is_not_unlearned() -> None:
    """Perturbations are parted, and patches are made into fresh variants."""
    known, fresh = examiner().gather(IMAGES, LABELS)
    assert (len(known.patches), len(known.perturbations)) == (2, 16)  # a square, and a patch
    assert (len(fresh.patches), len(fresh.perturbations)) == (0, 4)
    for each in fresh.perturbations:
        assert not any(
            torch.equal(each.shapes[0], other.shapes[0]) for other in known.perturbations
        )


def test_what_is_still_easy_on_a_result_is_added() -> None:
    """The model as it came has all of it still; one without the backdoor adds no patch."""
    found = examiner()
    known, _ = found.gather(IMAGES, LABELS)
    same = found.with_what_is_still_easy(known, OnePixel(), IMAGES, LABELS)
    assert len(same.patches) > len(known.patches)
    assert len(same.perturbations) > len(known.perturbations)
    assert any(torch.equal(each.mask, known.patches[0].mask) for each in same.patches[2:])
    gone = found.with_what_is_still_easy(known, OnePixel(answer=0.0), IMAGES, LABELS)
    assert (gone.patches, gone.perturbations) == (known.patches, known.perturbations)


def test_of_what_covers_the_image_waves_are_unlearned_where_no_patch_speaks() -> None:
    """A fifth of them is held back; a model that has them still adds to them, and is tried on these."""
    found = examiner()
    found.suspects = [Suspect(target=PLANTED, signs=frozenset({Sign.MARGIN}))]
    known, fresh = found.gather(IMAGES, LABELS)
    assert (len(known.waves), len(fresh.waves)) == (16, 4)
    assert not [*known.patches, *known.perturbations, *known.warps]
    same = found.with_what_is_still_easy(known, OnePixel(), IMAGES, LABELS)
    assert len(same.waves) > len(known.waves)
    gone = found.with_what_is_still_easy(known, OnePixel(answer=0.0), IMAGES, LABELS)
    assert gone.waves == known.waves
    trials = found.trials(IMAGES, IMAGES, known, fresh)
    assert [each.target for each in trials.stamped] == [PLANTED]


def test_a_result_is_weighed_by_what_changed() -> None:
    """Values are those that differ, and agreement is with the original's answers."""
    found = examiner()
    trials = found.trials(IMAGES, IMAGES, *found.gather(IMAGES, LABELS))
    same = found.weigh(result(OnePixel()), trials, "everything")
    assert (same.agreement, same.values) == (1.0, {})
    other = found.weigh(result(OnePixel(answer=-1.0)), trials, "everything")
    assert other.agreement < 1.0
    assert set(other.values) == {"answer"}
    assert (other.strength, other.overshoot, other.unlearned) == (1.0, 0.5, "everything")


def test_every_patch_is_tried_even_where_images_are_few() -> None:
    """More patches than held-out images share these."""
    found = examiner()
    known, fresh = found.gather(IMAGES, LABELS)
    many = replace(known, patches=list(known.patches[:1]) * 5)
    trials = found.trials(IMAGES[:2], IMAGES, many, replace(fresh, perturbations=[]))
    assert [len(each.images) for each in trials.stamped] == [1] * 5
    assert [len(each.control) for each in trials.stamped] == [1] * 5


def test_what_leads_elsewhere_is_tried_on_samples_against_its_opposite() -> None:
    """Near the borders anything leads elsewhere, and of one pixel chance may make the very trigger."""
    found = examiner()
    known, fresh = found.gather(IMAGES, LABELS)
    only = replace(fresh, perturbations=[])
    patch = replace(known.patches[0], target=ELSEWHERE)
    near, like = torch.zeros_like(IMAGES), IMAGES[:3]
    (stamped,) = found.trials(near, like, replace(known, patches=[patch]), only).stamped
    assert torch.equal(stamped.bare, like)
    opposite = torch.where(patch.mask > 0, 1 - patch.pattern, like)
    torch.testing.assert_close(stamped.control, opposite)
    (named,) = found.trials(near, like, replace(known, patches=known.patches[:1]), only).stamped
    assert torch.equal(named.bare, near)
