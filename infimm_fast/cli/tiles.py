"""The picture that shows how a picture was cut."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

LINE = (255, 196, 0)
PAPER = (24, 24, 28)
_MAX_SIDE = 900


def draw_tiles(picture: Image.Image, tiles: list[Image.Image], grid: tuple[int, int]) -> Image.Image:
    """Draw the grid with (row, column) of each sub-image on the picture, and the thumbnail beside it.

    Args:
        picture: the picture, mode RGB.
        tiles: its tiles: sub-images row by row, then the thumbnail if there is one.
        grid: (rows, columns).

    Returns:
        A new picture.
    """
    rows, columns = grid
    scale = min(_MAX_SIDE / max(picture.size), 1.0) if max(picture.size) > 300 else 300 / max(picture.size)
    width, height = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    thumbnail = tiles[-1] if len(tiles) > rows * columns else None
    margin, caption = 16, 28
    side = max(min(height, width) // 2, 120) if thumbnail is not None else 0
    canvas_size = (width + 2 * margin + (side + margin if side else 0), max(height, side) + 2 * margin + caption)
    canvas = Image.new("RGB", canvas_size, PAPER)
    canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (margin, margin + caption))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    pen.text((margin, margin), f"{rows} x {columns} sub-images of {tiles[0].width} px", fill="white", font=font)
    for row in range(rows):
        for column in range(columns):
            box = (
                margin + column * width // columns,
                margin + caption + row * height // rows,
                margin + (column + 1) * width // columns - 1,
                margin + caption + (row + 1) * height // rows - 1,
            )
            pen.rectangle(box, outline=LINE, width=3)
            label = f"{row}, {column}"
            corner = (box[0] + 8, box[1] + 8)
            pen.rectangle(pen.textbbox(corner, label, font=font), fill=PAPER)
            pen.text(corner, label, fill=LINE, font=font)
    if thumbnail is not None:
        left = width + 2 * margin
        pen.text((left, margin), "thumbnail", fill="white", font=font)
        canvas.paste(thumbnail.resize((side, side), Image.Resampling.LANCZOS), (left, margin + caption))
    return canvas
