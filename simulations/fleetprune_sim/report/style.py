"""Colours and shapes that tell methods and classes apart, also for the colour-blind."""

from typing import Any

PALETTE = (
    "#1A80BB",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C7853",
    "#7A7FD0",
)
"""Okabe and Ito's, without black and yellow, which one of the two colour schemes swallows, and with
a blue that is legible on dark too."""
GREY = "#858b94"
"""Legible on white and on near-black."""
SHADES = 0.04, 1.0
"""How strong a colour is for nothing and for all."""
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

CONFIG: dict[str, Any] = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": GREY,
        "titleColor": GREY,
        "domainColor": GREY,
        "tickColor": GREY,
        "gridColor": GREY,
        "gridOpacity": 0.22,
        "domainOpacity": 0.5,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelPadding": 4,
        "tickSize": 4,
    },
}
"""Of all charts."""

OUTLINES = {
    "circle": "M5,0A5,5,0,1,1,-5,0A5,5,0,1,1,5,0Z",
    "square": "M-4.4,-4.4H4.4V4.4H-4.4Z",
    "triangle-up": "M0,-5L5,4.2H-5Z",
    "diamond": "M0,-5.5L4.4,0L0,5.5L-4.4,0Z",
    "cross": "M-5,-1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",
    "triangle-down": "M0,5L5,-4.2H-5Z",
    "triangle-right": "M5,0L-4.2,5V-5Z",
    "triangle-left": "M-5,0L4.2,5V-5Z",
}
"""The shapes as SVG paths, for legends."""
