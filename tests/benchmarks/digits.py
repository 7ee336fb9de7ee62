"""Whether influence foretells retraining, and finds wrong labels: an MLP on scikit-learn's digits.

    python tests/benchmarks/digits.py                 in full: minutes, most of them retraining
    python tests/benchmarks/digits.py --quick         few retrainings, to see that it runs

The 1,797 images of 8 × 8 are split once, by a fixed seed: 1,437 to train on, 360 to test. The model
is 64 → 128 → 256 → 10 with biases, ReLU and two dropouts of 0.1, trained by SGD: momentum 0.9,
learning rate 0.05, weight decay 1e-3, 30 epochs of mini-batches of 64, nothing stopped early and
nothing chosen by the results below. Gradients are taken with dropout off. All three linear maps are
recorded, so no parameter is left out.

Datamodeling. The model is trained again on random halves of the training images, each several
times with other seeds. The outcome of a half S, for a test image q, is log p of q's label, the mean
over the seeds. The linear datamodeling score (Park et al. 2023) is, for one q, Spearman's
correlation over the halves of the outcome with Σ_{n ∈ S} score(q, n); the table has its mean over
the test images, and the standard error of it, which is that of the choice of test images, not of
halves. The correlation between outcomes of single seeds says how much of one is chance; their mean
has less of it, so that a score can correlate better with the mean than one seed with another.

    EK-FAC         ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(n), of one model trained on all training images
    gradient dot   ∇log p(q)ᵀ ∇log p(n)
    … cosine       that, over the norms of both
    random         Gaussian numbers

Wrong labels. A tenth of the training labels become another class each, at random; the model is
trained on that, and the training images are ordered by their influence on themselves, as the labels
stand. What counts is the share of the wrong labels among the first 10 % and 20 % of the images, the
mean over several seeds (of flips and of training) with its standard error.

    EK-FAC         ∇log p(n)ᵀ (F + λ)⁻¹ ∇log p(n)
    gradient norm  ‖∇log p(n)‖²
    loss           −log p(n)

F is the true Fisher, with a label drawn once for each training image from the model's own
predictions; or, where a row says so, with several draws for each image, or with the data's labels,
the empirical one. λ is the same for all three maps. mean(Λ) is the mean over all parameters of the
squared gradients of single images with F's labels, which is Λ's own mean, as a change of basis
leaves the sum of squares. The main result, chosen beforehand, has λ = 0.1 · mean(Λ) and one draw.
The row of ten draws was added when the others were known: a model this sure of itself draws another
class than the data's for few of 1,437 images, and the row says what that costs.
"""

import argparse
import time
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import ekfac_dist
from ekfac_dist.functional import cache_linears, flatten_func, flatten_params, ihvp_at_x_ekfac
from ekfac_dist.influence.agreement import spearman
from ekfac_dist.report.tables import table

try:
    import sklearn
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit(
        "The digits come with scikit-learn, which is missing: pip install scikit-learn"
    ) from None

NUM_TEST = 360
NUM_CLASSES = 10
LEAST_ACCURACY = 0.95
DATA = 0
# Of F's labels, by how many are drawn for an image.
NAMES = {1: "one draw", 10: "ten draws", DATA: "data's labels"}


@dataclass(frozen=True)
class Images:
    """Images as vectors [N, 64] between 0 and 1, and their labels [N]."""

    x: Tensor
    y: Tensor

    def __len__(self):
        return len(self.y)


@dataclass(frozen=True)
class Choice:
    """What EK-FAC is done with.

    Attributes:
        factor: λ / mean(Λ).
        draws: Labels of each image in F; DATA stands for the data's.
    """

    factor: float
    draws: int = 1

    def __str__(self):
        main = " (main)" if self == CHOICES[0] else ""
        return f"EK-FAC, λ = {self.factor:g} mean(Λ), {NAMES[self.draws]}{main}"


# The first is the main one.
CHOICES = (
    *(Choice(0.1), Choice(0.01), Choice(1), Choice(10)),
    *(Choice(0.1, draws=10), Choice(0.1, DATA)),
)


@dataclass
class Seconds:
    """Time that each kind of work took, one entry for each time."""

    taken: dict[str, list[float]] = field(default_factory=dict)

    def of(self, what, work, *given):
        """What `work` returns."""
        start = time.perf_counter()
        result = work(*given)
        self.taken.setdefault(what, []).append(time.perf_counter() - start)
        return result

    def print_all(self):
        rows = [
            [what, str(len(each)), f"{sum(each) / len(each):.2f}", f"{sum(each):.1f}"]
            for what, each in self.taken.items()
        ]
        print(table(["", "times", "seconds each", "seconds in all"], rows))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--retrainings", type=int, default=100, help="random halves to train on")
    parser.add_argument("--seeds", type=int, default=3, help="trainings on each half")
    parser.add_argument("--repeats", type=int, default=5, help="data sets with wrong labels")
    parser.add_argument("--threads", type=int, default=1, help="more slow so small a model down")
    parser.add_argument("--quick", action="store_true", help="5 halves, 2 seeds, 2 repeats, main λ")
    args = parser.parse_args()
    args.choices = CHOICES
    if args.quick:
        args.choices = CHOICES[:1]
        args.retrainings, args.seeds, args.repeats = 5, 2, 2
    if args.retrainings < 2 or args.seeds < 1 or args.repeats < 2:
        parser.error("at least 2 retrainings, 1 seed and 2 repeats are needed")
    return args


def load_images():
    """Training and test images."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return Images(x[train], y[train]), Images(x[test], y[test])


def trained(images, seed):
    """A model trained on images, in evaluation mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(128, 256), nn.ReLU(), nn.Dropout(0.1)),
        nn.Linear(256, NUM_CLASSES),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(30):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images.x[batch]), images.y[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def log_likelihoods(model, images):
    """Log p of each image's label [N]."""
    return -functional.cross_entropy(model(images.x), images.y, reduction="none")


@torch.no_grad()
def accuracy(model, images):
    return float((model(images.x).argmax(-1) == images.y).float().mean())


@torch.no_grad()
def with_labels_of_fisher(model, images, draws):
    """The images, each as often as labels are drawn for it from the model's own predictions."""
    if draws == DATA:
        return images
    generator = torch.Generator().manual_seed(0)
    probabilities = model(images.x).softmax(-1)
    labels = torch.multinomial(probabilities, draws, replacement=True, generator=generator)
    return Images(images.x.repeat_interleave(draws, 0), labels.flatten())


def losses_of(model):
    """A function of (flat parameters, images, labels) that gives each image's loss."""

    @flatten_func(model)
    def losses(parameters, x, y):
        logits = functional_call(model, parameters, (x,))
        return functional.cross_entropy(logits, y, reduction="none")

    return losses


def gradients_of(model, images):
    """Each image's gradient of its loss [N, P], all parameters in one row."""
    losses = losses_of(model)
    of_one = grad(lambda flat, x, y: losses(flat, x[None], y[None])[0])
    return vmap(of_one, (None, 0, 0))(flatten_params(model).detach(), images.x, images.y)


def mean_of_lambda(model, images):
    """Mean of the images' squared gradients over images and parameters."""
    parts = zip(images.x.split(256), images.y.split(256), strict=True)
    sums = [gradients_of(model, Images(*part)).square().sum() for part in parts]
    return float(sum(sums)) / len(images) / sum(p.numel() for p in model.parameters())


def inverse(model, images, damping, seconds):
    """(F + λ)⁻¹ as a function of gradients [..., P]; F has the labels of `images`."""
    parameters = flatten_params(model).detach()

    def fit():
        with cache_linears(model) as caches:
            return ihvp_at_x_ekfac(
                losses_of(model),
                *(parameters, images.x, images.y),
                batch_size=256,
                mlp_cache=caches,
                damping=damping,
            )

    ihvp = seconds.of(f"EK-FAC: fit on {len(images)} images", fit)

    def solve(vectors):
        # Some at a time, for the working memory's sake.
        parts = vectors.split(128)
        return seconds.of(
            f"EK-FAC: solve for {len(vectors)} vectors", lambda: torch.cat([*map(ihvp, parts)])
        )

    return solve


def inverses(model, images, choices, seconds):
    """The inverse of each choice, by its name."""
    labelled = {
        n: with_labels_of_fisher(model, images, n) for n in dict.fromkeys(c.draws for c in choices)
    }
    means = {draws: mean_of_lambda(model, each) for draws, each in labelled.items()}
    print("mean(Λ): " + "; ".join(f"{mean:.2e}, {NAMES[n]}" for n, mean in means.items()))
    return {
        str(c): inverse(model, labelled[c.draws], c.factor * means[c.draws], seconds)
        for c in choices
    }


def influence(train, test, choices, seconds):
    """Scores {method: [Q, N]} of test images against training images."""
    model = trained(train, seed=0)
    reached = accuracy(model, test)
    print(f"test accuracy {reached:.1%}; on the training images {accuracy(model, train):.1%}")
    if reached <= LEAST_ACCURACY:
        raise SystemExit(f"The model is not trained: more than {LEAST_ACCURACY:.0%} is asked for.")
    train_NP, test_QP = gradients_of(model, train), gradients_of(model, test)
    scores = {
        name: solve(test_QP) @ train_NP.T
        for name, solve in inverses(model, train, choices, seconds).items()
    }
    scores["gradient dot"] = test_QP @ train_NP.T
    norms_QN = test_QP.norm(dim=1)[:, None] * train_NP.norm(dim=1)
    scores["gradient cosine"] = scores["gradient dot"] / norms_QN
    generator = torch.Generator().manual_seed(0)
    scores["random"] = torch.randn(norms_QN.shape, generator=generator)
    return scores


def random_halves(count, size):
    """Which examples are in each half [K, N]."""
    generator = torch.Generator().manual_seed(1)
    halves_KN = torch.zeros(count, size)
    for half_N in halves_KN:
        half_N[torch.randperm(size, generator=generator)[: size // 2]] = 1
    return halves_KN


def retrain(train, test, halves_KN, args, seconds):
    """Log p of the test images' labels after training on each half [K, seeds, Q]."""
    outcomes, accuracies = [], []
    for number, half_N in enumerate(halves_KN):
        members = half_N.bool()
        half = Images(train.x[members], train.y[members])
        for seed in range(args.seeds):
            # Seed 0 is that of the model whose gradients are taken.
            own_seed = 1 + number * args.seeds + seed
            model = seconds.of("retraining on a half", trained, half, own_seed)
            outcomes.append(log_likelihoods(model, test))
            accuracies.append(accuracy(model, test))
    print(f"retrained on halves: test accuracy {min(accuracies):.1%} to {max(accuracies):.1%}")
    return torch.stack(outcomes).view(len(halves_KN), args.seeds, len(test))


def correlations(one_KQ, other_KQ):
    """Spearman's correlation over the halves, for each test image [Q]."""
    columns = zip(one_KQ.T, other_KQ.T, strict=True)
    return torch.tensor([spearman(one, other) for one, other in columns])


def datamodeling(train, test, args, seconds):
    print(f"Linear datamodeling score: {args.retrainings} halves, {args.seeds} trainings each\n")
    scores = influence(train, test, args.choices, seconds)
    halves_KN = random_halves(args.retrainings, len(train))
    outcomes_KsQ = retrain(train, test, halves_KN, args, seconds)
    rows = [
        [name, mean_and_error(correlations(halves_KN @ scores_QN.T, outcomes_KsQ.mean(1)))]
        for name, scores_QN in scores.items()
    ]
    print("\n" + table(["score", "Spearman, mean ± s.e."], rows))
    pairs = list(combinations(range(args.seeds), 2))
    if pairs:
        between = [correlations(outcomes_KsQ[:, one], outcomes_KsQ[:, two]) for one, two in pairs]
        against = mean_and_error(torch.stack(between).mean(0))
        print(f"\noutcomes of one seed against another's: {against}")


def with_wrong_labels(images, seed):
    """The images with a tenth of the labels changed, and which these are [N]."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(images), dtype=torch.bool)
    wrong[torch.randperm(len(images), generator=generator)[: round(len(images) / 10)]] = True
    added = torch.randint(1, NUM_CLASSES, (len(images),), generator=generator)
    return Images(images.x, torch.where(wrong, (images.y + added) % NUM_CLASSES, images.y)), wrong


def suspicion(model, images, choices, seed, seconds):
    """What the images are ordered by, the largest first {method: [N]}."""
    gradients_NP = gradients_of(model, images)
    by = {
        name: (solve(gradients_NP) * gradients_NP).sum(1)
        for name, solve in inverses(model, images, choices, seconds).items()
    }
    by["gradient norm"] = gradients_NP.square().sum(1)
    by["loss"] = -log_likelihoods(model, images)
    by["random"] = torch.rand(len(images), generator=torch.Generator().manual_seed(seed))
    return by


def share_found(by_N, wrong_N, part):
    """Share of the wrong labels that are among the first of the order."""
    first = by_N.argsort(descending=True)[: round(part * len(by_N))]
    return float(wrong_N[first].sum() / wrong_N.sum())


def mislabelled(train, test, args, seconds):
    print(f"Wrong labels: a tenth of them, {args.repeats} times\n")
    shares = {}
    for seed in range(args.repeats):
        images, wrong_N = with_wrong_labels(train, seed)
        model = trained(images, seed)
        learnt = accuracy(model, Images(images.x[wrong_N], images.y[wrong_N]))
        print(
            f"test accuracy {accuracy(model, test):.1%}; the model has learnt {learnt:.1%} of "
            f"{int(wrong_N.sum())} wrong labels"
        )
        by = suspicion(model, images, args.choices, seed, seconds)
        for name, by_N in by.items():
            found = [share_found(by_N, wrong_N, part) for part in (0.1, 0.2)]
            shares.setdefault(name, []).append(found)
    rows = []
    for name, found in shares.items():
        rows.append([name, *(mean_and_error(part, percent=True) for part in torch.tensor(found).T)])
    print("\n" + table(["ordered by", "in the first 10 %", "in the first 20 %"], rows))


def mean_and_error(values, percent=False):
    """Mean and its standard error."""
    mean, error = float(values.mean()), float(values.std()) / len(values) ** 0.5
    return f"{mean:.1%} ± {error:.1%}" if percent else f"{mean:.3f} ± {error:.3f}"


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    train, test = load_images()
    start = time.perf_counter()
    seconds = Seconds()
    print(
        f"ekfac_dist {ekfac_dist.__version__}, torch {torch.__version__}, scikit-learn "
        f"{sklearn.__version__}, {args.threads} thread(s)\n"
        f"training images {list(train.x.shape)}, test images {list(test.x.shape)}\n"
    )
    datamodeling(train, test, args, seconds)
    print()
    mislabelled(train, test, args, seconds)
    print()
    seconds.print_all()
    print(f"\nin all {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
