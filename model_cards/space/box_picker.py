"""A part of a page: a picture in which a box is drawn with a mouse, a finger or a pen."""

import base64
from io import BytesIO

import gradio as gr
from PIL import Image

SIDE = 1024  # pixels of the longer side of what is shown

TEMPLATE = """
<div class="frame">
  <img src="${value}" alt="The picture; draw a box in it" draggable="false">
  <div class="box" hidden></div>
</div>
"""

STYLE = """
text-align: center;
.frame { position: relative; display: inline-block; line-height: 0; cursor: crosshair; touch-action: none; }
.frame img { max-width: 100%; max-height: 460px; border-radius: 8px; user-select: none; }
.box { position: absolute; box-sizing: border-box; border: 2px solid white; border-radius: 2px;
  box-shadow: 0 0 0 1px rgb(0 0 0 / 0.6); background: rgb(255 255 255 / 0.15); pointer-events: none; }
"""

# Positions are shares of the sides of the picture, so that its size on the page does not matter.
SCRIPT = """
let start = null;
const share = (value, from, size) => Math.min(1, Math.max(0, (value - from) / size));
const place = (event) => {
  const image = element.querySelector('img').getBoundingClientRect();
  return [share(event.clientX, image.left, image.width), share(event.clientY, image.top, image.height)];
};
const corners = (end) => [
  Math.min(start[0], end[0]), Math.min(start[1], end[1]), Math.max(start[0], end[0]), Math.max(start[1], end[1]),
];
element.addEventListener('pointerdown', (event) => {
  if (!event.target.closest('.frame')) return;
  event.preventDefault();
  start = place(event);
  event.target.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
  if (!start) return;
  const [x0, y0, x1, y1] = corners(place(event)).map((edge) => 100 * edge);
  const box = element.querySelector('.box');
  box.hidden = false;
  Object.assign(box.style, {left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%`});
});
element.addEventListener('pointerup', (event) => {
  if (!start) return;
  const box = corners(place(event));
  start = null;
  if (box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) trigger('drawn', {box});
});
element.addEventListener('pointercancel', () => { start = null; });
"""


def box_picker(**kwargs) -> gr.HTML:
    """Returns a part that shows a picture, given as its `shown` form; `.drawn` is triggered when a box was drawn.

    The `EventData` of the event has the `box`, `[x0, y0, x1, y1]` as shares of the width and the height.
    """
    return gr.HTML(html_template=TEMPLATE, css_template=STYLE, js_on_load=SCRIPT, **kwargs)


def shown(picture: Image.Image) -> str:
    """Return a picture as the `data:` URI of a JPEG, not larger than a page needs."""
    copy, buffer = picture.copy(), BytesIO()
    copy.thumbnail((SIDE, SIDE))
    copy.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
