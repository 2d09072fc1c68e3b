"""The grid of the ablation: its file, and the runs that are chosen from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from microcinema.utils.errors import UserError

FULL = "full"


@dataclass
class Paper:
    """What all runs of a paper are told to train with, and what each variant is told beside it."""

    train: list[str]
    variants: dict[str, list[str]]


@dataclass
class Grid:
    """A grid file; see the comments of the one that is shipped."""

    seeds: list[int]
    max_train_steps: int
    train: list[str]
    text_sensitivity: list[str]
    evaluate: list[str]
    papers: dict[str, Paper]

    def train_overrides(self, paper: str, variant: str) -> list[str]:
        """What a variant's `train` is told, but for seed, steps and folders."""
        return [*self.papers[paper].train, *self.train, *self.papers[paper].variants[variant]]


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    paper: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.paper}/{self.variant}/seed-{self.seed}"


def load_grid(path: Path) -> Grid:
    """A grid file.

    Raises:
        UserError: no grid, or a paper without the variant `full` that the others are compared with.
    """
    try:
        grid: Grid = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Grid), OmegaConf.load(path)))  # type: ignore[assignment]
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"'{path}' is no grid: {' '.join(str(error).split())}") from None
    for name, paper in grid.papers.items():
        if FULL not in paper.variants:
            raise UserError(f"paper '{name}' of '{path}' has no variant '{FULL}' to compare with")
    return grid


def choose(grid: Grid, papers: Sequence[str] | None, variants: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    """The runs of these papers, variants and seeds (None: all), seed by seed, so that a grid that is broken off is narrow, not short.

    Raises:
        UserError: a name that is not in the grid.
    """
    known = {"paper": set(grid.papers), "variant": {v for p in grid.papers.values() for v in p.variants}}
    for kind, chosen in (("paper", papers), ("variant", variants)):
        for name in chosen or ():
            if name not in known[kind]:
                raise UserError(f"the grid has no {kind} '{name}'; it has {', '.join(sorted(known[kind]))}")
    return [
        Run(paper, variant, seed)
        for seed in seeds
        for paper, content in grid.papers.items()
        for variant in content.variants
        if paper in (papers or known["paper"]) and variant in (variants or known["variant"])
    ]


# --- runs ------------------------------------------------------------------------------------------------------------------------
