"""Local response normalisation (paper §3.3)."""
import torch

from model.config import LrnConfig


def local_response_norm(x: torch.Tensor, config: LrnConfig, groups: int = 1) -> torch.Tensor:
    """Normalise (B, C, H, W) over windows of channels which stay inside each of `groups` equal parts of C."""
    b, c, h, w = x.shape
    y = torch.nn.functional.local_response_norm(x.reshape(b * groups, c // groups, h, w), config.n,
                                                alpha=config.alpha * config.n, beta=config.beta, k=config.k)
    return y.reshape(b, c, h, w)
