"""Pictures of batches, kernels, predictions and neighbours."""
from pathlib import Path


def check_png(out: Path) -> None:
    """Raise ValueError for the name of a picture that does not say what is written."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out (={out}) must end in .png, which is what is written; correct the name")
