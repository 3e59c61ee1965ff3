"""Grids that are cut into windows: (grid, window, shift), with and without padding."""

GRIDS = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((6, 9), (2, 3), (1, 1)),
    ((7, 10), (4, 4), (2, 2)),
    ((5, 3), (4, 4), (0, 0)),
    ((3, 8), (3, 4), (0, 2)),
]


def offsets(window):
    """Rows of an offset table, T."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)
