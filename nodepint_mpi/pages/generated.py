"""A picture of generated samples. Local."""

import numpy as np
from matplotlib.figure import Figure

MOST_PANELS = 100
MOST_LINES = 200


def draw_generated(samples: np.ndarray, classes: np.ndarray | None) -> Figure:
    """Images as a grid; pairs of numbers as points; other samples as lines over their components.

    Args:
        samples: What the decoder gave, (samples, ...).
        classes: Of each sample, or None.
    """
    if samples.ndim == 3 and min(samples.shape[1:]) > 1:
        return _draw_images(samples[:MOST_PANELS], classes)
    figure = Figure(figsize=(5, 5), layout="constrained")
    panel = figure.subplots()
    flat = samples.reshape(len(samples), -1)
    colors = None if classes is None else classes
    if flat.shape[1] == 1:
        panel.hist(flat[:, 0], bins=40, color="gray")
        panel.set_xlabel("sample")
    elif flat.shape[1] == 2:
        panel.scatter(flat[:, 0], flat[:, 1], s=8, c=colors, cmap="tab10")
        panel.set_xlabel("component 0")
        panel.set_ylabel("component 1")
        panel.set_aspect("equal")
    else:
        panel.plot(flat[:MOST_LINES].T, linewidth=0.8)
        panel.set_xlabel("component")
    panel.grid(alpha=0.3)
    panel.set_title(f"{len(samples)} samples", fontsize="small")
    return figure


def _draw_images(images: np.ndarray, classes: np.ndarray | None) -> Figure:
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(0.8 * columns, 0.9 * rows), layout="constrained")
    for panel in np.atleast_1d(figure.subplots(rows, columns)).ravel():
        panel.set_axis_off()
    for i, (panel, image) in enumerate(zip(figure.axes, images, strict=False)):
        panel.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        if classes is not None:
            panel.set_title(f"{classes[i]:g}", fontsize="x-small", pad=1)
    return figure
