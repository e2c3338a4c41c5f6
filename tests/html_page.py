"""What an HTML page contains, for tests of the pages that tools write."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags that are not closed in their order, the attributes of all, tables by caption, and the text of items."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.tags, self.tables, self.items, self.words = [], [], [], {}, [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        elif tag == "tr":
            self.tables.setdefault(self.caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.caption][-1].append("")
        elif tag == "figcaption":
            self.items.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "caption" in self.open:
            self.caption += data
        elif {"td", "th"} & set(self.open[-2:]):
            self.tables[self.caption][-1][-1] += data
        elif "figcaption" in self.open:
            self.items[-1] += data
