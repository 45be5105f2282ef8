"""Whether a device is there."""

import torch


def check_device(device: str | torch.device | None) -> None:
    """ValueError for a device that this machine, or this build of torch, does not have."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The device {str(device)!r} cannot be used ({reason}); give 'cpu', or a GPU that is"
            " there."
        ) from error
