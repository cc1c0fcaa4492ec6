"""Draw the pictures of docs/how-memory-works.md, except memory.svg, which is written by hand.

`python docs/pictures/draw.py` writes the SVG files beside this one.
"""

from itertools import groupby, product
from pathlib import Path

DARK, GREY, PALE = "#222222", "#555555", "#eef1f5"
RANKS = ["#7fa6d1", "#8fc5a6", "#d9b36c", "#c795bd"]
FONT = 'font-family="Helvetica, Arial, sans-serif"'
ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#666666"/></marker></defs>'
)


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """Return a filled rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"/>'


def label(
    x: float, y: float, text: str, size: float = 13, anchor: str = "middle", fill: str = DARK
) -> str:
    """Return a line of text."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{text}'
        "</text>"
    )


def arrow(path: str) -> str:
    """Return an arrow along an SVG path."""
    return f'<path d="{path}" stroke="#666666" fill="none" marker-end="url(#arrow)"/>'


def save(name: str, title: str, width: int, height: int, shapes: list[str]) -> None:
    """Write one picture with a white background."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {FONT}>',
        f"<title>{title}</title>",
        ARROW,
        box(0, 0, width, height, "#ffffff"),
        *shapes,
        "</svg>\n",
    ]
    (Path(__file__).parent / f"{name}.svg").write_text("\n".join(lines), encoding="utf-8")


def product_keys() -> None:
    """Draw the three best of 8 x 8 slots, from the three best scores of each half."""
    first = [0.3, 1.1, -0.4, 2.0, 0.1, 1.4, -0.9, 0.6]
    second = [0.9, -0.2, 1.7, 0.4, 1.2, -0.7, 0.2, 0.0]
    rows = sorted(range(8), key=lambda i: -first[i])[:3]
    columns = sorted(range(8), key=lambda j: -second[j])[:3]
    best = sorted(product(rows, columns), key=lambda slot: -first[slot[0]] - second[slot[1]])[:3]
    left, top, size = 150, 80, 34
    shapes = [label(left + 4 * size, 30, "second half of the query times 8 sub-keys")]
    turned = label(0, 0, "first half times 8 sub-keys")
    shapes.append(f'<g transform="translate(68 {top + 4 * size}) rotate(-90)">{turned}</g>')
    for i, j in product(range(8), range(8)):
        x, y = left + j * size, top + i * size
        chosen, seen = (i, j) in best, i in rows and j in columns
        shapes.append(
            box(x, y, size - 2, size - 2, DARK if chosen else "#f3d9a4" if seen else PALE)
        )
        if seen:
            ink = "#ffffff" if chosen else DARK
            shapes.append(label(x + 16, y + 21, f"{first[i] + second[j]:.1f}", 11.5, fill=ink))
    for i in range(8):
        y, x = top + i * size, left + i * size
        ink = "#ffffff" if i in rows else DARK
        shapes.append(box(left - 62, y, 50, size - 2, "#1f5fa8" if i in rows else "#bcd0e6"))
        shapes.append(label(left - 37, y + 21, f"{first[i]:.1f}", 12, fill=ink))
        ink = "#ffffff" if i in columns else DARK
        shapes.append(box(x, top - 36, size - 2, 26, "#d2661c" if i in columns else "#f2d0b8"))
        shapes.append(label(x + 16, top - 18, f"{second[i]:.1f}", 12, fill=ink))
    shapes.append(label(480, 100, "64 slots, 16 scores", 17, "start"))
    text = """A slot is a pair of sub-keys. Its score is the sum of the two.

The 3 best slots are where the 3 best rows meet the
3 best columns (yellow): a slot in any other row has
three better ones in its own column. So 9 sums are
enough to find them exactly (black).

At the published size 512 + 512 scores decide among
262,144 slots; of 32 x 32 pairs only 119 need a look."""
    shapes += [
        label(480, 126 + 24 * k, line, 13.5, "start") for k, line in enumerate(text.split("\n"))
    ]
    save("product_keys", "Product keys: 8 + 8 scores decide among 64 slots", 960, 380, shapes)


def row_update() -> None:
    """Draw the way from the reads of a batch to the updated rows."""
    reads = [(3, 0.7, 0), (9, 0.3, 0), (3, 0.6, 1), (14, 0.4, 1), (9, 0.8, 2), (3, 0.2, 2)]

    def read(x: float, y: float, row: int, weight: float, token: int) -> list[str]:
        return [
            box(x, y, 130, 26, RANKS[token]),
            label(x + 8, y + 18, f"row {row}", 12.5, "start"),
            label(x + 122, y + 18, f"{weight} x g{'ABC'[token]}", 12.5, "end"),
        ]

    shapes = [
        label(115, 40, "reads kept by the forward pass"),
        label(115, 275, "three tokens, two reads each;", 12, fill=GREY),
        label(115, 292, "g: gradient of what a token read", 12, fill=GREY),
        arrow("M192 153 H256"),
        label(224, 143, "sort", 12, fill=GREY),
        label(331, 40, "by row"),
        label(434, 91, "sum", 12, fill=GREY),
        label(536, 40, "one gradient a row"),
        label(800, 40, "the table: Adam on rows 3, 9, 14"),
        label(800, 292, "other rows and their moments stay as they are", 12, fill=GREY),
    ]
    for k, one in enumerate(reads):
        shapes += read(50, 60 + 32 * k, *one)
    shapes += [box(700, 60 + 13 * row, 200, 11, PALE) for row in range(16)]
    y = 60.0
    for row, group in groupby(sorted(reads, key=lambda one: one[0]), key=lambda one: one[0]):
        start = y
        for one in group:
            shapes += read(266, y, *one)
            y += 28
        middle, target = (start + y - 2) / 2, 65 + 13 * row
        y += 14
        shapes += [
            arrow(f"M402 {middle} H466"),
            box(476, middle - 13, 120, 26, "#d8d8d8"),
            label(536, middle + 5, f"gradient of {row}", 12.5),
            box(700, 60 + 13 * row, 200, 11, DARK),
            arrow(f"M600 {middle} C650 {middle} 640 {target} 694 {target}"),
            label(908, target + 5, str(row), 11.5, "start"),
        ]
    save("row_update", "From reads to updated rows", 960, 310, shapes)


def layouts() -> None:
    """Draw a table split by rows and by columns."""
    shapes = []
    for left, by_rows in [(40, True), (520, False)]:
        shapes.append(label(left + 200, 34, "by rows" if by_rows else "by columns", 16))
        for i, j in product(range(12), range(4)):
            fill = RANKS[i // 3 if by_rows else j]
            shapes.append(box(left + 110 + 45 * j, 54 + 15 * i, 45 if by_rows else 43, 13, fill))
        for i in (2, 7, 8):
            shapes.append(
                f'<rect x="{left + 108}" y="{53 + 15 * i}" width="182" height="15" fill="none" '
                f'stroke="{DARK}" stroke-width="2"/>'
            )
        for rank in range(4):
            x, y = (left + 322, 80 + 45 * rank) if by_rows else (left + 131 + 45 * rank, 254)
            shapes.append(label(x, y, f"rank {rank}", 11.5, fill=GREY))
        shapes += [
            label(left + 96, 95, "a token", 12.5, "end", GREY),
            label(left + 96, 110, "reads 3 rows", 12.5, "end", GREY),
        ]
    shapes += [
        label(240, 285, "A rank stores a quarter of the rows. Others send it their reads"),
        label(240, 303, "of these and get partial sums back, or the rows themselves."),
        label(720, 285, "A rank stores a quarter of every row. All ranks see all reads;"),
        label(720, 303, "each sums its columns, and slices of the sums are sent."),
    ]
    save("layouts", "Two ways to split a table over four ranks", 960, 320, shapes)


if __name__ == "__main__":
    product_keys()
    row_update()
    layouts()
