"""Where a share lies whose standard error of 0 says nothing: all documents right, or all wrong."""

Z95 = 1.959964  # standard errors of a normal distribution around the middle 95 %


def interval(
    mean: float, stderr: float | None, documents: int, z: float = Z95
) -> tuple[float, float] | None:
    """Returns Wilson's interval of a share that is 0 or 1, at 95 % or as many `z` as given.

    None for every other mean, and where there is an error to go by.
    """
    if stderr or mean not in (0, 1) or not documents:
        return None
    far = z**2 / (documents + z**2)
    return (0.0, far) if mean == 0 else (1 - far, 1.0)
