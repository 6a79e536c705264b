"""What the classes of the package's own models are called, so that a prompt can name one."""

_DIGITS = tuple(map(str, range(10)))
_CANVASES = (*(f"alone {digit}" for digit in _DIGITS), *(f"count from {digit}" for digit in _DIGITS))
_NAMES = {"digits": _DIGITS, "canvases": _CANVASES}  # by the data set a model was trained with


def class_names(model: str) -> tuple[str, ...]:
    """model: the name of one in the package. Empty for any other."""
    return _NAMES.get(model.partition("_")[0], ())
