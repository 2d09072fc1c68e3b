"""Noise priors: the noise that diffuses a clip, given its key frame. `appearance` is MicroCinema's (arXiv 2311.18829, both figures)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange

from microcinema.utils.device import to_device
from microcinema.utils.errors import UserError, check_choice

KINDS = ("none", "appearance", "mixed", "progressive")
_BEST_GAMMA = 0.02  # in the authors' figure of FVD over lambda and gamma, beside lambda 0.03


@dataclass(frozen=True)
class NoisePrior:
    """The noise of a clip as a function of independent noise and the key frame.

    - `none`: `eps_hat = eps`, plain diffusion;
    - `appearance`: `eps_hat = eps + lam z_ref`, the appearance noise prior, `lam = strength`;
    - `mixed`, `progressive`: unit variance in each frame, correlated over frames, `a = strength` (arXiv 2305.10474).

    At strength 0 every kind is plain diffusion. `gamma` moves only the start of sampling closer to the key frame; None until
    `resolve` chooses it; that it adds to lambda is our reading of the authors' figure. A UserError for an unknown kind, or a negative or
    infinite number.
    """

    kind: str = "appearance"
    strength: float = 0.03
    gamma: float | None = None

    def __post_init__(self) -> None:
        check_choice("the noise prior's kind", self.kind, KINDS)
        for name, value in (("strength", self.strength), ("gamma", self.gamma)):
            if value is not None and not 0 <= value < 1e15:
                raise UserError(f"the noise prior's {name} is {value}; use a number >= 0, below 1e15")

    def resolve(self, abar_T: float) -> "NoisePrior":
        """The prior with a gamma, given the signal `abar_T` at the last step of the training schedule, which sampling from noise lacks
        and gamma gives back in part: the authors' 0.02 for `appearance`, 0 if there is none, and for other kinds, where none is known."""
        default = _BEST_GAMMA if self.kind == "appearance" and abar_T > 0 else 0.0
        return replace(self, gamma=default) if self.gamma is None else self

    def covariance(self, frames: int) -> torch.Tensor:
        """Covariance of one pixel's noise over frames, float64 (f, f).

        PYoCo, eq. 3: mixed noise shares `a^2 / (1 + a^2)` of its variance among all frames. Eq. 4: progressive noise is
        `eps_i = a / sqrt(1 + a^2) eps_{i-1} + 1 / sqrt(1 + a^2) n_i`, an autoregression, so it decays with distance.
        """
        index = torch.arange(frames, dtype=torch.float64)
        distance = (index[:, None] - index).abs()
        shared = self.strength**2 / (1 + self.strength**2)
        if self.kind == "mixed":
            return torch.where(distance == 0, 1.0, shared).double()
        if self.kind == "progressive":
            return torch.full_like(distance, shared**0.5) ** distance
        return torch.eye(frames, dtype=torch.float64)

    def noise(self, eps: torch.Tensor, z_ref: torch.Tensor) -> torch.Tensor:
        """`eps_hat = L eps + mu` for training, of independent standard noise `b f c h w` and the key frame's clean latents `b c h w`."""
        return self.correlate(eps) + self.mean(z_ref, eps.shape[1])

    def mean(self, z_ref: torch.Tensor, frames: int) -> torch.Tensor:
        """`mu`, the mean of the noise of a clip of so many frames, that broadcasts to `b f c h w`."""
        share = self.strength if self.kind == "appearance" else 0.0
        return share * rearrange(z_ref, "b c h w -> b 1 c h w")

    def correlate(self, x: torch.Tensor) -> torch.Tensor:
        """`L x`, of `b f c h w`: independent frames become correlated as those of the noise, whose covariance is `L L^T`."""
        return self._over_frames(x, torch.linalg.cholesky)

    def whiten(self, x: torch.Tensor) -> torch.Tensor:
        """`L^-1 x`, of `b f c h w`; see `denoise`, which shows samplers plain diffusion by it."""
        return self._over_frames(x, lambda covariance: torch.linalg.inv(torch.linalg.cholesky(covariance)))

    def _over_frames(self, x: torch.Tensor, matrix: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.kind in ("none", "appearance"):
            return x
        with torch.autocast(x.device.type, enabled=False):
            return einsum(
                to_device(matrix(self.covariance(x.shape[1])).to(x.dtype), x.device), x, "f g, b g c h w -> b f c h w"
            )

    def initial_noise(self, eps: torch.Tensor, z_ref: torch.Tensor) -> torch.Tensor:
        """`z_T`, from which sampling starts: `eps_hat + gamma z_ref`, so `eps + (lam + gamma) z_ref` for `appearance`."""
        assert self.gamma is not None, "resolve() chooses it"
        return self.noise(eps, z_ref) + self.gamma * rearrange(z_ref, "b c h w -> b 1 c h w")
