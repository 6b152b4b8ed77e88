"""Tables of numbers on stdout."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: "Table") -> None:
    """Print a table as wide as it is: a number that is cut off is worse than a line that is too long."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    unlimited = console.options.update_width(10_000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)
