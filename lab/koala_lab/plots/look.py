"""One look for every figure: colours, markers and names, the same in all figures of all papers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import seaborn as sns  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

DPI = 100  # inline pictures stay readable and small

# Colour-blind safe; one method keeps one colour in all figures of all papers.
_SAFE = list(sns.color_palette("colorblind").as_hex())
_STRONG = [*_SAFE[:5], "#882255", _SAFE[7], "#332288", _SAFE[9]]  # pink and yellow are too pale for thin lines
PALETTE: dict[str, str] = {
    "koala_m": _SAFE[0],
    "koala_v": _SAFE[9],
    "koala_plus_plus": _SAFE[4],
    "meka": _SAFE[2],
    "apollo": _SAFE[3],
    "apollo_b0": "#cc6677",
    "apollow": "#aa4499",
    "sgd": _SAFE[7],
    "sgd_equivalent": "#44aa99",
    "adam": _SAFE[1],
    "adamw": _SAFE[5],
    "adabelief": "#999933",
    "adabelief_l2": "#117733",
    "lookahead": "#661100",
    "radam": "#882255",
    "adahessian": "#332288",
    "paper": "#000000",
}
LABELS = {
    "koala_m": "KOALA-M",
    "koala_v": "KOALA-V",
    "koala_plus_plus": "KOALA++",
    "meka": "MEKA",
    "apollo": "APOLLO",
    "apollo_b0": "APOLLO, B = 0",
    "apollow": "ApolloW",
    "sgd": "SGD",
    "sgd_equivalent": "SGD, equivalent rate",
    "adam": "Adam",
    "adamw": "AdamW",
    "adabelief": "AdaBelief",
    "adabelief_l2": "AdaBelief, L2",
    "adabelief_eps_1e_8": "AdaBelief, ε = 1e-8",
    "adabelief_eps_1e_16": "AdaBelief, ε = 1e-16",
    "radam": "RAdam",
    "adahessian": "AdaHessian",
    "sdlbfgs": "SdLBFGS",
    "lookahead": "Lookahead",
    "momentum": "SGD with momentum",
    "yogi": "Yogi",
    "paper": "paper",
    # data sets and networks, as titles name them
    "fashion-mnist": "Fashion-MNIST",
    "mnist5k-t10k": "MNIST, 5000 images",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet32": "ImageNet-32",
    "pydoc-topics": "pydoc topics",
    "tinyshakespeare": "Tiny Shakespeare",
    "wikitext-2-valid": "WikiText-2, its validation part",
    "multi30k": "Multi30k",
    "numbers": "numbers in words",
    "mlp_100": "MLP with 100 hidden units",
    "resnet8": "ResNet-8",
    "resnet8_gn": "ResNet-8 with group norm",
    "resnet8_w16": "ResNet-8, 16 wide",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "dcgan_small": "small DCGAN",
    "lstm": "LSTM",
    "transformer": "Transformer",
}
_MARKERS = "osD^vPX<>*"


def style() -> None:
    """Set the project's matplotlib style for this process."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=[*_STRONG[:8], "#999933", _SAFE[9]],
        rc={
            "figure.dpi": DPI,
            "figure.figsize": (6.0, 3.6),
            "figure.constrained_layout.use": True,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "pdf.fonttype": 42,
            "svg.hashsalt": "koala",
        },
    )


def colour(method: str) -> str:
    """Return the colour of a method; one without an entry gets the same spare colour everywhere."""
    spare = _STRONG[zlib.crc32(method.encode()) % len(_STRONG)]
    return str(PALETTE.get(method, spare))


def label(name: str) -> str:
    """Return the name of a method, data set or network as the papers print it; one without an entry stays as it is."""
    return LABELS.get(name, name)


def setting(*names: str) -> str:
    """Return a data set and what else a title says of it, each name written out.

    >>> setting("digits, milestone", "resnet8")
    'digits, milestone, ResNet-8'
    """
    return ", ".join(label(name) for name in names)


def row_colours(rows: Sequence[str]) -> dict[str, str]:
    """Return a colour per row of a table, by its place; from the tenth row on they repeat, with other markers."""
    return {row: _STRONG[place % len(_STRONG)] for place, row in enumerate(rows)}


def row_markers(rows: Sequence[str]) -> dict[str, str]:
    """Return a marker per row of a table, by its place, so that colour alone tells no rows apart."""
    return {row: _MARKERS[place % len(_MARKERS)] for place, row in enumerate(rows)}


def log_y(ax: Axes) -> None:
    """Make the y axis logarithmic, with at least three plain numbers on it, in steps of about 10, 2 or 1.3.

    Args:
        ax: An axes on which all is drawn: the ticks are those of its present limits.
    """
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    decades = range(first, last + 1, 1 + (last - first) // 8)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [digit * 10.0**k for k in decades for digit in digits if low <= digit * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    ax.yaxis.set(major_locator=FixedLocator(ticks), major_formatter="{x:g}", minor_locator=NullLocator())
