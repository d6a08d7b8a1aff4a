"""A report: written once, as Markdown and as one HTML file that needs nothing else.

No scripts, no fonts and no pictures from outside; text in Chinese is set in whichever Chinese font the reader has.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

MARKDOWN_CELL = 300  # characters of a cell; HTML shows all
STYLE = """
body{font:15px/1.55 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC","Noto Sans SC",sans-serif;
max-width:1200px;margin:2rem auto;padding:0 1rem;color:#1f2430;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #d9dde5;padding-bottom:.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.8rem 0}
th,td{border:1px solid #d9dde5;padding:.35rem .6rem;text-align:left;vertical-align:top;white-space:pre-wrap;
overflow-wrap:anywhere;min-width:3.5rem}th,pre{background:#f3f5f9}pre{padding:1rem;overflow-x:auto}
.good{color:#0a7038;font-weight:600}.bad{color:#b3261e;font-weight:600}
figure{display:inline-block;margin:.5rem 1rem .5rem 0}figcaption{font-size:.85rem;color:#5a6272}
svg{max-width:100%;height:auto}
@media(prefers-color-scheme:dark){body{background:#14171d;color:#dfe3ea}th,pre{background:#20252e}
th,td,h2{border-color:#343b47}.good{color:#5fd08f}.bad{color:#ff8a80}}
"""


class Good(str):
    """Text that is good news."""


class Bad(str):
    """Text that is bad news."""


class Document:
    def __init__(self, title: str, language: str) -> None:
        self.title, self.language = title, language
        self.blocks: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        self.blocks.append(("heading", text))

    def text(self, text: str) -> None:
        self.blocks.append(("text", text))

    def code(self, text: str) -> None:
        """Lines as they stand in a file."""
        self.blocks.append(("code", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.blocks.append(("table", [header, *rows]))

    def figure(self, svg: str, caption: str, file: str | None = None) -> None:
        """A picture: inside the HTML; in Markdown a link to `file`, where it has one."""
        self.blocks.append(("figure", (svg, caption, file)))

    def markdown(self) -> str:
        parts = [f"# {self.title}"]
        for kind, block in self.blocks:
            if kind == "heading":
                parts.append(f"## {block}")
            elif kind == "text":
                parts.append(markdown_text(block))
            elif kind == "code":
                parts.append("\n".join(f"    {line}".rstrip() for line in block.split("\n")))
            elif kind == "table":
                lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in block]
                parts.append("\n".join([lines[0], "|" + " --- |" * len(block[0]), *lines[1:]]))
            elif kind == "figure" and block[2] is not None:
                parts.append(f"![{markdown_text(block[1])}]({block[2]})")
        return "\n\n".join(parts) + "\n"

    def body(self) -> str:
        """The blocks as HTML, without a page around them: for pages of another kind. STYLE says how they look."""
        parts = []
        for kind, block in self.blocks:
            if kind == "heading":
                parts.append(f"<h2>{html.escape(block)}</h2>")
            elif kind == "text":
                parts.append(element("p", block))
            elif kind == "code":
                parts.append(element("pre", block))
            elif kind == "table":
                head = "".join(element("th", cell) for cell in block[0])
                rows = "".join(f"<tr>{''.join(element('td', cell) for cell in row)}</tr>\n" for row in block[1:])
                parts.append(f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>')
            else:
                svg, caption, _ = block
                parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")
        return "\n".join(parts)

    def html(self) -> str:
        language = {"zh": "zh-CN"}.get(self.language, self.language)
        return (
            f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>\n<body>\n"
            f"<h1>{html.escape(self.title)}</h1>\n{self.body()}"
            "\n</body></html>\n"
        )


def element(tag: str, text: str) -> str:
    kind = ' class="good"' if isinstance(text, Good) else ' class="bad"' if isinstance(text, Bad) else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def markdown_text(text: str) -> str:
    """Text that is data cannot become markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#" else c for c in text)


def markdown_cell(cell: str) -> str:
    short = cell if len(cell) <= MARKDOWN_CELL else cell[:MARKDOWN_CELL] + "…"
    return " ".join(markdown_text(short).replace("|", "\\|").split("\n"))
