"""Names of files and classes, as they may be shown on a terminal."""


def printable(text: str) -> str:
    r"""The text with each character that is not printable as its escape, such as `\x1b`, `\n` or `\udcff`.

    A name in a file system may hold anything: a line break that would end a table's row, a sequence that would make
    the terminal do something, bytes that are no UTF-8 (Python holds them as lone surrogates).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
