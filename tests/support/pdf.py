"""Reads what Chromium prints: the texts and the filled shapes of each page, with their places. No other PDF.

Knows the few operators that its writer (Skia) uses; points, from the page's left and bottom.
"""

import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

_OBJECT = re.compile(rb"(\d+) 0 obj\n(.*?)\nendobj", re.DOTALL)
_TOKEN = re.compile(rb"<[0-9A-Fa-f\s]*>|\((?:\\.|[^\\)])*\)|\[|\]|/[^\s/<>\[\]()]+|[^\s/<>\[\]()]+")
Matrix = tuple[float, float, float, float, float, float]
IDENTITY: Matrix = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)


@dataclass
class PrintedPage:
    """One page."""

    width: float
    texts: list[tuple[str, float]] = field(default_factory=list)  # and its left end
    fills: list[tuple[tuple[int, int, int], float, float]] = field(
        default_factory=list
    )  # colour, left, right


def printed(path: Path) -> list[PrintedPage]:
    """The pages of a PDF that Chromium wrote."""
    objects = {int(number): body for number, body in _OBJECT.findall(path.read_bytes())}
    kids = next(body for body in objects.values() if b"/Type /Pages" in body and b"/Parent" not in body)
    pages = []
    for number in _leaves(kids, objects):
        body = objects[number]
        left, _, right, _ = map(float, re.search(rb"/MediaBox \[([^\]]*)\]", body)[1].split())
        page = PrintedPage(right - left)
        contents = int(re.search(rb"/Contents (\d+)", body)[1])
        _Reader(objects, page).read(_stream(objects[contents]), body, IDENTITY)
        pages.append(page)
    return pages


def _leaves(node: bytes, objects: dict[int, bytes]) -> list[int]:
    kids = [int(one) for one in re.findall(rb"(\d+) 0 R", re.search(rb"/Kids \[([^\]]*)\]", node)[1])]
    found = []
    for kid in kids:
        found += _leaves(objects[kid], objects) if b"/Type /Pages" in objects[kid] else [kid]
    return found


def _stream(body: bytes) -> bytes:
    head, _, rest = body.partition(b"stream\n")
    content = rest.rpartition(b"\nendstream")[0]
    return zlib.decompress(content) if b"/FlateDecode" in head else content


def _times(one: Matrix, other: Matrix) -> Matrix:
    a, b, c, d, e, f = one
    g, h, i, j, k, m = other
    return a * g + b * i, a * h + b * j, c * g + d * i, c * h + d * j, e * g + f * i + k, e * h + f * j + m


class _Reader:
    def __init__(self, objects: dict[int, bytes], page: PrintedPage) -> None:
        self.objects, self.page = objects, page

    def named(self, kind: bytes, resources: bytes) -> dict[bytes, int]:
        found = re.search(rb"/" + kind + rb" <<(.*?)>>", resources, re.DOTALL)
        return {name: int(n) for name, n in re.findall(rb"/(\S+) (\d+) 0 R", found[1])} if found else {}

    def letters(self, font: int) -> dict[int, str]:
        """Glyph -> text, by the font's ToUnicode map."""
        table = _stream(self.objects[int(re.search(rb"/ToUnicode (\d+)", self.objects[font])[1])])
        found: dict[int, str] = {}
        for block in re.findall(rb"beginbfchar(.*?)endbfchar", table, re.DOTALL):
            for glyph, text in re.findall(rb"<([0-9A-Fa-f]+)>\s*<([0-9A-Fa-f]+)>", block):
                found[int(glyph, 16)] = bytes.fromhex(text.decode()).decode("utf-16-be")
        for block in re.findall(rb"beginbfrange(.*?)endbfrange", table, re.DOTALL):
            for low, high, text in re.findall(
                rb"<([0-9A-Fa-f]+)>\s*<([0-9A-Fa-f]+)>\s*<([0-9A-Fa-f]+)>", block
            ):
                for i in range(int(high, 16) - int(low, 16) + 1):
                    found[int(low, 16) + i] = chr(int(text, 16) + i)
        return found

    def read(self, content: bytes, resources: bytes, matrix: Matrix) -> None:
        fonts = {name: self.letters(font) for name, font in self.named(b"Font", resources).items()}
        forms = self.named(b"XObject", resources)
        stack: list[tuple[Matrix, tuple[int, int, int]]] = []
        color, font, text_matrix = (0, 0, 0), {}, IDENTITY
        operands: list[bytes] = []
        xs: list[float] = []

        def at(x: float, y: float) -> float:
            return _times((1, 0, 0, 1, x, y), matrix)[4]

        for token in _TOKEN.findall(content):
            if re.match(rb"[<(\[\]/]|[-+.0-9]", token):
                operands.append(token)
                continue
            numbers = [float(one) for one in operands if re.fullmatch(rb"[-+.0-9]+", one)]
            if token == b"q":
                stack.append((matrix, color))
            elif token == b"Q":
                matrix, color = stack.pop()
            elif token == b"cm":
                matrix = _times(tuple(numbers), matrix)
            elif token == b"rg":
                color = tuple(round(255 * one) for one in numbers)
            elif token == b"Tf":
                font = fonts[operands[0][1:]]
            elif token == b"Tm":
                text_matrix = tuple(numbers)
            elif token in (b"Tj", b"TJ"):
                glyphs = b"".join(re.sub(rb"\s", b"", one[1:-1]) for one in operands if one.startswith(b"<"))
                text = "".join(font.get(int(glyphs[i : i + 4], 16), "") for i in range(0, len(glyphs), 4))
                self.page.texts.append((text, _times(text_matrix, matrix)[4]))
            elif token == b"re":
                xs += [at(numbers[0], numbers[1]), at(numbers[0] + numbers[2], numbers[1])]
            elif token in (b"m", b"l"):
                xs.append(at(*numbers))
            elif token in (b"f", b"f*", b"F", b"B"):
                self.page.fills.append((color, min(xs), max(xs)))
            elif token == b"Do" and operands[0][1:] in forms:
                form = self.objects[forms[operands[0][1:]]]
                if b"/Subtype /Form" in form:
                    self.read(_stream(form), form.partition(b"stream\n")[0], matrix)
            if token in (b"f", b"f*", b"F", b"B", b"n", b"S", b"s"):
                xs = []
            operands = []
