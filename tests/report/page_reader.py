"""Reads pages as a browser does: images, tables, headings, and what would be fetched."""

import base64
from html.parser import HTMLParser
from pathlib import Path

FETCHING = ("src", "href", "srcset", "data", "poster", "action")


class Page(HTMLParser):
    """`images` are the PNG files inside, `tables` rows of cells, `links` all that points away."""

    def __init__(self, path: Path):
        super().__init__()
        self.images: list[bytes] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "link"):
            self._open.append(tag)
        for name, value in attrs:
            if name not in FETCHING or (tag == "a" and (value or "").startswith("#")):
                continue
            head, _, content = (value or "").partition("base64,")
            if head == "data:image/png;":
                self.images.append(base64.b64decode(content, validate=True))
            else:
                self.links.append(value or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag

    def handle_data(self, data):
        within = self._open[-1] if self._open else ""
        if within in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif within == "h2":
            self.titles[-1] += data
        elif within != "style":
            self.text += data

    def table(self, first: str) -> dict[str, list[str]]:
        """The rows below the head that begins with this word."""
        (found,) = [table for table in self.tables if table[0][0] == first]
        return {row[0]: row[1:] for row in found[1:]}
