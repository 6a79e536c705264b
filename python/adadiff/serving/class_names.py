"""Names of the classes of the package's models, so that a prompt can name one."""

_DIGITS = tuple(map(str, range(10)))
_CANVASES = (*(f"alone {digit}" for digit in _DIGITS), *(f"count from {digit}" for digit in _DIGITS))
_NAMES = {"digits": _DIGITS, "canvases": _CANVASES}  # by the data set a model was trained with


def class_names(model: str) -> tuple[str, ...]:
    """Names of the classes of a model in the package, by label; empty for any other model."""
    return _NAMES.get(model.partition("_")[0], ())
