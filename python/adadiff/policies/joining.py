"""Policies of several parts as one text, joined by +. A file name with a + needs quotes: "width:'a+b.json'"."""

QUOTES = "'\""
FILES = ("width:", "cascade:", "estimate:")  # parts that name a file


def split_parts(policy: str) -> list[str]:
    """The parts, without quotes. Only a quote after a colon opens a quoted name; other quotes are ordinary letters.

    Raises ValueError for an unclosed quote, and for a part that looks like the rest of a file name.
    """
    parts, quote = [""], ""
    for before, letter in zip(" " + policy, policy, strict=False):
        if quote:
            if letter == quote:
                quote = ""
            else:
                parts[-1] += letter
        elif letter in QUOTES and before == ":":
            quote = letter
        elif letter == "+":
            parts.append("")
        else:
            parts[-1] += letter
    if quote:
        raise ValueError(f"policy {policy!r} has a quote that is not closed")
    if any(part.startswith(FILES) for part in parts):
        torn = [part for part in parts[1:] if ":" not in part and part != "full"]
        if torn:
            raise ValueError(
                f"no policy {torn[0]!r} in {policy!r}: + joins policies; put a file name that holds one in "
                "quotes, as in width:'a+b.json' or estimate:'a+b.json',share=0.6"
            )
    return parts


def quoted(name: str) -> str:
    """A file name, quoted where `split_parts` needs it."""
    if "+" not in name and not name.startswith(tuple(QUOTES)):
        return name
    quote = QUOTES[1] if QUOTES[0] in name else QUOTES[0]
    return f"{quote}{name}{quote}"
