"""Pictures, by matplotlib: what was chosen, and what that costs and gains."""

from .index import plot_index, plot_kept
from .lines import plot_density, plot_pareto, plot_time
from .maps import plot_heads, plot_mass, plot_needles

__all__ = [
    "plot_density",
    "plot_heads",
    "plot_index",
    "plot_kept",
    "plot_mass",
    "plot_needles",
    "plot_pareto",
    "plot_time",
]
